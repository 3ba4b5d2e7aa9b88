// TEST-ONLY: the CUDA kernels of spectral_transform, one by one against plain loops in double, over sizes and thread
// schedules; bases are random numbers, as the kernels do not know what they are.
// Usage: test_spectral_transform [SEEDS [FILE]]. One translation unit: it includes the kernels, or a copy with a
// planted bug.
#ifndef KERNEL_SOURCE
#define KERNEL_SOURCE "cuda/spectral_transform.cu"
#endif
#include KERNEL_SOURCE

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "cuda/channel_statistics.cu"
#include "testing/device_buffer.h"
#include "testing/kernel_test.h"
#include "testing/values.h"

namespace {

using ikem_fast::cuda::ElementType;
using ikem_fast::cuda::SpectralShape;
using ikem_fast::cuda::SpectralWeights;

using Values = std::vector<double>;

std::mt19937 generator;

template <typename T>
std::vector<T> draw(int64_t count, double mean = 0) {
  std::normal_distribution<double> normal(mean, 1.0);
  std::vector<T> values(count);
  for (T& value : values) value = rounded<T>(normal(generator));
  return values;
}

// Relative to the largest value that is wanted.
template <typename T>
bool same(const char* what, const std::vector<T>& ours, const Values& wanted, double tolerance) {
  double largest = 1e-3, worst = ours.size() == wanted.size() ? 0 : INFINITY;
  for (size_t i = 0; i < wanted.size() && worst < INFINITY; ++i) {
    largest = std::max(largest, std::abs(wanted[i]));
    const double error = std::abs(exact(ours[i]) - wanted[i]);
    if (!(error <= worst)) worst = error;
  }
  if (worst <= tolerance * largest) return true;
  printf("FAILED %s off by %g, allowed %g\n", what, worst, tolerance * largest);
  return false;
}

template <typename T>
class Checker {
 public:
  explicit Checker(const SpectralShape& shape) : s_(shape) {
    generator.seed(static_cast<unsigned>(s_.frames * 100 + s_.channels + s_.frequencies));
    window_ = s_.tile_frames + 2 * s_.lead;
    x_ = draw<T>(num_frames_values());
    y_ = draw<T>(num_frames_values(), 1.0);
    scale_ = draw<float>(s_.streams * s_.channels);
    shift_ = draw<float>(s_.streams * s_.channels);
    mean_ = draw<float>(s_.streams * s_.channels);
    mean_gradient_ = draw<float>(s_.streams * s_.channels);
    variance_gradient_ = draw<float>(s_.streams * s_.channels);
  }

  void check_all() {
    // Unless they are all of a stream, its last sequences.
    bool right = true;
    for (int mode = 0; mode < 5; ++mode) right = check_slots(mode) && right;
    for (int mode = 0; mode < 4; ++mode) right = check_frames(mode) && right;
    for (int mode = 0; mode < 3; ++mode) right = check_x_gradient(mode) && right;
    if (right) return;
    ++failures;
    printf("FAILED S %lld B %lld of %lld T %d V %d C %d tile %d lead %d F %d, %d bytes\n",
           static_cast<long long>(s_.streams), static_cast<long long>(s_.sequences),
           static_cast<long long>(s_.stream_sequences), s_.frames, s_.joints, s_.channels, s_.tile_frames, s_.lead,
           s_.frequencies, static_cast<int>(sizeof(T)));
  }

 private:
  static constexpr ElementType kType = sizeof(T) == 4 ? ElementType::kFloat : ElementType::kBFloat16;
  static constexpr double kTolerance = sizeof(T) == 4 ? 2e-6 : 5e-3;

  int64_t first_sequence() const { return s_.stream_sequences - s_.sequences; }
  int64_t num_frames_values() const {
    return s_.streams * s_.stream_sequences * s_.frames * s_.joints * s_.channels;
  }
  // Where the sequences that count begin, `size` values a sequence.
  int64_t start(int64_t size) const { return first_sequence() * size; }
  int64_t frames_start() const { return start(static_cast<int64_t>(s_.frames) * s_.joints * s_.channels); }
  int64_t num_single() const { return s_.streams * s_.rows() * s_.channels; }
  int64_t num_pairs() const { return s_.streams * s_.frequencies * s_.rows() * 2 * s_.channels; }

