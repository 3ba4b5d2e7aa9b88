// Products of row-major matrices on the calling thread: C (rows x columns) = A (rows x inner) B (inner x columns).
//
// With accumulate, the product is added to C. bfloat16 factors have float products: by the library where the CPU has
// matrix tiles (AMX), else by the dot-product instruction, else widened. A block of C stays in registers, of a shape
// that suits the number of columns, and its right factor in the first-level cache; sums of a few hundred products are
// added to C, so that a long chain of calls keeps the accuracy of short ones. A right factor whose rows are as long as
// it is used, at most 64 numbers, is read fastest.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef CPU_CAPABILITY_AVX512
#include <immintrin.h>
#endif

namespace ikem_fast::cpu::CPU_CAPABILITY {

void multiply(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t lda, const float* b, int64_t ldb,
              float* c, int64_t ldc, bool accumulate);
void multiply(int64_t rows, int64_t columns, int64_t inner, const double* a, int64_t lda, const double* b, int64_t ldb,
              double* c, int64_t ldc, bool accumulate);
// b in pairs of rows, ldb of them apart (pair_rows). With an odd inner size, a must hold a zero behind each row.
void multiply(int64_t rows, int64_t columns, int64_t inner, const at::BFloat16* a, int64_t lda, const at::BFloat16* b,
              int64_t ldb, float* c, int64_t ldc, bool accumulate);

// The same with the left factor given as its transpose (inner x rows); of bfloat16 in pairs of rows, too.
void multiply_transposed(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t lda, const float* b,
                         int64_t ldb, float* c, int64_t ldc, bool accumulate);
void multiply_transposed(int64_t rows, int64_t columns, int64_t inner, const double* a, int64_t lda, const double* b,
                         int64_t ldb, double* c, int64_t ldc, bool accumulate);
void multiply_transposed(int64_t rows, int64_t columns, int64_t inner, const at::BFloat16* a, int64_t lda,
                         const at::BFloat16* b, int64_t ldb, float* c, int64_t ldc, bool accumulate);

// Whether this instruction set multiplies bfloat16 faster than float.
bool has_bfloat16_products();

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

#ifdef CPU_CAPABILITY_AVX512
namespace matrix_product_detail {

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

}  // namespace matrix_product_detail
#endif

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

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
