#include "cuda/derive_modalities.h"

#include "cuda/kernel.h"

namespace ikem_fast::cuda {

namespace {

constexpr int kThreads = 256;

// One person of one clip: coordinates and bones by frame and joint.
template <typename T>
struct Person {
  const T* coordinates;  // of joint 0 in frame 0
  int plane;             // values between two coordinates
  int frame_size;        // values between two frames
  int joint_size;        // values between two joints
  const uint8_t* bone_parents;
  const Skeleton* skeleton;

  __device__ math::Vector3<T> joint(int frame, int number) const {
    const T* x = coordinates + frame * frame_size + number * joint_size;
    return {x[0], x[plane], x[2 * static_cast<int64_t>(plane)]};
  }
  // x_j - x_parent(j), zero at the root.
  __device__ math::Vector3<T> difference(int frame, int number) const {
    return joint(frame, number) - joint(frame, bone_parents[number]);
  }
  __device__ math::Vector3<T> bone(int frame, int number) const {
    if (number != skeleton->root || !skeleton->has_chest_normal) return difference(frame, number);
    const uint8_t* chest = skeleton->chest_normal;
    return math::chest_normal(difference(frame, chest[0]), difference(frame, chest[1]), difference(frame, chest[2]));
  }
};

// A thread per frame, joint and person derives all modalities of its place. Neighbouring threads read and write
// neighbouring values; what other joints and frames hold comes from the first-level cache.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    derive_modalities_kernel(T* __restrict__ output, const T* __restrict__ clips, const int64_t* __restrict__ num_frames,
                             ClipShape shape, Skeleton skeleton, OutputRows outputs, int tiles_per_clip) {
  // Threads of a warp look up different joints, which shared memory serves at once and parameters one by one.
  IKEM_SHARED(uint8_t, bone_parents, [Skeleton::kMaxJoints]);
  IKEM_SHARED(uint8_t, previous_bones, [Skeleton::kMaxJoints]);
  for (int joint = threadIdx.x; joint < shape.num_joints; joint += kThreads) {
    bone_parents[joint] = skeleton.bone_parents[joint];
    previous_bones[joint] = skeleton.previous_bones[joint];
  }
  __syncthreads();

  const int clip = blockIdx.x / tiles_per_clip;
  const int frame_size = shape.num_joints * shape.num_persons;
  const int plane = shape.num_frames * frame_size;
  const int place = (blockIdx.x % tiles_per_clip) * kThreads + threadIdx.x;
  if (place >= plane) return;
  const int t = place / frame_size;
  const int number = place % frame_size / shape.num_persons;
  const int64_t clip_offset = 3 * static_cast<int64_t>(plane) * clip;
  const Person<T> person{clips + clip_offset + place % shape.num_persons,
                         plane,
                         frame_size,
                         shape.num_persons,
                         bone_parents,
                         &skeleton};
  const T time_scale = math::time_scale<T>(num_frames[clip]);
  const bool has_next = t + 1 < shape.num_frames;
  const bool has_two_more = t + 2 < shape.num_frames;

  const auto row = [&](Modality modality) { return static_cast<int>(outputs.rows[static_cast<int>(modality)]); };
  const auto write = [&](Modality modality, const math::Vector3<T>& value) {
    T* out = output + 3 * static_cast<int64_t>(plane) * shape.num_clips * row(modality) + clip_offset + place;
    out[0] = value.x;
    out[plane] = value.y;
    out[2 * static_cast<int64_t>(plane)] = value.z;
  };
  const math::Vector3<T> zero{T(0), T(0), T(0)};

  const math::Vector3<T> now = person.joint(t, number);
  if (row(Modality::kJoint) >= 0) write(Modality::kJoint, now);
  if (row(Modality::kMotion) >= 0 || row(Modality::kAcceleration) >= 0) {
    const math::Vector3<T> next = has_next ? person.joint(t + 1, number) : now;
    const math::Vector3<T> after = has_two_more ? person.joint(t + 2, number) : next;
    if (row(Modality::kMotion) >= 0) {
      write(Modality::kMotion, has_next ? math::Vector3<T>{math::motion(now.x, next.x, time_scale),
                                                           math::motion(now.y, next.y, time_scale),
                                                           math::motion(now.z, next.z, time_scale)}
                                        : zero);
    }
    if (row(Modality::kAcceleration) >= 0) {
      write(Modality::kAcceleration,
            has_two_more ? math::Vector3<T>{math::acceleration(now.x, next.x, after.x, time_scale),
                                            math::acceleration(now.y, next.y, after.y, time_scale),
                                            math::acceleration(now.z, next.z, after.z, time_scale)}
                         : zero);
    }
  }
  const bool wants_axis = row(Modality::kRotationAxis) >= 0 || row(Modality::kAngularVelocity) >= 0;
  if (row(Modality::kBone) < 0 && !wants_axis) return;
  const math::Vector3<T> bone = person.bone(t, number);
  if (row(Modality::kBone) >= 0) write(Modality::kBone, bone);
  if (!wants_axis) return;
  const int before = previous_bones[number];
  const math::Vector3<T> previous = person.bone(t, before);
  const math::Vector3<T> axis = math::cross(bone, previous);
  if (row(Modality::kRotationAxis) >= 0) write(Modality::kRotationAxis, axis);
  if (row(Modality::kAngularVelocity) < 0) return;
  if (!has_next) return write(Modality::kAngularVelocity, zero);
  const math::Vector3<T> next_bone = person.bone(t + 1, number);
  const math::Vector3<T> next_previous = person.bone(t + 1, before);
  const T length = math::norm(axis);
  const T angle = math::angle(bone, previous, length);
  const T next_angle = math::angle(next_bone, next_previous, math::norm(math::cross(next_bone, next_previous)));
  write(Modality::kAngularVelocity, math::angular_velocity(angle, next_angle, axis, length, time_scale));
}

// Frames and persons of one clip that a block pulls back: whole skeletons, a thread for each joint.
struct GradientTiling {
  int persons;         // of a block
  int person_tiles;    // of a frame
  int frames;          // of a block
  int frame_tiles;     // of a clip
};

GradientTiling tile_gradients(const ClipShape& shape) {
  GradientTiling tiling;
  tiling.persons = shape.num_joints * shape.num_persons <= kThreads ? shape.num_persons : kThreads / shape.num_joints;
  tiling.person_tiles = (shape.num_persons + tiling.persons - 1) / tiling.persons;
  tiling.frames = kThreads / (shape.num_joints * tiling.persons);
  tiling.frame_tiles = (shape.num_frames + tiling.frames - 1) / tiling.frames;
  return tiling;
}

// The gradient of the coordinates, given that of the modalities. A thread holds the gradient of its joint's bone; what
// other bones pass on to it (as the bone before them, as a chest's bone, as children) goes through shared memory and is
// added joint after joint, so that every run rounds alike.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    derive_modalities_backward_kernel(T* __restrict__ output, const T* __restrict__ gradient,
                                      const T* __restrict__ clips, const int64_t* __restrict__ num_frames,
                                      ClipShape shape, Skeleton skeleton, OutputRows rows, GradientTiling tiling) {
  IKEM_SHARED(uint8_t, bone_parents, [Skeleton::kMaxJoints]);
  IKEM_SHARED(uint8_t, previous_bones, [Skeleton::kMaxJoints]);
  IKEM_SHARED(T, passed, [3][kThreads]);  // first to the bone before each bone, then by each bone to its joints
  for (int joint = threadIdx.x; joint < shape.num_joints; joint += kThreads) {
    bone_parents[joint] = skeleton.bone_parents[joint];
    previous_bones[joint] = skeleton.previous_bones[joint];
  }
  __syncthreads();

  const int tile = blockIdx.x % (tiling.frame_tiles * tiling.person_tiles);
  const int clip = blockIdx.x / (tiling.frame_tiles * tiling.person_tiles);
  const int tile_frame_size = shape.num_joints * tiling.persons;
  const int place = threadIdx.x;
  const int t = tile / tiling.person_tiles * tiling.frames + place / tile_frame_size;
  const int number = place % tile_frame_size / tiling.persons;
  const int m = tile % tiling.person_tiles * tiling.persons + place % tiling.persons;
  const bool is_inside = place / tile_frame_size < tiling.frames && t < shape.num_frames && m < shape.num_persons;
  // The place of joint 0 of this thread's frame and person.
  const int skeleton_place = place - number * tiling.persons;

  const int frame_size = shape.num_joints * shape.num_persons;
  const int plane = shape.num_frames * frame_size;
  const int64_t clip_offset = 3 * static_cast<int64_t>(plane) * clip;
  const Person<T> person{clips + clip_offset + m, plane, frame_size, shape.num_persons, bone_parents, &skeleton};
  const T time_scale = math::time_scale<T>(num_frames[clip]);
  const math::Vector3<T> zero{T(0), T(0), T(0)};
  const auto wants = [&](Modality modality) { return rows.rows[static_cast<int>(modality)] >= 0; };
  // Of this thread's joint in a frame; zero outside the frames that hold values.
  const auto gradient_at = [&](Modality modality, int frame, int frames_ahead) {
    if (!wants(modality) || frame < 0 || frame + frames_ahead >= shape.num_frames) return zero;
    const T* from = gradient +
                    3 * static_cast<int64_t>(plane) * shape.num_clips * rows.rows[static_cast<int>(modality)] +
                    clip_offset + frame * frame_size + number * shape.num_persons + m;
    return math::Vector3<T>{from[0], from[plane], from[2 * static_cast<int64_t>(plane)]};
  };
  const auto pass = [&](int joint, const math::Vector3<T>& value) {
    const int at = skeleton_place + joint * tiling.persons;
    passed[0][at] = value.x;
    passed[1][at] = value.y;
    passed[2][at] = value.z;
  };
  const auto passed_by = [&](int joint) {
    const int at = skeleton_place + joint * tiling.persons;
    return math::Vector3<T>{passed[0][at], passed[1][at], passed[2][at]};
  };

  const bool wants_velocity = wants(Modality::kAngularVelocity);
  const bool wants_axes = wants_velocity || wants(Modality::kRotationAxis);
  math::Vector3<T> of_bone = zero;
  math::Vector3<T> of_previous = zero;
  if (is_inside) {
    of_bone = gradient_at(Modality::kBone, t, 0);
    if (wants_axes) {
      const int before = previous_bones[number];
      const math::Vector3<T> bone = person.bone(t, number);
      const math::Vector3<T> previous = person.bone(t, before);
      const math::Vector3<T> axis = math::cross(bone, previous);
      math::Vector3<T> of_axis = gradient_at(Modality::kRotationAxis, t, 0);
      if (wants_velocity) {
        const T length = math::norm(axis);
        const T angle = math::angle(bone, previous, length);
        T of_angle = 0;
        if (t + 1 < shape.num_frames) {
          const math::Vector3<T> next = person.bone(t + 1, number);
          const math::Vector3<T> next_previous = person.bone(t + 1, before);
          const T next_angle = math::angle(next, next_previous, math::norm(math::cross(next, next_previous)));
          const math::Vector3<T> of_velocity = gradient_at(Modality::kAngularVelocity, t, 1);
          of_angle -= math::turn_gradient(axis, length, time_scale, of_velocity);
          of_axis = of_axis + math::turned_axis_gradient(angle, next_angle, axis, length, time_scale, of_velocity);
        }
        if (t > 0) {
          const math::Vector3<T> last_axis = math::cross(person.bone(t - 1, number), person.bone(t - 1, before));
          of_angle += math::turn_gradient(last_axis, math::norm(last_axis), time_scale,
                                          gradient_at(Modality::kAngularVelocity, t - 1, 1));
        }
        const auto gradients = math::angle_gradients(bone, previous, axis, length, of_angle);
        of_bone = of_bone + gradients.bone;
        of_previous = gradients.previous;
      }
      const auto gradients = math::axis_gradients(bone, previous, of_axis);
      of_bone = of_bone + gradients.bone;
      of_previous = of_previous + gradients.previous;
    }
  }
  if (wants_axes) {
    pass(number, of_previous);
    __syncthreads();
    for (int joint = 0; is_inside && joint < shape.num_joints; ++joint) {
      if (previous_bones[joint] == number) of_bone = of_bone + passed_by(joint);
    }
    __syncthreads();
  }

  // A chest's bones get theirs from the root's thread alone. None is left at the root, which has no parent.
  const bool is_root = number == skeleton.root;
  pass(number, is_root ? zero : of_bone);
  __syncthreads();
  if (is_inside && is_root && skeleton.has_chest_normal) {
    const uint8_t* const chest = skeleton.chest_normal;
    const auto gradients =
        math::chest_normal_gradients(person.difference(t, chest[0]), person.difference(t, chest[1]),
                                     person.difference(t, chest[2]), of_bone);
    const auto add = [&](int joint, const math::Vector3<T>& value) {
      if (joint != number) pass(joint, passed_by(joint) + value);
    };
    add(chest[0], gradients.a);
    add(chest[1], gradients.b);
    add(chest[2], gradients.c);
  }
  __syncthreads();
  if (!is_inside) return;

  math::Vector3<T> sum = gradient_at(Modality::kJoint, t, 0) +
                         (gradient_at(Modality::kMotion, t - 1, 1) - gradient_at(Modality::kMotion, t, 1)) * time_scale;
  sum = sum + (gradient_at(Modality::kAcceleration, t, 2) + gradient_at(Modality::kAcceleration, t - 2, 2) -
               gradient_at(Modality::kAcceleration, t - 1, 2) * T(2)) *
                  (time_scale * time_scale);
  sum = sum + passed_by(number);
  for (int joint = 0; joint < shape.num_joints; ++joint) {
    if (bone_parents[joint] == number) sum = sum - passed_by(joint);
  }
  T* out = output + clip_offset + t * frame_size + number * shape.num_persons + m;
  out[0] = sum.x;
  out[plane] = sum.y;
  out[2 * static_cast<int64_t>(plane)] = sum.z;
}

}  // namespace

