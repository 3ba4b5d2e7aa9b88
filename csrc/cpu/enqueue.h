// Ring buffer of keys on the CPU, see csrc/ops/enqueue.cpp.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace ikem_fast::cpu {

enum class RealType : int { kFloat, kDouble, kBFloat16 };

// Keys that come to lie one beside the other.
struct EnqueueRun {
  int64_t first_key = 0;
  int64_t first_column = 0;
  int64_t num_keys = 0;
};

// Strides in elements.
struct Enqueue {
  const void* keys = nullptr;  // (S, N, D)
  RealType key_type = RealType::kFloat;
  int64_t key_strides[3] = {};
  void* queue = nullptr;  // (S, D, K)
  RealType queue_type = RealType::kFloat;
  int64_t queue_strides[3] = {};
  int64_t size = 0;    // D
  EnqueueRun runs[2];  // before and after the queue's end

  static constexpr int64_t kRows = 16;  // a line of the cache in float
  int64_t blocks_per_stream() const { return (size + kRows - 1) / kRows; }
};

// Writes blocks [begin, end) of the S * blocks_per_stream() blocks of kRows rows of the queue.
IKEM_DECLARE_CPU(void, enqueue, const Enqueue& parameters, int64_t begin, int64_t end)

}  // namespace ikem_fast::cpu
