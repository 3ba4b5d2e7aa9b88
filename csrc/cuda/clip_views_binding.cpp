// The operator clip_views on CUDA tensors: checks, outputs, launch.
#include "cuda/clip_views.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/skeleton_arguments.h"
#include "cuda/stable_tensor.h"
#include "ops/derive_modalities_checks.h"

namespace ikem_fast::cuda {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool is_float_like(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

void check_clips(const Tensor& clips, const Tensor& num_frames, ScalarType dtype) {
  STD_TORCH_CHECK(clips.dim() == 5 && clips.size(1) == 3 && is_float_like(clips.scalar_type()),
                  "clips must be (N, 3, T, V, M) float32, float16 or bfloat16 on CUDA, got ", describe_sizes(clips),
                  " of dtype number ", static_cast<int>(clips.scalar_type()));
  int64_t dense_stride = 1;
  for (int64_t dimension = 4; dimension > 0; --dimension) {
    const int64_t size = clips.size(dimension);
    STD_TORCH_CHECK(size > 0 && size <= INT32_MAX, "clips must have at least one frame, joint and person, got ",
                    describe_sizes(clips));
    STD_TORCH_CHECK(size == 1 || clips.stride(dimension) == dense_stride,
                    "clips must be contiguous within each clip (only the first dimension may have any stride)");
    dense_stride *= size;
  }
  STD_TORCH_CHECK(clips.size(3) <= Skeleton::kMaxJoints, "clips must have at most ",
                  static_cast<int>(Skeleton::kMaxJoints), " joints on CUDA, got ", clips.size(3));
  STD_TORCH_CHECK(is_float_like(dtype), "dtype must be float32, bfloat16 or float16 on CUDA, got dtype number ",
                  static_cast<int>(dtype));
  STD_TORCH_CHECK(num_frames.dim() == 1 && num_frames.size(0) == clips.size(0) &&
                      num_frames.scalar_type() == ScalarType::Long,
                  "num_frames must be (", clips.size(0), ",) int64, got ", describe_sizes(num_frames),
                  " of dtype number ", static_cast<int>(num_frames.scalar_type()));
}

void check_device(const char* name, const Tensor& tensor, const Tensor& clips) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == clips.get_device_index(), name,
                  " must be on the clips' device, CUDA ", clips.get_device_index());
}

