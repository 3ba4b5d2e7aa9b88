// TEST-ONLY: the CUDA kernels of temporal_convolution against plain loops in double, over sizes and thread schedules.
// Usage: test_temporal_convolution [SEEDS [FILE]]. One translation unit: it includes the kernels, or a copy with a
// planted bug.
#ifndef KERNEL_SOURCE
#define KERNEL_SOURCE "cuda/temporal_convolution.cu"
#endif
#include KERNEL_SOURCE

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "cuda/channel_statistics.cu"
#include "cuda/partial_sums.cu"
#include "testing/device_buffer.h"
#include "testing/kernel_test.h"
#include "testing/values.h"

namespace {

using ikem_fast::cuda::ElementType;
using ikem_fast::cuda::TemporalConvolutionScratch;
using ikem_fast::cuda::TemporalConvolutionShape;

struct Case {
  TemporalConvolutionShape shape;
  bool with_activation = true;
  bool with_mean_gradient = true, with_variance_gradient = true;
  bool with_x_gradient = true;
  double offset = 0;  // of x, so that the mean may be far above the deviation
};

using Values = std::vector<double>;

template <typename T>
class Checker {
 public:
  explicit Checker(const Case& parameters)
      : c_(parameters), s_(c_.shape), random_(static_cast<unsigned>(s_.frames * 100 + s_.joints + s_.in_channels)) {
    x_ = draw<T>(s_.streams * s_.sequences * s_.frames * s_.joints * s_.in_channels, 1.0, c_.offset);
    y_gradient_ = draw<T>(num_y(), 1.0);
    weight_ = draw<float>(s_.streams * s_.out_channels * s_.in_channels * s_.taps,
                          1 / std::sqrt(1.0 * s_.in_channels * s_.taps));
    bias_ = draw<float>(s_.streams * s_.out_channels, 1.0);
    scale_ = draw<float>(s_.streams * s_.in_channels, 1.0);
    shift_ = draw<float>(s_.streams * s_.in_channels, 0.5);
    for (size_t i = 0; i < shift_.size(); ++i) shift_[i] -= static_cast<float>(c_.offset) * scale_[i];
    output_scale_ = draw<float>(s_.streams * s_.out_channels, 1.0);
    output_shift_ = draw<float>(s_.streams * s_.out_channels, 1.0);
    residual_ = draw<T>(num_y(), 1.0);
    mean_gradient_ = draw<float>(s_.streams * s_.out_channels, 3.0);
    variance_gradient_ = draw<float>(s_.streams * s_.out_channels, 3.0);
    make_expected();
  }

