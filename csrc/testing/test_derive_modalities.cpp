// TEST-ONLY: the CUDA kernel of derive_modalities against plain loops in double, over sizes and thread schedules.
// Usage: test_derive_modalities [SEEDS [FILE]]. One translation unit: it includes the kernel, or a copy with a planted bug.
#ifndef KERNEL_SOURCE
#define KERNEL_SOURCE "cuda/derive_modalities.cu"
#endif
#include KERNEL_SOURCE

#include <cmath>
#include <cstdio>
#include <random>

#include "testing/device_buffer.h"
#include "testing/expected_modalities.h"
#include "testing/kernel_test.h"

namespace {

using ikem_fast::cuda::ClipShape;
using ikem_fast::cuda::OutputRows;
using ikem_fast::cuda::Skeleton;

template <typename T>
void check(const ClipShape& shape, bool has_chest_normal, const std::vector<int>& modalities) {
  std::mt19937 random(shape.num_clips * 1000 + shape.num_frames * 10 + shape.num_joints);
  const Skeleton skeleton = expected::make_skeleton(shape.num_joints, has_chest_normal, random);
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
  const expected::Modalities modality_of{
      exact_clips, num_frames, {shape.num_clips, shape.num_frames, shape.num_joints, shape.num_persons}, skeleton};

  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-12;  // of the angles' scale; axes of nearly parallel bones
  double worst = 0;
  size_t i = 0;
  for (int modality : modalities) {
    for (int n = 0; n < shape.num_clips; ++n) {
      for (int c = 0; c < 3; ++c) {
        for (int t = 0; t < shape.num_frames; ++t) {
          for (int v = 0; v < shape.num_joints; ++v) {
            for (int m = 0; m < shape.num_persons; ++m, ++i) {
              const double wanted = modality_of.derive(modality, n, t, v, m)[c];
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
  const std::vector<int> all{0, 1, 2, 3, 4, 5};
  return run_over_seeds("derive_modalities", argc, argv, [&](int) {
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
  });
}
