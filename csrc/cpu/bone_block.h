// Bones, rotation axes and angles of a block of consecutive frames, for the CPU kernels that derive modalities or pull
// their gradients back. Include it only in sources of csrc/cpu.
//
// Lanes are the values that one coordinate has in one frame, joint by joint, the persons of a joint together. Lanes of
// consecutive frames lie one after another, so that registers are filled across frames and only a block's end is partial.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/skeleton.h"
#include "cpu/vectorized_real.h"
#include "math/modalities.h"

namespace ikem_fast::cpu::CPU_CAPABILITY {

namespace {

// out[joint] = in[sources[joint]] in every frame, where a joint is kPersons values. Copies of known size beat the
// gather instructions, which fetch one value at a time.
template <int kPersons, typename T>
void gather_joints(const T* in, const int32_t* sources, int64_t num_joints, int64_t num_frames, T* out) {
  for (int64_t t = 0; t < num_frames; ++t) {
    for (int64_t joint = 0; joint < num_joints; ++joint) {
      std::memcpy(out, in + sources[joint] * kPersons, kPersons * sizeof(T));
      out += kPersons;
    }
    in += num_joints * kPersons;
  }
}

#ifdef CPU_CAPABILITY_AVX512
// A frame of up to 32 joints fits into two registers, from which one instruction picks 16 joints. Writes up to 16 values
// beyond the last frame.
inline void gather_32_joints(const float* in, const int32_t* sources, int64_t num_joints, int64_t num_frames,
                             float* out) {
  const auto mask = [](int64_t count) { return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1); };
  const __mmask16 low = mask(num_joints);
  const __mmask16 high = mask(num_joints - 16);
  const __m512i first_sources = _mm512_maskz_loadu_epi32(low, sources);
  const __m512i last_sources = _mm512_maskz_loadu_epi32(high, sources + 16);
  for (int64_t t = 0; t < num_frames; ++t) {
    const __m512 first = _mm512_maskz_loadu_ps(low, in);
    const __m512 last = _mm512_maskz_loadu_ps(high, in + 16);
    // Lanes after the frame's last joint belong to the next frame, which overwrites them.
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(first, first_sources, last));
    if (high) _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(first, last_sources, last));
    in += num_joints;
    out += num_joints;
  }
}
#endif

template <typename T>
void gather_joints(const T* in, const int32_t* sources, int64_t num_joints, int64_t num_persons, int64_t num_frames,
                   T* out) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<T, float>) {
    if (num_persons == 1 && num_joints <= 32) return gather_32_joints(in, sources, num_joints, num_frames, out);
  }
#endif
  if (num_persons == 1) return gather_joints<1>(in, sources, num_joints, num_frames, out);
  if (num_persons == 2) return gather_joints<2>(in, sources, num_joints, num_frames, out);
  for (int64_t t = 0; t < num_frames; ++t) {
    for (int64_t joint = 0; joint < num_joints; ++joint) {
      out = std::copy_n(in + sources[joint] * num_persons, num_persons, out);
    }
    in += num_joints * num_persons;
  }
}

template <typename T>
class BoneBlock {
 public:
  using V = at::vec::Vectorized<T>;
  static constexpr int64_t kWidth = V::size();
  static constexpr int64_t kNumBuffers = 11;
  // Values per buffer for blocks of so many frames: a block, the frame after it, and what a register may reach past it.
  static constexpr int64_t buffer_size(int64_t lanes, int64_t block_frames) { return (block_frames + 1) * lanes + 64; }

  // Places for all of a block's intermediate values, aligned to 64 bytes: kNumBuffers * buffer_size().
  BoneBlock(const Skeleton& skeleton, int64_t num_persons, const int64_t* modalities, int64_t num_modalities,
            int64_t block_frames, T* workspace)
      : skeleton_(skeleton), num_persons_(num_persons), lanes_(skeleton.num_joints * num_persons) {
    const int64_t size = buffer_size(lanes_, block_frames);
    for (int c = 0; c < 3; ++c) {
      bones_[c] = workspace + c * size;
      previous_[c] = workspace + (3 + c) * size;
      axes_[c] = workspace + (6 + c) * size;
    }
    lengths_ = workspace + 9 * size;
    angles_ = workspace + 10 * size;
    const auto wants = [&](Modality modality) {
      return std::find(modalities, modalities + num_modalities, static_cast<int64_t>(modality)) !=
             modalities + num_modalities;
    };
    wants_angles_ = wants(Modality::kAngularVelocity);
    wants_axes_ = wants_angles_ || wants(Modality::kRotationAxis);
    wants_bones_ = wants_axes_ || wants(Modality::kBone);
  }

  // Goes to a block of `frames` frames, after which the clip has `frames_after` more. `joints` are the block's
  // coordinates and those of up to two of the frames after it.
  void load(const T* const (&joints)[3], int64_t frames, int64_t frames_after, T time_scale) {
    std::copy_n(joints, 3, joints_);
    frames_ = frames;
    frames_after_ = frames_after;
    time_scale_ = time_scale;
    if (wants_bones_) prepare();
  }

