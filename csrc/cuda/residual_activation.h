// Batch norm, dropout, residual and ReLU on CUDA: the launchers, on raw pointers.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "cuda/element_type.h"

namespace ikem_fast::cuda {

// S streams of rows of C channels; x and residual (S, rows, C), coefficients (S, C).
struct ResidualActivationInput {
  const void* x;
  const void* residual;  // may be null
  ElementType type;      // of both: float or bfloat16
  const float* scale;
  const float* shift;
  const float* residual_scale;  // may be null, both
  const float* residual_shift;
  int num_streams;
  int64_t rows;
  int64_t channels;
  int64_t pool_rows;    // of one mean, a divisor of rows; 0 for no means
  uint32_t threshold;   // math::dropout_threshold
  uint32_t layer;
  const int64_t* seed;  // on the device; not read for a threshold of 0
};

struct ResidualActivationGradients {
  const void* out;  // like x, or with means (S, rows / pool_rows, C) float
  void* x;
  void* residual;      // null without one
  float* sums[4];      // of scale, shift and, null without them, residual_scale and residual_shift
  float* scratch;      // residual_activation_scratch_size numbers
};

// out: like x, or with means (S, rows / pool_rows, C) float. cudaErrorInvalidValue for sizes that no grid holds.
cudaError_t residual_activation(void* out, const ResidualActivationInput& input, cudaStream_t stream);

cudaError_t residual_activation_backward(const ResidualActivationGradients& gradients,
                                         const ResidualActivationInput& input, cudaStream_t stream);

int64_t residual_activation_scratch_size(const ResidualActivationInput& input);

}  // namespace ikem_fast::cuda
