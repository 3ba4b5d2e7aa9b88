// TEST-ONLY: the CUDA kernel of graph_convolution against plain loops in double, over sizes and thread schedules.
// Usage: test_graph_convolution [SEEDS [FILE]]. One translation unit: it includes the kernel, or a copy with a planted
// bug.
#ifndef KERNEL_SOURCE
#define KERNEL_SOURCE "cuda/graph_convolution.cu"
#endif
#include KERNEL_SOURCE

#include "cuda/channel_statistics.cu"
#include "testing/expected_graph.h"

namespace {

enum Epilogue { kNothing, kStatistics, kScale, kActivation };

template <typename T>
void check(const GraphCase& c, Epilogue epilogue) {
  GraphTensors<T> tensors(c);
  GraphBuffers<T> buffers(tensors);
  const auto& shape = tensors.shape;
  std::vector<float> scale, shift;
  tensors.fill(scale, shape.streams * shape.out_channels, 1.0);
  tensors.fill(shift, shape.streams * shape.out_channels, 1.0);
  DeviceBuffer<float> scales(scale), shifts(shift);
  const int64_t frame_size = static_cast<int64_t>(shape.joints) * shape.out_channels;
  DeviceBuffer<T> y(shape.streams * tensors.out_frames() * frame_size);
  const int slots = ikem_fast::cuda::graph_convolution_slots(shape, buffers.input.type, c.device);
  DeviceBuffer<float> moments(shape.streams * slots * 3 * shape.out_channels);
  DeviceBuffer<float> mean(shape.streams * shape.out_channels), variance(shape.streams * shape.out_channels);
  const bool is_scaled = epilogue >= kScale;
  const ikem_fast::cuda::GraphConvolutionOutput output{y.data(), epilogue == kStatistics ? moments.data() : nullptr,
                                                       is_scaled ? scales.data() : nullptr,
                                                       is_scaled ? shifts.data() : nullptr, epilogue == kActivation};
  bool right =
      ikem_fast::cuda::graph_convolution(output, buffers.input, c.device, nullptr) == cudaSuccess &&
      (epilogue != kStatistics ||
       ikem_fast::cuda::combine_channel_statistics(
           mean.data(), variance.data(), {moments.data(), shape.streams, slots, shape.out_channels}, nullptr) ==
           cudaSuccess);

  const std::vector<T> got = y.values();
  const double digits = 3e-7, rounding = sizeof(T) == 2 ? 0.5 / 128 : 1e-7;
  Worst of_y, of_mean, of_variance;
  std::vector<double> sums(shape.streams * shape.out_channels), squares(sums.size());
  for (int pass = 0; pass < 2; ++pass) {  // the second for squares of differences from the mean
    for (int64_t s = 0; s < shape.streams; ++s) {
      for (int64_t frame = 0; frame < tensors.out_frames(); ++frame) {
        const auto [values, magnitudes] = tensors.convolved(s, frame);
        for (int64_t i = 0; i < frame_size; ++i) {
          const int64_t channel = s * shape.out_channels + i % shape.out_channels;
          if (pass == 1) {
            const double difference = values[i] - sums[channel] / double(shape.values_per_channel());
            squares[channel] += difference * difference;
            continue;
          }
          sums[channel] += values[i];
          double wanted = values[i], allowed = magnitudes[i] * digits;
          if (is_scaled) {
            wanted = wanted * scale[channel] + shift[channel];
            allowed = allowed * std::abs(scale[channel]) + digits * std::abs(shift[channel]);
            if (epilogue == kActivation) wanted = std::max(wanted, 0.0);
          }
          of_y.add(exact(got[(s * tensors.out_frames() + frame) * frame_size + i]), wanted,
                   allowed + rounding * std::abs(wanted));
        }
      }
    }
    if (epilogue != kStatistics) break;
  }
  right = of_y.check("y") && right;
  if (epilogue == kStatistics) {
    const double count = std::max(1.0, double(shape.values_per_channel()));
    const std::vector<float> means = mean.values(), variances = variance.values();
    for (size_t i = 0; i < sums.size(); ++i) {
      const double deviation = std::sqrt(squares[i] / count), magnitude = std::abs(sums[i] / count) + deviation;
      of_mean.add(means[i], sums[i] / count, 1e-6 * magnitude + 1e-30);
      of_variance.add(variances[i], squares[i] / count, 3e-6 * deviation * magnitude + 1e-30);
    }
    right = of_mean.check("mean") && of_variance.check("variance") && right;
  }
  if (!right) report_case(c, shape.edges, sizeof(T));
}

template <typename T>
void check_epilogues(const GraphCase& c) {
  for (Epilogue epilogue : {kNothing, kStatistics, kScale, kActivation}) check<T>(c, epilogue);
}

void check_refusals() {
  GraphTensors<float> tensors({{1, 1, 1, 1, 2, 1, 8, 8, 0}, 1.0, {1, 65536}});
  GraphBuffers<float> buffers(tensors);
  DeviceBuffer<float> y(16);
  const auto run = [&](auto change) {
    ikem_fast::cuda::GraphConvolutionInput input = buffers.input;
    change(input);
    return ikem_fast::cuda::graph_convolution({y.data(), nullptr, nullptr, nullptr, false}, input, {1, 65536}, nullptr);
  };
  const bool refused =
      run([](auto& input) { input.shape.joints = 129; }) == cudaErrorInvalidValue &&
      run([](auto& input) { input.shape.partitions = 13; }) == cudaErrorInvalidValue &&
      run([](auto& input) { input.type = ikem_fast::cuda::ElementType::kDouble; }) == cudaErrorInvalidValue &&
      run([](auto&) {}) == cudaSuccess && run([](auto& input) { input.shape.sequences = 0; }) == cudaSuccess;
  if (refused) return;
  ++failures;
  printf("FAILED the launcher must refuse many joints, many partitions and float64, and accept no sequences\n");
}

}  // namespace

