// Random parameters of views on the CPU, see csrc/ops/draw_views.cpp.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "math/augmentation.h"

namespace ikem_fast::cpu {

struct DrawViews {
  const int64_t* indices = nullptr;  // (B,) samples
  int64_t num_samples = 0;           // B
  uint64_t seed = 0;
  uint32_t epoch = 0;
  AugmentationRanges ranges{};
  int64_t* crop_start = nullptr;   // (R, B)
  float* shear = nullptr;          // (R, B, 6)
  float* camera_scale = nullptr;   // (R, B)
  float* camera_angles = nullptr;  // (R, B, 3)
  float* motion_scale = nullptr;   // (R, B)
};

// Draws numbers [begin, end) of the R * B views of samples.
IKEM_DECLARE_CPU(void, draw_views, const DrawViews& parameters, int64_t begin, int64_t end)

}  // namespace ikem_fast::cpu
