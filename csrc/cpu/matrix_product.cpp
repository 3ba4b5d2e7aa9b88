#include "cpu/matrix_product.h"

#include <type_traits>
#include <utility>

#include "cpu/vector_register.h"

namespace ikem_fast::cpu::CPU_CAPABILITY {

namespace {

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2) || defined(__aarch64__)
constexpr bool kHasVectors = true;
#else
constexpr bool kHasVectors = false;  // at::vec has arrays in their place, which stay in memory
#endif

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kMostVectors = 4;
#else
constexpr int kMostVectors = 2;
#endif

// Rows of a block that is so many vectors wide: with them it fills the registers, but for what is multiplied.
constexpr int block_rows(int vectors) { return 6 * kMostVectors / vectors; }

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline float widen(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t load_pair(const at::BFloat16* pair) {
  uint32_t bits;
  std::memcpy(&bits, pair, sizeof(bits));
  return bits;
}

// For pairs of bfloat16 the pointer has another type than what is there.
template <typename T>
inline __attribute__((always_inline)) T load_number(const T* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

// Left factors. A cursor over some rows of one goes along the inner index: at(i) is its number in row i, or both numbers
// of a pair as a word.

// Rows that are so far apart take an address each, more than there are registers: five of them share a base. Where the
// compiler knew how bases hang together it would compute them all from one.
template <typename T, int kRows>
class RowsCursor {
 public:
  RowsCursor(const T* data, int64_t stride) : stride_(stride), three_strides_(3 * stride) {
    for (int g = 0; g < kBases; ++g) {
      bases_[g] = data + 5 * g * stride;
      hide(bases_[g]);
    }
    hide(three_strides_);
  }
  inline __attribute__((always_inline)) T at(int i) const {
    const T* base = bases_[i / 5];
    switch (i % 5) {
      case 0:
        return load_number(base);
      case 1:
        return load_number(base + stride_);
      case 2:
        return load_number(base + 2 * stride_);
      case 3:
        return load_number(base + three_strides_);
      default:
        return load_number(base + 4 * stride_);
    }
  }
  inline __attribute__((always_inline)) void advance() {
#pragma GCC unroll 8
    for (int g = 0; g < kBases; ++g) {
      ++bases_[g];
      hide(bases_[g]);
    }
  }

 private:
  static constexpr int kBases = (kRows + 4) / 5;
  template <typename Value>
  static inline __attribute__((always_inline)) void hide(Value& value) {
    asm("" : "+r"(value));
  }
  const T* bases_[kBases];
  int64_t stride_, three_strides_;
};

template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  T at(int64_t i, int64_t k) const { return data[i * stride + k]; }
  Rows from(int64_t i, int64_t k) const { return {data + i * stride + k, stride}; }
  template <int kRows>
  RowsCursor<T, kRows> cursor() const {
    return {data, stride};
  }
};

template <typename T>
struct ColumnsCursor {
  const T* data;
  int64_t stride;
  T at(int i) const { return load_number(data + i); }
  void advance() { data += stride; }
};

template <typename T>
struct Columns {
  const T* data;
  int64_t stride;
  T at(int64_t i, int64_t k) const { return data[k * stride + i]; }
  Columns from(int64_t i, int64_t k) const { return {data + k * stride + i, stride}; }
  template <int kRows>
  ColumnsCursor<T> cursor() const {
    return {data, stride};
  }
};

struct WidenedColumnsCursor {
  const at::BFloat16* data;
  int64_t stride;  // in pairs
  int odd = 0;
  float at(int i) const { return data[2 * i + odd]; }
  void advance() {
    data += odd ? 2 * stride : 0;
    odd = 1 - odd;
  }
};

// bfloat16 in pairs along the inner index, read as words or widened.
struct PairsInRows {
  const at::BFloat16* data;
  int64_t stride;
  Rows<uint32_t> pairs() const { return {reinterpret_cast<const uint32_t*>(data), stride / 2}; }
  float at(int64_t i, int64_t k) const { return data[i * stride + k]; }
  PairsInRows from(int64_t i, int64_t k) const { return {data + i * stride + k, stride}; }
  template <int kRows>
  RowsCursor<at::BFloat16, kRows> cursor() const {
    return {data, stride};
  }
};

struct PairsInColumns {
  const at::BFloat16* data;
  int64_t stride;  // in pairs
  Columns<uint32_t> pairs() const { return {reinterpret_cast<const uint32_t*>(data), stride}; }
  float at(int64_t i, int64_t k) const { return data[2 * (k / 2 * stride + i) + k % 2]; }
  PairsInColumns from(int64_t i, int64_t k) const { return {data + 2 * (k / 2 * stride + i), stride}; }  // k even
  template <int kRows>
  WidenedColumnsCursor cursor() const {
    return {data, stride};
  }
};

// Calls block(number of rows as a constant, first row) for blocks as equal as can be, of at most kMost rows.
template <int kMost, int... kCounts, typename Block>
inline __attribute__((always_inline)) void for_row_blocks(int64_t rows, const Block& block,
                                                          std::integer_sequence<int, kCounts...>) {
  const int64_t blocks = divide_up(rows, kMost);
  for (int64_t done = 0, i = 0; done < blocks; ++done) {
    const int64_t count = rows / blocks + (done < rows % blocks ? 1 : 0);
    ((count == kCounts + 1 ? block(std::integral_constant<int, kCounts + 1>{}, i) : void()), ...);
    i += count;
  }
}

// Calls run(number of vectors as a constant, first column) for panels of columns.
template <typename T, typename Run>
inline __attribute__((always_inline)) void for_column_panels(int64_t columns, const Run& run) {
  constexpr int64_t kLength = at::vec::Vectorized<T>::size();
  int64_t j = 0;
  if constexpr (std::is_same_v<T, float>) {
    for (; columns - j > (kMostVectors - 1) * kLength; j += kMostVectors * kLength) {
      run(std::integral_constant<int, kMostVectors>{}, j);
    }
    if constexpr (kMostVectors == 4) {
      if (columns - j > 2 * kLength) {
        return run(std::integral_constant<int, 3>{}, j);
      }
      if (columns - j > kLength) {
        return run(std::integral_constant<int, 2>{}, j);
      }
    }
    if (columns > j) {
      run(std::integral_constant<int, 1>{}, j);
    }
  } else {
    for (; j < columns; j += kMostVectors * kLength) {
      run(std::integral_constant<int, kMostVectors>{}, j);
    }
  }
}

// The loops over registers are unrolled by demand: sums that are indexed at run time would live in memory. A function of
// its own, since the compiler spreads the registers of all blocks together over one.
template <typename T, int kRows, int kVectors, typename Left>
__attribute__((noinline)) void multiply_block(int64_t inner, const Left& left_factor, const T* b, int64_t ldb, T* c,
                                              int64_t ldc, int64_t columns, bool accumulate) {
  using V = at::vec::Vectorized<T>;
  auto a = left_factor.template cursor<kRows>();
  typename VectorRegister<T>::Type sums[kRows][kVectors];
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[i][v] = V(T(0));
    }
  }
  for (int64_t k = 0; k < inner; ++k) {
    typename VectorRegister<T>::Type right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      right[v] = V::loadu(b + k * ldb + v * V::size());
    }
#pragma GCC unroll 24
    for (int i = 0; i < kRows; ++i) {
      const V left(static_cast<T>(a.at(i)));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sums[i][v] = at::vec::fmadd(left, V(right[v]), V(sums[i][v]));
      }
    }
    a.advance();
  }
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      T* out = c + i * ldc + v * V::size();
      const int64_t count = std::min<int64_t>(columns - v * V::size(), V::size());
      if (count == V::size()) {
        (accumulate ? V(sums[i][v]) + V::loadu(out) : V(sums[i][v])).store(out);
      } else if (count > 0) {
        (accumulate ? V(sums[i][v]) + V::loadu(out, count) : V(sums[i][v])).store(out, count);
      }
    }
  }
}

