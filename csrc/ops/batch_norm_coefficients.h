// Batch norm as one factor and one summand per channel.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace ikem_fast {

// scale = weight / sqrt(variance + eps), shift = bias - mean scale; all (S, C) float or double.
std::tuple<at::Tensor, at::Tensor> batch_norm_coefficients(const at::Tensor& mean, const at::Tensor& variance,
                                                           const at::Tensor& weight, const at::Tensor& bias,
                                                           double eps);

// The gradients of mean, variance, weight and bias.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_coefficients_backward(
    const at::Tensor& mean, const at::Tensor& variance, const at::Tensor& weight, double eps,
    const at::Tensor& scale_gradient, const at::Tensor& shift_gradient);

}  // namespace ikem_fast
