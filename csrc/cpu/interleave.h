// Vectors from planes of coordinates to x y z x y z ..., one register at a time. Include it only in sources of csrc/cpu.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include "cpu/vectorized_real.h"

namespace ikem_fast::cpu::CPU_CAPABILITY {

namespace {

// out[3 i + c] = coordinate c of lane i, for all lanes of a register.
template <typename T>
inline void store_interleaved(const math::Vector3<at::vec::Vectorized<T>>& vectors, T* out) {
  constexpr int64_t kWidth = at::vec::Vectorized<T>::size();
  T x[kWidth], y[kWidth], z[kWidth];
  vectors.x.store(x);
  vectors.y.store(y);
  vectors.z.store(z);
  for (int64_t i = 0; i < kWidth; ++i) {
    out[3 * i] = x[i];
    out[3 * i + 1] = y[i];
    out[3 * i + 2] = z[i];
  }
}

// Value k of the result is lane k / 3 of coordinate k % 3, here for the three registers of the result.
#ifdef CPU_CAPABILITY_AVX512
template <>
inline void store_interleaved<float>(const math::Vector3<at::vec::Vectorized<float>>& vectors, float* out) {
  // A source of 16 or more is a lane of y. Where z belongs, the first shuffle leaves anything.
  const __m512i first = _mm512_setr_epi32(0, 16, 0, 1, 17, 0, 2, 18, 0, 3, 19, 0, 4, 20, 0, 5);
  const __m512i second = _mm512_setr_epi32(21, 0, 6, 22, 0, 7, 23, 0, 8, 24, 0, 9, 25, 0, 10, 26);
  const __m512i third = _mm512_setr_epi32(0, 11, 27, 0, 12, 28, 0, 13, 29, 0, 14, 30, 0, 15, 31, 0);
  const __m512i first_z = _mm512_setr_epi32(0, 0, 0, 0, 0, 1, 0, 0, 2, 0, 0, 3, 0, 0, 4, 0);
  const __m512i second_z = _mm512_setr_epi32(0, 5, 0, 0, 6, 0, 0, 7, 0, 0, 8, 0, 0, 9, 0, 0);
  const __m512i third_z = _mm512_setr_epi32(10, 0, 0, 11, 0, 0, 12, 0, 0, 13, 0, 0, 14, 0, 0, 15);
  const __m512 x = vectors.x, y = vectors.y, z = vectors.z;
  const auto shuffle = [&](__m512i xy, __mmask16 is_z, __m512i from_z) {
    return _mm512_mask_permutexvar_ps(_mm512_permutex2var_ps(x, xy, y), is_z, from_z, z);
  };
  _mm512_storeu_ps(out, shuffle(first, 0x4924, first_z));
  _mm512_storeu_ps(out + 16, shuffle(second, 0x2492, second_z));
  _mm512_storeu_ps(out + 32, shuffle(third, 0x9249, third_z));
}
#elif defined(CPU_CAPABILITY_AVX2)
template <>
inline void store_interleaved<float>(const math::Vector3<at::vec::Vectorized<float>>& vectors, float* out) {
  const __m256 x = _mm256_permutevar8x32_ps(vectors.x, _mm256_setr_epi32(0, 3, 6, 1, 4, 7, 2, 5));
  const __m256 y = _mm256_permutevar8x32_ps(vectors.y, _mm256_setr_epi32(5, 0, 3, 6, 1, 4, 7, 2));
  const __m256 z = _mm256_permutevar8x32_ps(vectors.z, _mm256_setr_epi32(2, 5, 0, 3, 6, 1, 4, 7));
  // Each permuted register holds its lanes where they go in one of the three results.
  _mm256_storeu_ps(out, _mm256_blend_ps(_mm256_blend_ps(x, y, 0x92), z, 0x24));
  _mm256_storeu_ps(out + 8, _mm256_blend_ps(_mm256_blend_ps(x, y, 0x24), z, 0x49));
  _mm256_storeu_ps(out + 16, _mm256_blend_ps(_mm256_blend_ps(x, y, 0x49), z, 0x92));
}
#endif

}  // namespace

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
