// How the elements of two tensors lie in memory; shared by the CPU's operator and CUDA's binding, so no torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace ikem_fast {

// Whether both tensors of these sizes fill their memory without gaps, element beside element in the same order: then
// they are updated as vectors.
template <typename Integers>
bool lie_alike(const Integers& sizes, const Integers& strides, const Integers& other_strides) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride and size
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 1) continue;
    if (strides[i] != other_strides[i]) return false;
    dimensions.emplace_back(strides[i], sizes[i]);
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t dense_stride = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride != dense_stride) return false;
    dense_stride *= size;
  }
  return true;
}

}  // namespace ikem_fast
