// What convolutions form of their inputs, channel by channel.
#pragma once

#include "cuda/convolution_input.h"
#include "cuda/kernel.h"

namespace ikem_fast::cuda {

// NaN stays, which fmaxf would not let it.
__device__ __forceinline__ float relu(float x) { return x < 0.0f ? 0.0f : x; }

struct ActivationOfChannel {
  float scale, shift;

  __device__ __forceinline__ float before(float x) const { return fmaf(scale, x, shift); }
  __device__ __forceinline__ float operator()(float x) const { return relu(before(x)); }
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
