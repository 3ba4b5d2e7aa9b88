#include "cpu/derive_modalities.h"

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstring>

#include "cpu/vectorized_real.h"

namespace ikem_fast::cpu::CPU_CAPABILITY {

namespace {

using at::vec::Vectorized;
using math::Vector3;

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

template <typename T>
void gather_joints(const T* in, const int32_t* sources, int64_t num_joints, int64_t num_persons, int64_t num_frames,
                   T* out) {
  if (num_persons == 1) return gather_joints<1>(in, sources, num_joints, num_frames, out);
  if (num_persons == 2) return gather_joints<2>(in, sources, num_joints, num_frames, out);
  for (int64_t t = 0; t < num_frames; ++t) {
    for (int64_t joint = 0; joint < num_joints; ++joint) {
      out = std::copy_n(in + sources[joint] * num_persons, num_persons, out);
    }
    in += num_joints * num_persons;
  }
}

// One block of consecutive frames of one clip. Lanes of its frames lie one after another, in the clips, the output
// and the buffers, so that registers are filled across frames and only the block's end is partial.
template <typename T>
class Block {
 public:
  Block(const DeriveModalities& parameters, T* workspace, int64_t number)
      : p_(parameters),
        lanes_(parameters.num_lanes()),
        clip_(number / parameters.blocks_per_clip()),
        first_(number % parameters.blocks_per_clip() * parameters.block_frames()),
        frames_(std::min(parameters.block_frames(), parameters.clip_frames - first_)),
        // Through the reciprocal, as PyTorch divides a number by a tensor, so that both round alike.
        time_scale_(T(1) / T(parameters.num_frames[clip_]) * T(kReferenceFrames)) {
    const int64_t size = parameters.buffer_size();
    for (int c = 0; c < 3; ++c) {
      bones_[c] = workspace + c * size;
      previous_[c] = workspace + (3 + c) * size;
      axes_[c] = workspace + (6 + c) * size;
    }
    angles_ = workspace + 9 * size;
  }

  void derive() {
    prepare();
    for (int64_t s = 0; s < p_.num_outputs; ++s) {
      switch (static_cast<Modality>(p_.modalities[s])) {
        case Modality::kJoint:
          for (int c = 0; c < 3; ++c) std::copy_n(input(c), frames_ * lanes_, output(s, c));
          break;
        case Modality::kMotion:
          for (int c = 0; c < 3; ++c) write_motion(input(c), output(s, c));
          break;
        case Modality::kBone:
          for (int c = 0; c < 3; ++c) std::copy_n(bones_[c], frames_ * lanes_, output(s, c));
          break;
        case Modality::kAcceleration:
          for (int c = 0; c < 3; ++c) write_acceleration(input(c), output(s, c));
          break;
        case Modality::kRotationAxis:
          for (int c = 0; c < 3; ++c) std::copy_n(axes_[c], frames_ * lanes_, output(s, c));
          break;
        case Modality::kAngularVelocity:
          write_angular_velocity(output(s, 0), output(s, 1), output(s, 2));
          break;
      }
    }
  }

 private:
  using V = Vectorized<T>;
  static constexpr int64_t kWidth = V::size();

  bool wants(Modality modality) const {
    return std::find(p_.modalities, p_.modalities + p_.num_outputs, static_cast<int64_t>(modality)) !=
           p_.modalities + p_.num_outputs;
  }

  // Coordinate c of the block's first frame.
  const T* input(int c) const {
    return static_cast<const T*>(p_.clips) + ((clip_ * 3 + c) * p_.clip_frames + first_) * lanes_;
  }
  T* output(int64_t s, int c) const {
    return static_cast<T*>(p_.output) + (((s * p_.num_clips + clip_) * 3 + c) * p_.clip_frames + first_) * lanes_;
  }

  // Values of the block's frames that have at least `ahead` frames of the clip after them.
  int64_t values_with_frames_ahead(int64_t ahead) const {
    return std::clamp<int64_t>(p_.clip_frames - ahead - first_, 0, frames_) * lanes_;
  }

  // Bones, axes and angles, as far as the modalities need them.
  void prepare() {
    const bool angles = wants(Modality::kAngularVelocity);
    const bool axes = angles || wants(Modality::kRotationAxis);
    if (!axes && !wants(Modality::kBone)) return;
    // Angular velocity needs the angles of the frame after the block, too.
    const int64_t frames = frames_ + (angles && first_ + frames_ < p_.clip_frames ? 1 : 0);
    for (int c = 0; c < 3; ++c) {
      gather_joints(input(c), p_.bone_parents, p_.num_joints, p_.num_persons, frames, bones_[c]);
      subtract_from(input(c), frames * lanes_, bones_[c]);
    }
    if (p_.has_chest_normal) insert_chest_normals(frames);
    if (!axes) return;
    for (int c = 0; c < 3; ++c) {
      gather_joints(bones_[c], p_.previous_bones, p_.num_joints, p_.num_persons, frames, previous_[c]);
    }
    for (int64_t i = 0; i < frames * lanes_; i += kWidth) {
      const Vector3<V> bone = load(bones_, i);
      const Vector3<V> previous = load(previous_, i);
      const Vector3<V> axis = math::cross(bone, previous);
      axis.x.store(axes_[0] + i);
      axis.y.store(axes_[1] + i);
      axis.z.store(axes_[2] + i);
      if (angles) math::angle(bone, previous, axis).store(angles_ + i);
    }
  }