// copy_rows(k, depth, j, width, to, stride) writes a part of the right factor, and zeros behind its rows. It is asked
// for always, or only for the last columns, where they are no whole vectors.
template <typename T, bool kAlwaysCopies, typename Left, typename CopyRows>
inline void multiply_in_blocks(int64_t rows, int64_t columns, int64_t inner, const Left& a, const T* b, int64_t ldb,
                               T* c, int64_t ldc, bool accumulate, const CopyRows& copy_rows) {
  constexpr int64_t kInner = 256;
  constexpr int64_t kLength = at::vec::Vectorized<T>::size();
  alignas(64) T copied[kInner * kMostVectors * kLength];
  for (int64_t k = 0; k < inner; k += kInner) {
    const int64_t depth = std::min(kInner, inner - k);
    for_column_panels<T>(columns, [&](auto vectors, int64_t j) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(vectors)::value;
      constexpr int kMost = block_rows(kVectors);
      const int64_t width = std::min(kVectors * kLength, columns - j);
      const T* right = kAlwaysCopies ? nullptr : b + k * ldb + j;
      int64_t right_stride = ldb;
      if (kAlwaysCopies || width < kVectors * kLength) {
        copy_rows(k, depth, j, width, copied, kVectors * kLength);
        right = copied;
        right_stride = kVectors * kLength;
      }
      for_row_blocks<kMost>(
          rows,
          [&](auto count, int64_t i) __attribute__((always_inline)) {
            constexpr int kRows = decltype(count)::value;
            multiply_block<T, kRows, kVectors>(depth, a.from(i, k), right, right_stride,
                                               c + i * ldc + j, ldc, width, accumulate || k > 0);
          },
          std::make_integer_sequence<int, kMost>{});
    });
  }
}

