#include "cpu/derive_modalities.h"

#include "cpu/modality_block.h"
#include "cpu/workspace.h"

namespace ikem_fast::cpu::CPU_CAPABILITY {

namespace {

template <typename T>
void derive_blocks(const DeriveModalities& p, int64_t begin, int64_t end) {
  using Block = ModalityBlock<T>;
  const int64_t lanes = p.num_lanes();
  const Workspace<T> workspace(Block::kNumBuffers * Block::buffer_size(lanes, p.block_frames()));
  Block block(p.skeleton, p.num_persons, p.modalities, p.num_outputs, p.block_frames(), workspace.data());
  for (int64_t number = begin; number < end; ++number) {
    const int64_t clip = number / p.blocks_per_clip();
    const int64_t first = number % p.blocks_per_clip() * p.block_frames();
    const int64_t frames = std::min(p.block_frames(), p.clip_frames - first);
    // Of coordinate 0 in the block's first frame, in the input and in every modality.
    const int64_t start = (clip * 3 * p.clip_frames + first) * lanes;
    const int64_t plane = p.clip_frames * lanes;
    const T* const clips = static_cast<const T*>(p.clips) + start;
    const T* const joints[3] = {clips, clips + plane, clips + 2 * plane};
    block.load(joints, frames, p.clip_frames - first - frames, math::time_scale<T>(p.num_frames[clip]));
    for (int64_t s = 0; s < p.num_outputs; ++s) {
      T* const out = static_cast<T*>(p.output) + s * p.num_clips * 3 * plane + start;
      block.derive(static_cast<Modality>(p.modalities[s]), [&](int64_t i, const auto& values, int64_t count) {
        values.x.store(out + i, count);
        values.y.store(out + plane + i, count);
        values.z.store(out + 2 * plane + i, count);
      });
    }
  }
}

}  // namespace

void derive_modalities(const DeriveModalities& parameters, int64_t begin, int64_t end) {
  if (parameters.is_double) {
    derive_blocks<double>(parameters, begin, end);
  } else {
    derive_blocks<float>(parameters, begin, end);
  }
}

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
