// Views of stored clips on CUDA: the launcher, on raw pointers.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "cuda/skeleton.h"

namespace ikem_fast::cuda {

enum class StoredElement : int { kFloat, kHalf, kBFloat16 };

// Stored clips and the parameters of R views of B samples, all on the stream's device. A null parameter is an
// augmentation that is off.
struct ClipViewsInput {
  const void* clips;            // (N, 3, T, V, M), each clip contiguous
  StoredElement clip_element;
  int64_t clip_stride;          // elements between two clips
  int64_t num_clips;            // N
  const int64_t* num_frames;    // (N,)
  const int64_t* indices;       // (B,) clips; null for clip b in place b
  const int64_t* crop_start;    // (R, B)
  int crop_padding;             // mirrored frames at either end
  const float* shear;           // (R, B, 6)
  const float* camera_scale;    // (R, B)
  const float* camera_angles;   // (R, B, 3)
  const float* motion_scale;    // (R, B)
  int num_samples;              // B
  int num_views;                // R
  int clip_frames;              // T
  int num_joints;               // V
  int num_persons;              // M
  int num_outputs;              // S
};

// Doubles of scratch memory that the statistics of these views take; 0 for an empty batch.
int64_t clip_views_scratch_size(const ClipViewsInput& input);

// Writes views (R, S, B * M, T, V, 3) and, where they are not null, statistics (2, R, S, V, 3): sums and sums of squares,
// by way of `scratch`. View is float, __half or __nv_bfloat16. A sample whose index or crop lies outside the set or the
// clip gets NaN for its coordinates. cudaErrorInvalidValue for a shape that does not fit: more than 2^31 - 1 values in a
// clip or blocks in the batch, or more joints than Skeleton holds.
template <typename View>
cudaError_t clip_views(View* views, double* statistics, double* scratch, const ClipViewsInput& input,
                       const Skeleton& skeleton, const OutputRows& rows, cudaStream_t stream);

}  // namespace ikem_fast::cuda
