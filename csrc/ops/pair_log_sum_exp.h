// Log-sum-exps of similarities with queues and of products of two similarities, with the nearest neighbours.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace ikem_fast {

// x (A, N, D), queue (A, D, K): similarities s_a = x_a queue_a; y (U, N, E), y_queue (E, K), both or neither:
// g_u = y_u y_queue. Element types: float with float queues, double with double, bfloat16 with bfloat16 or float.
// Returns, in float (double for double), with log-sum-exps over the K columns of `scale` times
//   single (A, N) of s_a; with y (U, N) of g_u
//   pair (A (A - 1) / 2, N) of s_a s_b for a < b, in the order of the upper triangle; with y (A U, N) of s_a g_u
//   neighbours (A, N, topk) int64: where s_a is largest, in descending order, of equal values the first
//   mined (A, N, topk, A): s_b at the neighbours of a; with y (A, N, topk, 1 + U): s_a, then all g_u.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> pair_log_sum_exp(const at::Tensor& x,
                                                                            const at::Tensor& queue,
                                                                            const std::optional<at::Tensor>& y,
                                                                            const std::optional<at::Tensor>& y_queue,
                                                                            double scale, int64_t topk);

// The gradient with respect to x, with y with respect to y, from what the forward pass returned and the gradients of
// that; in float (double for double). The similarities are computed again.
at::Tensor pair_log_sum_exp_backward(const at::Tensor& x, const at::Tensor& queue, const std::optional<at::Tensor>& y,
                                     const std::optional<at::Tensor>& y_queue, double scale, const at::Tensor& single,
                                     const at::Tensor& pair, const at::Tensor& neighbours,
                                     const at::Tensor& single_gradient, const at::Tensor& pair_gradient,
                                     const at::Tensor& mined_gradient);

}  // namespace ikem_fast
