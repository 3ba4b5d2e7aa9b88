#include "cpu/batch_norm_coefficients.h"

#include "math/batch_norm.h"

namespace ikem_fast::cpu::CPU_CAPABILITY {

namespace {

template <typename T>
void make_coefficients(const BatchNormCoefficients& p, void* scale, void* shift) {
  const auto at = [](const void* values, int64_t i) { return static_cast<const T*>(values)[i]; };
  for (int64_t i = 0; i < p.count; ++i) {
    const auto made = math::norm_coefficients<T>(at(p.mean, i), at(p.variance, i), at(p.weight, i), at(p.bias, i),
                                                 static_cast<T>(p.eps));
    static_cast<T*>(scale)[i] = made.scale;
    static_cast<T*>(shift)[i] = made.shift;
  }
}

template <typename T>
void make_gradients(const BatchNormCoefficients& p, const BatchNormGradients& gradients) {
  const auto at = [](const void* values, int64_t i) { return static_cast<const T*>(values)[i]; };
  for (int64_t i = 0; i < p.count; ++i) {
    const auto made = math::norm_gradients<T>(at(p.mean, i), at(p.variance, i), at(p.weight, i),
                                              static_cast<T>(p.eps), at(gradients.scale, i), at(gradients.shift, i));
    static_cast<T*>(gradients.mean)[i] = made.mean;
    static_cast<T*>(gradients.variance)[i] = made.variance;
    static_cast<T*>(gradients.weight)[i] = made.weight;
    static_cast<T*>(gradients.bias)[i] = made.bias;
  }
}

}  // namespace

void batch_norm_coefficients(const BatchNormCoefficients& parameters, void* scale, void* shift) {
  const auto make = parameters.is_double ? &make_coefficients<double> : &make_coefficients<float>;
  make(parameters, scale, shift);
}

void batch_norm_coefficients_backward(const BatchNormCoefficients& parameters, const BatchNormGradients& gradients) {
  const auto make = parameters.is_double ? &make_gradients<double> : &make_gradients<float>;
  make(parameters, gradients);
}

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
