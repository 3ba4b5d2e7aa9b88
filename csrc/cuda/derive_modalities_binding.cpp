// The operator derive_modalities and its backward on CUDA tensors: checks, output, launch.
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

// What both directions take, checked, dense and as kernels take it.
struct Input {
  Input(const Tensor& given_clips, const Tensor& given_num_frames, const std::vector<int64_t>& bone_parents,
        const std::vector<int64_t>& previous_bones, const std::vector<int64_t>& chest_normal,
        const std::vector<int64_t>& modalities)
      : clips(given_clips), num_frames(given_num_frames) {
    check_tensors(clips, num_frames);
    const std::string problem = find_problem(clips.size(3), bone_parents, previous_bones, chest_normal, modalities);
    STD_TORCH_CHECK(problem.empty(), problem);
    modality_sizes = sizes_of(clips);
    modality_sizes.insert(modality_sizes.begin(), static_cast<int64_t>(modalities.size()));
    shape = {static_cast<int>(clips.size(0)), static_cast<int>(clips.size(2)), static_cast<int>(clips.size(3)),
             static_cast<int>(clips.size(4))};
    skeleton = make_skeleton(bone_parents, previous_bones, chest_normal);
    rows = make_output_rows(modalities);
  }
  // To be called with a guard on the clips' device.
  void make_dense() {
    clips = torch::stable::contiguous(clips);
    num_frames = torch::stable::contiguous(num_frames);
  }
  template <typename T>
  const T* clip_values() const {
    return static_cast<const T*>(clips.const_data_ptr());
  }
  const int64_t* frame_counts() const { return static_cast<const int64_t*>(num_frames.const_data_ptr()); }
  bool is_float() const { return clips.scalar_type() == ScalarType::Float; }

  Tensor clips;
  Tensor num_frames;
  std::vector<int64_t> modality_sizes;  // (S, N, 3, T, V, M)
  ClipShape shape;
  Skeleton skeleton;
  OutputRows rows;
};

void check_launch(const char* name, cudaError_t error, const Tensor& clips) {
  STD_TORCH_CHECK(error == cudaSuccess, name, " cannot run on clips ", describe_sizes(clips), ": ",
                  cudaGetErrorString(error));
}

template <typename T>
cudaError_t launch(Tensor& output, const Input& input) {
  return derive_modalities(static_cast<T*>(output.mutable_data_ptr()), input.clip_values<T>(), input.frame_counts(),
                           input.shape, input.skeleton, input.rows, current_stream(input.clips));
}

template <typename T>
cudaError_t launch_backward(Tensor& output, const Tensor& gradient, const Input& input) {
  return derive_modalities_backward(static_cast<T*>(output.mutable_data_ptr()),
                                    static_cast<const T*>(gradient.const_data_ptr()), input.clip_values<T>(),
                                    input.frame_counts(), input.shape, input.skeleton, input.rows,
                                    current_stream(input.clips));
}

Tensor derive_modalities_op(const Tensor& clips, const Tensor& num_frames, std::vector<int64_t> bone_parents,
                            std::vector<int64_t> previous_bones, std::vector<int64_t> chest_normal,
                            std::vector<int64_t> modalities) {
  Input input(clips, num_frames, bone_parents, previous_bones, chest_normal, modalities);
  const torch::stable::accelerator::DeviceGuard guard(clips.get_device_index());
  input.make_dense();
  Tensor output = torch::stable::new_empty(input.clips, input.modality_sizes);
  check_launch("derive_modalities",
               input.is_float() ? launch<float>(output, input) : launch<double>(output, input), clips);
  return output;
}

Tensor derive_modalities_backward_op(const Tensor& clips, const Tensor& num_frames, std::vector<int64_t> bone_parents,
                                     std::vector<int64_t> previous_bones, std::vector<int64_t> chest_normal,
                                     std::vector<int64_t> modalities, const Tensor& gradient) {
  Input input(clips, num_frames, bone_parents, previous_bones, chest_normal, modalities);
  STD_TORCH_CHECK(sizes_of(gradient) == input.modality_sizes && gradient.scalar_type() == clips.scalar_type() &&
                      gradient.is_cuda() && gradient.get_device_index() == clips.get_device_index(),
                  "gradient must be that of ", modalities.size(), " modalities of clips ", describe_sizes(clips),
                  ", in their dtype and on their device, got ", describe_sizes(gradient), " of dtype number ",
                  static_cast<int>(gradient.scalar_type()));
  const torch::stable::accelerator::DeviceGuard guard(clips.get_device_index());
  input.make_dense();
  const Tensor dense_gradient = torch::stable::contiguous(gradient);
  Tensor output = torch::stable::new_empty(input.clips, sizes_of(clips));
  check_launch("derive_modalities_backward",
               input.is_float() ? launch_backward<float>(output, dense_gradient, input)
                                : launch_backward<double>(output, dense_gradient, input),
               clips);
  return output;
}

}  // namespace

}  // namespace ikem_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ikem_fast, CUDA, m) {
  m.impl("derive_modalities", TORCH_BOX(&ikem_fast::cuda::derive_modalities_op));
  m.impl("derive_modalities_backward", TORCH_BOX(&ikem_fast::cuda::derive_modalities_backward_op));
}
