// The six modalities of a block of consecutive frames, for the CPU kernels that derive them. Include it only in sources
// of csrc/cpu.
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
class ModalityBlock {
 public:
  using V = at::vec::Vectorized<T>;
  static constexpr int64_t kWidth = V::size();
  static constexpr int64_t kNumBuffers = 11;
  // Values per buffer for blocks of so many frames: a block, the frame after it, and what a register may reach past it.
  static constexpr int64_t buffer_size(int64_t lanes, int64_t block_frames) { return (block_frames + 1) * lanes + 64; }

  // Places for all of a block's intermediate values, aligned to 64 bytes: kNumBuffers * buffer_size().
  ModalityBlock(const Skeleton& skeleton, int64_t num_persons, const int64_t* modalities, int64_t num_modalities,
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

  // Calls write(i, vectors, count) with the modality's values in lanes i ... i + count - 1 of the block, for all of
  // them in order; only the last count is less than a register's.
  template <typename Write>
  void derive(Modality modality, const Write& write) const {
    const V scale(time_scale_);
    switch (modality) {
      case Modality::kJoint:
        return derive_ahead(0, write, [&](int64_t i, auto values) { return values(joints_, i); });
      case Modality::kMotion:
        return derive_ahead(1, write, [&](int64_t i, auto values) {
          const Vector now = values(joints_, i), next = values(joints_, i + lanes_);
          return Vector{math::motion(now.x, next.x, scale), math::motion(now.y, next.y, scale),
                        math::motion(now.z, next.z, scale)};
        });
      case Modality::kBone:
        return derive_ahead(0, write, [&](int64_t i, auto) { return values_at(bones_, i); });
      case Modality::kAcceleration:
        return derive_ahead(2, write, [&](int64_t i, auto values) {
          const Vector now = values(joints_, i), next = values(joints_, i + lanes_);
          const Vector after = values(joints_, i + 2 * lanes_);
          return Vector{math::acceleration(now.x, next.x, after.x, scale),
                        math::acceleration(now.y, next.y, after.y, scale),
                        math::acceleration(now.z, next.z, after.z, scale)};
        });
      case Modality::kRotationAxis:
        return derive_ahead(0, write, [&](int64_t i, auto) { return values_at(axes_, i); });
      case Modality::kAngularVelocity:
        return derive_ahead(1, write, [&](int64_t i, auto) {
          return math::angular_velocity(V::loadu(angles_ + i), V::loadu(angles_ + i + lanes_), values_at(axes_, i),
                                        V::loadu(lengths_ + i), scale);
        });
    }
  }

 private:
  using Vector = math::Vector3<V>;

  template <typename Pointer>
  static Vector values_at(Pointer const (&planes)[3], int64_t i) {
    return {V::loadu(planes[0] + i), V::loadu(planes[1] + i), V::loadu(planes[2] + i)};
  }

  // Derives the lanes that have at least `ahead` frames of the clip after them, and zeros after those. `derive_lanes`
  // gets an index and a function that loads vectors from there, at the end only as many as there are.
  template <typename Write, typename Derive>
  void derive_ahead(int64_t ahead, const Write& write, const Derive& derive_lanes) const {
    const int64_t size = frames_ * lanes_;
    const int64_t count = std::clamp<int64_t>(frames_ + frames_after_ - ahead, 0, frames_) * lanes_;
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
      write(i, derive_lanes(i, [](const auto& planes, int64_t at) { return values_at(planes, at); }), kWidth);
    }
    if (i < count) {
      const int64_t rest = count - i;
      Vector last = derive_lanes(i, [rest](const auto& planes, int64_t at) {
        return Vector{V::loadu(planes[0] + at, rest), V::loadu(planes[1] + at, rest), V::loadu(planes[2] + at, rest)};
      });
      write(i, last, rest);
    }
    for (i = count; i < size; i += kWidth) {
      write(i, Vector{V(T(0)), V(T(0)), V(T(0))}, std::min(kWidth, size - i));
    }
  }

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

  // A register of frames at a time: one chest normal takes as long as a register of them.
  void insert_chest_normals(int64_t frames) {
    const int64_t count = frames * num_persons_;
    const auto place = [&](int64_t number, int64_t joint) {
      return number / num_persons_ * lanes_ + joint * num_persons_ + number % num_persons_;
    };
    T values[9][kWidth] = {};
    for (int64_t i = 0; i < count; i += kWidth) {
      const int64_t here = std::min(kWidth, count - i);
      for (int64_t bone = 0; bone < 3; ++bone) {
        for (int64_t k = 0; k < here; ++k) {
          const int64_t at = place(i + k, skeleton_.chest_normal[bone]);
          for (int c = 0; c < 3; ++c) values[3 * bone + c][k] = bones_[c][at];
        }
      }
      const auto bone = [&](int64_t number) {
        const T(*planes)[kWidth] = values + 3 * number;
        return Vector{V::loadu(planes[0]), V::loadu(planes[1]), V::loadu(planes[2])};
      };
      const Vector normal = math::chest_normal(bone(0), bone(1), bone(2));
      T normals[3][kWidth];
      normal.x.store(normals[0]);
      normal.y.store(normals[1]);
      normal.z.store(normals[2]);
      for (int64_t k = 0; k < here; ++k) {
        for (int c = 0; c < 3; ++c) bones_[c][place(i + k, skeleton_.root)] = normals[c][k];
      }
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
};

}  // namespace

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
