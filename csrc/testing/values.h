// TEST-ONLY: numbers of kernels' types as plain ones, and the other way.
#pragma once

#include "cuda/kernel.h"

template <typename T>
double exact(T value) {
  if constexpr (sizeof(T) == 2) {
    return __bfloat162float(value);
  } else {
    return value;
  }
}

template <typename T>
T rounded(double value) {
  if constexpr (sizeof(T) == 2) {
    return __float2bfloat16_rn(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}
