// The skeleton and the size of blocks, as the CPU kernels that derive modalities take them.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ikem_fast::cpu {

struct Skeleton {
  int64_t num_joints = 0;                   // V
  const int32_t* bone_parents = nullptr;    // (V,) joints
  const int32_t* previous_bones = nullptr;  // (V,) joints
  int64_t root = 0;
  bool has_chest_normal = false;
  int64_t chest_normal[3] = {};  // joints
};

// Frames that are derived together: enough to fill registers, few enough that everything between stays in the
// first-level cache, and about as many in every block of a clip.
inline int64_t choose_block_frames(int64_t lanes, int64_t clip_frames) {
  constexpr int64_t kLanesPerBlock = 512;
  const int64_t most = std::max<int64_t>(1, kLanesPerBlock / std::max<int64_t>(lanes, 1));
  const int64_t num_blocks = std::max<int64_t>(1, (clip_frames + most - 1) / most);
  return std::max<int64_t>(1, (clip_frames + num_blocks - 1) / num_blocks);
}

}  // namespace ikem_fast::cpu