  void check_all() {
    if (!ikem_fast::cuda::find_scratch(scratch_, s_, kType)) return fail("search for scratch memory", 0, 0);
    DeviceBuffer<T> x(x_), y(num_y()), packed(scratch_.packed_weights);
    DeviceBuffer<float> weight(weight_), bias(bias_), scale(scale_), shift(shift_), moments(scratch_.moments);
    DeviceBuffer<float> mean(s_.streams * s_.out_channels), variance(s_.streams * s_.out_channels);
    const ikem_fast::cuda::ActivationInput activation{c_.with_activation ? scale.data() : nullptr, shift.data()};
    expect("packing", ikem_fast::cuda::pack_temporal_weights(packed.data(), kType, weight.data(), s_, nullptr));
    expect("convolution", ikem_fast::cuda::temporal_convolution(
                              {y.data(), bias.data(), true, moments.data(), mean.data(), variance.data(), nullptr,
                               nullptr, nullptr},
                              x.data(), kType, activation, packed.data(), s_, nullptr));
    compare("y", y.values(), y_, kTolerance);
    compare("mean", mean.values(), mean_, kSumTolerance);
    compare("variance", variance.values(), variance_, kSumTolerance);
    const std::vector<T> made = y.values();
    const std::vector<float> made_mean = mean.values();

    DeviceBuffer<float> output_scale(output_scale_), output_shift(output_shift_);
    DeviceBuffer<T> residual(residual_);
    for (bool with_residual : {true, false}) {
      expect("inference", ikem_fast::cuda::temporal_convolution(
                              {y.data(), bias.data(), false, nullptr, nullptr, nullptr, output_scale.data(),
                               output_shift.data(), with_residual ? residual.data() : nullptr},
                              x.data(), kType, activation, packed.data(), s_, nullptr));
      Values wanted(y_);
      for (size_t i = 0; i < wanted.size(); ++i) {
        const size_t channel = stream_of(i, num_y()) * s_.out_channels + i % s_.out_channels;
        wanted[i] = std::max(output_scale_[channel] * wanted[i] + output_shift_[channel] +
                                 (with_residual ? exact(residual_[i]) : 0.0f), 0.0);
      }
      compare("inference", y.values(), wanted, kTolerance);
    }

    DeviceBuffer<T> made_y(made), y_gradient(y_gradient_), x_gradient(x_.size());
    DeviceBuffer<float> mean_gradient(mean_gradient_), variance_gradient(variance_gradient_), given_mean(made_mean);
    DeviceBuffer<float> coefficient_sums(scratch_.coefficient_sums), scale_gradient(scale_.size());
    DeviceBuffer<float> shift_gradient(scale_.size()), weight_gradient(weight_.size()), bias_gradient(bias_.size());
    DeviceBuffer<float> weight_sums(scratch_.weight_sums);
    const ikem_fast::cuda::GradientInput gradient{made_y.data(), given_mean.data(),
                                                  c_.with_mean_gradient ? mean_gradient.data() : nullptr,
                                                  c_.with_variance_gradient ? variance_gradient.data() : nullptr,
                                                  static_cast<float>(1.0 / num_values())};
    make_expected_gradients(made, made_mean);
    if (c_.with_x_gradient || c_.with_activation) {
      expect("x's gradient", ikem_fast::cuda::temporal_convolution_x_gradient(
                                 {c_.with_x_gradient ? x_gradient.data() : nullptr, coefficient_sums.data(),
                                  scale_gradient.data(), shift_gradient.data()},
                                 x.data(), kType, activation, y_gradient.data(), gradient, packed.data(), s_, nullptr));
      if (c_.with_x_gradient) compare("x's gradient", x_gradient.values(), x_gradient_, kTolerance);
      if (c_.with_activation) {
        compare("scale's gradient", scale_gradient.values(), scale_gradient_, kTolerance);
        compare("shift's gradient", shift_gradient.values(), shift_gradient_, kTolerance);
      }
    }
    expect("weight's gradient",
           ikem_fast::cuda::temporal_convolution_weight_gradient(
               {weight_gradient.data(), bias_gradient.data(), weight_sums.data()}, x.data(), kType, activation,
               y_gradient.data(), gradient, s_, nullptr));
    compare("weight's gradient", weight_gradient.values(), weight_gradient_, kTolerance);
    compare("bias's gradient", bias_gradient.values(), bias_gradient_, kSumTolerance);
  }

 private:
  static constexpr ElementType kType = sizeof(T) == 4 ? ElementType::kFloat : ElementType::kBFloat16;
  // Relative to the largest magnitude. Activations and weights are rounded here as there, sums of gradients are not.
  static constexpr double kTolerance = sizeof(T) == 4 ? 1e-5 : 1.5e-2, kSumTolerance = sizeof(T) == 4 ? 1e-5 : 2e-3;

  int64_t num_y() const { return s_.streams * s_.sequences * s_.out_frames() * s_.joints * s_.out_channels; }
  int64_t num_values() const { return std::max<int64_t>(s_.sequences * s_.out_frames() * s_.joints, 1); }
  size_t stream_of(size_t i, size_t size) const { return i / (size / s_.streams); }

  template <typename Value>
  std::vector<Value> draw(int64_t count, double deviation, double mean = 0) {
    std::normal_distribution<double> normal(mean, deviation);
    std::vector<Value> values(count);
    for (Value& value : values) value = rounded<Value>(normal(random_));
    return values;
  }

  void fail(const char* what, double error, double allowed) const {
    ++failures;
    printf("FAILED %s of S %lld B %lld T %d V %d C %d to %d K %d stride %d, %d bytes: off by %g, allowed %g\n", what,
           static_cast<long long>(s_.streams), static_cast<long long>(s_.sequences), s_.frames, s_.joints,
           s_.in_channels, s_.out_channels, s_.taps, s_.stride, static_cast<int>(sizeof(T)), error, allowed);
  }
  void expect(const char* what, cudaError_t error) const {
    if (error != cudaSuccess) fail(what, static_cast<int>(error), 0);
  }
  template <typename Value>
  void compare(const char* what, const std::vector<Value>& ours, const Values& wanted, double tolerance) const {
    double largest = 1e-3, worst = ours.size() == wanted.size() ? 0 : INFINITY;
    for (size_t i = 0; i < wanted.size() && worst < INFINITY; ++i) {
      largest = std::max(largest, std::abs(wanted[i]));
      const double error = std::abs(exact(ours[i]) - wanted[i]);
      if (!(error <= worst)) worst = error;
    }
    if (!(worst <= tolerance * largest)) fail(what, worst, tolerance * largest);
  }

