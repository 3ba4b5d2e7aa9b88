#include "ops/derive_modalities.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/derive_modalities.h"

namespace ikem_fast {

namespace {

void check_joints(const char* name, at::IntArrayRef joints, int64_t num_joints) {
  for (int64_t joint : joints) {
    TORCH_CHECK_VALUE(joint >= 0 && joint < num_joints, name, " must hold joints 0 ... ", num_joints - 1, ", got ", joint);
  }
}

// The joint that is its own parent.
int64_t find_root(at::IntArrayRef bone_parents) {
  int64_t root = -1;
  int64_t count = 0;
  for (int64_t joint = 0; joint < static_cast<int64_t>(bone_parents.size()); ++joint) {
    if (bone_parents[joint] == joint) {
      root = joint;
      ++count;
    }
  }
  TORCH_CHECK_VALUE(count == 1, "bone_parents must have exactly one root (a joint that is its own parent), got ", count);
  return root;
}

void check_arguments(const at::Tensor& clips, const at::Tensor& num_frames, at::IntArrayRef bone_parents,
                     at::IntArrayRef previous_bones, at::IntArrayRef chest_normal, at::IntArrayRef modalities) {
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
  const int64_t num_joints = clips.size(3);
  TORCH_CHECK_VALUE(static_cast<int64_t>(bone_parents.size()) == num_joints &&
                        static_cast<int64_t>(previous_bones.size()) == num_joints,
                    "bone_parents and previous_bones must each name one joint for every one of the clips' ", num_joints,
                    ", got ", bone_parents.size(), " and ", previous_bones.size());
  check_joints("bone_parents", bone_parents, num_joints);
  check_joints("previous_bones", previous_bones, num_joints);
  TORCH_CHECK_VALUE(chest_normal.empty() || chest_normal.size() == 3, "chest_normal must name three joints or none, got ",
                    chest_normal.size());
  check_joints("chest_normal", chest_normal, num_joints);
  TORCH_CHECK_VALUE(!modalities.empty(), "modalities must name at least one modality, got none");
  for (int64_t modality : modalities) {
    TORCH_CHECK_VALUE(modality >= 0 && modality < kNumModalities, "modalities must hold numbers 0 ... ",
                      kNumModalities - 1, ", got ", modality);
  }
}

}  // namespace

at::Tensor derive_modalities(const at::Tensor& clips, const at::Tensor& num_frames, at::IntArrayRef bone_parents,
                             at::IntArrayRef previous_bones, at::IntArrayRef chest_normal, at::IntArrayRef modalities) {
  check_arguments(clips, num_frames, bone_parents, previous_bones, chest_normal, modalities);
  const int64_t root = find_root(bone_parents);
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

  const std::vector<int32_t> parents(bone_parents.begin(), bone_parents.end());
  const std::vector<int32_t> previous(previous_bones.begin(), previous_bones.end());
  cpu::DeriveModalities parameters;
  parameters.clips = dense_clips.const_data_ptr();
  parameters.output = output.mutable_data_ptr();
  parameters.num_frames = frame_counts;
  parameters.is_double = clips.scalar_type() == at::kDouble;
  parameters.num_clips = clips.size(0);
  parameters.clip_frames = clips.size(2);
  parameters.num_joints = clips.size(3);
  parameters.num_persons = clips.size(4);
  parameters.bone_parents = parents.data();
  parameters.previous_bones = previous.data();
  parameters.root = root;
  parameters.has_chest_normal = !chest_normal.empty();
  std::copy(chest_normal.begin(), chest_normal.end(), parameters.chest_normal);
  parameters.num_outputs = static_cast<int64_t>(modalities.size());
  parameters.modalities = modalities.data();

  const auto derive_blocks = IKEM_DISPATCH_CPU(derive_modalities);
  const int64_t workspace_bytes =
      cpu::DeriveModalities::kNumBuffers * parameters.buffer_size() * static_cast<int64_t>(clips.element_size());
  constexpr int64_t kBlocksPerTask = 8;  // some ten microseconds of work
  at::parallel_for(0, parameters.num_clips * parameters.blocks_per_clip(), kBlocksPerTask,
                   [&](int64_t begin, int64_t end) {
                     const at::DataPtr workspace = c10::GetCPUAllocator()->allocate(workspace_bytes);
                     derive_blocks(parameters, workspace.get(), begin, end);
                   });
  return output;
}

TORCH_LIBRARY_IMPL(ikem_fast, CPU, m) { m.impl("derive_modalities", &derive_modalities); }

}  // namespace ikem_fast