template <typename T>
void clear(int64_t rows, int64_t columns, T* c, int64_t ldc) {
  for (int64_t i = 0; i < rows; ++i) {
    std::fill_n(c + i * ldc, columns, T(0));
  }
}

template <typename T, typename Left>
void multiply_real(int64_t rows, int64_t columns, int64_t inner, const Left& a, const T* b, int64_t ldb, T* c,
                   int64_t ldc, bool accumulate) {
  if (!accumulate && (inner == 0 || !kHasVectors)) {
    clear(rows, columns, c, ldc);
  }
  if constexpr (kHasVectors) {
    const auto copy_rows = [&](int64_t k, int64_t depth, int64_t j, int64_t width, T* to, int64_t stride) {
      for (int64_t p = 0; p < depth; ++p) {
        std::fill(std::copy_n(b + (k + p) * ldb + j, width, to + p * stride), to + (p + 1) * stride, T(0));
      }
    };
    multiply_in_blocks<T, false>(rows, columns, inner, a, b, ldb, c, ldc, accumulate, copy_rows);
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < inner; ++k) {
        const T left = a.at(i, k);
        for (int64_t j = 0; j < columns; ++j) {
          c[i * ldc + j] += left * b[k * ldb + j];
        }
      }
    }
  }
}

// For every CPU: both numbers of a pair, widened, are multiplied and added.
template <typename Left>
void multiply_widened(int64_t rows, int64_t columns, int64_t pairs, const Left& a, const at::BFloat16* b, int64_t ldb,
                      float* c, int64_t ldc, bool accumulate) {
  if (!accumulate && (pairs == 0 || !kHasVectors)) {
    clear(rows, columns, c, ldc);
  }
  if constexpr (kHasVectors) {
    const auto copy_rows = [&](int64_t k, int64_t depth, int64_t j, int64_t width, float* to, int64_t stride) {
      for (int64_t p = 0; p < depth / 2; ++p) {
        const at::BFloat16* from = b + 2 * ((k / 2 + p) * ldb + j);
        float* even = to + 2 * p * stride;
        float* odd = even + stride;
        for (int64_t column = 0; column < width; ++column) {
          const uint32_t bits = load_pair(from + 2 * column);
          even[column] = widen(bits << 16);
          odd[column] = widen(bits & 0xffff0000u);
        }
        std::fill(even + width, odd, 0.0f);
        std::fill(odd + width, odd + stride, 0.0f);
      }
    };
    multiply_in_blocks<float, true>(rows, columns, 2 * pairs, a, nullptr, 0, c, ldc, accumulate, copy_rows);
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t p = 0; p < pairs; ++p) {
        const float even = a.at(i, 2 * p), odd = a.at(i, 2 * p + 1);
        const at::BFloat16* right = b + 2 * p * ldb;
        for (int64_t j = 0; j < columns; ++j) {
          const uint32_t bits = load_pair(right + 2 * j);
          c[i * ldc + j] += even * widen(bits << 16) + odd * widen(bits & 0xffff0000u);
        }
      }
    }
  }
}

#ifdef CPU_CAPABILITY_AVX512
template <int kRows, int kVectors, typename Left>
__attribute__((noinline, target("avx512bf16"))) void multiply_pairs_block(int64_t pairs, const Left& left_factor,
                                                                       const at::BFloat16* b, int64_t ldb, float* c,
                                                                       int64_t ldc, int64_t columns,
                                                                       bool accumulate) {
  auto a = left_factor.template cursor<kRows>();
  const auto last = static_cast<__mmask16>((1u << std::min<int64_t>(columns - 16 * (kVectors - 1), 16)) - 1);
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[i][v] = _mm512_setzero_ps();
    }
  }
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const at::BFloat16* from = b + 2 * (p * ldb + 16 * v);
      right[v] = reinterpret_cast<__m512bh>(v + 1 < kVectors ? _mm512_loadu_si512(from)
                                                             : _mm512_maskz_loadu_epi32(last, from));
    }
