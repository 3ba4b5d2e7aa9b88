// Sums that blocks of a kernel made in parts, brought together on CUDA: the launcher, on raw pointers.
#pragma once

#include <driver_types.h>

#include <cstdint>

namespace ikem_fast::cuda {

// sums[s, i] = parts[s, 0, i] + ... + parts[s, count - 1, i] for i < size, in double and always in the same order; 0
// without parts. Consecutive parts of a stream lie `pitch` values apart, and consecutive streams `count` parts.
struct PartialSums {
  const float* parts;  // (streams, count, pitch), of which the first `size` of each part count
  int64_t streams;
  int64_t size;
  int64_t pitch;
  int count;
};

// sums (streams, size).
cudaError_t add_partial_sums(float* sums, const PartialSums& parts, cudaStream_t stream);

}  // namespace ikem_fast::cuda
