// The six modalities of a block of consecutive frames, for the CPU kernels that derive them. Include it only in sources
// of csrc/cpu.
#pragma once

#include "cpu/bone_block.h"

namespace ikem_fast::cpu::CPU_CAPABILITY {

namespace {

template <typename T>
class ModalityBlock : public BoneBlock<T> {
  using Base = BoneBlock<T>;
  using typename Base::Vector;
  using Base::angles_, Base::axes_, Base::bones_, Base::frames_, Base::frames_after_, Base::joints_, Base::lanes_,
      Base::lengths_, Base::time_scale_, Base::values_at;

 public:
  using typename Base::V;
  using Base::Base, Base::kWidth;

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
};

}  // namespace

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