#pragma GCC unroll 24
    for (int i = 0; i < kRows; ++i) {
      const auto left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int32_t>(a.at(i))));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sums[i][v] = _mm512_dpbf16_ps(sums[i][v], left, right[v]);
      }
    }
    a.advance();
  }
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* out = c + i * ldc + 16 * v;
      const auto mask = static_cast<__mmask16>(v + 1 < kVectors ? 0xffff : last);
      if (accumulate) {
        sums[i][v] = _mm512_add_ps(sums[i][v], _mm512_maskz_loadu_ps(mask, out));
      }
      _mm512_mask_storeu_ps(out, mask, sums[i][v]);
    }
  }
}

template <typename Left>
__attribute__((target("avx512bf16"))) void multiply_pairs_in_hardware(int64_t rows, int64_t columns, int64_t pairs,
                                                                      const Left& a, const at::BFloat16* b,
                                                                      int64_t ldb, float* c, int64_t ldc,
                                                                      bool accumulate) {
  constexpr int64_t kPairBlock = 128;  // pairs of rows of B that stay in the first-level cache
  for (int64_t p = 0; p < pairs; p += kPairBlock) {
    const int64_t count = std::min(kPairBlock, pairs - p);
    const bool add = accumulate || p > 0;
    for_column_panels<float>(columns, [&](auto vectors, int64_t j) __attribute__((target("avx512bf16"))) {
      constexpr int kVectors = decltype(vectors)::value;
      constexpr int kMost = block_rows(kVectors);
      for_row_blocks<kMost>(
          rows,
          [&](auto number, int64_t i) __attribute__((target("avx512bf16"))) {
            constexpr int kRows = decltype(number)::value;
            multiply_pairs_block<kRows, kVectors>(count, a.from(i, p), b + 2 * (p * ldb + j), ldb,
                                                  c + i * ldc + j, ldc, columns - j, add);
          },
          std::make_integer_sequence<int, kMost>{});
    });
  }
}
#endif

template <typename Left>
void multiply_pairs(int64_t rows, int64_t columns, int64_t inner, const Left& a, const at::BFloat16* b, int64_t ldb,
                    float* c, int64_t ldc, bool accumulate) {
  const int64_t pairs = paired_rows(inner) / 2;
#ifdef CPU_CAPABILITY_AVX512
  if (pairs > 0 && matrix_product_detail::has_bfloat16_arithmetic()) {
    multiply_pairs_in_hardware(rows, columns, pairs, a.pairs(), b, ldb, c, ldc, accumulate);
    return;
  }
#endif
  multiply_widened(rows, columns, pairs, a, b, ldb, c, ldc, accumulate);
}

}  // namespace

void multiply(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t lda, const float* b, int64_t ldb,
              float* c, int64_t ldc, bool accumulate) {
  multiply_real<float>(rows, columns, inner, Rows<float>{a, lda}, b, ldb, c, ldc, accumulate);
}

void multiply(int64_t rows, int64_t columns, int64_t inner, const double* a, int64_t lda, const double* b, int64_t ldb,
              double* c, int64_t ldc, bool accumulate) {
  multiply_real<double>(rows, columns, inner, Rows<double>{a, lda}, b, ldb, c, ldc, accumulate);
}

void multiply(int64_t rows, int64_t columns, int64_t inner, const at::BFloat16* a, int64_t lda, const at::BFloat16* b,
              int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  if (rows <= 0 || columns <= 0) {
    return;
  }
  const int64_t pairs = paired_rows(inner) / 2;
  if (pairs > 0 && at::native::cpublas::could_pack(at::kBFloat16)) {
    at::native::cpublas::brgemm(rows, columns, 2 * pairs, lda, ldb, ldc, accumulate, a, b, c, /*is_vnni=*/true);
    return;
  }
  multiply_pairs(rows, columns, inner, PairsInRows{a, lda}, b, ldb, c, ldc, accumulate);
}

void multiply_transposed(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t lda, const float* b,
                         int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  multiply_real<float>(rows, columns, inner, Columns<float>{a, lda}, b, ldb, c, ldc, accumulate);
}

void multiply_transposed(int64_t rows, int64_t columns, int64_t inner, const double* a, int64_t lda, const double* b,
                         int64_t ldb, double* c, int64_t ldc, bool accumulate) {
  multiply_real<double>(rows, columns, inner, Columns<double>{a, lda}, b, ldb, c, ldc, accumulate);
}

void multiply_transposed(int64_t rows, int64_t columns, int64_t inner, const at::BFloat16* a, int64_t lda,
                         const at::BFloat16* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  multiply_pairs(rows, columns, inner, PairsInColumns{a, lda}, b, ldb, c, ldc, accumulate);
}

bool has_bfloat16_products() {
#ifdef CPU_CAPABILITY_AVX512
  return matrix_product_detail::has_bfloat16_arithmetic();
#else
  return false;
#endif
}

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
