// Ring buffer of keys, docs/method.md section 5.
#pragma once

#include <ATen/core/Tensor.h>

namespace ikem_fast {

// Writes keys (S, N, D) into the columns of queue (S, D, K) from pointer (1,) int64 on and moves the pointer past them,
// modulo K; (N, D) and (D, K) for a single queue. Of more than K keys the last K stay.
void enqueue_(const at::Tensor& queue, const at::Tensor& keys, const at::Tensor& pointer);

}  // namespace ikem_fast