  // Calls visit(place of y, place of x, place of the weight) for all products.
  template <typename Visit>
  void for_each_product(Visit visit) const {
    for (int64_t sequence = 0; sequence < s_.streams * s_.sequences; ++sequence) {
      const int64_t stream = sequence / s_.sequences;
      for (int to = 0; to < s_.out_frames(); ++to) {
        for (int tap = 0; tap < s_.taps; ++tap) {
          const int from = to * s_.stride + tap - s_.taps / 2;
          if (from < 0 || from >= s_.frames) continue;
          for (int joint = 0; joint < s_.joints; ++joint) {
            const int64_t y_row = (sequence * s_.out_frames() + to) * s_.joints + joint;
            const int64_t x_row = (sequence * s_.frames + from) * s_.joints + joint;
            for (int out = 0; out < s_.out_channels; ++out) {
              for (int in = 0; in < s_.in_channels; ++in) {
                visit(y_row * s_.out_channels + out, x_row * s_.in_channels + in,
                      ((stream * s_.out_channels + out) * s_.in_channels + in) * s_.taps + tap);
              }
            }
          }
        }
      }
    }
  }

  double before(size_t i) const {
    const size_t channel = stream_of(i, x_.size()) * s_.in_channels + i % s_.in_channels;
    return std::fma(scale_[channel], exact(x_[i]), shift_[channel]);
  }

  void make_expected() {
    h_.resize(x_.size());
    for (size_t i = 0; i < x_.size(); ++i) {
      h_[i] = c_.with_activation ? exact(rounded<T>(std::max(before(i), 0.0))) : exact(x_[i]);
    }
    y_.assign(num_y(), 0);
    for_each_product([&](int64_t y, int64_t x, int64_t w) { y_[y] += h_[x] * exact(rounded<T>(weight_[w])); });
    mean_.assign(bias_.size(), 0);
    variance_.assign(bias_.size(), 0);
    for (size_t i = 0; i < y_.size(); ++i) y_[i] += bias_[y_channel(i)];
    for (size_t i = 0; i < y_.size(); ++i) mean_[y_channel(i)] += y_[i] / num_values();
    for (size_t i = 0; i < y_.size(); ++i) {
      variance_[y_channel(i)] += std::pow(y_[i] - mean_[y_channel(i)], 2) / num_values();
    }
  }
  size_t y_channel(size_t i) const { return stream_of(i, y_.size()) * s_.out_channels + i % s_.out_channels; }

  void make_expected_gradients(const std::vector<T>& made, const std::vector<float>& made_mean) {
    Values total(y_.size()), h_gradient(x_.size(), 0.0);
    bias_gradient_.assign(bias_.size(), 0);
    for (size_t i = 0; i < total.size(); ++i) {
      const size_t channel = y_channel(i);
      total[i] = exact(y_gradient_[i]);
      if (c_.with_mean_gradient) total[i] += mean_gradient_[channel] / double(num_values());
      if (c_.with_variance_gradient) {
        total[i] += 2.0 / num_values() * variance_gradient_[channel] * (exact(made[i]) - double(made_mean[channel]));
      }
      bias_gradient_[channel] += total[i];
      total[i] = exact(rounded<T>(total[i]));
    }
    weight_gradient_.assign(weight_.size(), 0);
    for_each_product([&](int64_t y, int64_t x, int64_t w) {
      h_gradient[x] += total[y] * exact(rounded<T>(weight_[w]));
      weight_gradient_[w] += total[y] * h_[x];
    });
    x_gradient_ = h_gradient;
    scale_gradient_.assign(scale_.size(), 0);
    shift_gradient_.assign(scale_.size(), 0);
    if (!c_.with_activation) return;
    for (size_t i = 0; i < x_.size(); ++i) {
      const size_t channel = stream_of(i, x_.size()) * s_.in_channels + i % s_.in_channels;
      const double passed = before(i) > 0 ? h_gradient[i] : 0;
      x_gradient_[i] = scale_[channel] * passed;
      scale_gradient_[channel] += passed * exact(x_[i]);
      shift_gradient_[channel] += passed;
    }
  }

