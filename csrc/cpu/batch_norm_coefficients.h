// Coefficients of batch norm on the CPU, see csrc/ops/batch_norm_coefficients.cpp.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace ikem_fast::cpu {

// Everything holds `count` numbers, float or double.
struct BatchNormCoefficients {
  bool is_double = false;
  int64_t count = 0;
  const void *mean = nullptr, *variance = nullptr, *weight = nullptr, *bias = nullptr;  // bias: forward only
  double eps = 0;
};

struct BatchNormGradients {
  const void *scale = nullptr, *shift = nullptr;
  void *mean = nullptr, *variance = nullptr, *weight = nullptr, *bias = nullptr;
};

IKEM_DECLARE_CPU(void, batch_norm_coefficients, const BatchNormCoefficients& parameters, void* scale, void* shift)

IKEM_DECLARE_CPU(void, batch_norm_coefficients_backward, const BatchNormCoefficients& parameters,
                 const BatchNormGradients& gradients)

}  // namespace ikem_fast::cpu
