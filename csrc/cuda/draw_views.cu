#include "cuda/draw_views.h"

#include "cuda/kernel.h"

namespace ikem_fast::cuda {

namespace {

constexpr int kDrawThreads = 128;

// A thread per view of a sample.
__global__ void __launch_bounds__(kDrawThreads)
    draw_views_kernel(DrawnViews drawn, const int64_t* __restrict__ indices, int num_samples, int num_draws,
                      uint64_t seed, const int64_t* __restrict__ epoch, AugmentationRanges ranges) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kDrawThreads + threadIdx.x;
  if (i >= num_draws) return;
  const DrawnParameters parameters =
      math::draw_parameters(seed, static_cast<uint32_t>(*epoch), static_cast<uint32_t>(indices[i % num_samples]),
                            static_cast<uint32_t>(i / num_samples), ranges);
  drawn.crop_start[i] = parameters.crop_start;
  for (int k = 0; k < 6; ++k) drawn.shear[6 * i + k] = parameters.shear[k];
  drawn.camera_scale[i] = parameters.camera_scale;
  for (int k = 0; k < 3; ++k) drawn.camera_angles[3 * i + k] = parameters.camera_angles[k];
  drawn.motion_scale[i] = parameters.motion_scale;
}

}  // namespace

cudaError_t draw_views(const DrawnViews& drawn, const int64_t* indices, int64_t num_samples, int64_t num_views,
                       uint64_t seed, const int64_t* epoch, const AugmentationRanges& ranges, cudaStream_t stream) {
  const int64_t num_draws = num_samples * num_views;
  if (num_draws == 0) return cudaSuccess;
  if (num_draws > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t blocks = (num_draws + kDrawThreads - 1) / kDrawThreads;
  return IKEM_LAUNCH(draw_views_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kDrawThreads), 0, stream, drawn,
                     indices, static_cast<int>(num_samples), static_cast<int>(num_draws), seed, epoch, ranges);
}

}  // namespace ikem_fast::cuda
