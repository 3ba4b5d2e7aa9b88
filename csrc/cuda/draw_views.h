// Random parameters of views on CUDA: the launcher, on raw pointers.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "math/augmentation.h"

namespace ikem_fast::cuda {

// Where the parameters of R views of B samples go.
struct DrawnViews {
  int64_t* crop_start;   // (R, B)
  float* shear;          // (R, B, 6)
  float* camera_scale;   // (R, B)
  float* camera_angles;  // (R, B, 3)
  float* motion_scale;   // (R, B)
};

// indices (B,) and epoch (1,) on the stream's device: a number among the launch's arguments would stay the same in every
// replay of a CUDA graph. cudaErrorInvalidValue for more than 2^31 - 1 views of samples.
cudaError_t draw_views(const DrawnViews& drawn, const int64_t* indices, int64_t num_samples, int64_t num_views,
                       uint64_t seed, const int64_t* epoch, const AugmentationRanges& ranges, cudaStream_t stream);

}  // namespace ikem_fast::cuda
