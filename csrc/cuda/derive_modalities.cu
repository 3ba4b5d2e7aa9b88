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

template cudaError_t derive_modalities<float>(float*, const float*, const int64_t*, const ClipShape&, const Skeleton&,
                                              const OutputRows&, cudaStream_t);
template cudaError_t derive_modalities<double>(double*, const double*, const int64_t*, const ClipShape&,
                                               const Skeleton&, const OutputRows&, cudaStream_t);

}  // namespace ikem_fast::cuda
