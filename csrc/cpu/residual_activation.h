// Batch norm, dropout, residual and ReLU on the CPU, see csrc/ops/residual_activation.cpp.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/numbers.h"

namespace ikem_fast::cpu {

// S streams of rows of C channels. The rows of a stream are an item each rows_of_item (fewer in the last).
struct ResidualActivation {
  Numbers numbers{};
  const void* x = nullptr;               // (S, rows, C)
  const void* residual = nullptr;        // likewise, or null
  const void* scale = nullptr;           // (S, C)
  const void* shift = nullptr;           // (S, C)
  const void* residual_scale = nullptr;  // (S, C), or null
  const void* residual_shift = nullptr;  // (S, C), or null
  int64_t rows = 0;
  int64_t channels = 0;
  int64_t pool_rows = 0;  // rows of a mean, of which an item has a whole number; 0 for no means
  int64_t rows_of_item = 0;
  int64_t num_sums = 0;    // of gradients of coefficients: 4 with coefficients of the residual, otherwise 2
  uint32_t threshold = 0;  // math::dropout_threshold
  uint32_t layer = 0;
  uint64_t seed = 0;

  int64_t items_of_stream() const { return rows_of_item ? (rows + rows_of_item - 1) / rows_of_item : 0; }
};

struct ResidualActivationGradients {
  const void* out = nullptr;  // of (S, rows, C), or of the means (S, rows / pool_rows, C)
  void* x = nullptr;          // like x
  void* residual = nullptr;   // like the residual, or null
  double* sums = nullptr;     // (S, items, num_sums, C): an item's parts of the gradients of the coefficients
};

// out (S, rows, C), or the means (S, rows / pool_rows, C), of the items [first, last) of all streams, one after another.
IKEM_DECLARE_CPU(void, residual_activation, const ResidualActivation& parameters, int64_t first, int64_t last,
                 void* out)

IKEM_DECLARE_CPU(void, residual_activation_backward, const ResidualActivation& parameters, int64_t first, int64_t last,
                 const ResidualActivationGradients& gradients)

}  // namespace ikem_fast::cpu
