// Coefficients of batch norm on CUDA: the launchers, on raw pointers. Everything holds `count` numbers.
#pragma once

#include <driver_types.h>

#include <cstdint>

namespace ikem_fast::cuda {

struct BatchNormInput {
  const float* mean;
  const float* variance;
  const float* weight;
  const float* bias;  // not read backward
  float eps;
  int64_t count;
};

struct BatchNormGradients {
  const float* scale;
  const float* shift;
  float* mean;
  float* variance;
  float* weight;
  float* bias;
};

// scale = weight / sqrt(variance + eps), shift = bias - mean scale.
cudaError_t batch_norm_coefficients(float* scale, float* shift, const BatchNormInput& input, cudaStream_t stream);

cudaError_t batch_norm_coefficients_backward(const BatchNormGradients& gradients, const BatchNormInput& input,
                                             cudaStream_t stream);

}  // namespace ikem_fast::cuda