int main(int argc, char** argv) {
  constexpr int kShared = 227 * 1024;
  return run_over_seeds("graph_convolution", argc, argv, [](int seed) {
    // S, B, T, stride, V, P, C_in, C_out; degree; processors, bytes
    check_epilogues<__nv_bfloat16>({{2, 2, 3, 1, 5, 3, 3, 16, 0}, 1.0, {1, kShared}});  // channels that end a vector
    check_epilogues<float>({{2, 1, 3, 2, 7, 2, 5, 3, 0}, 1.5, {1, kShared}});           // odd channels, stride
    check<__nv_bfloat16>({{1, 4, 5, 1, 25, 3, 16, 16, 0}, 1.0, {1, kShared}}, kStatistics);  // several tiles of a block
    check<__nv_bfloat16>({{1, 3, 5, 2, 25, 1, 16, 32, 0}, -1, {2, kShared}}, kStatistics);
    check<float>({{1, 2, 1, 1, 1, 1, 1, 1, 0}, 1.0, {1, kShared}}, kStatistics);
    check<__nv_bfloat16>({{2, 0, 4, 1, 5, 3, 8, 16, 0}, 1.0, {1, kShared}}, kStatistics);
    check<float>({{1, 1, 2, 1, 6, 3, 8, 8, 0}, 0.0, {1, kShared}}, kStatistics);  // no edges
    if (seed == 0) {
      check<__nv_bfloat16>({{1, 1, 6, 1, 25, 3, 64, 144, 0}, 1.0, {1, kShared}}, kStatistics);  // chunks, column blocks
      check<float>({{1, 1, 3, 1, 40, 3, 40, 70, 0}, 1.0, {1, kShared}}, kStatistics);
    }
    if (seed == 1) {
      check<__nv_bfloat16>({{1, 2, 3, 3, 128, 2, 24, 40, 0}, 1.0, {1, kShared}}, kStatistics);
      check<__nv_bfloat16>({{1, 1, 4, 1, 33, 2, 88, 20, 0}, 1.0, {1, 52 * 1024}}, kStatistics);  // weights in passing
    }
    if (seed == 2) {
      check<__nv_bfloat16>({{1, 1, 2, 1, 60, 1, 8, 8, 0}, 50.0, {1, kShared}}, kStatistics);  // edges in global memory
      check<float>({{1, 1, 4, 1, 20, 12, 9, 24, 0}, 0.5, {1, kShared}}, kStatistics);
    }
    if (seed == 3) {
      check<__nv_bfloat16>({{1, 1, 3, 1, 50, 1, 72, 64, 0}, -1, {3, kShared}}, kScale);
      check<float>({{2, 1, 2, 1, 25, 3, 16, 32, 0}, 1.0, {1, kShared}}, kActivation);
    }
    check_refusals();
  });
}
