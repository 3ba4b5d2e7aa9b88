// The operator draw_views on CUDA tensors: checks, outputs, launch.
#include "cuda/draw_views.h"

#include <tuple>

#include "cuda/stable_tensor.h"
#include "ops/draw_views_checks.h"

namespace ikem_fast::cuda {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> draw_views_op(const Tensor& indices, int64_t seed,
                                                                 const Tensor& epoch, int64_t num_views,
                                                                 int64_t num_frames, int64_t crop_padding_ratio,
                                                                 double shear, double camera_view) {
  STD_TORCH_CHECK(indices.dim() == 1 && indices.scalar_type() == ScalarType::Long, "indices must be (B,) int64, got ",
                  describe_sizes(indices), " of dtype number ", static_cast<int>(indices.scalar_type()));
  STD_TORCH_CHECK(epoch.dim() == 1 && epoch.size(0) == 1 && epoch.scalar_type() == ScalarType::Long,
                  "epoch must be (1,) int64, got ", describe_sizes(epoch), " of dtype number ",
                  static_cast<int>(epoch.scalar_type()));
  STD_TORCH_CHECK(indices.is_cuda() && epoch.is_cuda() && epoch.get_device_index() == indices.get_device_index(),
                  "epoch must be on the device of indices");
  const std::string problem = find_draw_problem(num_views, num_frames, crop_padding_ratio, shear, camera_view);
  STD_TORCH_CHECK(problem.empty(), problem);

  const torch::stable::accelerator::DeviceGuard guard(indices.get_device_index());
  const Tensor dense_indices = torch::stable::contiguous(indices);
  const int64_t batch = indices.size(0);
  const auto empty = [&](std::vector<int64_t> sizes, ScalarType type) {
    return torch::stable::new_empty(dense_indices, sizes, type);
  };
  Tensor crop_start = empty({num_views, batch}, ScalarType::Long);
  Tensor shears = empty({num_views, batch, 2, 3}, ScalarType::Float);
  Tensor camera_scale = empty({num_views, batch}, ScalarType::Float);
  Tensor camera_angles = empty({num_views, batch, 3}, ScalarType::Float);
  Tensor motion_scale = empty({num_views, batch}, ScalarType::Float);
  const auto floats = [](Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); };
  const DrawnViews drawn{static_cast<int64_t*>(crop_start.mutable_data_ptr()), floats(shears), floats(camera_scale),
                         floats(camera_angles), floats(motion_scale)};
  const cudaError_t error = draw_views(drawn, static_cast<const int64_t*>(dense_indices.const_data_ptr()), batch,
                                       num_views, static_cast<uint64_t>(seed),
                                       static_cast<const int64_t*>(epoch.const_data_ptr()),
                                       augmentation_ranges(num_frames, crop_padding_ratio, shear, camera_view),
                                       current_stream(indices));
  STD_TORCH_CHECK(error == cudaSuccess, "draw_views cannot draw ", num_views, " views of ", batch, " samples: ",
                  cudaGetErrorString(error));
  return {crop_start, shears, camera_scale, camera_angles, motion_scale};
}

}  // namespace

}  // namespace ikem_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ikem_fast, CUDA, m) { m.impl("draw_views", TORCH_BOX(&ikem_fast::cuda::draw_views_op)); }
