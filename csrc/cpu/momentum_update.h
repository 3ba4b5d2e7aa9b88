// Momentum update on the CPU, see csrc/ops/momentum_update.cpp.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace ikem_fast::cpu {

// Values of one tensor, side by side in memory.
struct MomentumPiece {
  static constexpr int64_t kMaxSize = 16384;
  void* key;
  const void* query;
  int64_t size;
  bool is_double;
};

// key = momentum * key + (1 - momentum) * query in each of `count` pieces.
IKEM_DECLARE_CPU(void, momentum_update, const MomentumPiece* pieces, int64_t count, double momentum)

}  // namespace ikem_fast::cpu
