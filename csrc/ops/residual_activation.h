// The end of an encoder's block in one pass, docs/method.md section 4.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace ikem_fast {

// relu(dropout(scale x + shift) + residual_scale residual + residual_shift) of x (S, B, T, V, C) float, bfloat16 or
// double, with coefficients (S, C); with pool = M its mean over frames, joints and each M sequences, (S, B / M, C).
// Coefficients and means are float, or double for double. seed (1) int64. The same bits for any number of threads.
at::Tensor residual_activation(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift,
                               const std::optional<at::Tensor>& residual,
                               const std::optional<at::Tensor>& residual_scale,
                               const std::optional<at::Tensor>& residual_shift, double dropout,
                               const std::optional<at::Tensor>& seed, int64_t layer, int64_t pool);

// The gradients of x, scale, shift, residual, residual_scale and residual_shift, (0,) for what was not given.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> residual_activation_backward(
    const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift, const std::optional<at::Tensor>& residual,
    const std::optional<at::Tensor>& residual_scale, const std::optional<at::Tensor>& residual_shift, double dropout,
    const std::optional<at::Tensor>& seed, int64_t layer, int64_t pool, const at::Tensor& gradient);

}  // namespace ikem_fast