  // Calls visit(stream, sequence, tile, joint, row in the stream) for all rows.
  template <typename Visit>
  void for_each_row(Visit visit) const {
    for (int64_t stream = 0; stream < s_.streams; ++stream) {
      for (int64_t row = 0; row < s_.rows(); ++row) {
        const int joint = static_cast<int>(row % s_.joints), tile = static_cast<int>(row / s_.joints % s_.num_tiles());
        visit(stream, row / s_.joints / s_.num_tiles(), tile, joint, row);
      }
    }
  }
  // -1 for a frame that is not there; of tensors from frames_start() on.
  int64_t frame_at(int64_t stream, int64_t sequence, int frame, int joint, int channel) const {
    if (frame < 0 || frame >= s_.frames) return -1;
    const int64_t of_stream = (stream * s_.stream_sequences + sequence) * s_.frames + frame;
    return (of_stream * s_.joints + joint) * s_.channels + channel;
  }
  int64_t single_at(int64_t stream, int64_t row, int channel) const {
    return (stream * s_.rows() + row) * s_.channels + channel;
  }
  int64_t pair_at(int64_t stream, int f, int64_t row, int part, int channel) const {
    return (((stream * s_.frequencies + f) * s_.rows() + row) * 2 + part) * s_.channels + channel;
  }

  // Modes: x itself, its activation, the gradient with nothing, with the mean's, with both.
  bool check_slots(int mode) {
    const std::vector<double> basis = draw_basis(window_);
    DeviceBuffer<T> x(x_), y(y_), single(num_single()), pairs(num_pairs());
    DeviceBuffer<float> scale(scale_), shift(shift_), mean(mean_), mean_gradient(mean_gradient_);
    DeviceBuffer<float> variance_gradient(variance_gradient_);
    const int64_t num_sums = s_.streams * s_.stream_sequences * s_.channels;
    DeviceBuffer<float> sums(std::vector<float>(num_sums, 0.0f));
    const ikem_fast::cuda::GradientInput gradient{y.data() + frames_start(), mean.data(),
                                                  mode >= 3 ? mean_gradient.data() : nullptr,
                                                  mode == 4 ? variance_gradient.data() : nullptr, 0.125f};
    const cudaError_t error = ikem_fast::cuda::spectral_slots(
        {single.data(), pairs.data()}, basis.data(), x.data() + frames_start(), kType,
        {mode == 1 ? scale.data() : nullptr, shift.data()}, mode >= 2 ? &gradient : nullptr,
        mode >= 2 ? sums.data() + start(s_.channels) : nullptr, s_, nullptr);
    Values wanted_single(num_single()), wanted_pairs(num_pairs()), wanted_sums(num_sums);
    for_each_row([&](int64_t stream, int64_t sequence, int tile, int joint, int64_t row) {
      for (int channel = 0; channel < s_.channels; ++channel) {
        const int64_t of_stream = stream * s_.channels + channel;
        for (int j = 0; j < window_; ++j) {
          const int64_t at = frame_at(stream, sequence, tile * s_.tile_frames - s_.lead + j, joint, channel);
          if (at < 0) continue;
          const double value = exact(x_[frames_start() + at]), made = exact(y_[frames_start() + at]);
          double h = value;
          if (mode == 1) {
            const double before = std::fma(scale_[of_stream], static_cast<float>(value), shift_[of_stream]);
            h = exact(rounded<T>(std::max(before, 0.0)));
          }
          if (mode >= 3) h += 0.125 * mean_gradient_[of_stream];
          if (mode == 4) h += 0.25 * variance_gradient_[of_stream] * (made - mean_[of_stream]);
          if (mode >= 2 && j >= s_.lead && j < s_.lead + s_.tile_frames) {
            wanted_sums[(stream * s_.stream_sequences + first_sequence() + sequence) * s_.channels + channel] += h;
          }
          wanted_single[single_at(stream, row, channel)] += basis[j] * h;
          for (int f = 0; f < s_.frequencies; ++f) {
            for (int part = 0; part < 2; ++part) {
              wanted_pairs[pair_at(stream, f, row, part, channel)] += basis[(1 + 2 * f + part) * window_ + j] * h;
            }
          }
        }
      }
    });
    bool right = error == cudaSuccess;
    right = same("single slots", single.values(), wanted_single, kTolerance) && right;
    right = same("pairs of slots", pairs.values(), wanted_pairs, kTolerance) && right;
    if (mode >= 2) right = same("sums", sums.values(), wanted_sums, 2e-6) && right;
    return right;
  }

