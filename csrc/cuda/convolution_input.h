// What convolutions form of their inputs as they load them: the activation of a batch norm, and in a backward pass the
// gradient that reaches a result of which the batch statistics were taken, too.
#pragma once

#include "cuda/kernel.h"
#include "cuda/real_types.h"

namespace ikem_fast::cuda {

// relu(scale * x + shift) per stream and channel, both (S, C); x itself where they are null.
struct ActivationInput {
  const float* scale;
  const float* shift;
};

// gradient + mean_gradient / n + (2 / n) variance_gradient (y - mean), of n values a channel and stream. mean_gradient and
// variance_gradient (S, C) may be null; y and mean are only read beside the latter.
struct GradientInput {
  const void* y;
  const float* mean;
  const float* mean_gradient;
  const float* variance_gradient;
  float inverse_count;  // 1 / n
};

// The coefficients of one channel.
struct ActivationOfChannel {
  float scale, shift;

  __device__ __forceinline__ float before(float x) const { return fmaf(scale, x, shift); }
  __device__ __forceinline__ float operator()(float x) const { return fmaxf(before(x), 0.0f); }
};

__device__ __forceinline__ ActivationOfChannel of_channel(const ActivationInput& input, int64_t channel) {
  return {input.scale[channel], input.shift[channel]};
}

// gradient + slope * y + constant.
struct GradientOfChannel {
  float slope, constant;

  __device__ __forceinline__ float operator()(float gradient) const { return gradient + constant; }
  __device__ __forceinline__ float operator()(float gradient, float y) const {
    return gradient + fmaf(slope, y, constant);
  }
};

__device__ __forceinline__ GradientOfChannel of_channel(const GradientInput& input, int64_t channel) {
  const float constant = input.mean_gradient ? input.mean_gradient[channel] * input.inverse_count : 0.0f;
  if (!input.variance_gradient) return {0.0f, constant};
  const float slope = 2.0f * input.inverse_count * input.variance_gradient[channel];
  return {slope, fmaf(-slope, input.mean[channel], constant)};
}

}  // namespace ikem_fast::cuda
