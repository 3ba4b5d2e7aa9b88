// TEST-ONLY: the CUDA kernels of graph_convolution's gradients against plain loops in double, over sizes and thread
// schedules. Whole numbers, for which all arithmetic is exact, show every place; others show statistics' gradients.
// Usage: test_graph_convolution_backward [SEEDS [FILE]]. One translation unit: it includes the kernels, or a copy with a
// planted bug.
#ifndef KERNEL_SOURCE
#define KERNEL_SOURCE "cuda/graph_convolution_backward.cu"
#endif
#include KERNEL_SOURCE

#include "testing/expected_graph.h"

namespace {

enum Statistics { kNone, kMean, kVariance, kMeanAndVariance };

// A sum and the sum of its terms' magnitudes.
struct Sum {
  double value = 0, magnitude = 1e-30;

  void add(double term, double magnitude_of_term) {
    value += term;
    magnitude += magnitude_of_term;
  }
  void add(double term) { add(term, std::abs(term)); }
};

template <typename T>
void check(const GraphCase& c, Statistics statistics, bool with_x_gradient = true) {
  GraphTensors<T> tensors(c);
  GraphBuffers<T> buffers(tensors);
  const auto& shape = tensors.shape;
  const int joints = shape.joints, partitions = shape.partitions;
  const int in_channels = shape.in_channels, out_channels = shape.out_channels;
  const int64_t frames = tensors.out_frames(), rows = frames * joints;
  std::vector<T> y, y_gradient;
  tensors.fill(y, shape.streams * rows * out_channels, 1.0);
  tensors.fill(y_gradient, shape.streams * rows * out_channels, 1.0);
  std::vector<float> mean, mean_gradient, variance_gradient;
  tensors.fill(mean, shape.streams * out_channels, 1.0);
  tensors.fill(mean_gradient, shape.streams * out_channels, 2.0 * double(rows));
  tensors.fill(variance_gradient, shape.streams * out_channels, 1.0 * double(rows));
  const bool has_mean = statistics & kMean, has_variance = statistics & kVariance;

  DeviceBuffer<T> ys(y), y_gradients(y_gradient), x_gradients(tensors.x.size());
  DeviceBuffer<float> means(mean), mean_gradients(mean_gradient), variance_gradients(variance_gradient);
  DeviceBuffer<float> weights(tensors.weight.size()), biases(tensors.bias.size()), importances(tensors.importance.size());
  DeviceBuffer<float> workspace(
      ikem_fast::cuda::graph_convolution_backward_workspace(shape, buffers.input.type, c.device));
  const cudaError_t error = ikem_fast::cuda::graph_convolution_backward(
      {ys.data(), y_gradients.data(), means.data(), has_mean ? mean_gradients.data() : nullptr,
       has_variance ? variance_gradients.data() : nullptr, with_x_gradient ? x_gradients.data() : nullptr,
       weights.data(), biases.data(), importances.data(), workspace.data()},
      buffers.input, c.device, nullptr);

  const double digits = statistics == kNone && c.whole_numbers ? 1e-6 : sizeof(T) == 2 ? 4e-3 : 2e-6;
  const double stored = sizeof(T) == 2 ? 0.5 / 128 : 1e-7;
  std::vector<Sum> of_x(tensors.x.size()), of_weight(tensors.weight.size()), of_bias(tensors.bias.size());
  std::vector<Sum> of_importance(tensors.importance.size());
  for (int64_t s = 0; s < shape.streams; ++s) {
    for (int64_t frame = 0; frame < frames; ++frame) {
      const std::vector<double> u = tensors.gathered(s, frame);
      const auto u_at = [&](int w, int p, int channel) { return u[(w * partitions + p) * in_channels + channel]; };
      std::vector<double> total(joints * out_channels);
      for (int i = 0; i < joints * out_channels; ++i) {
        const int64_t place = (s * frames + frame) * joints * out_channels + i;
        const int64_t channel = s * out_channels + i % out_channels;
        total[i] = exact(y_gradient[place]);
        if (has_mean) total[i] += mean_gradient[channel] / double(rows);
        if (has_variance) total[i] += 2 * variance_gradient[channel] / double(rows) * (exact(y[place]) - mean[channel]);
      }
      for (int w = 0; w < joints; ++w) {
        for (int p = 0; p < partitions; ++p) {
          for (int n = 0; n < out_channels; ++n) {
            const double factor = exact(rounded<T>(total[w * out_channels + n]));
            const int64_t row = (s * partitions + p) * out_channels + n;
            for (int k = 0; k < in_channels; ++k) of_weight[row * in_channels + k].add(factor * u_at(w, p, k));
          }
        }
      }
      for (int e = 0; e < shape.edges; ++e) {
        const int p = tensors.edges[3 * e], v = tensors.edges[3 * e + 1], w = tensors.edges[3 * e + 2];
        const int64_t place = (p * joints + v) * joints + w;
        Sum& of_edge = of_importance[s * partitions * joints * joints + place];
        const double coefficient = tensors.coefficient(s, e), adjacency = tensors.adjacency[place];
        for (int k = 0; k < in_channels; ++k) {
          Sum of_u;
          for (int n = 0; n < out_channels; ++n) {
            of_u.add(exact(rounded<T>(total[w * out_channels + n])) * tensors.weight_at(s, p, n, k));
          }
          const int64_t frame_of_x = tensors.source(frame);
          const double rounded_u = exact(rounded<T>(of_u.value)), input = tensors.x_at(s, frame_of_x, v, k);
          of_x[((s * shape.sequences * shape.frames + frame_of_x) * joints + v) * in_channels + k].add(
              coefficient * rounded_u, std::abs(coefficient) * of_u.magnitude);
          of_edge.add(adjacency * input * rounded_u, std::abs(adjacency * input) * of_u.magnitude);
        }
        for (int n = 0; n < out_channels; ++n) {
          const int64_t row = (s * partitions + p) * out_channels + n;
          of_edge.add(adjacency * tensors.bias[row] * total[w * out_channels + n]);
          of_bias[row].add(coefficient * total[w * out_channels + n]);
        }
      }
    }
  }
  const auto is_right = [&](const char* what, const auto& got, const std::vector<Sum>& wanted, double last_rounding) {
    Worst worst;
    for (size_t i = 0; i < wanted.size(); ++i) {
      worst.add(exact(got[i]), wanted[i].value,
                digits * wanted[i].magnitude + last_rounding * std::abs(wanted[i].value));
    }
    return worst.check(what);
  };
  bool right = error == cudaSuccess;
  if (with_x_gradient) right = is_right("gradient of x", x_gradients.values(), of_x, stored) && right;
  right = is_right("gradient of weight", weights.values(), of_weight, 0) && right;
  right = is_right("gradient of bias", biases.values(), of_bias, 0) && right;
  right = is_right("gradient of importance", importances.values(), of_importance, 0) && right;
  if (!right) report_case(c, shape.edges, sizeof(T));
}

// Places by whole numbers, the gradients of statistics by others.
template <typename T>
void check_both(GraphCase c, Statistics statistics = kMeanAndVariance) {
  check<T>(c, statistics);
  c.whole_numbers = true;
  check<T>(c, kNone);
}

void check_refusals() {
  GraphTensors<float> tensors({{1, 1, 1, 1, 2, 1, 8, 8, 0}, 1.0, {1, 65536}});
  GraphBuffers<float> buffers(tensors);
  const auto run = [&](auto change) {
    ikem_fast::cuda::GraphConvolutionInput input = buffers.input;
    change(input);
    return ikem_fast::cuda::graph_convolution_backward({}, input, {1, 65536}, nullptr);
  };
  const bool refused =
      run([](auto& input) { input.shape.joints = 129; }) == cudaErrorInvalidValue &&
      run([](auto& input) { input.shape.partitions = 13; }) == cudaErrorInvalidValue &&
      run([](auto& input) { input.type = ikem_fast::cuda::ElementType::kDouble; }) == cudaErrorInvalidValue &&
      run([](auto& input) { input.shape.streams = 0; }) == cudaSuccess;
  if (refused) return;
  ++failures;
  printf("FAILED the launcher must refuse many joints, many partitions and float64, and accept no streams\n");
}

}  // namespace

