// A skeleton as operators receive it, kept for the CPU kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "cpu/skeleton.h"
#include "ops/derive_modalities_checks.h"

namespace ikem_fast {

class SkeletonNumbers {
 public:
  SkeletonNumbers(at::IntArrayRef bone_parents, at::IntArrayRef previous_bones, at::IntArrayRef chest_normal)
      : bone_parents_(bone_parents.begin(), bone_parents.end()),
        previous_bones_(previous_bones.begin(), previous_bones.end()) {
    skeleton_.num_joints = static_cast<int64_t>(bone_parents.size());
    skeleton_.bone_parents = bone_parents_.data();
    skeleton_.previous_bones = previous_bones_.data();
    skeleton_.root = find_root(bone_parents.vec());
    skeleton_.has_chest_normal = !chest_normal.empty();
    std::copy(chest_normal.begin(), chest_normal.end(), skeleton_.chest_normal);
  }
  SkeletonNumbers(const SkeletonNumbers&) = delete;
  SkeletonNumbers& operator=(const SkeletonNumbers&) = delete;

  // Points into this object.
  const cpu::Skeleton& skeleton() const { return skeleton_; }

 private:
  std::vector<int32_t> bone_parents_;
  std::vector<int32_t> previous_bones_;
  cpu::Skeleton skeleton_;
};

}  // namespace ikem_fast
