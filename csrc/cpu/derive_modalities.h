// Derivation of modalities on the CPU, see csrc/ops/derive_modalities.cpp.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/capability.h"
#include "cpu/skeleton.h"

namespace ikem_fast::cpu {

// Lanes are the V * M values that one coordinate has in one frame, joint by joint, the persons of a joint together.
struct DeriveModalities {
  const void* clips = nullptr;           // (N, 3, T, lanes) float, or double where is_double
  void* output = nullptr;                // (S, N, 3, T, lanes) of the same type
  const int64_t* num_frames = nullptr;   // (N,)
  bool is_double = false;
  int64_t num_clips = 0;
  int64_t clip_frames = 0;               // T
  int64_t num_persons = 0;
  Skeleton skeleton;
  int64_t num_outputs = 0;               // S
  const int64_t* modalities = nullptr;   // (S,) values of Modality

  int64_t num_lanes() const { return skeleton.num_joints * num_persons; }
  int64_t block_frames() const { return choose_block_frames(num_lanes(), clip_frames); }
  // Frames of one clip that are handled together.
  struct Block {
    int64_t clip, first_frame, frames;
    int64_t start;  // of coordinate 0 in the first frame, in the clips and in every modality
  };
  Block block(int64_t number) const {
    const int64_t clip = number / blocks_per_clip(), first = number % blocks_per_clip() * block_frames();
    return {clip, first, std::min(block_frames(), clip_frames - first), (clip * 3 * clip_frames + first) * num_lanes()};
  }
  int64_t blocks_per_clip() const { return (clip_frames + block_frames() - 1) / block_frames(); }
};

// The gradient of the clips, given that of the modalities.
struct DeriveModalitiesBackward : DeriveModalities {
  const void* gradient = nullptr;  // (S, N, 3, T, lanes) as the clips; `output` is (N, 3, T, lanes)
};

// Derives blocks [begin, end) of the N * blocks_per_clip() blocks.
IKEM_DECLARE_CPU(void, derive_modalities, const DeriveModalities& parameters, int64_t begin, int64_t end)
// Pulls the gradients of blocks [begin, end) back.
IKEM_DECLARE_CPU(void, derive_modalities_backward, const DeriveModalitiesBackward& parameters, int64_t begin,
                 int64_t end)

}  // namespace ikem_fast::cpu