int main(int argc, char** argv) {
  constexpr int kShared = 227 * 1024;
  return run_over_seeds("graph_convolution_backward", argc, argv, [](int seed) {
    // S, B, T, stride, V, P, C_in, C_out; degree; processors, bytes
    check_both<__nv_bfloat16>({{2, 2, 3, 1, 5, 3, 3, 16, 0}, 1.0, {1, kShared}});        // channels that end a vector
    check_both<float>({{2, 1, 3, 2, 7, 2, 5, 3, 0}, 1.5, {1, kShared}}, kMean);          // odd channels, stride
    check_both<__nv_bfloat16>({{1, 4, 5, 1, 25, 3, 16, 16, 0}, 1.0, {1, kShared}});      // several tiles of a block
    check_both<__nv_bfloat16>({{1, 3, 5, 2, 25, 1, 16, 32, 0}, -1, {2, kShared}}, kVariance);
    check_both<float>({{1, 2, 1, 1, 1, 1, 1, 1, 0}, 1.0, {1, kShared}});
    check<__nv_bfloat16>({{2, 0, 4, 1, 5, 3, 8, 16, 0}, 1.0, {1, kShared}}, kMeanAndVariance);  // no sequences
    check<float>({{1, 1, 2, 1, 6, 3, 8, 8, 0}, 0.0, {1, kShared}}, kMeanAndVariance);           // no edges
    check<__nv_bfloat16>({{1, 1, 3, 1, 9, 3, 16, 24, 0}, 1.0, {1, kShared}}, kMeanAndVariance, false);
    if (seed == 0) {
      check_both<__nv_bfloat16>({{1, 1, 11, 1, 25, 3, 64, 64, 0}, 1.0, {1, kShared}});    // two chunks at once
      check_both<__nv_bfloat16>({{1, 1, 6, 1, 25, 3, 64, 144, 0}, 1.0, {1, kShared}});    // separate passes
    }
    if (seed == 1) {
      check_both<float>({{1, 1, 3, 3, 40, 3, 40, 70, 0}, 1.0, {1, kShared}});
      check_both<__nv_bfloat16>({{1, 2, 3, 2, 128, 2, 24, 40, 0}, 1.0, {1, kShared}});
      check_both<float>({{1, 2, 3, 1, 20, 1, 40, 30, 0}, -1, {1, kShared}});
    }
    if (seed == 2) {
      check_both<__nv_bfloat16>({{1, 1, 4, 1, 33, 2, 88, 72, 0}, 1.0, {1, 80 * 1024}});   // weights in passing
      check_both<__nv_bfloat16>({{1, 1, 2, 1, 60, 1, 8, 8, 0}, 30.0, {1, kShared}});      // edges in global memory
      check_both<__nv_bfloat16>({{1, 3, 1, 1, 128, 1, 60, 48, 0}, 1.0, {1, kShared}});    // sums in global memory
    }
    if (seed == 3) {
      check_both<float>({{1, 1, 4, 1, 20, 12, 9, 24, 0}, 0.5, {1, kShared}});
      check_both<__nv_bfloat16>({{1, 1, 3, 1, 50, 1, 72, 256, 0}, -1, {3, kShared}});
      check_both<__nv_bfloat16>({{2, 1, 7, 1, 25, 2, 16, 32, 0}, 1.0, {1, kShared}});
    }
    check_refusals();
  });
}
