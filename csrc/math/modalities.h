// The six modalities at one joint and frame (docs/method.md section 3), for host and device.
#pragma once

#include <cstdint>

#include "math/vector3.h"

namespace ikem_fast {

// The numbers by which operators name modalities; the order of ikem_fast.MODALITIES.
enum class Modality : int { kJoint, kMotion, kBone, kAcceleration, kRotationAxis, kAngularVelocity };
constexpr int kNumModalities = 6;

// Velocities are scaled by this over the clip's own frame count.
constexpr int kReferenceFrames = 50;

namespace math {
#ifdef CPU_CAPABILITY
inline namespace CPU_CAPABILITY {
#endif

// r = 50 / F. Through the reciprocal, as PyTorch divides a number by a tensor, so that both round alike.
template <typename S>
IKEM_HOST_DEVICE S time_scale(int64_t num_frames) {
  return S(1) / static_cast<S>(num_frames) * S(kReferenceFrames);
}

// v_t = r (x_{t+1} - x_t), per coordinate.
template <typename S>
IKEM_HOST_DEVICE S motion(S now, S next, S time_scale) {
  return Real<S>::product(time_scale, next - now);
}

// a_t = r (v_{t+1} - v_t), per coordinate.
template <typename S>
IKEM_HOST_DEVICE S acceleration(S now, S next, S after_next, S time_scale) {
  return Real<S>::product(time_scale, motion(next, after_next, time_scale) - motion(now, next, time_scale));
}

// normalize((a - c) x (b - c)) of the bones a, b, c: what the root has for a bone.
template <typename S>
IKEM_HOST_DEVICE Vector3<S> chest_normal(const Vector3<S>& a, const Vector3<S>& b, const Vector3<S>& c) {
  return normalize(cross(a - c, b - c));
}

// The angle in [0, pi] between a bone and the bone before it, given the length of their cross product. It does not
// depend on the bones' lengths, so they need not be normalised. 0 where a bone is zero.
template <typename S>
IKEM_HOST_DEVICE S angle(const Vector3<S>& bone, const Vector3<S>& previous, S axis_length) {
  return Real<S>::arctangent(axis_length, dot(bone, previous));
}

// r (theta_{t+1} - theta_t) normalize(o_t), given the length of o_t.
template <typename S>
IKEM_HOST_DEVICE Vector3<S> angular_velocity(S angle, S next_angle, const Vector3<S>& axis, S axis_length, S time_scale) {
  return normalize(axis, axis_length) * (time_scale * (next_angle - angle));
}

#ifdef CPU_CAPABILITY
}  // namespace CPU_CAPABILITY
#endif
}  // namespace math
}  // namespace ikem_fast
