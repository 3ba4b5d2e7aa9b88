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

// The gradient of theta_{t+1} - theta_t, given that of the angular velocity.
template <typename S>
IKEM_HOST_DEVICE S turn_gradient(const Vector3<S>& axis, S axis_length, S time_scale, const Vector3<S>& gradient) {
  return dot(normalize(axis, axis_length), gradient * time_scale);
}

// The gradient of o_t, given that of the angular velocity.
template <typename S>
IKEM_HOST_DEVICE Vector3<S> turned_axis_gradient(S angle, S next_angle, const Vector3<S>& axis, S axis_length,
                                                 S time_scale, const Vector3<S>& gradient) {
  return normalize_gradient(normalize(axis, axis_length), axis_length,
                            gradient * (time_scale * (next_angle - angle)));
}

// Gradients of the bones a, b, c, given that of their chest normal.
template <typename S>
struct ChestGradients {
  Vector3<S> a, b, c;
};
template <typename S>
IKEM_HOST_DEVICE ChestGradients<S> chest_normal_gradients(const Vector3<S>& a, const Vector3<S>& b, const Vector3<S>& c,
                                                          const Vector3<S>& gradient) {
  const Vector3<S> first = a - c, second = b - c;
  const Vector3<S> normal = cross(first, second);
  const S length = norm(normal);
  const Vector3<S> of_normal = normalize_gradient(normalize(normal, length), length, gradient);
  const Vector3<S> of_a = cross(second, of_normal), of_b = cross(of_normal, first);
  return {of_a, of_b, (of_a + of_b) * S(-1)};
}

// Gradients of a bone and of the bone before it.
template <typename S>
struct BoneGradients {
  Vector3<S> bone, previous;
};

// Given that of the rotation axis o = b x b'.
template <typename S>
IKEM_HOST_DEVICE BoneGradients<S> axis_gradients(const Vector3<S>& bone, const Vector3<S>& previous,
                                                 const Vector3<S>& gradient) {
  return {cross(previous, gradient), cross(gradient, bone)};
}

// Given that of the angle between them. It grows by what either bone's end moves away from the other bone, over the
// length of the bone that moves. No gradient passes to a bone shorter than 1e-12, nor where the axis has no direction.
template <typename S>
IKEM_HOST_DEVICE BoneGradients<S> angle_gradients(const Vector3<S>& bone, const Vector3<S>& previous,
                                                  const Vector3<S>& axis, S axis_length, S gradient) {
  using R = Real<S>;
  const auto away = [](const Vector3<S>& turn, const Vector3<S>& moved) {
    const S square = dot(moved, moved);
    return zero_below(cross(turn, moved) * (S(1) / R::at_least(square, S(1e-24))), square, S(1e-24));
  };
  // 1e-18: what single precision can still square.
  const Vector3<S> turn = axis * (gradient / R::at_least(axis_length, S(1e-18)));
  return {away(turn * S(-1), bone), away(turn, previous)};
}

#ifdef CPU_CAPABILITY
}  // namespace CPU_CAPABILITY
#endif
}  // namespace math
}  // namespace ikem_fast
