// Products of row-major matrices on the calling thread: C (rows x columns) = A (rows x inner) B (inner x columns).
//
// With accumulate, the product is added to C. bfloat16 factors have float products: by the library where the CPU has
// matrix tiles (AMX), else by the dot-product instruction, else widened. A block of C stays in registers and its right
// factor in the first-level cache; sums of a few hundred products are added to C, so that a long chain of calls keeps
// the accuracy of short ones.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef CPU_CAPABILITY_AVX512
#include <immintrin.h>
#endif

namespace ikem_fast::cpu::CPU_CAPABILITY {

namespace matrix_product_detail {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kRowBlock = 6;  // with four vectors a row they fill the registers
constexpr int kVectors = 4;
#else
constexpr int kRowBlock = 6;
constexpr int kVectors = 2;
#endif

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2) || defined(__aarch64__)
constexpr bool kHasVectors = true;
#else
constexpr bool kHasVectors = false;  // at::vec has arrays in their place, which stay in memory
#endif

// Calls block(number of rows as a constant, first row) for blocks of kRowBlock rows and the rest.
template <typename Block>
inline __attribute__((always_inline)) void for_row_blocks(int64_t rows, const Block& block) {
  int64_t i = 0;
  for (; i + kRowBlock <= rows; i += kRowBlock) {
    block(std::integral_constant<int, kRowBlock>{}, i);
  }
  static_assert(kRowBlock == 6);
  switch (rows - i) {
    case 1:
      return block(std::integral_constant<int, 1>{}, i);
    case 2:
      return block(std::integral_constant<int, 2>{}, i);
    case 3:
      return block(std::integral_constant<int, 3>{}, i);
    case 4:
      return block(std::integral_constant<int, 4>{}, i);
    case 5:
      return block(std::integral_constant<int, 5>{}, i);
    default:
      return;
  }
}

// The loops over registers are unrolled by demand: sums that are indexed at run time would live in memory.
template <typename T, int kRows, typename Left>
inline __attribute__((always_inline)) void multiply_block(int64_t inner, const Left* a, int64_t lda, const T* b,
                                                          int64_t ldb, T* c, int64_t ldc, int64_t columns,
                                                          bool accumulate) {
  using V = at::vec::Vectorized<T>;
  V sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[i][v] = V(T(0));
    }
  }
  for (int64_t k = 0; k < inner; ++k) {
    V right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      right[v] = V::loadu(b + k * ldb + v * V::size());
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const V left(static_cast<T>(a[i * lda + k]));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sums[i][v] = at::vec::fmadd(left, right[v], sums[i][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      T* out = c + i * ldc + v * V::size();
      const int64_t count = std::min<int64_t>(columns - v * V::size(), V::size());
      if (count == V::size()) {
        if (accumulate) {
          sums[i][v] = sums[i][v] + V::loadu(out);
        }
        sums[i][v].store(out);
      } else if (count > 0) {
        if (accumulate) {
          sums[i][v] = sums[i][v] + V::loadu(out, count);
        }
        sums[i][v].store(out, count);
      }
    }
  }
}

template <typename T>
inline void multiply_in_blocks(int64_t rows, int64_t columns, int64_t inner, const T* a, int64_t lda, const T* b,
                               int64_t ldb, T* c, int64_t ldc, bool accumulate) {
  constexpr int64_t kInner = 256;
  constexpr int64_t kWidth = kVectors * at::vec::Vectorized<T>::size();
  alignas(64) T rest[kInner * kWidth];  // the last columns, padded to whole vectors
  for (int64_t k = 0; k < inner; k += kInner) {
    const int64_t depth = std::min(kInner, inner - k);
    for (int64_t j = 0; j < columns; j += kWidth) {
      const int64_t width = std::min(kWidth, columns - j);
      const T* right = b + k * ldb + j;
      int64_t right_stride = ldb;
      if (width < kWidth) {
        for (int64_t p = 0; p < depth; ++p) {
          std::fill(std::copy_n(right + p * ldb, width, rest + p * kWidth), rest + (p + 1) * kWidth, T(0));
        }
        right = rest;
        right_stride = kWidth;
      }
      for_row_blocks(rows, [&](auto count, int64_t i) __attribute__((always_inline)) {
        multiply_block<T, decltype(count)::value>(depth, a + i * lda + k, lda, right, right_stride, c + i * ldc + j,
                                                  ldc, width, accumulate || k > 0);
      });
    }
  }
}