 protected:
  using Vector = math::Vector3<V>;

  template <typename Pointer>
  static Vector values_at(Pointer const (&planes)[3], int64_t i) {
    return {V::loadu(planes[0] + i), V::loadu(planes[1] + i), V::loadu(planes[2] + i)};
  }

  // As many skeletons as a register has lanes, or fewer at a block's end: the persons of a frame, then those of the next.
  struct Skeletons {
    int64_t count;
    int64_t first_lanes[kWidth];  // of joint 0
  };
  // Calls with all skeletons of the block's first frames.
  template <typename Function>
  void for_each_skeletons(int64_t frames, const Function& function) const {
    Skeletons skeletons{};
    for (int64_t t = 0; t < frames; ++t) {
      for (int64_t m = 0; m < num_persons_; ++m) {
        skeletons.first_lanes[skeletons.count++] = t * lanes_ + m;
        if (skeletons.count < kWidth) continue;
        function(skeletons);
        skeletons.count = 0;
      }
    }
    if (skeletons.count > 0) function(skeletons);
  }
  // A joint's vectors; zeros where there are no more skeletons.
  Vector gather(const T* const (&planes)[3], const Skeletons& skeletons, int64_t joint) const {
    T values[3][kWidth] = {};
    for (int64_t k = 0; k < skeletons.count; ++k) {
      const int64_t lane = skeletons.first_lanes[k] + joint * num_persons_;
      for (int c = 0; c < 3; ++c) values[c][k] = planes[c][lane];
    }
    return values_at(values, 0);
  }
  // Calls write(place, value) with the places of a joint's coordinates and what the vectors hold for them.
  template <typename Write>
  void scatter(const Vector& vectors, const Skeletons& skeletons, int64_t joint, T* const (&planes)[3],
               const Write& write) const {
    T values[3][kWidth];
    vectors.x.store(values[0]);
    vectors.y.store(values[1]);
    vectors.z.store(values[2]);
    for (int64_t k = 0; k < skeletons.count; ++k) {
      const int64_t lane = skeletons.first_lanes[k] + joint * num_persons_;
      for (int c = 0; c < 3; ++c) write(planes[c][lane], values[c][k]);
    }
  }

  const Skeleton& skeleton_;
  const int64_t num_persons_;
  const int64_t lanes_;
  bool wants_angles_, wants_axes_, wants_bones_;
  const T* joints_[3] = {};
  int64_t frames_ = 0;
  int64_t frames_after_ = 0;
  T time_scale_{};
  T* bones_[3];
  T* previous_[3];
  T* axes_[3];
  T* lengths_;  // of the axes
  T* angles_;

 private:
  // Bones, axes and angles, as far as the modalities need them.
  void prepare() {
    // Angular velocity needs the angles of the frame after the block, too.
    const int64_t frames = frames_ + (wants_angles_ && frames_after_ > 0 ? 1 : 0);
    for (int c = 0; c < 3; ++c) {
      gather_joints(joints_[c], skeleton_.bone_parents, skeleton_.num_joints, num_persons_, frames, bones_[c]);
      subtract_from(joints_[c], frames * lanes_, bones_[c]);
    }
    if (skeleton_.has_chest_normal) insert_chest_normals(frames);
    if (!wants_axes_) return;
    for (int c = 0; c < 3; ++c) {
      gather_joints(bones_[c], skeleton_.previous_bones, skeleton_.num_joints, num_persons_, frames, previous_[c]);
    }
    for (int64_t i = 0; i < frames * lanes_; i += kWidth) {
      const Vector bone = values_at(bones_, i);
      const Vector previous = values_at(previous_, i);
      const Vector axis = math::cross(bone, previous);
      axis.x.store(axes_[0] + i);
      axis.y.store(axes_[1] + i);
      axis.z.store(axes_[2] + i);
      if (wants_angles_) {
        const V length = math::norm(axis);
        length.store(lengths_ + i);
        math::angle(bone, previous, length).store(angles_ + i);
      }
    }
  }

  // values = minuend - values
  static void subtract_from(const T* minuend, int64_t count, T* values) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) (V::loadu(minuend + i) - V::loadu(values + i)).store(values + i);
    if (i < count) (V::loadu(minuend + i, count - i) - V::loadu(values + i)).store(values + i);
  }

  // A register of skeletons at a time: one chest normal takes as long as a register of them.
  void insert_chest_normals(int64_t frames) {
    for_each_skeletons(frames, [&](const Skeletons& skeletons) {
      const auto bone = [&](int number) { return gather(bones_, skeletons, skeleton_.chest_normal[number]); };
      scatter(math::chest_normal(bone(0), bone(1), bone(2)), skeletons, skeleton_.root, bones_,
              [](T& place, T value) { place = value; });
    });
  }
};

}  // namespace

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
