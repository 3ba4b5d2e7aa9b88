// Derivation of modalities on CUDA: the launcher, on raw pointers.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "math/modalities.h"

namespace ikem_fast::cuda {

// Handed to the kernel by value: no copy to the device that a graph would have to capture.
struct Skeleton {
  static constexpr int kMaxJoints = 256;
  uint8_t bone_parents[kMaxJoints];
  uint8_t previous_bones[kMaxJoints];
  uint8_t chest_normal[3];
  uint8_t root;
  bool has_chest_normal;
};

struct ClipShape {
  int num_clips;    // N
  int num_frames;   // T
  int num_joints;   // V
  int num_persons;  // M
};

// rows[modality] is the modality's place in the output, or -1.
struct OutputRows {
  int8_t rows[kNumModalities];
};

// clips (N, 3, T, V, M), num_frames (N,), output (S, N, 3, T, V, M), all contiguous on the stream's device; T is float
// or double. cudaErrorInvalidValue for a shape with more than 2^31 - 1 values in a clip or tiles in the batch, or more
// joints than Skeleton holds.
template <typename T>
cudaError_t derive_modalities(T* output, const T* clips, const int64_t* num_frames, const ClipShape& shape,
                              const Skeleton& skeleton, const OutputRows& rows, cudaStream_t stream);

}  // namespace ikem_fast::cuda
