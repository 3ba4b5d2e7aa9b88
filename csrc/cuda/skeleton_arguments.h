// From the numbers that operators receive to what kernels take. For bindings.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/skeleton.h"
#include "ops/derive_modalities_checks.h"

namespace ikem_fast::cuda {

inline Skeleton make_skeleton(const std::vector<int64_t>& bone_parents, const std::vector<int64_t>& previous_bones,
                              const std::vector<int64_t>& chest_normal) {
  Skeleton skeleton{};
  for (size_t joint = 0; joint < bone_parents.size(); ++joint) {
    skeleton.bone_parents[joint] = static_cast<uint8_t>(bone_parents[joint]);
    skeleton.previous_bones[joint] = static_cast<uint8_t>(previous_bones[joint]);
  }
  skeleton.root = static_cast<uint8_t>(find_root(bone_parents));
  skeleton.has_chest_normal = !chest_normal.empty();
  for (int i = 0; i < 3 && skeleton.has_chest_normal; ++i) {
    skeleton.chest_normal[i] = static_cast<uint8_t>(chest_normal[i]);
  }
  return skeleton;
}

inline OutputRows make_output_rows(const std::vector<int64_t>& modalities) {
  OutputRows rows;
  std::fill_n(rows.rows, kNumModalities, int8_t{-1});
  for (size_t s = 0; s < modalities.size(); ++s) rows.rows[modalities[s]] = static_cast<int8_t>(s);
  return rows;
}

}  // namespace ikem_fast::cuda
