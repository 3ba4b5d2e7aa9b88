// Momentum update on CUDA: the launcher, on raw pointers.
#pragma once

#include <driver_types.h>

#include <cstdint>
#include <vector>

namespace ikem_fast::cuda {

// Values of a tensor of the key encoders and of its query encoder's, side by side in memory.
template <typename T>
struct MomentumPair {
  T* key;
  const T* query;
  int64_t size;
};

// key = momentum * key + (1 - momentum) * query in every pair, some hundred of them in one launch. T is float or double.
template <typename T>
cudaError_t momentum_update(const std::vector<MomentumPair<T>>& pairs, double momentum, cudaStream_t stream);

}  // namespace ikem_fast::cuda
