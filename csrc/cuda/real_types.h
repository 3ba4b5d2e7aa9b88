// Numbers of tensors in kernels: their width, conversions, and four of them at once.
#pragma once

#include <type_traits>

#include "cuda/kernel.h"

namespace ikem_fast::cuda {

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// float for float and bfloat16, double for double.
template <typename T>
using Widened = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Rounds to nearest even.
template <typename T, typename Value>
__device__ __forceinline__ T narrow(Value value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

// Four values side by side, aligned to all four.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T values[4];
};

template <typename T>
__device__ __forceinline__ void store_four(T* to, const float (&values)[4]) {
  Four<T> four;
#pragma unroll
  for (int k = 0; k < 4; ++k) four.values[k] = narrow<T>(values[k]);
  *reinterpret_cast<Four<T>*>(to) = four;
}

}  // namespace ikem_fast::cuda