template <typename T>
inline void multiply_plainly(int64_t rows, int64_t columns, int64_t inner, const T* a, int64_t lda, const T* b,
                             int64_t ldb, T* c, int64_t ldc) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < inner; ++k) {
      for (int64_t j = 0; j < columns; ++j) {
        c[i * ldc + j] += a[i * lda + k] * b[k * ldb + j];
      }
    }
  }
}

}  // namespace matrix_product_detail

template <typename T, typename = std::enable_if_t<std::is_floating_point_v<T>>>
inline void multiply(int64_t rows, int64_t columns, int64_t inner, const T* a, int64_t lda, const T* b, int64_t ldb,
                     T* c, int64_t ldc, bool accumulate) {
  if (!accumulate && (inner == 0 || !matrix_product_detail::kHasVectors)) {
    for (int64_t i = 0; i < rows; ++i) {
      std::fill_n(c + i * ldc, columns, T(0));
    }
  }
  if constexpr (matrix_product_detail::kHasVectors) {
    matrix_product_detail::multiply_in_blocks(rows, columns, inner, a, lda, b, ldb, c, ldc, accumulate);
  } else {
    matrix_product_detail::multiply_plainly(rows, columns, inner, a, lda, b, ldb, c, ldc);
  }
}

// Rows become columns, for words of 4 or 8 bytes, whatever they mean: a pair of bfloat16 is a word too, so that a matrix
// (columns, inner) becomes the pairs of rows of a right factor (inner, columns) as (columns, inner / 2) words.
template <int kBytes>
inline void transpose_words(int64_t rows, int64_t columns, const void* from, int64_t ld_from, void* to, int64_t ld_to) {
  const auto* source = static_cast<const char*>(from);
  auto* target = static_cast<char*>(to);
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  constexpr int64_t kBlock = at::vec::Vectorized<float>::size();
#else
  constexpr int64_t kBlock = 8;
#endif
  for (int64_t i = 0; i < rows; i += kBlock) {
    for (int64_t j = 0; j < columns; j += kBlock) {
      const int64_t height = std::min(kBlock, rows - i), width = std::min(kBlock, columns - j);
      const char* block = source + (i * ld_from + j) * kBytes;
      char* transposed = target + (j * ld_to + i) * kBytes;
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
      if constexpr (kBytes == sizeof(float)) {
        if (height == kBlock && width == kBlock) {
          at::vec::transpose_mxn<float, kBlock, kBlock>(reinterpret_cast<const float*>(block), ld_from,
                                                        reinterpret_cast<float*>(transposed), ld_to);
          continue;
        }
      }
#endif
      for (int64_t column = 0; column < width; ++column) {
        for (int64_t row = 0; row < height; ++row) {
          std::memcpy(transposed + (column * ld_to + row) * kBytes, block + (row * ld_from + column) * kBytes, kBytes);
        }
      }
    }
  }
}

// A right factor of bfloat16 is read in pairs of rows, (ceil(inner / 2), columns, 2), an odd last row with zeros.
constexpr int64_t paired_rows(int64_t inner) { return (inner + 1) / 2 * 2; }

// Both numbers of a pair as one word; may stand where there are bfloat16.
typedef uint32_t __attribute__((may_alias)) PairBits;
typedef uint16_t __attribute__((may_alias)) NumberBits;

