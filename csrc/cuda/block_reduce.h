// Reductions over the lanes of a warp and the threads of a block; every thread gets the result, the same bits each time.
#pragma once

#include "cuda/kernel.h"

namespace ikem_fast::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// `combine` is associative and commutative.
template <typename T, typename Combine>
__device__ __forceinline__ T reduce_warp(T value, Combine combine) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = combine(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

// `shared` holds a value for each of the block's kWarps warps and is free again after the next barrier.
template <int kWarps, typename T, typename Combine>
__device__ __forceinline__ T reduce_block(T value, T* shared, Combine combine) {
  value = reduce_warp(value, combine);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, shared[warp]);
  return value;
}

}  // namespace ikem_fast::cuda
