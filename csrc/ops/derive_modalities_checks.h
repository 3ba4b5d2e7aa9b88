// What may go wrong with the arguments that are no tensors; shared by the CPU's operator and CUDA's binding, so no torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "math/modalities.h"

namespace ikem_fast {

inline std::string find_bad_joint(const char* name, const std::vector<int64_t>& joints, int64_t num_joints) {
  for (int64_t joint : joints) {
    if (joint < 0 || joint >= num_joints) {
      return std::string(name) + " must hold joints 0 ... " + std::to_string(num_joints - 1) + ", got " +
             std::to_string(joint);
    }
  }
  return "";
}

// The joint that is its own parent.
inline int64_t find_root(const std::vector<int64_t>& bone_parents) {
  for (int64_t joint = 0; joint < static_cast<int64_t>(bone_parents.size()); ++joint) {
    if (bone_parents[joint] == joint) return joint;
  }
  return -1;
}

// The first problem in one sentence, or nothing.
inline std::string find_problem(int64_t num_joints, const std::vector<int64_t>& bone_parents,
                                const std::vector<int64_t>& previous_bones, const std::vector<int64_t>& chest_normal,
                                const std::vector<int64_t>& modalities) {
  const auto size = [](const std::vector<int64_t>& values) { return std::to_string(values.size()); };
  if (static_cast<int64_t>(bone_parents.size()) != num_joints ||
      static_cast<int64_t>(previous_bones.size()) != num_joints) {
    return "bone_parents and previous_bones must each name one joint for every one of the clips' " +
           std::to_string(num_joints) + ", got " + size(bone_parents) + " and " + size(previous_bones);
  }
  if (!chest_normal.empty() && chest_normal.size() != 3) {
    return "chest_normal must name three joints or none, got " + size(chest_normal);
  }
  for (const std::string& problem :
       {find_bad_joint("bone_parents", bone_parents, num_joints),
        find_bad_joint("previous_bones", previous_bones, num_joints),
        find_bad_joint("chest_normal", chest_normal, num_joints)}) {
    if (!problem.empty()) return problem;
  }
  int64_t num_roots = 0;
  for (int64_t joint = 0; joint < num_joints; ++joint) num_roots += bone_parents[joint] == joint;
  if (num_roots != 1) {
    return "bone_parents must have exactly one root, a joint that is its own parent, got " + std::to_string(num_roots);
  }
  if (modalities.empty()) return "modalities must name at least one modality, got none";
  for (size_t i = 0; i < modalities.size(); ++i) {
    if (modalities[i] < 0 || modalities[i] >= kNumModalities) {
      return "modalities must hold numbers 0 ... " + std::to_string(kNumModalities - 1) + ", got " +
             std::to_string(modalities[i]);
    }
    if (std::find(modalities.begin(), modalities.begin() + i, modalities[i]) != modalities.begin() + i) {
      return "modalities must be distinct, got " + std::to_string(modalities[i]) + " twice";
    }
  }
  return "";
}

}  // namespace ikem_fast
