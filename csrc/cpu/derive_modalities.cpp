#include "cpu/derive_modalities.h"

#include "cpu/modality_block.h"
#include "cpu/workspace.h"

namespace ikem_fast::cpu::CPU_CAPABILITY {

namespace {

template <typename T>
void derive_blocks(const DeriveModalities& p, int64_t begin, int64_t end) {
  using Block = ModalityBlock<T>;
  const Workspace<T> workspace(Block::kNumBuffers * Block::buffer_size(p.num_lanes(), p.block_frames()));
  Block block(p.skeleton, p.num_persons, p.modalities, p.num_outputs, p.block_frames(), workspace.data());
  const int64_t plane = p.clip_frames * p.num_lanes();
  for (int64_t number = begin; number < end; ++number) {
    const auto [clip, first, frames, start] = p.block(number);
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

// Gradients of the modalities of a block of frames, pulled back to its coordinates. The block that is loaded begins a
// frame earlier, where the clip does: an angle counts in the velocity of the frame before it, too.
template <typename T>
class GradientBlock : public BoneBlock<T> {
  using Base = BoneBlock<T>;
  using typename Base::Skeletons;
  using typename Base::Vector;
  using Base::angles_, Base::axes_, Base::bones_, Base::frames_, Base::frames_after_, Base::gather, Base::lanes_,
      Base::lengths_, Base::num_persons_, Base::previous_, Base::scatter, Base::skeleton_, Base::time_scale_,
      Base::values_at, Base::wants_angles_, Base::wants_axes_, Base::wants_bones_;

 public:
  using typename Base::V;
  using Base::kWidth;
  using Planes = T* [3];
  using ConstPlanes = const T* [3];
  static constexpr int64_t kNumBuffers = Base::kNumBuffers + 7;
  static constexpr int64_t buffer_size(int64_t lanes, int64_t block_frames) {
    return Base::buffer_size(lanes, block_frames + 1);
  }

  GradientBlock(const Skeleton& skeleton, int64_t num_persons, const int64_t* modalities, int64_t num_modalities,
                int64_t block_frames, T* workspace)
      : Base(skeleton, num_persons, modalities, num_modalities, block_frames + 1, workspace) {
    const int64_t size = buffer_size(lanes_, block_frames);
    T* const own = workspace + Base::kNumBuffers * size;
    for (int c = 0; c < 3; ++c) {
      bone_gradients_[c] = own + c * size;
      previous_gradients_[c] = own + (3 + c) * size;
    }
    turn_gradients_ = own + 6 * size;
  }

  // The block loaded is frames `first - lead` ... of the clip, and `first` its first frame that gets a gradient.
  // `gradient_of(modality, planes)` points to the gradient of a modality there, or gives false where it has none.
  template <typename GradientOf>
  void pull_back(int64_t first, int64_t lead, const GradientOf& gradient_of, const Planes& output) {
    lead_ = lead;
    const int64_t size = (frames_ - lead) * lanes_;
    for (T* plane : output) std::fill_n(plane, size, T(0));
    add_differences(first, gradient_of, output);
    if (!wants_bones_) return;
    ConstPlanes gradient;
    const bool has_bones = gradient_of(Modality::kBone, gradient);
    for (int c = 0; c < 3; ++c) {
      if (has_bones) {
        std::copy_n(gradient[c], size, bone_gradients_[c]);
      } else {
        std::fill_n(bone_gradients_[c], size, T(0));
      }
    }
    if (wants_axes_) pull_back_rotations(gradient_of);
    pull_back_chest_normals();
    for (int c = 0; c < 3; ++c) {
      add(T(1), bone_gradients_[c], size, output[c]);
      add_to_joints(T(-1), bone_gradients_[c], skeleton_.bone_parents, output[c]);
    }
  }

 private:
  int64_t frames() const { return frames_ - lead_; }

  static void add(T factor, const T* values, int64_t count, T* sums) {
    for (int64_t i = 0; i < count; ++i) sums[i] += factor * values[i];
  }

  // sums[sources[joint]] += factor * values[joint] in every frame, where a joint is kPersons values, or any number.
  template <int kPersons>
  void add_to_joints(T factor, const T* values, const int32_t* sources, T* sums) const {
    const int64_t persons = kPersons ? kPersons : num_persons_;
    for (int64_t t = 0; t < frames(); ++t) {
      for (int64_t joint = 0; joint < skeleton_.num_joints; ++joint) {
        T* const sum = sums + sources[joint] * persons;
        for (int64_t m = 0; m < persons; ++m) sum[m] += factor * values[m];
        values += persons;
      }
      sums += lanes_;
    }
  }
  void add_to_joints(T factor, const T* values, const int32_t* sources, T* sums) const {
    if (num_persons_ == 1) return add_to_joints<1>(factor, values, sources, sums);
    if (num_persons_ == 2) return add_to_joints<2>(factor, values, sources, sums);
    add_to_joints<0>(factor, values, sources, sums);
  }

  // Joint, motion and acceleration: the value of frame t holds the coordinates of frames t, t + 1 and t + 2.
  template <typename GradientOf>
  void add_differences(int64_t first, const GradientOf& gradient_of, const Planes& output) const {
    const T r = time_scale_;
    const int64_t clip_frames = first + frames() + frames_after_;
    struct Term {
      Modality modality;
      int64_t frames_ahead;  // of a value's frame, up to its last coordinate
      T factors[3];
    };
    for (const Term& term : {Term{Modality::kJoint, 0, {1}}, Term{Modality::kMotion, 1, {-r, r}},
                             Term{Modality::kAcceleration, 2, {r * r, -2 * r * r, r * r}}}) {
      ConstPlanes gradient;
      if (!gradient_of(term.modality, gradient)) continue;
      for (int64_t ahead = 0; ahead <= term.frames_ahead; ++ahead) {
        const int64_t begin = std::max<int64_t>(0, ahead - first);
        const int64_t end = std::min(frames(), clip_frames - term.frames_ahead + ahead - first);
        for (int c = 0; c < 3; ++c) {
          add(term.factors[ahead], gradient[c] + (begin - ahead) * lanes_, (end - begin) * lanes_,
              output[c] + begin * lanes_);
        }
      }
    }
  }

  // Rotation axes and angular velocities, to the bones.
  template <typename GradientOf>
  void pull_back_rotations(const GradientOf& gradient_of) {
    const int64_t size = frames() * lanes_;
    const int64_t lead = lead_ * lanes_;
    // Lanes with a frame after them; the others' angular velocity is a constant.
    const int64_t moving = std::min(frames(), frames() + frames_after_ - 1) * lanes_;
    const V scale(time_scale_);
    ConstPlanes of_axes, of_velocities;
    const bool has_axes = gradient_of(Modality::kRotationAxis, of_axes);
    if (wants_angles_) {
      gradient_of(Modality::kAngularVelocity, of_velocities);
      // From the frame before the block on, for which the first of a clip has zeros.
      std::fill_n(turn_gradients_, lanes_, T(0));
      for (int64_t i = -lead; i < moving; i += kWidth) {
        const Vector gradient = load_lanes(of_velocities, i, std::min(kWidth, moving - i));
        math::turn_gradient(values_at(axes_, i + lead), V::loadu(lengths_ + i + lead), scale, gradient)
            .store(turn_gradients_ + lanes_ + i);
      }
      std::fill_n(turn_gradients_ + lanes_ + moving, size - moving, T(0));
    }
    const auto pull_back_lanes = [&](int64_t i, int64_t count, bool is_moving) {
      const int64_t at = i + lead;
      const Vector bone = values_at(bones_, at), previous = values_at(previous_, at), axis = values_at(axes_, at);
      const V length = V::loadu(lengths_ + at);
      Vector of_axis = has_axes ? load_lanes(of_axes, i, count) : zero();
      if (is_moving) {
        of_axis = of_axis + math::turned_axis_gradient(V::loadu(angles_ + at), V::loadu(angles_ + at + lanes_), axis,
                                                       length, scale, load_lanes(of_velocities, i, count));
      }
      math::BoneGradients<V> gradients = math::axis_gradients(bone, previous, of_axis);
      if (wants_angles_) {
        const V of_angle = V::loadu(turn_gradients_ + i) - V::loadu(turn_gradients_ + lanes_ + i);
        const auto of_angles = math::angle_gradients(bone, previous, axis, length, of_angle);
        gradients = {gradients.bone + of_angles.bone, gradients.previous + of_angles.previous};
      }
      store_lanes(gradients.bone + values_at(bone_gradients_, i), i, count, bone_gradients_);
      store_lanes(gradients.previous, i, count, previous_gradients_);
    };
    const int64_t with_velocity = wants_angles_ ? moving : 0;
    for (int64_t i = 0; i < with_velocity; i += kWidth) {
      pull_back_lanes(i, std::min(kWidth, with_velocity - i), true);
    }
    for (int64_t i = with_velocity; i < size; i += kWidth) pull_back_lanes(i, std::min(kWidth, size - i), false);
    for (int c = 0; c < 3; ++c) {
      add_to_joints(T(1), previous_gradients_[c], skeleton_.previous_bones, bone_gradients_[c]);
    }
  }

  // The root's bone, to the bones of the chest; none is left at the root, which has no parent.
  void pull_back_chest_normals() {
    const T* bones[3];
    for (int c = 0; c < 3; ++c) bones[c] = bones_[c] + lead_ * lanes_;
    this->for_each_skeletons(frames(), [&](const Skeletons& skeletons) {
      if (skeleton_.has_chest_normal) {
        // The chest normal is that of differences of joints, of which the root's is zero.
        const auto difference = [&](int number) {
          const int64_t joint = skeleton_.chest_normal[number];
          return joint == skeleton_.root ? zero() : gather(bones, skeletons, joint);
        };
        const auto gradients =
            math::chest_normal_gradients(difference(0), difference(1), difference(2),
                                         gather(bone_gradients_, skeletons, skeleton_.root));
        const auto add = [](T& place, T value) { place += value; };
        scatter(gradients.a, skeletons, skeleton_.chest_normal[0], bone_gradients_, add);
        scatter(gradients.b, skeletons, skeleton_.chest_normal[1], bone_gradients_, add);
        scatter(gradients.c, skeletons, skeleton_.chest_normal[2], bone_gradients_, add);
      }
      scatter(zero(), skeletons, skeleton_.root, bone_gradients_, [](T& place, T value) { place = value; });
    });
  }

  static Vector zero() { return {V(T(0)), V(T(0)), V(T(0))}; }
  static Vector load_lanes(const ConstPlanes& planes, int64_t i, int64_t count) {
    return {V::loadu(planes[0] + i, count), V::loadu(planes[1] + i, count), V::loadu(planes[2] + i, count)};
  }
  static void store_lanes(const Vector& values, int64_t i, int64_t count, const Planes& planes) {
    values.x.store(planes[0] + i, count);
    values.y.store(planes[1] + i, count);
    values.z.store(planes[2] + i, count);
  }

  int64_t lead_ = 0;
  T* bone_gradients_[3];
  T* previous_gradients_[3];  // of each bone, to the bone before it
  T* turn_gradients_;         // of theta_{t+1} - theta_t, from the frame before the block on
};

template <typename T>
void derive_blocks_backward(const DeriveModalitiesBackward& p, int64_t begin, int64_t end) {
  using Block = GradientBlock<T>;
  const Workspace<T> workspace(Block::kNumBuffers * Block::buffer_size(p.num_lanes(), p.block_frames()));
  Block block(p.skeleton, p.num_persons, p.modalities, p.num_outputs, p.block_frames(), workspace.data());
  const int64_t plane = p.clip_frames * p.num_lanes();
  for (int64_t number = begin; number < end; ++number) {
    const auto [clip, first, frames, start] = p.block(number);
    const int64_t lead = first > 0 ? 1 : 0;
    const T* const clips = static_cast<const T*>(p.clips) + start - lead * p.num_lanes();
    const T* const joints[3] = {clips, clips + plane, clips + 2 * plane};
    block.load(joints, lead + frames, p.clip_frames - first - frames, math::time_scale<T>(p.num_frames[clip]));
    T* const out = static_cast<T*>(p.output) + start;
    T* const output[3] = {out, out + plane, out + 2 * plane};
    const auto gradient_of = [&](Modality modality, typename Block::ConstPlanes& planes) {
      const int64_t* const found =
          std::find(p.modalities, p.modalities + p.num_outputs, static_cast<int64_t>(modality));
      if (found == p.modalities + p.num_outputs) return false;
      const T* const gradient =
          static_cast<const T*>(p.gradient) + (found - p.modalities) * p.num_clips * 3 * plane + start;
      for (int c = 0; c < 3; ++c) planes[c] = gradient + c * plane;
      return true;
    };
    block.pull_back(first, lead, gradient_of, output);
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

void derive_modalities_backward(const DeriveModalitiesBackward& parameters, int64_t begin, int64_t end) {
  if (parameters.is_double) {
    derive_blocks_backward<double>(parameters, begin, end);
  } else {
    derive_blocks_backward<float>(parameters, begin, end);
  }
}

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
