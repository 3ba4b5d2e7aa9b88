// Convolution over frames with batch norm and ReLU applied on load, and the batch statistics of what it makes. On the
// CPU there are two ways: the direct one, and one in the frequency domain (temporal_convolution_spectral.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "ops/temporal_convolution_checks.h"

namespace ikem_fast {

// y (S, B, T', V, C_out) = bias + the convolution over the T frames of h = relu(scale x + shift), or of h = x; h is
// rounded to x's type and zero beyond the frames. With output_scale and output_shift it becomes
// relu(output_scale y + output_shift + residual). All is checked, and every tensor dense. x, y and residual are float,
// bfloat16 or double, the rest float, for double double.
struct TemporalConvolution {
  TemporalConvolutionSizes sizes;
  at::Tensor x;                           // (S, B, T, V, C_in)
  at::Tensor scale, shift;                // (S, C_in), or both not defined
  at::Tensor weight;                      // (S, C_out, C_in, K)
  at::Tensor bias;                        // (S, C_out); not defined in a backward pass, like all below
  bool statistics = false;                // mean and variance are wanted
  at::Tensor output_scale, output_shift;  // (S, C_out), or both not defined; never with statistics
  at::Tensor residual;                    // (S, B, T', V, C_out), or not defined
};

// With n values of a channel, the gradient that reaches y is
// total = y_gradient + mean_gradient / n + (2 / n) variance_gradient (y - mean).
struct TemporalConvolutionBackward {
  TemporalConvolution forward;
  at::Tensor y;                  // (S, B, T', V, C_out)
  at::Tensor mean;               // (S, C_out); not defined without variance_gradient
  at::Tensor y_gradient;         // like y
  at::Tensor mean_gradient;      // (S, C_out), or not defined
  at::Tensor variance_gradient;  // (S, C_out), or not defined
  bool with_x_gradient = true;
};

// From the arguments of the operators; ValueError for what does not fit.
TemporalConvolution check_temporal_convolution(
    const at::Tensor& x, const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift,
    const at::Tensor& weight, const at::Tensor& bias, int64_t stride, bool statistics,
    const std::optional<at::Tensor>& output_scale, const std::optional<at::Tensor>& output_shift,
    const std::optional<at::Tensor>& residual);
TemporalConvolutionBackward check_temporal_convolution_backward(
    const at::Tensor& x, const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift,
    const at::Tensor& weight, int64_t stride, const at::Tensor& y, const at::Tensor& mean, const at::Tensor& y_gradient,
    const std::optional<at::Tensor>& mean_gradient, const std::optional<at::Tensor>& variance_gradient,
    bool with_x_gradient);

// y, and the mean and biased variance (S, C_out) of y before it is rounded; these are (0,) unless asked for, and 0
// where there are no values.
std::tuple<at::Tensor, at::Tensor, at::Tensor> temporal_convolution_direct(const TemporalConvolution& arguments);

// Gradients of x ((0,) unless asked for), scale and shift ((0,) where there are none), weight and bias.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> temporal_convolution_direct_backward(
    const TemporalConvolutionBackward& arguments);

}  // namespace ikem_fast