template <typename T>
cudaError_t derive_modalities(T* output, const T* clips, const int64_t* num_frames, const ClipShape& shape,
                              const Skeleton& skeleton, const OutputRows& rows, cudaStream_t stream) {
  if (shape.num_joints > Skeleton::kMaxJoints) return cudaErrorInvalidValue;
  const int64_t plane = static_cast<int64_t>(shape.num_frames) * shape.num_joints * shape.num_persons;
  const int64_t tiles_per_clip = (plane + kThreads - 1) / kThreads;
  const int64_t tiles = tiles_per_clip * shape.num_clips;
  if (tiles == 0) return cudaSuccess;
  if (3 * plane > INT32_MAX || tiles > INT32_MAX) return cudaErrorInvalidValue;
  return IKEM_LAUNCH((derive_modalities_kernel<T>), dim3(static_cast<unsigned>(tiles)), dim3(kThreads), 0, stream,
                     output, clips, num_frames, shape, skeleton, rows, static_cast<int>(tiles_per_clip));
}

template <typename T>
cudaError_t derive_modalities_backward(T* output, const T* gradient, const T* clips, const int64_t* num_frames,
                                       const ClipShape& shape, const Skeleton& skeleton, const OutputRows& rows,
                                       cudaStream_t stream) {
  if (shape.num_joints > Skeleton::kMaxJoints) return cudaErrorInvalidValue;
  const int64_t plane = static_cast<int64_t>(shape.num_frames) * shape.num_joints * shape.num_persons;
  if (plane * shape.num_clips == 0) return cudaSuccess;
  if (3 * plane > INT32_MAX) return cudaErrorInvalidValue;
  const GradientTiling tiling = tile_gradients(shape);
  const int64_t tiles = static_cast<int64_t>(tiling.frame_tiles) * tiling.person_tiles * shape.num_clips;
  if (tiles > INT32_MAX) return cudaErrorInvalidValue;
  return IKEM_LAUNCH((derive_modalities_backward_kernel<T>), dim3(static_cast<unsigned>(tiles)), dim3(kThreads), 0,
                     stream, output, gradient, clips, num_frames, shape, skeleton, rows, tiling);
}

template cudaError_t derive_modalities<float>(float*, const float*, const int64_t*, const ClipShape&, const Skeleton&,
                                              const OutputRows&, cudaStream_t);
template cudaError_t derive_modalities<double>(double*, const double*, const int64_t*, const ClipShape&,
                                               const Skeleton&, const OutputRows&, cudaStream_t);

template cudaError_t derive_modalities_backward<float>(float*, const float*, const float*, const int64_t*,
                                                       const ClipShape&, const Skeleton&, const OutputRows&,
                                                       cudaStream_t);
template cudaError_t derive_modalities_backward<double>(double*, const double*, const double*, const int64_t*,
                                                        const ClipShape&, const Skeleton&, const OutputRows&,
                                                        cudaStream_t);

}  // namespace ikem_fast::cuda
