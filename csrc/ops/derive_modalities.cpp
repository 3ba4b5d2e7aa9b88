#include "ops/derive_modalities.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

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

}  // namespace

at::Tensor derive_modalities(const at::Tensor& clips, const at::Tensor& num_frames, at::IntArrayRef bone_parents,
                             at::IntArrayRef previous_bones, at::IntArrayRef chest_normal, at::IntArrayRef modalities) {
  check_tensors(clips, num_frames);
  const std::string problem =
      find_problem(clips.size(3), bone_parents.vec(), previous_bones.vec(), chest_normal.vec(), modalities.vec());
  TORCH_CHECK_VALUE(problem.empty(), problem);
  const at::Tensor dense_clips = clips.contiguous();
  const at::Tensor dense_frames = num_frames.contiguous();
  const int64_t* frame_counts = dense_frames.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < dense_frames.size(0); ++n) {
    TORCH_CHECK_VALUE(frame_counts[n] > 0, "num_frames must be above 0, got ", frame_counts[n], " for clip ", n);
  }

  std::vector<int64_t> sizes{static_cast<int64_t>(modalities.size())};
  sizes.insert(sizes.end(), clips.sizes().begin(), clips.sizes().end());
  at::Tensor output = at::empty(sizes, clips.options().memory_format(at::MemoryFormat::Contiguous));
  if (output.numel() == 0) return output;

  const SkeletonNumbers numbers(bone_parents, previous_bones, chest_normal);
  cpu::DeriveModalities parameters;
  parameters.clips = dense_clips.const_data_ptr();
  parameters.output = output.mutable_data_ptr();
  parameters.num_frames = frame_counts;
  parameters.is_double = clips.scalar_type() == at::kDouble;
  parameters.num_clips = clips.size(0);
  parameters.clip_frames = clips.size(2);
  parameters.num_persons = clips.size(4);
  parameters.skeleton = numbers.skeleton();
  parameters.num_outputs = static_cast<int64_t>(modalities.size());
  parameters.modalities = modalities.data();

  const auto derive_blocks = IKEM_DISPATCH_CPU(derive_modalities);
  constexpr int64_t kBlocksPerTask = 8;  // some ten microseconds of work
  at::parallel_for(0, parameters.num_clips * parameters.blocks_per_clip(), kBlocksPerTask,
                   [&](int64_t begin, int64_t end) { derive_blocks(parameters, begin, end); });
  return output;
}

TORCH_LIBRARY_IMPL(ikem_fast, CPU, m) { m.impl("derive_modalities", &derive_modalities); }

}  // namespace ikem_fast
