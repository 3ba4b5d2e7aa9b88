// The skeleton and the order of modalities, as CUDA kernels take them: by value, so that there is no copy to the device
// that a graph would have to capture.
#pragma once

#include <cstdint>

#include "math/modalities.h"

namespace ikem_fast::cuda {

struct Skeleton {
  static constexpr int kMaxJoints = 256;
  uint8_t bone_parents[kMaxJoints];
  uint8_t previous_bones[kMaxJoints];
  uint8_t chest_normal[3];
  uint8_t root;
  bool has_chest_normal;
};

// rows[modality] is the modality's place in the output, or -1.
struct OutputRows {
  int8_t rows[kNumModalities];
};

}  // namespace ikem_fast::cuda