  // What slots give, from frames_start() on.
  Values project_back(const std::vector<double>& basis, const std::vector<T>& single, const std::vector<T>& pairs) {
    Values frames(num_frames_values());
    for_each_row([&](int64_t stream, int64_t sequence, int tile, int joint, int64_t row) {
      for (int channel = 0; channel < s_.channels; ++channel) {
        for (int j = 0; j < s_.tile_frames; ++j) {
          const int64_t at = frame_at(stream, sequence, tile * s_.tile_frames + j, joint, channel);
          if (at < 0) continue;
          double sum = basis[j] * exact(single[single_at(stream, row, channel)]);
          for (int f = 0; f < s_.frequencies; ++f) {
            for (int part = 0; part < 2; ++part) {
              const double factor = basis[(1 + 2 * f + part) * s_.tile_frames + j];
              sum += factor * exact(pairs[pair_at(stream, f, row, part, channel)]);
            }
          }
          frames[frames_start() + at] = sum;
        }
      }
    });
    return frames;
  }

  size_t channel_of(size_t i) const {
    return i / (num_frames_values() / s_.streams) * s_.channels + i % s_.channels;
  }
  bool counts(size_t i) const {
    const int64_t of_sequence = static_cast<int64_t>(s_.frames) * s_.joints * s_.channels;
    return static_cast<int64_t>(i) / of_sequence % s_.stream_sequences >= first_sequence();
  }

  // Modes: without and with statistics, inference, inference with a residual.
  bool check_frames(int mode) {
    const std::vector<double> basis = draw_basis(s_.tile_frames);
    const std::vector<T> single = draw<T>(num_single()), pairs = draw<T>(num_pairs());
    DeviceBuffer<T> given_single(single), given_pairs(pairs), residual(y_);
    DeviceBuffer<T> result(std::vector<T>(num_frames_values(), rounded<T>(0)));
    DeviceBuffer<float> bias(mean_), scale(scale_), shift(shift_);
    DeviceBuffer<float> moments(std::vector<float>(s_.streams * s_.stream_sequences * 3 * s_.channels, 0.0f));
    const cudaError_t error = ikem_fast::cuda::spectral_frames(
        {result.data() + frames_start(), bias.data(), mode == 1 ? moments.data() + start(3 * s_.channels) : nullptr,
         mode >= 2 ? scale.data() : nullptr, shift.data(), mode == 3 ? residual.data() + frames_start() : nullptr},
        {given_single.data(), given_pairs.data()}, basis.data(), kType, s_, nullptr);
    Values wanted = project_back(basis, single, pairs);
    Values sums(s_.streams * s_.channels), squares(sums);
    const double values = double(s_.sequences) * s_.frames * s_.joints;
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (!counts(i)) continue;
      wanted[i] += mean_[channel_of(i)];
      sums[channel_of(i)] += wanted[i] / values;
      squares[channel_of(i)] += wanted[i] * wanted[i] / values;
      if (mode >= 2) {
        wanted[i] = scale_[channel_of(i)] * wanted[i] + shift_[channel_of(i)] + (mode == 3 ? exact(y_[i]) : 0.0f);
        wanted[i] = std::max(wanted[i], 0.0);
      }
    }
    bool right = error == cudaSuccess;
    right = same("frames", result.values(), wanted, kTolerance) && right;
    if (mode != 1) return right;
    DeviceBuffer<float> mean(sums.size()), variance(sums.size());
    ikem_fast::cuda::combine_channel_statistics(
        mean.data(), variance.data(),
        {moments.data(), s_.streams, static_cast<int>(s_.stream_sequences), s_.channels}, nullptr);
    for (size_t i = 0; i < sums.size(); ++i) squares[i] -= sums[i] * sums[i];
    right = same("mean", mean.values(), sums, 1e-5) && right;
    return same("variance", variance.values(), squares, 1e-5) && right;
  }

