// The operator derive_modalities on CUDA tensors: checks, output, launch.
#include "cuda/derive_modalities.h"

#include <vector>

#include "cuda/skeleton_arguments.h"
#include "cuda/stable_tensor.h"
#include "ops/derive_modalities_checks.h"

namespace ikem_fast::cuda {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_tensors(const Tensor& clips, const Tensor& num_frames) {
  const ScalarType type = clips.scalar_type();
  STD_TORCH_CHECK(clips.dim() == 5 && clips.size(1) == 3 && (type == ScalarType::Float || type == ScalarType::Double),
                  "clips must be (N, 3, T, V, M) float32 or float64, got ", describe_sizes(clips), " of dtype number ",
                  static_cast<int>(type));
  for (int64_t dimension = 2; dimension < 5; ++dimension) {
    STD_TORCH_CHECK(clips.size(dimension) > 0 && clips.size(dimension) <= INT32_MAX,
                    "clips must have at least one frame, joint and person, got ", describe_sizes(clips));
  }
  STD_TORCH_CHECK(num_frames.dim() == 1 && num_frames.size(0) == clips.size(0) &&
                      num_frames.scalar_type() == ScalarType::Long,
                  "num_frames must be (", clips.size(0), ",) int64, got ", describe_sizes(num_frames),
                  " of dtype number ", static_cast<int>(num_frames.scalar_type()));
  STD_TORCH_CHECK(num_frames.is_cuda() && num_frames.get_device_index() == clips.get_device_index(),
                  "num_frames must be on the clips' device, CUDA ", clips.get_device_index());
  STD_TORCH_CHECK(clips.size(3) <= Skeleton::kMaxJoints, "clips must have at most ",
                  static_cast<int>(Skeleton::kMaxJoints), " joints on CUDA, got ", clips.size(3));
}

template <typename T>
cudaError_t launch(Tensor& output, const Tensor& clips, const Tensor& num_frames, const ClipShape& shape,
                   const Skeleton& skeleton, const OutputRows& rows) {
  return derive_modalities(static_cast<T*>(output.mutable_data_ptr()), static_cast<const T*>(clips.const_data_ptr()),
                           static_cast<const int64_t*>(num_frames.const_data_ptr()), shape, skeleton, rows,
                           current_stream(clips));
}

Tensor derive_modalities_op(const Tensor& clips, const Tensor& num_frames, std::vector<int64_t> bone_parents,
                            std::vector<int64_t> previous_bones, std::vector<int64_t> chest_normal,
                            std::vector<int64_t> modalities) {
  check_tensors(clips, num_frames);
  const std::string problem =
      find_problem(clips.size(3), bone_parents, previous_bones, chest_normal, modalities);
  STD_TORCH_CHECK(problem.empty(), problem);

  const torch::stable::accelerator::DeviceGuard guard(clips.get_device_index());
  const Tensor dense_clips = torch::stable::contiguous(clips);
  const Tensor dense_frames = torch::stable::contiguous(num_frames);
  std::vector<int64_t> sizes{static_cast<int64_t>(modalities.size())};
  for (int64_t i = 0; i < clips.dim(); ++i) sizes.push_back(clips.size(i));
  Tensor output = torch::stable::new_empty(dense_clips, sizes);

  const ClipShape shape{static_cast<int>(clips.size(0)), static_cast<int>(clips.size(2)),
                        static_cast<int>(clips.size(3)), static_cast<int>(clips.size(4))};
  const Skeleton skeleton = make_skeleton(bone_parents, previous_bones, chest_normal);
  const OutputRows rows = make_output_rows(modalities);
  const cudaError_t error = clips.scalar_type() == ScalarType::Float
                                ? launch<float>(output, dense_clips, dense_frames, shape, skeleton, rows)
                                : launch<double>(output, dense_clips, dense_frames, shape, skeleton, rows);
  STD_TORCH_CHECK(error == cudaSuccess, "derive_modalities cannot run on clips ", describe_sizes(clips), ": ",
                  cudaGetErrorString(error));
  return output;
}

}  // namespace

}  // namespace ikem_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ikem_fast, CUDA, m) {
  m.impl("derive_modalities", TORCH_BOX(&ikem_fast::cuda::derive_modalities_op));
}
