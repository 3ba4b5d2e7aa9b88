// Graph convolution of several streams: joints gathered along edges, then a product over channels.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace ikem_fast {

// x (S, B, T, V, C_in) float, bfloat16 or double; weight (S, P, C_out, C_in), bias (S, P, C_out), importance
// (S, P, V, V), adjacency (P, V, V), output_scale and output_shift (S, C_out), all float, for double x double; edges
// (E, 3) int of (partition, from v, to w), sorted by (w, partition, v). With A = adjacency * importance at the edges,
//   y[t, w] = sum_p (sum_v A[p, v, w] x[t * stride, v]) weight[p]^T + bias[p] sum_v A[p, v, w]
// (S, B, ceil(T / stride), V, C_out) of x's type; then output_scale * y + output_shift, and of that max(0, .) with
// output_activation. With `statistics` mean and biased variance of y over all but streams and channels, (S, C_out), float
// (double), of what y is before it is rounded; 0 of no values. Without, both (0,). The same bits for the same number of
// threads.
std::tuple<at::Tensor, at::Tensor, at::Tensor> graph_convolution(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& importance,
    const at::Tensor& adjacency, const at::Tensor& edges, int64_t stride, bool statistics,
    const std::optional<at::Tensor>& output_scale, const std::optional<at::Tensor>& output_shift,
    bool output_activation);

// Gradients of x (of x's type; (0,) unless asked for), weight, bias and importance from those of y, mean and variance;
// y and mean are what the forward pass returned, looked at with variance_gradient alone.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> graph_convolution_backward(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& importance,
    const at::Tensor& adjacency, const at::Tensor& edges, int64_t stride, const at::Tensor& y, const at::Tensor& mean,
    const at::Tensor& y_gradient, const std::optional<at::Tensor>& mean_gradient,
    const std::optional<at::Tensor>& variance_gradient, bool with_x_gradient);

}  // namespace ikem_fast