  // Modes: without and with an activation, of scale and shift alone.
  bool check_x_gradient(int mode) {
    const std::vector<double> basis = draw_basis(s_.tile_frames);
    const std::vector<T> single = draw<T>(num_single()), pairs = draw<T>(num_pairs());
    DeviceBuffer<T> given_single(single), given_pairs(pairs), x(x_);
    DeviceBuffer<T> result(std::vector<T>(num_frames_values(), rounded<T>(0)));
    DeviceBuffer<float> scale(scale_), shift(shift_);
    const int64_t num_sums = s_.streams * s_.stream_sequences * s_.channels;
    const std::vector<float> zeros(num_sums, 0.0f);
    DeviceBuffer<float> scale_sums(zeros), shift_sums(zeros);
    const cudaError_t error = ikem_fast::cuda::spectral_x_gradient(
        {mode < 2 ? result.data() + frames_start() : nullptr, x.data() + frames_start(),
         {mode >= 1 ? scale.data() : nullptr, shift.data()},
         scale_sums.data() + start(s_.channels), shift_sums.data() + start(s_.channels)},
        {given_single.data(), given_pairs.data()}, basis.data(), kType, s_, nullptr);
    Values wanted = project_back(basis, single, pairs), wanted_scale(num_sums), wanted_shift(num_sums);
    for (size_t i = 0; i < wanted.size() && mode >= 1; ++i) {
      if (!counts(i)) continue;
      const size_t channel = channel_of(i), of_sequence = static_cast<size_t>(s_.frames) * s_.joints * s_.channels;
      const float value = exact(x_[i]);
      const double passed = std::fma(scale_[channel], value, shift_[channel]) > 0 ? wanted[i] : 0;
      wanted_shift[i / of_sequence * s_.channels + i % s_.channels] += passed;
      wanted_scale[i / of_sequence * s_.channels + i % s_.channels] += passed * value;
      wanted[i] = scale_[channel] * passed;
    }
    if (mode == 2) wanted.assign(wanted.size(), 0.0);
    bool right = error == cudaSuccess;
    right = same("x's gradient", result.values(), wanted, kTolerance) && right;
    right = same("sums for scale", scale_sums.values(), wanted_scale, 1e-5) && right;
    return same("sums for shift", shift_sums.values(), wanted_shift, 1e-5) && right;
  }

  std::vector<double> draw_basis(int points) const { return draw<double>(s_.num_slots() * points); }

  const SpectralShape& s_;
  int window_;
  std::vector<T> x_, y_;
  std::vector<float> scale_, shift_, mean_, mean_gradient_, variance_gradient_;
};

// The weights' slots and the way back, which is their transpose.
template <typename T>
void check_weights(const SpectralWeights& w, int single_parts, int pair_parts) {
  generator.seed(static_cast<unsigned>(w.in_channels * 100 + w.out_channels));
  const int num_slots = 1 + 2 * w.frequencies;
  const int64_t num_single = w.streams * w.in_channels * w.out_channels, num_pairs = 4 * w.frequencies * num_single;
  const std::vector<double> basis = draw<double>(num_slots * w.taps);
  const std::vector<float> weight = draw<float>(num_single * w.taps);
  const std::vector<float> of_single = draw<float>(num_single * single_parts);
  const std::vector<float> of_pairs = draw<float>(num_pairs * pair_parts);
  DeviceBuffer<float> given(weight), given_single(of_single), given_pairs(of_pairs), gradient(weight.size());
  DeviceBuffer<T> single(num_single), pairs(num_pairs);
  const cudaError_t error =
      ikem_fast::cuda::spectral_weights(single.data(), pairs.data(), sizeof(T) == 4 ? ElementType::kFloat
                                                                                    : ElementType::kBFloat16,
                                        given.data(), basis.data(), w, nullptr);
  const cudaError_t gradient_error = ikem_fast::cuda::spectral_weight_gradient(
      gradient.data(), given_single.data(), single_parts, given_pairs.data(), pair_parts, basis.data(), w, nullptr);
  Values wanted_single(num_single), wanted_pairs(num_pairs), wanted_gradient(weight.size());
  const int64_t matrix = static_cast<int64_t>(w.in_channels) * w.out_channels;
  for (size_t i = 0; i < weight.size(); ++i) {
    const int tap = static_cast<int>(i % w.taps), in = static_cast<int>(i / w.taps % w.in_channels);
    const int out = static_cast<int>(i / w.taps / w.in_channels % w.out_channels);
    const int64_t stream = i / w.taps / matrix, place = in * w.out_channels + out;
    wanted_single[stream * matrix + place] += basis[tap] * weight[i];
    for (int part = 0; part < single_parts; ++part) {
      wanted_gradient[i] += basis[tap] * of_single[(stream * single_parts + part) * matrix + place];
    }
    for (int f = 0; f < w.frequencies; ++f) {
      const int width = 2 * w.out_channels;
      const int64_t first = (stream * w.frequencies + f) * 4 * matrix;
      // (rows, columns, slot, sign): which of the four corners takes which number.
      const int corners[4][4] = {{0, 0, 0, 1}, {0, 1, 1, 1}, {1, 0, 1, -1}, {1, 1, 0, 1}};
      for (const auto& [down, right, slot, sign] : corners) {
        const double factor = sign * basis[(1 + 2 * f + slot) * w.taps + tap];
        const int64_t at = (down * w.in_channels + in) * width + right * w.out_channels + out;
        wanted_pairs[first + at] += factor * weight[i];
        for (int part = 0; part < pair_parts; ++part) {
          wanted_gradient[i] +=
              factor * of_pairs[((stream * w.frequencies + f) * pair_parts + part) * 4 * matrix + at];
        }
      }
    }
  }
  bool right = error == cudaSuccess && gradient_error == cudaSuccess;
  right = same("weights' single slots", single.values(), wanted_single, sizeof(T) == 4 ? 1e-6 : 4e-3) && right;
  right = same("weights' pairs", pairs.values(), wanted_pairs, sizeof(T) == 4 ? 1e-6 : 4e-3) && right;
  right = same("weights' gradient", gradient.values(), wanted_gradient, 2e-6) && right;
  if (right) return;
  ++failures;
  printf("FAILED weights of S %lld C %d to %d K %d F %d\n", static_cast<long long>(w.streams), w.in_channels,
         w.out_channels, w.taps, w.frequencies);
}

