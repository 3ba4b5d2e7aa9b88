// Log-sum-exps over a queue on the CPU, see csrc/ops/queue_log_sum_exp.cpp.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace ikem_fast::cpu {

// What x and the queue hold. Sums and gradients are double for double and float for the others.
enum class QueueNumbers { kFloat, kBFloat16, kBFloat16OverFloat, kDouble };

struct QueueLogSumExp {
  QueueNumbers numbers{};
  const void* x = nullptr;      // (B, R, row_stride): D numbers, then zeros
  const void* queue = nullptr;  // (B, D, K) with the strides below
  int64_t rows = 0;             // R
  int64_t size = 0;             // D
  int64_t row_stride = 0;       // D, for bfloat16 rounded up to an even number
  int64_t queue_size = 0;       // K
  int64_t batch_stride = 0, size_stride = 0, column_stride = 0;  // of the queue
  int64_t tile = 0;                                              // columns looked at at a time
  double scale = 0;
  bool with_gradient = false;
};

// Sums over some columns of the queue for some rows of x, relative to the largest similarity m of these columns.
struct QueueSums {
  double* largest = nullptr;  // m of each row; -inf without columns
  double* sum = nullptr;      // of exp(scale (s_j - m))
  void* weighted = nullptr;   // (rows, D), of exp(scale (s_j - m)) queue_j; not touched without columns or gradient
};

// Sums over the tiles [first_tile, last_tile) of the queue for num_rows rows of x from first_row on.
IKEM_DECLARE_CPU(void, sum_queue_tiles, const QueueLogSumExp& parameters, int64_t batch, int64_t first_row,
                 int64_t num_rows, int64_t first_tile, int64_t last_tile, const QueueSums& sums)

// Sums over more columns, row `from` of `other`, are added to row `to` of `sums`.
IKEM_DECLARE_CPU(void, add_queue_sums, const QueueLogSumExp& parameters, const QueueSums& sums, int64_t to,
                 const QueueSums& other, int64_t from)

// The log-sum-exp of a row with its positive; its weighted sum becomes the gradient.
IKEM_DECLARE_CPU(double, finish_queue_row, const QueueLogSumExp& parameters, const QueueSums& sums, int64_t row,
                 double positive)

}  // namespace ikem_fast::cpu
