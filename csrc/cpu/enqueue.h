// Ring buffer of keys on the CPU, see csrc/ops/enqueue.cpp.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace ikem_fast::cpu {

enum class RealType : int { kFloat, kDouble, kBFloat16 };

// Strides in elements.
struct Enqueue {
  const void* keys = nullptr;  // (S, N, D), the first of the keys that stay
  RealType key_type = RealType::kFloat;
  int64_t key_strides[3] = {};
  void* queue = nullptr;  // (S, D, K)
  RealType queue_type = RealType::kFloat;
  int64_t queue_strides[3] = {};
  int64_t num_keys = 0;      // N, at most K
  int64_t size = 0;          // D
  int64_t queue_size = 0;    // K
  int64_t first_column = 0;  // of the first key, in 0 ... K - 1

  static constexpr int64_t kRows = 16;  // a line of the cache in float
  int64_t blocks_per_stream() const { return (size + kRows - 1) / kRows; }
};

// Writes blocks [begin, end) of the S * blocks_per_stream() blocks of kRows rows of the queue.
IKEM_DECLARE_CPU(void, enqueue, const Enqueue& parameters, int64_t begin, int64_t end)

}  // namespace ikem_fast::cpu
