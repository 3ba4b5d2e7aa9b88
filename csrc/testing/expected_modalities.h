// TEST-ONLY: modalities by plain loops in double, sharing no code with the kernels: docs/method.md section 3, one joint at
// a time. Include it after a kernel's source.
#pragma once

#include <array>
#include <cmath>
#include <random>
#include <vector>

#include "cuda/skeleton.h"

namespace expected {

using ikem_fast::cuda::Skeleton;
using Point = std::array<double, 3>;

struct Shape {
  int num_clips;    // N
  int num_frames;   // T
  int num_joints;   // V
  int num_persons;  // M
};

inline Point minus(const Point& a, const Point& b) { return {a[0] - b[0], a[1] - b[1], a[2] - b[2]}; }
inline Point scaled(const Point& a, double s) { return {a[0] * s, a[1] * s, a[2] * s}; }
inline Point cross(const Point& a, const Point& b) {
  return {a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]};
}
inline double inner(const Point& a, const Point& b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }
inline double length(const Point& a) { return std::sqrt(inner(a, a)); }
inline Point unit(const Point& a) { return scaled(a, 1 / std::max(length(a), 1e-12)); }

// Modalities of clips (N, 3, T, V, M).
struct Modalities {
  const std::vector<double>& clips;
  const std::vector<int64_t>& num_frames;
  const Shape shape;
  const Skeleton& skeleton;

  Point joint(int n, int t, int v, int m) const {
    Point point;
    for (int c = 0; c < 3; ++c) {
      point[c] =
          clips[(((static_cast<size_t>(n) * 3 + c) * shape.num_frames + t) * shape.num_joints + v) * shape.num_persons +
                m];
    }
    return point;
  }
  Point bone(int n, int t, int v, int m) const {
    const auto difference = [&](int joint_number) {
      return minus(joint(n, t, joint_number, m), joint(n, t, skeleton.bone_parents[joint_number], m));
    };
    if (v != skeleton.root || !skeleton.has_chest_normal) return difference(v);
    const Point c = difference(skeleton.chest_normal[2]);
    return unit(cross(minus(difference(skeleton.chest_normal[0]), c), minus(difference(skeleton.chest_normal[1]), c)));
  }
  Point axis(int n, int t, int v, int m) const {
    return cross(bone(n, t, v, m), bone(n, t, skeleton.previous_bones[v], m));
  }
  double angle(int n, int t, int v, int m) const {
    const Point a = unit(bone(n, t, v, m));
    const Point b = unit(bone(n, t, skeleton.previous_bones[v], m));
    return std::atan2(length(cross(a, b)), inner(a, b));
  }
  Point derive(int modality, int n, int t, int v, int m) const {
    const double r = 50.0 / num_frames[n];
    const bool has_next = t + 1 < shape.num_frames;
    const bool has_two_more = t + 2 < shape.num_frames;
    switch (static_cast<ikem_fast::Modality>(modality)) {
      case ikem_fast::Modality::kJoint:
        return joint(n, t, v, m);
      case ikem_fast::Modality::kMotion:
        return has_next ? scaled(minus(joint(n, t + 1, v, m), joint(n, t, v, m)), r) : Point{};
      case ikem_fast::Modality::kBone:
        return bone(n, t, v, m);
      case ikem_fast::Modality::kAcceleration: {
        if (!has_two_more) return Point{};
        const Point next = joint(n, t + 1, v, m);
        return scaled(minus(minus(joint(n, t + 2, v, m), next), minus(next, joint(n, t, v, m))), r * r);
      }
      case ikem_fast::Modality::kRotationAxis:
        return axis(n, t, v, m);
      default:
        return has_next ? scaled(unit(axis(n, t, v, m)), r * (angle(n, t + 1, v, m) - angle(n, t, v, m))) : Point{};
    }
  }
};

// A random tree whose root is not joint 0, with previous bones that differ from the parents at one joint.
inline Skeleton make_skeleton(int num_joints, bool has_chest_normal, std::mt19937& random) {
  Skeleton skeleton{};
  skeleton.root = num_joints / 2;
  skeleton.has_chest_normal = has_chest_normal;
  std::vector<int> placed{skeleton.root};
  for (int v = 0; v < num_joints; ++v) {
    if (v == skeleton.root) continue;
    skeleton.bone_parents[v] = placed[random() % placed.size()];
    placed.push_back(v);
  }
  skeleton.bone_parents[skeleton.root] = skeleton.root;
  for (int v = 0; v < num_joints; ++v) skeleton.previous_bones[v] = skeleton.bone_parents[v];
  if (num_joints > 3) {
    skeleton.previous_bones[num_joints - 1] = num_joints - 2;
    for (int i = 0; i < 3; ++i) skeleton.chest_normal[i] = (skeleton.root + 1 + i) % num_joints;
  }
  return skeleton;
}

}  // namespace expected
