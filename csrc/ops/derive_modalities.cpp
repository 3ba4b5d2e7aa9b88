#include "ops/derive_modalities.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/derive_modalities.h"
#include "ops/derive_modalities_checks.h"
#include "ops/skeleton_numbers.h"

namespace ikem_fast {

namespace {

void check_tensors(const at::Tensor& clips, const at::Tensor& num_frames) {
  TORCH_CHECK_VALUE(
      clips.dim() == 5 && clips.size(1) == 3 && (clips.scalar_type() == at::kFloat || clips.scalar_type() == at::kDouble),
      "clips must be (N, 3, T, V, M) float32 or float64, got ", clips.sizes(), " ", clips.scalar_type());
  for (int64_t dimension = 2; dimension < 5; ++dimension) {
    TORCH_CHECK_VALUE(clips.size(dimension) > 0, "clips must have at least one frame, joint and person, got ",
                      clips.sizes());
  }
  TORCH_CHECK_VALUE(num_frames.dim() == 1 && num_frames.size(0) == clips.size(0) && num_frames.scalar_type() == at::kLong,
                    "num_frames must be (", clips.size(0), ",) int64, got ", num_frames.sizes(), " ",
                    num_frames.scalar_type());
  TORCH_CHECK_VALUE(num_frames.device() == clips.device(), "num_frames must be on the clips' device ", clips.device(),
                    ", got ", num_frames.device());
}

// What both directions take, checked, dense and kept for as long as a kernel runs.
class Input {
 public:
  Input(const at::Tensor& clips, const at::Tensor& num_frames, at::IntArrayRef bone_parents,
        at::IntArrayRef previous_bones, at::IntArrayRef chest_normal, at::IntArrayRef modalities)
      : modalities_(modalities) {
    check_tensors(clips, num_frames);
    const std::string problem =
        find_problem(clips.size(3), bone_parents.vec(), previous_bones.vec(), chest_normal.vec(), modalities.vec());
    TORCH_CHECK_VALUE(problem.empty(), problem);
    clips_ = clips.contiguous();
    num_frames_ = num_frames.contiguous();
    const int64_t* frame_counts = num_frames_.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < num_frames_.size(0); ++n) {
      TORCH_CHECK_VALUE(frame_counts[n] > 0, "num_frames must be above 0, got ", frame_counts[n], " for clip ", n);
    }
    numbers_.emplace(bone_parents, previous_bones, chest_normal);
  }

  // (S, N, 3, T, V, M)
  std::vector<int64_t> modality_sizes() const {
    std::vector<int64_t> sizes{static_cast<int64_t>(modalities_.size())};
    sizes.insert(sizes.end(), clips_.sizes().begin(), clips_.sizes().end());
    return sizes;
  }
  void fill(cpu::DeriveModalities& parameters) const {
    parameters.clips = clips_.const_data_ptr();
    parameters.num_frames = num_frames_.const_data_ptr<int64_t>();
    parameters.is_double = clips_.scalar_type() == at::kDouble;
    parameters.num_clips = clips_.size(0);
    parameters.clip_frames = clips_.size(2);
    parameters.num_persons = clips_.size(4);
    parameters.skeleton = numbers_->skeleton();
    parameters.num_outputs = static_cast<int64_t>(modalities_.size());
    parameters.modalities = modalities_.data();
  }

 private:
  at::IntArrayRef modalities_;
  at::Tensor clips_, num_frames_;
  std::optional<SkeletonNumbers> numbers_;
};

template <typename Parameters>
void run_blocks(const Parameters& parameters, void (*kernel)(const Parameters&, int64_t, int64_t)) {
  constexpr int64_t kBlocksPerTask = 8;  // some ten microseconds of work
  at::parallel_for(0, parameters.num_clips * parameters.blocks_per_clip(), kBlocksPerTask,
                   [&](int64_t begin, int64_t end) { kernel(parameters, begin, end); });
}

}  // namespace

at::Tensor derive_modalities(const at::Tensor& clips, const at::Tensor& num_frames, at::IntArrayRef bone_parents,
                             at::IntArrayRef previous_bones, at::IntArrayRef chest_normal, at::IntArrayRef modalities) {
  const Input input(clips, num_frames, bone_parents, previous_bones, chest_normal, modalities);
  at::Tensor output = at::empty(input.modality_sizes(), clips.options().memory_format(at::MemoryFormat::Contiguous));
  cpu::DeriveModalities parameters;
  input.fill(parameters);
  parameters.output = output.mutable_data_ptr();
  run_blocks(parameters, IKEM_DISPATCH_CPU(derive_modalities));
  return output;
}

at::Tensor derive_modalities_backward(const at::Tensor& clips, const at::Tensor& num_frames,
                                      at::IntArrayRef bone_parents, at::IntArrayRef previous_bones,
                                      at::IntArrayRef chest_normal, at::IntArrayRef modalities,
                                      const at::Tensor& gradient) {
  const Input input(clips, num_frames, bone_parents, previous_bones, chest_normal, modalities);
  TORCH_CHECK_VALUE(gradient.sizes() == at::IntArrayRef(input.modality_sizes()) &&
                        gradient.scalar_type() == clips.scalar_type() && gradient.device() == clips.device(),
                    "gradient must be ", at::IntArrayRef(input.modality_sizes()), " ", clips.scalar_type(), " on ",
                    clips.device(), ", got ", gradient.sizes(), " ", gradient.scalar_type(), " on ", gradient.device());
  at::Tensor output = at::empty(clips.sizes(), clips.options().memory_format(at::MemoryFormat::Contiguous));
  const at::Tensor dense_gradient = gradient.contiguous();
  cpu::DeriveModalitiesBackward parameters;
  input.fill(parameters);
  parameters.output = output.mutable_data_ptr();
  parameters.gradient = dense_gradient.const_data_ptr();
  run_blocks(parameters, IKEM_DISPATCH_CPU(derive_modalities_backward));
  return output;
}

TORCH_LIBRARY_IMPL(ikem_fast, CPU, m) {
  m.impl("derive_modalities", &derive_modalities);
  m.impl("derive_modalities_backward", &derive_modalities_backward);
}

}  // namespace ikem_fast
