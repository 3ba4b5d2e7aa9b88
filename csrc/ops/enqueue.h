// Ring buffer of keys, docs/method.md section 5.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace ikem_fast {

// Writes keys (S, N, D) into the columns of queue (S, D, K) from pointer (1,) int64 on and moves the pointer past them,
// modulo K; (N, D) and (D, K) for a single queue. Of more than K keys the last K stay. With a queue_size, `queue` is the
// columns from first_column on of a queue of that many, and keys that belong into others are left out.
void enqueue_(const at::Tensor& queue, const at::Tensor& keys, const at::Tensor& pointer, int64_t first_column,
              std::optional<int64_t> queue_size);

}  // namespace ikem_fast