void check_refusals() {
  const SpectralShape good{1, 1, 1, 4, 3, 8, 4, 0, 2};
  const auto run = [](const SpectralShape& shape, ElementType type) {
    return ikem_fast::cuda::spectral_frames({}, {}, nullptr, type, shape, nullptr);
  };
  SpectralShape odd = good, long_tile = good, long_window = good, many = good;
  odd.channels = 7;
  long_tile.tile_frames = 17;
  long_window.lead = 11;
  many.frequencies = 17;
  SpectralWeights weights{1, 8, 8, 29, 4};
  bool refused = run(good, ElementType::kDouble) == cudaErrorInvalidValue;
  for (const SpectralShape& shape : {odd, long_tile, long_window, many}) {
    refused = refused && run(shape, ElementType::kFloat) == cudaErrorInvalidValue;
  }
  refused = refused && ikem_fast::cuda::spectral_weight_gradient(nullptr, nullptr, 1, nullptr, 1, nullptr, weights,
                                                                 nullptr) == cudaErrorInvalidValue;
  if (refused) return;
  ++failures;
  printf("FAILED the launchers must refuse what their kernels cannot do\n");
}

}  // namespace

int main(int argc, char** argv) {
  return run_over_seeds("spectral_transform", argc, argv, [](int) {
    // S, B, of how many, T, V, C, tile, lead, F
    const std::vector<SpectralShape> shapes{
        {1, 1, 1, 1, 1, 2, 1, 0, 0},
        {2, 3, 3, 13, 4, 24, 13, 0, 8},   // the last block's frames
        {1, 1, 2, 13, 25, 6, 13, 0, 8},
        {1, 2, 5, 11, 3, 10, 11, 0, 8},
        {2, 1, 2, 16, 2, 4, 16, 0, 12},
        {1, 2, 3, 37, 3, 8, 13, 4, 12},   // tiles, of which the last is not whole
        {1, 1, 1, 20, 1, 520, 4, 1, 3},   // channels for three blocks
        {0, 2, 2, 4, 2, 4, 4, 0, 2},
        {2, 0, 2, 4, 2, 4, 4, 0, 2},
    };
    for (const SpectralShape& shape : shapes) {
      Checker<float>(shape).check_all();
      Checker<__nv_bfloat16>(shape).check_all();
    }
    check_weights<float>({1, 1, 1, 1, 0}, 1, 1);
    check_weights<__nv_bfloat16>({2, 8, 32, 9, 8}, 4, 1);
    check_weights<float>({1, 11, 37, 13, 3}, 2, 3);
    check_weights<float>({2, 3, 5, 27, 16}, 1, 2);
    check_refusals();
  });
}
