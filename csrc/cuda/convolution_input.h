// What convolutions form of their inputs as they load them: the activation of a batch norm, and in a backward pass the
// gradient that reaches a result of which the batch statistics were taken, too.
#pragma once

namespace ikem_fast::cuda {

// relu(scale * x + shift) per stream and channel, both (S, C); x itself where they are null.
struct ActivationInput {
  const float* scale;
  const float* shift;
};

// gradient + mean_gradient / n + (2 / n) variance_gradient (y - mean), of n values a channel and stream. mean_gradient
// and variance_gradient (S, C) may be null; y and mean are only read beside the latter.
struct GradientInput {
  const void* y;
  const float* mean;
  const float* mean_gradient;
  const float* variance_gradient;
  float inverse_count;  // 1 / n
};

}  // namespace ikem_fast::cuda
