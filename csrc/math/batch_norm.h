// Batch norm as a factor and a summand, and their gradients, for host and device.
#pragma once

#include "math/vector3.h"

namespace ikem_fast::math {
#ifdef CPU_CAPABILITY
inline namespace CPU_CAPABILITY {
#endif

template <typename T>
struct NormCoefficients {
  T scale, shift;
};

// Rounded after each operation, so that all devices agree.
template <typename T>
IKEM_HOST_DEVICE NormCoefficients<T> norm_coefficients(T mean, T variance, T weight, T bias, T eps) {
  const T scale = weight / Real<T>::square_root(variance + eps);
  return {scale, bias - Real<T>::product(mean, scale)};
}

template <typename T>
struct NormGradients {
  T mean, variance, weight, bias;
};

template <typename T>
IKEM_HOST_DEVICE NormGradients<T> norm_gradients(T mean, T variance, T weight, T eps, T of_scale, T of_shift) {
  const T inverse_deviation = T(1) / Real<T>::square_root(variance + eps);
  const T scale = weight * inverse_deviation;
  // The shift depends on the scale, too.
  const T total = of_scale - Real<T>::product(mean, of_shift);
  return {-scale * of_shift, T(-0.5) * total * scale * inverse_deviation * inverse_deviation,
          total * inverse_deviation, of_shift};
}

#ifdef CPU_CAPABILITY
}  // namespace CPU_CAPABILITY
#endif
}  // namespace ikem_fast::math