  const Case& c_;
  const TemporalConvolutionShape& s_;
  std::mt19937 random_;
  TemporalConvolutionScratch scratch_{};
  std::vector<T> x_, y_gradient_, residual_;
  std::vector<float> weight_, bias_, scale_, shift_, output_scale_, output_shift_, mean_gradient_, variance_gradient_;
  Values h_, y_, mean_, variance_, x_gradient_, scale_gradient_, shift_gradient_, weight_gradient_, bias_gradient_;
};

void check_refusals() {
  const TemporalConvolutionShape good{1, 1, 4, 3, 8, 8, 3, 1};
  TemporalConvolutionShape odd = good, even = good, huge = good, cramped = good;
  cramped.shared_bytes = 1024;
  odd.in_channels = 3;
  even.taps = 2;
  huge.taps = 1023;
  huge.in_channels = huge.out_channels = 1 << 20;
  TemporalConvolutionScratch scratch;
  alignas(16) float values[4] = {};
  const auto run = [&](const TemporalConvolutionShape& shape, const void* x, ElementType type) {
    return ikem_fast::cuda::temporal_convolution({}, x, type, {}, nullptr, shape, nullptr);
  };
  const bool refused = run(good, values, ElementType::kDouble) == cudaErrorInvalidValue &&
                       run(good, values + 1, ElementType::kFloat) == cudaErrorInvalidValue &&
                       run(odd, values, ElementType::kFloat) == cudaErrorInvalidValue &&
                       run(even, values, ElementType::kFloat) == cudaErrorInvalidValue &&
                       !ikem_fast::cuda::find_scratch(scratch, huge, ElementType::kFloat) &&
                       !ikem_fast::cuda::find_scratch(scratch, cramped, ElementType::kFloat) &&
                       !ikem_fast::cuda::find_scratch(scratch, good, ElementType::kDouble);
  if (refused) return;
  ++failures;
  printf("FAILED the launchers must refuse what their kernels cannot do\n");
}

}  // namespace

int main(int argc, char** argv) {
  return run_over_seeds("temporal_convolution", argc, argv, [](int seed) {
    // S, B, T, V, C_in, C_out, K, stride
    const std::vector<Case> cases{
        {{1, 1, 1, 1, 8, 8, 1, 1}},
        {{2, 3, 5, 3, 16, 16, 9, 1}},
        {{1, 2, 7, 5, 24, 40, 3, 2}, true, true, false},
        {{1, 2, 6, 2, 16, 32, 5, 3}, true, false, true, false},
        {{2, 1, 9, 4, 8, 16, 1, 2}, false},            // a frame in two is not seen
        {{1, 2, 4, 3, 72, 8, 3, 1}, false, false, false},  // source channels in parts
        {{1, 1, 5, 2, 8, 72, 11, 1}, true, true, true, false},  // more taps than frames, and than a warp sums up
        {{0, 2, 3, 2, 8, 8, 3, 1}},
        {{2, 0, 3, 2, 8, 8, 3, 1}},
        {{1, 1, 50, 7, 16, 16, 9, 1}, true, true, true, true, 1e3},
        {{1, 2, 150, 1, 16, 16, 9, 1, 20 * 1024}},  // little shared memory: tiles of frames
        {{1, 1, 40, 5, 32, 24, 7, 2, 48 * 1024}},   // ... and weights in stages
    };
    for (const Case& parameters : cases) {
      Checker<float>(parameters).check_all();
      Checker<__nv_bfloat16>(parameters).check_all();
    }
    // The model's sizes: tiles of joints and of frames.
    if (seed == 2) {
      const std::vector<Case> large{
          {{1, 1, 50, 25, 16, 16, 9, 1}},
          {{1, 1, 50, 25, 32, 32, 9, 2}},
          {{1, 1, 25, 25, 64, 64, 9, 2}},
          {{1, 2, 13, 25, 64, 64, 9, 1}},
      };
      for (const Case& parameters : large) Checker<__nv_bfloat16>(parameters).check_all();
      Checker<float>(large[3]).check_all();
    }
    check_refusals();
  });
}
