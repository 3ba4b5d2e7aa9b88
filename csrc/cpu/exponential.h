// Exponentials for sums of them, a register at a time. Include it only in sources of csrc/cpu.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

namespace ikem_fast::cpu::CPU_CAPABILITY {

// 2^x for x below 127, within 2 units in the last place; below -126 it stays at 2^-126, the smallest normal number,
// which is one operation less where there are no such x.
template <bool kCanBeBelow = true>
inline __attribute__((always_inline)) at::vec::Vectorized<float> power_of_two(const at::vec::Vectorized<float>& x) {
  using V = at::vec::Vectorized<float>;
  const V clamped = kCanBeBelow ? at::vec::clamp_min(x, V(-126.0f)) : x;
  // Adding this rounds to whole numbers, which then stand in the lowest bits.
  const V shift(12582912.0f);
  const V shifted = clamped + shift;
  const V fraction = clamped - (shifted - shift);
  // 2^f for f in [-1/2, 1/2], fitted to the least largest relative error (9e-8).
  V series(0.001326472731307149f);
  for (float coefficient :
       {0.009671512991189957f, 0.05550733581185341f, 0.24022242426872253f, 0.6931470036506653f, 1.0f}) {
    series = at::vec::fmadd(series, fraction, V(coefficient));
  }
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(series),
                                              _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(series),
                                              _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
#else
  float values[V::size()], exponents[V::size()];
  series.store(values);
  shifted.store(exponents);
  for (int i = 0; i < V::size(); ++i) {
    values[i] = std::bit_cast<float>(std::bit_cast<uint32_t>(values[i]) + (std::bit_cast<uint32_t>(exponents[i]) << 23));
  }
  return V::loadu(values);
#endif
}

// The same in double, not below 2^-1022.
template <bool kCanBeBelow = true>
inline at::vec::Vectorized<double> power_of_two(const at::vec::Vectorized<double>& x) {
  using V = at::vec::Vectorized<double>;
  return at::vec::clamp_min(x, V(-1022.0)).exp2();
}

// exp(x) for x up to 0, within 2 units in the last place; NaN stays NaN, which power_of_two does not promise. Below -87 it is exp(-87) = 1.6e-38 (float) rather than less, which
// beside exp(0) is nothing.
template <typename T>
inline at::vec::Vectorized<T> exponential(const at::vec::Vectorized<T>& x) {
  using V = at::vec::Vectorized<T>;
  if constexpr (std::is_same_v<T, float>) {
    using I = at::vec::Vectorized<int32_t>;
    // exp(x) = 2^n exp(r), n whole, |r| <= log(2) / 2. Adding the shift leaves n + 127 in the last bits of a float.
    constexpr float kShift = 12582912.0f + 127.0f;  // 1.5 * 2^23
    const V y = at::vec::clamp_min(x, V(-87.0f));
    const V shifted = at::vec::fmadd(y, V(1.44269504f), V(kShift));
    // The first part of log(2) is so short that its product with n is exact.
    const V minus_n = V(kShift) - shifted;
    const V r = at::vec::fmadd(minus_n, V(-2.12194440e-4f), at::vec::fmadd(minus_n, V(0.693359375f), y));
    // exp(r) as a polynomial fitted to the least largest relative error (2e-9).
    V series(0.00138368458f);
    for (float coefficient : {0.00837481581f, 0.0416682251f, 0.166664198f, 0.499999911f, 1.0f, 1.0f}) {
      series = at::vec::fmadd(series, r, V(coefficient));
    }
    const V power = at::vec::cast<float>(at::vec::cast<int32_t>(shifted) << I(23));
    return series * power;
  } else {
    return x.exp();
  }
}

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
