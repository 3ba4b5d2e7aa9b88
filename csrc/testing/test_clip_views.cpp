// TEST-ONLY: the CUDA kernels of clip_views against plain loops in double, over sizes and thread schedules.
// Usage: test_clip_views [SEEDS [FILE]]. One translation unit: it includes the kernel, or a copy with a planted bug.
#ifndef KERNEL_SOURCE
#define KERNEL_SOURCE "cuda/clip_views.cu"
#endif
#include KERNEL_SOURCE

#include <cmath>
#include <cstdio>
#include <random>

#include "testing/device_buffer.h"
#include "testing/expected_modalities.h"
#include "testing/kernel_test.h"

namespace {

using expected::Point;
using ikem_fast::cuda::ClipViewsInput;
using ikem_fast::cuda::OutputRows;
using ikem_fast::cuda::Skeleton;
using ikem_fast::cuda::StoredElement;

struct Options {
  bool crop = true;
  bool shear = true;
  bool camera = true;
  bool motion_scale = true;
  bool indices = true;
  bool statistics = true;
  bool has_chest_normal = true;
  int first_element = 0;  // where the clips begin in their memory
};

template <typename T>
StoredElement element_of(T) {
  return std::is_same_v<T, float> ? StoredElement::kFloat
         : std::is_same_v<T, __half> ? StoredElement::kHalf
                                     : StoredElement::kBFloat16;
}

template <typename T>
T narrowed(double value) {
  T result;
  ikem_fast::cuda::round_to(result, static_cast<float>(value));
  return result;
}

// Of a value and its neighbour that T can hold.
template <typename T>
double rounding() {
  return std::is_same_v<T, float> ? 0 : std::is_same_v<T, __half> ? 1.0 / 2048 : 1.0 / 256;
}

// The augmented clip of one view of one sample, docs/method.md section 2.
std::vector<double> augmented(const std::vector<double>& clip, const expected::Shape& shape, const Options& options,
                              int64_t start, int padding, const float* shear, float scale, const float* angles,
                              float motion) {
  const int lanes = shape.num_joints * shape.num_persons;
  const int frames = shape.num_frames;
  const auto at = [&](int c, int t, int lane) { return (static_cast<size_t>(c) * frames + t) * lanes + lane; };
  std::vector<double> extended_frames;
  for (int t = padding - 1; t >= 0; --t) extended_frames.push_back(t);
  for (int t = 0; t < frames; ++t) extended_frames.push_back(t);
  for (int t = frames - 1; t >= frames - padding; --t) extended_frames.push_back(t);
  std::vector<double> moved(clip.size());
  for (int t = 0; t < frames; ++t) {
    const int source = options.crop ? static_cast<int>(extended_frames[start + t]) : t;
    for (int lane = 0; lane < lanes; ++lane) {
      Point x{clip[at(0, source, lane)], clip[at(1, source, lane)], clip[at(2, source, lane)]};
      if (options.shear) {
        x = {x[0] + shear[0] * x[1] + shear[3] * x[2], shear[1] * x[0] + x[1] + shear[4] * x[2],
             shear[2] * x[0] + shear[5] * x[1] + x[2]};
      }
      if (options.camera) {
        const double a = angles[0], b = angles[1], c = angles[2];
        x = {x[0], std::cos(a) * x[1] - std::sin(a) * x[2], std::sin(a) * x[1] + std::cos(a) * x[2]};
        x = {std::cos(b) * x[0] + std::sin(b) * x[2], x[1], -std::sin(b) * x[0] + std::cos(b) * x[2]};
        x = {std::cos(c) * x[0] - std::sin(c) * x[1], std::sin(c) * x[0] + std::cos(c) * x[1], x[2]};
        x = expected::scaled(x, scale);
      }
      for (int c = 0; c < 3; ++c) moved[at(c, t, lane)] = x[c];
    }
  }
  std::vector<double> result = moved;
  for (int t = 1; t + 1 < frames && options.motion_scale; ++t) {
    for (int lane = 0; lane < lanes; ++lane) {
      for (int c = 0; c < 3; ++c) {
        const double mean = (moved[at(c, t - 1, lane)] + moved[at(c, t + 1, lane)]) / 2;
        result[at(c, t, lane)] = mean + motion * (moved[at(c, t, lane)] - mean);
      }
    }
  }
  return result;
}

template <typename Stored, typename View>
void check(const expected::Shape& shape, int num_samples, int num_views, const std::vector<int>& modalities,
           const Options& options = {}) {
  std::mt19937 random(num_samples * 1000 + shape.num_frames * 10 + shape.num_joints + shape.num_persons);
  const Skeleton skeleton = expected::make_skeleton(shape.num_joints, options.has_chest_normal, random);
  const size_t clip_size = static_cast<size_t>(3) * shape.num_frames * shape.num_joints * shape.num_persons;
  const size_t stride = clip_size + 2;  // a set whose clips lie apart
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<float> uniform(-0.5f, 0.5f);
  std::vector<Stored> clips(options.first_element + shape.num_clips * stride);
  for (Stored& value : clips) value = narrowed<Stored>(normal(random));
  std::vector<int64_t> num_frames(shape.num_clips), indices(num_samples), starts(num_views * num_samples);
  for (int64_t& value : num_frames) value = 20 + random() % 200;
  for (int64_t& value : indices) value = random() % shape.num_clips;
  const int padding = shape.num_frames / 3;
  for (int64_t& value : starts) value = random() % (2 * padding + 1);
  std::vector<float> shear(6 * starts.size()), scale(starts.size()), angles(3 * starts.size()), motion(starts.size());
  for (float& value : shear) value = uniform(random);
  for (float& value : scale) value = 1 + uniform(random);
  for (float& value : angles) value = uniform(random);
  for (float& value : motion) value = 0.5f + 2 * uniform(random);
  OutputRows rows;
  for (int8_t& row : rows.rows) row = -1;
  for (size_t s = 0; s < modalities.size(); ++s) rows.rows[modalities[s]] = static_cast<int8_t>(s);

  DeviceBuffer<Stored> device_clips(clips);
  DeviceBuffer<int64_t> device_frames(num_frames), device_indices(indices), device_starts(starts);
  DeviceBuffer<float> device_shear(shear), device_scale(scale), device_angles(angles), device_motion(motion);
  const ClipViewsInput input{device_clips.data() + options.first_element,
                             element_of(Stored{}),
                             static_cast<int64_t>(stride),
                             shape.num_clips,
                             device_frames.data(),
                             options.indices ? device_indices.data() : nullptr,
                             options.crop ? device_starts.data() : nullptr,
                             padding,
                             options.shear ? device_shear.data() : nullptr,
                             options.camera ? device_scale.data() : nullptr,
                             options.camera ? device_angles.data() : nullptr,
                             options.motion_scale ? device_motion.data() : nullptr,
                             num_samples,
                             num_views,
                             shape.num_frames,
                             shape.num_joints,
                             shape.num_persons,
                             static_cast<int>(modalities.size())};
  const size_t row_size = static_cast<size_t>(3) * shape.num_joints;
  const size_t rows_per_modality = static_cast<size_t>(num_samples) * shape.num_persons * shape.num_frames;
  const size_t num_sums = num_views * modalities.size() * row_size;
  DeviceBuffer<View> device_views(num_sums * rows_per_modality);
  DeviceBuffer<double> device_statistics(options.statistics ? 2 * num_sums : 0);
  DeviceBuffer<double> scratch(options.statistics ? ikem_fast::cuda::clip_views_scratch_size(input) : 0);
  const cudaError_t error = ikem_fast::cuda::clip_views<View>(
      device_views.data(), options.statistics ? device_statistics.data() : nullptr, scratch.data(), input, skeleton,
      rows, nullptr);
  const std::vector<View> views = device_views.values();
  const std::vector<double> statistics = device_statistics.values();

  const expected::Shape one{1, shape.num_frames, shape.num_joints, shape.num_persons};
  double worst = 0;
  std::vector<double> sums(num_sums), squares(num_sums), sizes(num_sums);
  for (int view = 0; view < num_views; ++view) {
    for (int b = 0; b < num_samples; ++b) {
      const int64_t clip = options.indices ? indices[b] : b;
      const size_t drawn = static_cast<size_t>(view) * num_samples + b;
      std::vector<double> stored(clip_size);
      for (size_t i = 0; i < clip_size; ++i) {
        stored[i] = ikem_fast::cuda::widen(clips[options.first_element + clip * stride + i]);
      }
      const std::vector<double> coordinates =
          augmented(stored, one, options, starts[drawn], padding, &shear[6 * drawn], scale[drawn], &angles[3 * drawn],
                    motion[drawn]);
      const std::vector<int64_t> frame_count{num_frames[clip]};
      const expected::Modalities modality_of{coordinates, frame_count, one, skeleton};
      for (size_t s = 0; s < modalities.size(); ++s) {
        for (int m = 0; m < shape.num_persons; ++m) {
          for (int t = 0; t < shape.num_frames; ++t) {
            const size_t row = ((view * modalities.size() + s) * num_samples + b) * shape.num_persons + m;
            for (int v = 0; v < shape.num_joints; ++v) {
              const Point wanted = modality_of.derive(modalities[s], 0, t, v, m);
              for (int c = 0; c < 3; ++c) {
                const double got =
                    ikem_fast::cuda::widen(views[(row * shape.num_frames + t) * row_size + 3 * v + c]);
                const size_t sum = (view * modalities.size() + s) * row_size + 3 * v + c;
                sums[sum] += got;
                squares[sum] += got * got;
                sizes[sum] += std::abs(got);
                // Where neighbouring bones are nearly parallel, rounding turns the axis of angular velocity.
                const Point axis = modality_of.axis(0, t, v, m);
                const double slack = modalities[s] == 5 ? 1e-5 / std::max(1e-3, expected::length(axis)) : 0;
                const double allowed = (4e-5 + slack) * (1 + std::abs(wanted[c])) + rounding<View>() * std::abs(wanted[c]);
                const double difference = std::abs(got - wanted[c]) / allowed;
                if (!(difference <= worst)) worst = difference;  // NaN, too
              }
            }
          }
        }
      }
    }
  }
  double worst_sum = 0;
  for (size_t i = 0; i < num_sums && options.statistics; ++i) {
    const double of_sum = std::abs(statistics[i] - sums[i]) / (1e-30 + sizes[i]);
    const double of_squares = std::abs(statistics[num_sums + i] - squares[i]) / (1e-30 + squares[i]);
    for (double difference : {of_sum, of_squares}) {
      if (!(difference <= worst_sum)) worst_sum = difference;
    }
  }
  if (error == cudaSuccess && worst <= 1 && worst_sum <= 1e-6) return;
  ++failures;
  printf("FAILED N %d T %d V %d M %d B %d R %d, %zu modalities, %zu to %zu bytes, seed %llu: error %d, %g of what is "
         "allowed, sums off by %g\n",
         shape.num_clips, shape.num_frames, shape.num_joints, shape.num_persons, num_samples, num_views,
         modalities.size(), sizeof(Stored), sizeof(View), static_cast<unsigned long long>(cuda_emulator::config.seed),
         static_cast<int>(error), worst, worst_sum);
}

// Indices and crops outside the set give NaN, and nothing is read there.
void check_bad_samples() {
  const int num_joints = 5, num_frames = 4;
  std::mt19937 random(1);
  const Skeleton skeleton = expected::make_skeleton(num_joints, true, random);
  DeviceBuffer<float> clips(std::vector<float>(2 * 3 * num_frames * num_joints, 1.0f));
  DeviceBuffer<int64_t> counts(std::vector<int64_t>{50, 50});
  DeviceBuffer<int64_t> indices(std::vector<int64_t>{1, 2, -1, 0});
  DeviceBuffer<int64_t> starts(std::vector<int64_t>{0, 0, 0, 3});
  const int sample_size = num_frames * num_joints * 3;
  DeviceBuffer<float> views(4 * sample_size);
  ClipViewsInput input{};
  input.clips = clips.data();
  input.clip_stride = sample_size;
  input.num_clips = 2;
  input.num_frames = counts.data();
  input.indices = indices.data();
  input.crop_start = starts.data();
  input.crop_padding = 1;
  input.num_samples = 4;
  input.num_views = 1;
  input.clip_frames = num_frames;
  input.num_joints = num_joints;
  input.num_persons = 1;
  input.num_outputs = 1;
  const OutputRows rows{{0, -1, -1, -1, -1, -1}};
  const cudaError_t error =
      ikem_fast::cuda::clip_views<float>(views.data(), nullptr, nullptr, input, skeleton, rows, nullptr);
  const std::vector<float> values = views.values();
  bool right = error == cudaSuccess;
  for (int i = 0; i < 4 * sample_size; ++i) right = right && (i < sample_size ? values[i] == 1.0f : std::isnan(values[i]));
  input.num_joints = Skeleton::kMaxJoints + 1;
  right = right && ikem_fast::cuda::clip_views<float>(views.data(), nullptr, nullptr, input, skeleton, rows, nullptr) ==
                       cudaErrorInvalidValue;
  if (right) return;
  ++failures;
  printf("FAILED indices outside the set must give NaN, and too many joints be refused\n");
}

// Sums do not depend on the order in which threads and blocks run.
void check_determinism() {
  std::vector<double> first;
  for (int seed : {0, 1, 5}) {
    cuda_emulator::config.seed = seed;
    std::mt19937 random(1);
    const int num_joints = 20, num_frames = 9, num_samples = 3, num_persons = 1;
    const Skeleton skeleton = expected::make_skeleton(num_joints, true, random);
    std::vector<float> values(num_samples * 3 * num_frames * num_joints);
    for (float& value : values) value = std::normal_distribution<float>()(random);
    DeviceBuffer<float> clips(values);
    DeviceBuffer<int64_t> counts(std::vector<int64_t>(num_samples, 70));
    ClipViewsInput input{};
    input.clips = clips.data();
    input.clip_stride = 3 * num_frames * num_joints;
    input.num_clips = input.num_samples = num_samples;
    input.num_frames = counts.data();
    input.num_views = 1;
    input.clip_frames = num_frames;
    input.num_joints = num_joints;
    input.num_persons = num_persons;
    input.num_outputs = 1;
    const OutputRows rows{{-1, 0, -1, -1, -1, -1}};
    DeviceBuffer<float> views(values.size());
    DeviceBuffer<double> statistics(2 * 3 * num_joints), scratch(ikem_fast::cuda::clip_views_scratch_size(input));
    ikem_fast::cuda::clip_views<float>(views.data(), statistics.data(), scratch.data(), input, skeleton, rows, nullptr);
    if (first.empty()) first = statistics.values();
    if (first == statistics.values()) continue;
    ++failures;
    printf("FAILED sums depend on the order of threads\n");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<int> all{0, 1, 2, 3, 4, 5};
  return run_over_seeds("clip_views", argc, argv, [&](int seed) {
    // All frames of 25 joints and two persons take more than one block; small ones more than one seed.
    if (seed == 0) check<float, float>({3, 35, 25, 2}, 1, 1, all);
    if (seed == 1) check<__half, __nv_bfloat16>({2, 35, 20, 2}, 1, 1, all);
    check<float, __nv_bfloat16>({3, 7, 25, 2}, 2, 2, all);
    check<__nv_bfloat16, __half>({2, 6, 5, 4}, 2, 1, all, {.first_element = 1});
    check<float, float>({2, 5, 20, 3}, 2, 1, {4, 2, 1}, {.crop = false, .camera = false});
    check<float, float>({2, 4, 9, 1}, 2, 2, {3, 0}, {.shear = false, .motion_scale = false, .indices = false});
    check<__half, float>({1, 1, 7, 1}, 2, 1, all, {.statistics = false});
    check<float, __half>({1, 2, 6, 1}, 1, 1, {5}, {.motion_scale = false, .has_chest_normal = false});
    check<float, float>({1, 3, 1, 1}, 1, 1, all, {.has_chest_normal = false});
    check<float, float>({2, 3, 5, 2}, 0, 2, all);
    if (seed < 2) check<float, __nv_bfloat16>({1, 3, Skeleton::kMaxJoints, 2}, 1, 1, {5, 0});
    check_bad_samples();
    if (seed == 0) check_determinism();
  });
}