inline void pair_rows(int64_t inner, int64_t columns, const at::BFloat16* b, int64_t ldb, at::BFloat16* pairs) {
  for (int64_t k = 0; k < inner; k += 2) {
    const auto* first = reinterpret_cast<const NumberBits*>(b + k * ldb);
    const auto* second = first + ldb;
    auto* out = reinterpret_cast<PairBits*>(pairs + k * columns);
    if (k + 1 < inner) {
      for (int64_t j = 0; j < columns; ++j) {
        out[j] = first[j] | static_cast<uint32_t>(second[j]) << 16;
      }
    } else {
      for (int64_t j = 0; j < columns; ++j) {
        out[j] = first[j];
      }
    }
  }
}

namespace matrix_product_detail {

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

// For every CPU: both numbers of a pair, widened, are multiplied and added.
inline void multiply_pairs(int64_t rows, int64_t columns, int64_t pairs, const at::BFloat16* a, int64_t lda,
                           const at::BFloat16* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  if (!accumulate && (pairs == 0 || !kHasVectors)) {
    for (int64_t i = 0; i < rows; ++i) {
      std::fill_n(c + i * ldc, columns, 0.0f);
    }
  }
  if constexpr (kHasVectors) {
    constexpr int64_t kPairs = 128;
    constexpr int64_t kWidth = kVectors * at::vec::Vectorized<float>::size();
    alignas(64) float widened[2 * kPairs * kWidth];
    for (int64_t p = 0; p < pairs; p += kPairs) {
      const int64_t depth = std::min(kPairs, pairs - p);
      for (int64_t j = 0; j < columns; j += kWidth) {
        const int64_t width = std::min(kWidth, columns - j);
        for (int64_t q = 0; q < depth; ++q) {
          const at::BFloat16* from = b + 2 * ((p + q) * ldb + j);
          float* even = widened + 2 * q * kWidth;
          float* odd = even + kWidth;
          for (int64_t column = 0; column < width; ++column) {
            const uint32_t bits = load_pair(from + 2 * column);
            even[column] = widen(bits << 16);
            odd[column] = widen(bits & 0xffff0000u);
          }
          std::fill(even + width, odd, 0.0f);
          std::fill(odd + width, odd + kWidth, 0.0f);
        }
        for_row_blocks(rows, [&](auto count, int64_t i) __attribute__((always_inline)) {
          multiply_block<float, decltype(count)::value>(2 * depth, a + i * lda + 2 * p, lda, widened, kWidth,
                                                        c + i * ldc + j, ldc, width, accumulate || p > 0);
        });
      }
    }
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t p = 0; p < pairs; ++p) {
        const uint32_t left = load_pair(a + i * lda + 2 * p);
        const float even = widen(left << 16), odd = widen(left & 0xffff0000u);
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
template <int kRows>
__attribute__((target("avx512bf16"))) inline void multiply_pairs_block(int64_t pairs, const at::BFloat16* a,
                                                                       int64_t lda, const at::BFloat16* b,
                                                                       int64_t ldb, float* c, int64_t ldc,
                                                                       int64_t columns, bool accumulate) {
  __mmask16 masks[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int64_t left = std::clamp<int64_t>(columns - 16 * v, 0, 16);
    masks[v] = static_cast<__mmask16>((1u << left) - 1);
  }
  __m512 sums[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      sums[i][v] = _mm512_setzero_ps();
    }
  }
  const auto run = [&](auto load) __attribute__((target("avx512bf16"), always_inline)) {
    for (int64_t p = 0; p < pairs; ++p) {
      __m512bh right[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        right[v] = reinterpret_cast<__m512bh>(load(v, b + 2 * (p * ldb + 16 * v)));
      }
      for (int i = 0; i < kRows; ++i) {
        const auto left = reinterpret_cast<__m512bh>(
            _mm512_set1_epi32(static_cast<int32_t>(load_pair(a + i * lda + 2 * p))));
        for (int v = 0; v < kVectors; ++v) {
          sums[i][v] = _mm512_dpbf16_ps(sums[i][v], left, right[v]);
        }
      }
    }
  };
  if (columns >= 16 * kVectors) {
    run([](int, const at::BFloat16* from) __attribute__((always_inline)) { return _mm512_loadu_si512(from); });
  } else {
    run([&](int v, const at::BFloat16* from) __attribute__((always_inline)) {
      return _mm512_maskz_loadu_epi32(masks[v], from);
    });
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      float* out = c + i * ldc + 16 * v;
      if (accumulate) {
        sums[i][v] = _mm512_add_ps(sums[i][v], _mm512_maskz_loadu_ps(masks[v], out));
      }
      _mm512_mask_storeu_ps(out, masks[v], sums[i][v]);
    }
  }
}

__attribute__((target("avx512bf16"))) inline void multiply_pairs_in_hardware(
    int64_t rows, int64_t columns, int64_t pairs, const at::BFloat16* a, int64_t lda, const at::BFloat16* b,
    int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  constexpr int64_t kPairBlock = 128;  // pairs of rows of B that stay in the first-level cache
  for (int64_t p = 0; p < pairs; p += kPairBlock) {
    const int64_t count = std::min(kPairBlock, pairs - p);
    const bool add = accumulate || p > 0;
    for (int64_t j = 0; j < columns; j += 16 * kVectors) {
      const at::BFloat16* right = b + 2 * (p * ldb + j);
      for_row_blocks(rows, [&](auto number, int64_t i) __attribute__((target("avx512bf16"))) {
        multiply_pairs_block<decltype(number)::value>(count, a + i * lda + 2 * p, lda, right, ldb, c + i * ldc + j,
                                                      ldc, columns - j, add);
      });
    }
  }
}

inline bool has_bfloat16_arithmetic() {
  static const bool found = __builtin_cpu_supports("avx512bf16");
  return found;
}

__attribute__((target("avx512bf16"))) inline int64_t round_pairs_of_vectors(int64_t count, const float* from,
                                                                            at::BFloat16* to) {
  int64_t j = 0;
  for (; j + 32 <= count; j += 32) {
    const auto rounded = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + j + 16), _mm512_loadu_ps(from + j));
    _mm512_storeu_si512(to + j, reinterpret_cast<__m512i>(rounded));
  }
  return j;
}
#endif

}  // namespace matrix_product_detail