  // values = minuend - values
  static void subtract_from(const T* minuend, int64_t count, T* values) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) (V::loadu(minuend + i) - V::loadu(values + i)).store(values + i);
    if (i < count) (V::loadu(minuend + i, count - i) - V::loadu(values + i)).store(values + i);
  }

  void insert_chest_normals(int64_t frames) {
    for (int64_t t = 0; t < frames; ++t) {
      for (int64_t person = 0; person < p_.num_persons; ++person) {
        const auto bone = [&](int64_t joint) {
          const int64_t i = t * lanes_ + joint * p_.num_persons + person;
          return Vector3<T>{bones_[0][i], bones_[1][i], bones_[2][i]};
        };
        const auto normal =
            math::chest_normal(bone(p_.chest_normal[0]), bone(p_.chest_normal[1]), bone(p_.chest_normal[2]));
        const int64_t i = t * lanes_ + p_.root * p_.num_persons + person;
        bones_[0][i] = normal.x;
        bones_[1][i] = normal.y;
        bones_[2][i] = normal.z;
      }
    }
  }

  static Vector3<V> load(T* const (&buffers)[3], int64_t i) {
    return {V::loadu(buffers[0] + i), V::loadu(buffers[1] + i), V::loadu(buffers[2] + i)};
  }

  void write_motion(const T* joints, T* out) const {
    const int64_t count = values_with_frames_ahead(1);
    const V scale(time_scale_);
    write(out, count, [&](int64_t i, auto values) {
      return math::motion(values(joints + i), values(joints + lanes_ + i), scale);
    });
  }

  void write_acceleration(const T* joints, T* out) const {
    const int64_t count = values_with_frames_ahead(2);
    const V scale(time_scale_);
    write(out, count, [&](int64_t i, auto values) {
      return math::acceleration(values(joints + i), values(joints + lanes_ + i), values(joints + 2 * lanes_ + i), scale);
    });
  }

  // Fills out[0, count) with what `derive` returns and the rest of the block with zeros. `derive` gets an index and
  // a function that loads a register from there, at the end only as much of it as there is.
  template <typename Derive>
  void write(T* out, int64_t count, const Derive& derive) const {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) derive(i, [](const T* values) { return V::loadu(values); }).store(out + i);
    if (i < count) {
      const int64_t rest = count - i;
      derive(i, [rest](const T* values) { return V::loadu(values, rest); }).store(out + i, rest);
    }
    std::fill(out + count, out + frames_ * lanes_, T(0));
  }

  void write_angular_velocity(T* out_x, T* out_y, T* out_z) const {
    const int64_t count = values_with_frames_ahead(1);
    const V scale(time_scale_);
    const auto derive = [&](int64_t i) {
      return math::angular_velocity(V::loadu(angles_ + i), V::loadu(angles_ + lanes_ + i), load(axes_, i), scale);
    };
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
      const Vector3<V> velocity = derive(i);
      velocity.x.store(out_x + i);
      velocity.y.store(out_y + i);
      velocity.z.store(out_z + i);
    }
    if (i < count) {
      const Vector3<V> velocity = derive(i);
      velocity.x.store(out_x + i, count - i);
      velocity.y.store(out_y + i, count - i);
      velocity.z.store(out_z + i, count - i);
    }
    for (T* out : {out_x, out_y, out_z}) std::fill(out + count, out + frames_ * lanes_, T(0));
  }

  const DeriveModalities& p_;
  const int64_t lanes_;
  const int64_t clip_;
  const int64_t first_;   // frame
  const int64_t frames_;
  const T time_scale_;
  T* bones_[3];
  T* previous_[3];
  T* axes_[3];
  T* angles_;
};

template <typename T>
void derive_blocks(const DeriveModalities& parameters, void* workspace, int64_t begin, int64_t end) {
  for (int64_t number = begin; number < end; ++number) {
    Block<T>(parameters, static_cast<T*>(workspace), number).derive();
  }
}

}  // namespace

void derive_modalities(const DeriveModalities& parameters, void* workspace, int64_t begin, int64_t end) {
  if (parameters.is_double) {
    derive_blocks<double>(parameters, workspace, begin, end);
  } else {
    derive_blocks<float>(parameters, workspace, begin, end);
  }
}

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
