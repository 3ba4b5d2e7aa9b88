// Derivation of modalities on the CPU, see csrc/ops/derive_modalities.cpp.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "math/modalities.h"

namespace ikem_fast::cpu {

// Lanes are the V * M values that one coordinate has in one frame, joint by joint, the persons of a joint together.
struct DeriveModalities {
  const void* clips = nullptr;           // (N, 3, T, lanes) float, or double where is_double
  void* output = nullptr;                // (S, N, 3, T, lanes) of the same type
  const int64_t* num_frames = nullptr;   // (N,)
  bool is_double = false;
  int64_t num_clips = 0;
  int64_t clip_frames = 0;               // T
  int64_t num_joints = 0;
  int64_t num_persons = 0;
  const int32_t* bone_parents = nullptr;    // (V,) joints
  const int32_t* previous_bones = nullptr;  // (V,) joints
  int64_t root = 0;
  bool has_chest_normal = false;
  int64_t chest_normal[3] = {};          // joints
  int64_t num_outputs = 0;               // S
  const int64_t* modalities = nullptr;   // (S,) values of Modality

  int64_t num_lanes() const { return num_joints * num_persons; }
  // Frames that are derived together: enough to fill registers, few enough that everything between stays in the
  // first-level cache.
  int64_t block_frames() const {
    constexpr int64_t kLanesPerBlock = 512;
    const int64_t frames = kLanesPerBlock / (num_lanes() < 1 ? 1 : num_lanes());
    return frames < 1 ? 1 : frames > clip_frames ? clip_frames : frames;
  }
  int64_t blocks_per_clip() const { return (clip_frames + block_frames() - 1) / block_frames(); }
  // Values per buffer: a block, the frame after it, and what a register may read past its end.
  int64_t buffer_size() const { return (block_frames() + 1) * num_lanes() + 64; }
  static constexpr int64_t kNumBuffers = 10;
};

// Derives blocks [begin, end) of the N * blocks_per_clip() blocks. `workspace` holds kNumBuffers * buffer_size()
// values, aligned to 64 bytes.
IKEM_DECLARE_CPU(void, derive_modalities, const DeriveModalities& parameters, void* workspace, int64_t begin, int64_t end)

}  // namespace ikem_fast::cpu
