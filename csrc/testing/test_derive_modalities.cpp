// TEST-ONLY: the CUDA kernels of derive_modalities against plain loops in double, over sizes and thread schedules; the
// gradient against differences of those.
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
struct Input {
  Input(const ClipShape& shape, bool has_chest_normal, const std::vector<int>& modalities)
      : random(shape.num_clips * 1000 + shape.num_frames * 10 + shape.num_joints),
        skeleton(expected::make_skeleton(shape.num_joints, has_chest_normal, random)),
        clips(static_cast<size_t>(3) * shape.num_clips * shape.num_frames * shape.num_joints * shape.num_persons),
        num_frames(shape.num_clips) {
    std::normal_distribution<double> normal;
    for (T& value : clips) value = static_cast<T>(normal(random));
    for (int64_t& value : num_frames) value = 20 + random() % 200;
    for (int8_t& row : rows.rows) row = -1;
    for (size_t s = 0; s < modalities.size(); ++s) rows.rows[modalities[s]] = static_cast<int8_t>(s);
  }
  std::mt19937 random;
  const Skeleton skeleton;
  std::vector<T> clips;
  std::vector<int64_t> num_frames;
  OutputRows rows;
};

template <typename T>
void report(const char* what, const ClipShape& shape, const std::vector<int>& modalities, cudaError_t error,
            double worst, double tolerance) {
  if (error == cudaSuccess && worst <= tolerance) return;
  ++failures;
  printf("FAILED %s of N %d T %d V %d M %d, %zu modalities, %zu-byte values, seed %llu: error %d, difference %g\n", what,
         shape.num_clips, shape.num_frames, shape.num_joints, shape.num_persons, modalities.size(), sizeof(T),
         static_cast<unsigned long long>(cuda_emulator::config.seed), static_cast<int>(error), worst);
}

template <typename T>
void check(const ClipShape& shape, bool has_chest_normal, const std::vector<int>& modalities) {
  const Input<T> input(shape, has_chest_normal, modalities);
  const auto& [random, skeleton, clips, num_frames, rows] = input;
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
  report<T>("modalities", shape, modalities, error, worst, tolerance);
}

// Central differences of sum(weights * modalities) in up to `most` of the coordinates.
template <typename T>
void check_gradient(const ClipShape& shape, bool has_chest_normal, const std::vector<int>& modalities,
                    size_t most = 150) {
  Input<T> input(shape, has_chest_normal, modalities);
  const size_t size = input.clips.size();
  std::normal_distribution<double> normal;
  std::vector<T> weights(modalities.size() * size);
  for (T& value : weights) value = static_cast<T>(normal(input.random));

  DeviceBuffer<T> device_clips(input.clips);
  DeviceBuffer<T> device_weights(weights);
  DeviceBuffer<int64_t> device_frames(input.num_frames);
  DeviceBuffer<T> device_output(size);
  const cudaError_t error =
      ikem_fast::cuda::derive_modalities_backward(device_output.data(), device_weights.data(), device_clips.data(),
                                                  device_frames.data(), shape, input.skeleton, input.rows, nullptr);
  const std::vector<T> output = device_output.values();

  std::vector<double> clips(input.clips.begin(), input.clips.end());
  const expected::Modalities modality_of{
      clips, input.num_frames, {shape.num_clips, shape.num_frames, shape.num_joints, shape.num_persons},
      input.skeleton};
  // Of the values that depend on a coordinate: those of its person, of its frame and the two before it.
  const auto objective = [&](int n, int frame, int m) {
    double sum = 0;
    for (size_t s = 0; s < modalities.size(); ++s) {
      for (int t = std::max(0, frame - 2); t <= frame; ++t) {
        for (int v = 0; v < shape.num_joints; ++v) {
          const expected::Point value = modality_of.derive(modalities[s], n, t, v, m);
          for (int c = 0; c < 3; ++c) {
            const size_t place =
                (((static_cast<size_t>(n) * 3 + c) * shape.num_frames + t) * shape.num_joints + v) * shape.num_persons +
                m;
            sum += weights[s * size + place] * value[c];
          }
        }
      }
    }
    return sum;
  };
  const double step = 1e-5;
  const double tolerance = sizeof(T) == 4 ? 2e-3 : 2e-6;
  double worst = 0;
  for (size_t k = 0; k < std::min(size, most); ++k) {
    const size_t i = size <= most ? k : input.random() % size;
    const int m = i % shape.num_persons;
    const int t = i / shape.num_persons / shape.num_joints % shape.num_frames;
    const int n = i / shape.num_persons / shape.num_joints / shape.num_frames / 3;
    const double value = clips[i];
    clips[i] = value + step;
    const double above = objective(n, t, m);
    clips[i] = value - step;
    const double below = objective(n, t, m);
    clips[i] = value;
    const double wanted = (above - below) / (2 * step);
    const double difference = std::abs(output[i] - wanted) / (1 + std::abs(wanted));
    if (!(difference <= worst)) worst = difference;  // NaN, too
  }
  report<T>("gradient", shape, modalities, error, worst, tolerance);
}

void check_refusals() {
  const OutputRows rows{{0, -1, -1, -1, -1, -1}};
  const Skeleton skeleton{};
  const auto derive = [&](const ClipShape& shape) {
    return ikem_fast::cuda::derive_modalities<float>(nullptr, nullptr, nullptr, shape, skeleton, rows, nullptr);
  };
  const bool refused = derive({1, 1, Skeleton::kMaxJoints + 1, 1}) == cudaErrorInvalidValue &&
                       derive({1, 1 << 20, 200, 10}) == cudaErrorInvalidValue && derive({0, 1, 5, 1}) == cudaSuccess;
  const auto pull_back = [&](const ClipShape& shape) {
    return ikem_fast::cuda::derive_modalities_backward<float>(nullptr, nullptr, nullptr, nullptr, shape, skeleton, rows,
                                                              nullptr);
  };
  const bool refused_backward = pull_back({1, 1, Skeleton::kMaxJoints + 1, 1}) == cudaErrorInvalidValue &&
                                pull_back({1, 1 << 20, 200, 10}) == cudaErrorInvalidValue &&
                                pull_back({0, 1, 5, 1}) == cudaSuccess;
  if (refused && refused_backward) return;
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
    check_gradient<double>({2, 7, 25, 2}, true, all);
    check_gradient<float>({1, 12, 20, 1}, true, all);
    check_gradient<double>({3, 1, 25, 1}, true, all);
    check_gradient<double>({1, 2, 20, 3}, false, all);
    check_gradient<double>({1, 3, 100, 5}, true, all, 20);
    check_gradient<double>({2, 3, 1, 1}, false, all);
    check_gradient<float>({1, 2, Skeleton::kMaxJoints, 2}, true, {5, 0}, 20);
    for (int modality : all) check_gradient<double>({1, 5, 6, 2}, true, {modality});
    check_refusals();
  });
}
