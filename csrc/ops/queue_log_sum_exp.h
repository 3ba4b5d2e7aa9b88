// Contrast against a queue in one pass, in tiles of its columns; nothing of the queue's length is made.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace ikem_fast {

// x (B, R, D), queue (B, D, K) with any strides, positive (B, R) -> log(exp(positive) + sum_j exp(scale x queue_j)),
// the largest scale x queue_j, both (B, R), and the gradient of the first with respect to x, (B, R, D), which is empty,
// (0,), unless asked for. x float, bfloat16 (queue bfloat16 or float) or double; the rest float, or double for double.
// The same bits for the same number of threads.
std::tuple<at::Tensor, at::Tensor, at::Tensor> queue_log_sum_exp(const at::Tensor& x, const at::Tensor& queue,
                                                                 const at::Tensor& positive, double scale,
                                                                 bool with_gradient);

}  // namespace ikem_fast
