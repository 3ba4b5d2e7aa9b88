// Values of memory as registers of the numbers they are computed in: float for float and bfloat16, double for double.
// Include it only in sources of csrc/cpu.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <type_traits>

namespace ikem_fast::cpu::CPU_CAPABILITY {

template <typename T>
using Widened = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
using WidenedVector = at::vec::Vectorized<Widened<T>>;

template <typename T>
inline WidenedVector<T> load_widened(const T* from) {
  if constexpr (!std::is_same_v<T, at::BFloat16>) {
    return WidenedVector<T>::loadu(from);
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
#elif defined(CPU_CAPABILITY_AVX2)
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16));
#else
    float values[WidenedVector<T>::size()];
    for (int i = 0; i < WidenedVector<T>::size(); ++i) values[i] = static_cast<float>(from[i]);
    return WidenedVector<T>::loadu(values);
#endif
  }
}

// Whether this CPU rounds to bfloat16 in one instruction.
inline bool rounds_in_hardware() {
#ifdef CPU_CAPABILITY_AVX512
  static const bool found = __builtin_cpu_supports("avx512bf16");
  return found;
#else
  return false;
#endif
}

// bfloat16 is rounded to nearest even. kInHardware needs rounds_in_hardware(), and makes zeros of what is below 1e-38.
template <typename T, bool kInHardware = false>
inline void store_narrowed(const WidenedVector<T>& values, T* to) {
  if constexpr (!std::is_same_v<T, at::BFloat16>) {
    values.store(to);
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    __m256i rounded;
    if constexpr (kInHardware) {
      // No intrinsic: this code is compiled for CPUs without the instruction, too.
      asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(__m512(values)));
    } else {
      rounded = at::vec::cvtfp32_bf16(__m512(values));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
#elif defined(CPU_CAPABILITY_AVX2)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), at::vec::cvtfp32_bf16(__m256(values)));
#else
    float numbers[WidenedVector<T>::size()];
    values.store(numbers);
    for (int i = 0; i < WidenedVector<T>::size(); ++i) to[i] = at::BFloat16(numbers[i]);
#endif
  }
}

// The first `count` values; zeros after them.
template <typename T>
inline WidenedVector<T> load_widened(const T* from, int64_t count) {
  T values[WidenedVector<T>::size()] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = from[i];
  return load_widened(values);
}

template <typename T, bool kInHardware = false>
inline void store_narrowed(const WidenedVector<T>& values, T* to, int64_t count) {
  T numbers[WidenedVector<T>::size()];
  store_narrowed<T, kInHardware>(values, numbers);
  for (int64_t i = 0; i < count; ++i) to[i] = numbers[i];
}

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