// Float numbers rounded to nearest even; those below 1e-38 may become zero.
inline void round_numbers(int64_t count, const float* from, at::BFloat16* to) {
  using V = at::vec::Vectorized<float>;
  constexpr int64_t kStep = 2 * V::size();
  int64_t j = 0;
#ifdef CPU_CAPABILITY_AVX512
  if (matrix_product_detail::has_bfloat16_arithmetic()) {
    j = matrix_product_detail::round_pairs_of_vectors(count, from, to);
  }
#endif
  for (; j + kStep <= count; j += kStep) {
    at::vec::convert_from_float<at::BFloat16>(V::loadu(from + j), V::loadu(from + j + V::size())).store(to + j);
  }
  for (; j < count; ++j) {
    to[j] = at::BFloat16(from[j]);
  }
}

// b in pairs of rows, ldb of them apart. With an odd inner size, a must hold a zero behind each row.
inline void multiply(int64_t rows, int64_t columns, int64_t inner, const at::BFloat16* a, int64_t lda,
                     const at::BFloat16* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  if (rows <= 0 || columns <= 0) {
    return;
  }
  const int64_t pairs = paired_rows(inner) / 2;
  if (pairs > 0 && at::native::cpublas::could_pack(at::kBFloat16)) {
    at::native::cpublas::brgemm(rows, columns, 2 * pairs, lda, ldb, ldc, accumulate, a, b, c, /*is_vnni=*/true);
    return;
  }
#ifdef CPU_CAPABILITY_AVX512
  if (pairs > 0 && matrix_product_detail::has_bfloat16_arithmetic()) {
    matrix_product_detail::multiply_pairs_in_hardware(rows, columns, pairs, a, lda, b, ldb, c, ldc, accumulate);
    return;
  }
#endif
  matrix_product_detail::multiply_pairs(rows, columns, pairs, a, lda, b, ldb, c, ldc, accumulate);
}

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
