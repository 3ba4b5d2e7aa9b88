// TEST-ONLY: the CUDA kernel of derive_modalities against plain loops in double, over sizes and thread schedules.
// Usage: test_derive_modalities [SEEDS]. One translation unit: it includes the kernel, or a copy with a planted bug.
#ifndef KERNEL_SOURCE
#define KERNEL_SOURCE "cuda/derive_modalities.cu"
#endif
#include KERNEL_SOURCE

#include <array>
#include <cmath>
#include <cstdio>
#include <random>

#include "testing/device_buffer.h"

namespace {

using ikem_fast::kNumModalities;
using ikem_fast::cuda::ClipShape;
using ikem_fast::cuda::OutputRows;
using ikem_fast::cuda::Skeleton;
using Point = std::array<double, 3>;

int failures = 0;

// ---- the expected values: docs/method.md section 3, one joint at a time

Point minus(const Point& a, const Point& b) { return {a[0] - b[0], a[1] - b[1], a[2] - b[2]}; }
Point scaled(const Point& a, double s) { return {a[0] * s, a[1] * s, a[2] * s}; }
Point cross(const Point& a, const Point& b) {
  return {a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]};
}
double inner(const Point& a, const Point& b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }
double length(const Point& a) { return std::sqrt(inner(a, a)); }
Point unit(const Point& a) { return scaled(a, 1 / std::max(length(a), 1e-12)); }

struct Expected {
  const std::vector<double>& clips;
  const std::vector<int64_t>& num_frames;
  const ClipShape& shape;
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
Skeleton make_skeleton(int num_joints, bool has_chest_normal, std::mt19937& random) {
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

template <typename T>
void check(const ClipShape& shape, bool has_chest_normal, const std::vector<int>& modalities) {
  std::mt19937 random(shape.num_clips * 1000 + shape.num_frames * 10 + shape.num_joints);
  const Skeleton skeleton = make_skeleton(shape.num_joints, has_chest_normal, random);
  const size_t clip_size = static_cast<size_t>(3) * shape.num_frames * shape.num_joints * shape.num_persons;
  std::normal_distribution<double> normal;
  std::vector<T> clips(shape.num_clips * clip_size);
  for (T& value : clips) value = static_cast<T>(normal(random));
  std::vector<int64_t> num_frames(shape.num_clips);
  for (int64_t& value : num_frames) value = 20 + random() % 200;
  OutputRows rows;
  for (int8_t& row : rows.rows) row = -1;
  for (size_t s = 0; s < modalities.size(); ++s) rows.rows[modalities[s]] = static_cast<int8_t>(s);

  DeviceBuffer<T> device_clips(clips);
  DeviceBuffer<int64_t> device_frames(num_frames);
  DeviceBuffer<T> device_output(modalities.size() * clips.size());
  const cudaError_t error = ikem_fast::cuda::derive_modalities(device_output.data(), device_clips.data(),
                                                               device_frames.data(), shape, skeleton, rows, nullptr);
  const std::vector<T> output = device_output.values();
  const std::vector<double> exact_clips(clips.begin(), clips.end());
  const Expected expected{exact_clips, num_frames, shape, skeleton};

  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-12;  // of the angles' scale; axes of nearly parallel bones
  double worst = 0;
  size_t i = 0;
  for (int modality : modalities) {
    for (int n = 0; n < shape.num_clips; ++n) {
      for (int c = 0; c < 3; ++c) {
        for (int t = 0; t < shape.num_frames; ++t) {
          for (int v = 0; v < shape.num_joints; ++v) {
            for (int m = 0; m < shape.num_persons; ++m, ++i) {
              const double wanted = expected.derive(modality, n, t, v, m)[c];
              const double difference = std::abs(output[i] - wanted) / (1 + std::abs(wanted));
              if (!(difference <= worst)) worst = difference;  // NaN, too
            }
          }
        }
      }
    }
  }
  if (error == cudaSuccess && worst <= tolerance) return;
  ++failures;
  printf("FAILED N %d T %d V %d M %d, %zu modalities, %zu-byte values, seed %llu: error %d, difference %g\n",
         shape.num_clips, shape.num_frames, shape.num_joints, shape.num_persons, modalities.size(), sizeof(T),
         static_cast<unsigned long long>(cuda_emulator::config.seed), static_cast<int>(error), worst);
}

void check_refusals() {
  const OutputRows rows{{0, -1, -1, -1, -1, -1}};
  const Skeleton skeleton{};
  const auto derive = [&](const ClipShape& shape) {
    return ikem_fast::cuda::derive_modalities<float>(nullptr, nullptr, nullptr, shape, skeleton, rows, nullptr);
  };
  const bool refused = derive({1, 1, Skeleton::kMaxJoints + 1, 1}) == cudaErrorInvalidValue &&
                       derive({1, 1 << 20, 200, 10}) == cudaErrorInvalidValue && derive({0, 1, 5, 1}) == cudaSuccess;
  if (refused) return;
  ++failures;
  printf("FAILED the launcher must refuse too many joints and clips too large, and accept an empty batch\n");
}

}  // namespace

int main(int argc, char** argv) {
  const int seeds = argc > 1 ? atoi(argv[1]) : 4;
  const std::vector<int> all{0, 1, 2, 3, 4, 5};
  for (int seed = 0; seed < seeds && failures == 0; ++seed) {
    cuda_emulator::config.seed = seed;
    check<float>({2, 7, 25, 2}, true, all);
    check<double>({1, 5, 20, 2}, true, all);
    check<float>({3, 1, 25, 1}, true, all);
    check<float>({1, 2, 20, 3}, false, all);
    check<double>({0, 4, 25, 2}, true, all);
    check<float>({2, 3, 1, 1}, false, all);
    check<float>({1, 3, Skeleton::kMaxJoints, 1}, true, {5, 0});
    for (int modality : all) check<float>({1, 4, 25, 1}, true, {modality});
    check<float>({1, 4, 20, 2}, true, {4, 2, 1});
    check_refusals();
  }
  const bool passed = failures == 0 && cuda_emulator::reports.empty();
  printf("%s derive_modalities, %d seeds, %zu reports\n", passed ? "passed" : "FAILED", seeds,
         cuda_emulator::reports.size());
  return passed ? 0 : 1;
}
