#include "ops/clip_views.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "cpu/clip_views.h"
#include "cpu/workspace.h"
#include "ops/derive_modalities_checks.h"
#include "ops/skeleton_numbers.h"

namespace ikem_fast {

namespace {

bool is_float_like(at::ScalarType type) { return type == at::kFloat || type == at::kHalf || type == at::kBFloat16; }

cpu::Element element(at::ScalarType type) {
  switch (type) {
    case at::kHalf:
      return cpu::Element::kHalf;
    case at::kBFloat16:
      return cpu::Element::kBFloat16;
    case at::kDouble:
      return cpu::Element::kDouble;
    default:
      return cpu::Element::kFloat;
  }
}

void check_clips(const at::Tensor& clips, const at::Tensor& num_frames, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(clips.dim() == 5 && clips.size(1) == 3 &&
                        (is_float_like(clips.scalar_type()) || clips.scalar_type() == at::kDouble),
                    "clips must be (N, 3, T, V, M) float32, float16, bfloat16 or float64, got ", clips.sizes(), " ",
                    clips.scalar_type());
  int64_t dense_stride = 1;
  for (int64_t dimension = 4; dimension > 0; --dimension) {
    const int64_t size = clips.size(dimension);
    TORCH_CHECK_VALUE(size > 0, "clips must have at least one frame, joint and person, got ", clips.sizes());
    TORCH_CHECK_VALUE(size == 1 || clips.stride(dimension) == dense_stride,
                      "clips must be contiguous within each clip (only the first dimension may have any stride), got "
                      "strides ",
                      clips.strides(), " of ", clips.sizes());
    dense_stride *= size;
  }
  const bool fits = clips.scalar_type() == at::kDouble ? dtype == at::kDouble : is_float_like(dtype);
  TORCH_CHECK_VALUE(fits, "dtype must be float64 for float64 clips and float32, bfloat16 or float16 for others, got ",
                    dtype, " for ", clips.scalar_type());
  TORCH_CHECK_VALUE(num_frames.dim() == 1 && num_frames.size(0) == clips.size(0) && num_frames.scalar_type() == at::kLong,
                    "num_frames must be (", clips.size(0), ",) int64, got ", num_frames.sizes(), " ",
                    num_frames.scalar_type());
}

at::Tensor dense_parameter(const char* name, const std::optional<at::Tensor>& parameter, at::IntArrayRef sizes,
                           at::ScalarType type) {
  if (!parameter) return {};
  TORCH_CHECK_VALUE(parameter->sizes() == sizes && parameter->scalar_type() == type, name, " must be ", sizes, " ", type,
                    ", got ", parameter->sizes(), " ", parameter->scalar_type());
  return parameter->contiguous();
}

const void* data_or_null(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }

}  // namespace

std::tuple<at::Tensor, at::Tensor> clip_views(
    const at::Tensor& clips, const std::optional<at::Tensor>& indices, const at::Tensor& num_frames,
    const std::optional<at::Tensor>& crop_start, int64_t crop_padding, const std::optional<at::Tensor>& shear,
    const std::optional<at::Tensor>& camera_scale, const std::optional<at::Tensor>& camera_angles,
    const std::optional<at::Tensor>& motion_scale, at::IntArrayRef bone_parents, at::IntArrayRef previous_bones,
    at::IntArrayRef chest_normal, at::IntArrayRef modalities, int64_t num_views, at::ScalarType dtype, bool statistics) {
  check_clips(clips, num_frames, dtype);
  const std::string problem =
      find_problem(clips.size(3), bone_parents.vec(), previous_bones.vec(), chest_normal.vec(), modalities.vec());
  TORCH_CHECK_VALUE(problem.empty(), problem);
  TORCH_CHECK_VALUE(num_views > 0, "num_views must be above 0, got ", num_views);
  TORCH_CHECK_VALUE(crop_padding >= 0 && crop_padding <= clips.size(2), "crop_padding must be 0 ... ", clips.size(2),
                    ", got ", crop_padding);
  TORCH_CHECK_VALUE(!indices || (indices->dim() == 1 && indices->scalar_type() == at::kLong),
                    "indices must be (B,) int64, got ", indices ? indices->sizes() : at::IntArrayRef{}, " ",
                    indices ? indices->scalar_type() : at::kLong);
  const int64_t batch = indices ? indices->size(0) : clips.size(0);
  const at::ScalarType computed = clips.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor crop_starts = dense_parameter("crop_start", crop_start, {num_views, batch}, at::kLong);
  const at::Tensor shears = dense_parameter("shear", shear, {num_views, batch, 2, 3}, computed);
  const at::Tensor camera_scales = dense_parameter("camera_scale", camera_scale, {num_views, batch}, computed);
  const at::Tensor camera_turns = dense_parameter("camera_angles", camera_angles, {num_views, batch, 3}, computed);
  const at::Tensor motion_scales = dense_parameter("motion_scale", motion_scale, {num_views, batch}, computed);
  const at::Tensor dense_indices = indices ? indices->contiguous() : at::Tensor();
  const at::Tensor dense_frames = num_frames.contiguous();

  const SkeletonNumbers numbers(bone_parents, previous_bones, chest_normal);
  cpu::ClipViews parameters;
  parameters.clips = clips.const_data_ptr();
  parameters.clip_element = element(clips.scalar_type());
  parameters.clip_stride = clips.stride(0);
  parameters.num_frames = dense_frames.const_data_ptr<int64_t>();
  parameters.indices = static_cast<const int64_t*>(data_or_null(dense_indices));
  parameters.crop_start = static_cast<const int64_t*>(data_or_null(crop_starts));
  parameters.crop_padding = crop_padding;
  parameters.shear = data_or_null(shears);
  parameters.camera_scale = data_or_null(camera_scales);
  parameters.camera_angles = data_or_null(camera_turns);
  parameters.motion_scale = data_or_null(motion_scales);
  parameters.view_element = element(dtype);
  parameters.num_samples = batch;
  parameters.num_views = num_views;
  parameters.clip_frames = clips.size(2);
  parameters.num_persons = clips.size(4);
  parameters.skeleton = numbers.skeleton();
  parameters.num_outputs = static_cast<int64_t>(modalities.size());
  parameters.modalities = modalities.data();

  for (int64_t b = 0; b < batch; ++b) {
    const int64_t clip = parameters.indices ? parameters.indices[b] : b;
    TORCH_CHECK_INDEX(clip >= 0 && clip < clips.size(0), "indices must be 0 ... ", clips.size(0) - 1, ", got ", clip,
                      " in place ", b);
    TORCH_CHECK_VALUE(parameters.num_frames[clip] > 0, "num_frames must be above 0, got ", parameters.num_frames[clip],
                      " for clip ", clip);
  }
  for (int64_t i = 0; i < num_views * batch && parameters.crop_start; ++i) {
    TORCH_CHECK_VALUE(parameters.crop_start[i] >= 0 && parameters.crop_start[i] <= 2 * crop_padding,
                      "crop_start must be 0 ... ", 2 * crop_padding, ", got ", parameters.crop_start[i]);
  }

  const int64_t num_joints = clips.size(3);
  const auto options = clips.options().memory_format(at::MemoryFormat::Contiguous);
  at::Tensor views =
      at::empty({num_views, parameters.num_outputs, batch * parameters.num_persons, clips.size(2), num_joints, 3},
                options.dtype(dtype));
  at::Tensor totals = statistics ? at::zeros({2, num_views, parameters.num_outputs, num_joints, 3},
                                             clips.options().dtype(at::kDouble))
                                 : at::empty({0}, clips.options().dtype(at::kDouble));
  parameters.views = views.mutable_data_ptr();
  const int64_t num_groups = parameters.num_groups();
  const int64_t group_size = parameters.group_sums_size();
  const cpu::Workspace<double> partial_sums(statistics ? num_views * num_groups * group_size : 0);
  parameters.partial_sums = statistics ? partial_sums.data() : nullptr;

  const auto make_groups = IKEM_DISPATCH_CPU(clip_views);
  at::parallel_for(0, num_groups, 1, [&](int64_t begin, int64_t end) { make_groups(parameters, begin, end); });
  if (!statistics) return {views, totals};
  // Groups in order, so that the result is the same on any number of threads.
  double* const out = totals.mutable_data_ptr<double>();
  const int64_t half = group_size / 2;
  for (int64_t view = 0; view < num_views; ++view) {
    for (int64_t group = 0; group < num_groups; ++group) {
      const double* const sums = partial_sums.data() + (view * num_groups + group) * group_size;
      for (int64_t i = 0; i < half; ++i) {
        out[view * half + i] += sums[i];
        out[(num_views + view) * half + i] += sums[half + i];
      }
    }
  }
  return {views, totals};
}

TORCH_LIBRARY_IMPL(ikem_fast, CPU, m) { m.impl("clip_views", &clip_views); }

}  // namespace ikem_fast
