#include "ops/draw_views.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/draw_views.h"
#include "ops/draw_views_checks.h"

namespace ikem_fast {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> draw_views(
    const at::Tensor& indices, int64_t seed, const at::Tensor& epoch, int64_t num_views, int64_t num_frames,
    int64_t crop_padding_ratio, double shear, double camera_view) {
  TORCH_CHECK_VALUE(indices.dim() == 1 && indices.scalar_type() == at::kLong, "indices must be (B,) int64, got ",
                    indices.sizes(), " ", indices.scalar_type());
  TORCH_CHECK_VALUE(epoch.dim() == 1 && epoch.size(0) == 1 && epoch.scalar_type() == at::kLong,
                    "epoch must be (1,) int64, got ", epoch.sizes(), " ", epoch.scalar_type());
  const int64_t epoch_number = *epoch.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(epoch_number >= 0 && epoch_number <= UINT32_MAX, "epoch must be 0 ... 2^32 - 1, got ",
                    epoch_number);
  const std::string problem = find_draw_problem(num_views, num_frames, crop_padding_ratio, shear, camera_view);
  TORCH_CHECK_VALUE(problem.empty(), problem);
  const at::Tensor dense_indices = indices.contiguous();
  cpu::DrawViews parameters;
  parameters.indices = dense_indices.const_data_ptr<int64_t>();
  parameters.num_samples = indices.size(0);
  for (int64_t b = 0; b < parameters.num_samples; ++b) {
    TORCH_CHECK_VALUE(parameters.indices[b] >= 0 && parameters.indices[b] <= UINT32_MAX,
                      "indices must be 0 ... 2^32 - 1, got ", parameters.indices[b], " in place ", b);
  }
  parameters.seed = static_cast<uint64_t>(seed);
  parameters.epoch = static_cast<uint32_t>(epoch_number);
  parameters.ranges = augmentation_ranges(num_frames, crop_padding_ratio, shear, camera_view);

  const int64_t batch = indices.size(0);
  const auto floats = indices.options().dtype(at::kFloat);
  const at::Tensor crop_start = at::empty({num_views, batch}, indices.options());
  const at::Tensor shears = at::empty({num_views, batch, 2, 3}, floats);
  const at::Tensor camera_scale = at::empty({num_views, batch}, floats);
  const at::Tensor camera_angles = at::empty({num_views, batch, 3}, floats);
  const at::Tensor motion_scale = at::empty({num_views, batch}, floats);
  parameters.crop_start = crop_start.mutable_data_ptr<int64_t>();
  parameters.shear = shears.mutable_data_ptr<float>();
  parameters.camera_scale = camera_scale.mutable_data_ptr<float>();
  parameters.camera_angles = camera_angles.mutable_data_ptr<float>();
  parameters.motion_scale = motion_scale.mutable_data_ptr<float>();

  const auto draw = IKEM_DISPATCH_CPU(draw_views);
  constexpr int64_t kDrawsPerTask = 1024;
  at::parallel_for(0, num_views * batch, kDrawsPerTask,
                   [&](int64_t begin, int64_t end) { draw(parameters, begin, end); });
  return {crop_start, shears, camera_scale, camera_angles, motion_scale};
}

TORCH_LIBRARY_IMPL(ikem_fast, CPU, m) { m.impl("draw_views", &draw_views); }

}  // namespace ikem_fast