std::optional<Tensor> dense_parameter(const char* name, const std::optional<Tensor>& parameter, const Tensor& clips,
                                      const std::vector<int64_t>& sizes, ScalarType type) {
  if (!parameter) return std::nullopt;
  bool fits = parameter->dim() == static_cast<int64_t>(sizes.size()) && parameter->scalar_type() == type;
  for (size_t i = 0; i < sizes.size() && fits; ++i) fits = parameter->size(static_cast<int64_t>(i)) == sizes[i];
  STD_TORCH_CHECK(fits, name, " must have one value for each of ", sizes[0], " views of ", sizes[1], " samples, ",
                  type == ScalarType::Long ? "int64" : "float32", ", got ", describe_sizes(*parameter),
                  " of dtype number ", static_cast<int>(parameter->scalar_type()));
  check_device(name, *parameter, clips);
  return torch::stable::contiguous(*parameter);
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

StoredElement element(ScalarType type) {
  return type == ScalarType::Half       ? StoredElement::kHalf
         : type == ScalarType::BFloat16 ? StoredElement::kBFloat16
                                        : StoredElement::kFloat;
}

template <typename View>
cudaError_t launch(Tensor& views, Tensor& statistics, Tensor& scratch, bool has_statistics, const ClipViewsInput& input,
                   const Skeleton& skeleton, const OutputRows& rows, cudaStream_t stream) {
  return clip_views<View>(static_cast<View*>(views.mutable_data_ptr()),
                          has_statistics ? static_cast<double*>(statistics.mutable_data_ptr()) : nullptr,
                          static_cast<double*>(scratch.mutable_data_ptr()), input, skeleton, rows, stream);
}

std::tuple<Tensor, Tensor> clip_views_op(
    const Tensor& clips, std::optional<Tensor> indices, const Tensor& num_frames, std::optional<Tensor> crop_start,
    int64_t crop_padding, std::optional<Tensor> shear, std::optional<Tensor> camera_scale,
    std::optional<Tensor> camera_angles, std::optional<Tensor> motion_scale, std::vector<int64_t> bone_parents,
    std::vector<int64_t> previous_bones, std::vector<int64_t> chest_normal, std::vector<int64_t> modalities,
    int64_t num_views, ScalarType dtype, bool statistics) {
  check_clips(clips, num_frames, dtype);
  check_device("num_frames", num_frames, clips);
  const std::string problem = find_problem(clips.size(3), bone_parents, previous_bones, chest_normal, modalities);
  STD_TORCH_CHECK(problem.empty(), problem);
  STD_TORCH_CHECK(num_views > 0 && num_views <= INT32_MAX, "num_views must be above 0, got ", num_views);
  STD_TORCH_CHECK(crop_padding >= 0 && crop_padding <= clips.size(2), "crop_padding must be 0 ... ", clips.size(2),
                  ", got ", crop_padding);
  if (indices) {
    STD_TORCH_CHECK(indices->dim() == 1 && indices->scalar_type() == ScalarType::Long,
                    "indices must be (B,) int64, got ", describe_sizes(*indices), " of dtype number ",
                    static_cast<int>(indices->scalar_type()));
    check_device("indices", *indices, clips);
  }
  const int64_t batch = indices ? indices->size(0) : clips.size(0);
  STD_TORCH_CHECK(batch <= INT32_MAX, "indices must have at most 2^31 - 1 values, got ", batch);

  const torch::stable::accelerator::DeviceGuard guard(clips.get_device_index());
  const auto parameter = [&](const char* name, const std::optional<Tensor>& values, std::vector<int64_t> more = {}) {
    std::vector<int64_t> sizes{num_views, batch};
    sizes.insert(sizes.end(), more.begin(), more.end());
    return dense_parameter(name, values, clips, sizes, ScalarType::Float);
  };
  const std::optional<Tensor> crop_starts =
      dense_parameter("crop_start", crop_start, clips, {num_views, batch}, ScalarType::Long);
  const std::optional<Tensor> shears = parameter("shear", shear, {2, 3});
  const std::optional<Tensor> camera_scales = parameter("camera_scale", camera_scale);
  const std::optional<Tensor> camera_turns = parameter("camera_angles", camera_angles, {3});
  const std::optional<Tensor> motion_scales = parameter("motion_scale", motion_scale);
  if (indices) indices = torch::stable::contiguous(*indices);
  const Tensor dense_frames = torch::stable::contiguous(num_frames);

  const int64_t num_outputs = static_cast<int64_t>(modalities.size());
  const ClipViewsInput input{clips.const_data_ptr(),
                             element(clips.scalar_type()),
                             clips.stride(0),
                             clips.size(0),
                             static_cast<const int64_t*>(dense_frames.const_data_ptr()),
                             data_or_null<int64_t>(indices),
                             data_or_null<int64_t>(crop_starts),
                             static_cast<int>(crop_padding),
                             data_or_null<float>(shears),
                             data_or_null<float>(camera_scales),
                             data_or_null<float>(camera_turns),
                             data_or_null<float>(motion_scales),
                             static_cast<int>(batch),
                             static_cast<int>(num_views),
                             static_cast<int>(clips.size(2)),
                             static_cast<int>(clips.size(3)),
                             static_cast<int>(clips.size(4)),
                             static_cast<int>(num_outputs)};
  Tensor views = torch::stable::new_empty(
      dense_frames, {num_views, num_outputs, batch * clips.size(4), clips.size(2), clips.size(3), 3}, dtype);
  Tensor totals = statistics ? torch::stable::new_empty(dense_frames, {2, num_views, num_outputs, clips.size(3), 3},
                                                        ScalarType::Double)
                             : torch::stable::new_empty(dense_frames, {0}, ScalarType::Double);
  Tensor scratch =
      torch::stable::new_empty(dense_frames, {statistics ? clip_views_scratch_size(input) : 0}, ScalarType::Double);

  const Skeleton skeleton = make_skeleton(bone_parents, previous_bones, chest_normal);
  const OutputRows rows = make_output_rows(modalities);
  const auto launch_for = dtype == ScalarType::Half       ? &launch<__half>
                          : dtype == ScalarType::BFloat16 ? &launch<__nv_bfloat16>
                                                          : &launch<float>;
  const cudaError_t error =
      launch_for(views, totals, scratch, statistics, input, skeleton, rows, current_stream(clips));
  STD_TORCH_CHECK(error == cudaSuccess, "clip_views cannot run on clips ", describe_sizes(clips), ": ",
                  cudaGetErrorString(error));
  return {views, totals};
}

}  // namespace

}  // namespace ikem_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ikem_fast, CUDA, m) { m.impl("clip_views", TORCH_BOX(&ikem_fast::cuda::clip_views_op)); }
