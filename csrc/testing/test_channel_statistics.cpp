// TEST-ONLY: statistics of accumulators' columns, and of their parts together, against plain loops in double.
// Usage: test_channel_statistics [SEEDS [FILE]]. One translation unit: it includes the kernels, or a copy with a planted
// bug.
#ifndef KERNEL_SOURCE
#define KERNEL_SOURCE "cuda/channel_statistics.cu"
#endif
#include KERNEL_SOURCE

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "testing/device_buffer.h"
#include "testing/kernel_test.h"

namespace {

using ikem_fast::cuda::Accumulators;
using ikem_fast::cuda::ColumnMoments;

// A block, of one warp, takes tiles of 16 kM rows from row blockIdx.x * rows on.
template <int kM, int kN>
__global__ void column_moments_kernel(float* moments, const float* values, int rows, int channels) {
  const float* own = values + static_cast<int64_t>(blockIdx.x) * rows * channels;
  ColumnMoments<kM, kN> statistics;
  for (int begin = 0; begin < rows; begin += 16 * kM) {
    Accumulators<kM, kN> tile;
    for (int i = 0; i < kM; ++i) {
      for (int j = 0; j < kN; ++j) {
        for (int q = 0; q < 4; ++q) {
          const int row = begin + 16 * i + ikem_fast::cuda::accumulator_row(q);
          const int column = 8 * j + ikem_fast::cuda::accumulator_column(q);
          tile[i][j][q] = row < rows && column < channels ? own[row * channels + column] : NAN;
        }
      }
    }
    statistics.add(tile, rows - begin);
  }
  float* slot = moments + static_cast<int64_t>(blockIdx.x) * 3 * channels;
  statistics.store(slot, slot + channels, slot + 2 * channels, channels);
}

template <int kM, int kN>
void check(int streams, int slots, int rows, int channels, double shift) {
  std::mt19937 random(rows * 100 + channels);
  std::normal_distribution<double> normal;
  std::vector<float> values(static_cast<size_t>(streams) * slots * rows * channels);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(shift * (i % channels + 1) + normal(random));
  }
  DeviceBuffer<float> input(values), moments(static_cast<size_t>(streams) * slots * 3 * channels);
  DeviceBuffer<float> mean(streams * channels), variance(streams * channels);
  bool right = true;
  if (slots) {
    right = IKEM_LAUNCH((column_moments_kernel<kM, kN>), dim3(streams * slots), dim3(32), 0, nullptr, moments.data(),
                        input.data(), rows, channels) == cudaSuccess;
  }
  right = right && ikem_fast::cuda::combine_channel_statistics(mean.data(), variance.data(),
                                                               {moments.data(), streams, slots, channels},
                                                               nullptr) == cudaSuccess;
  const std::vector<float> means = mean.values(), variances = variance.values();
  const double count = static_cast<double>(slots) * rows;
  double worst = 0;
  for (int s = 0; s < streams; ++s) {
    for (int c = 0; c < channels; ++c) {
      double sum = 0, squares = 0;
      const auto at = [&](int64_t i) { return double(values[(s * int64_t(count) + i) * channels + c]); };
      for (int64_t i = 0; i < count; ++i) sum += at(i);
      const double wanted = count ? sum / count : 0;
      for (int64_t i = 0; i < count; ++i) squares += (at(i) - wanted) * (at(i) - wanted);
      const double wanted_variance = count ? squares / count : 0;
      const double magnitude = std::abs(wanted) + std::sqrt(wanted_variance) + 1e-30;
      const double of_mean = std::abs(means[s * channels + c] - wanted) / (2e-7 * magnitude);
      // A value's own rounding moves it by that much of the mean.
      const double of_variance = std::abs(variances[s * channels + c] - wanted_variance) /
                                 (1e-6 * wanted_variance + 2e-7 * magnitude * std::sqrt(wanted_variance) + 1e-30);
      for (double difference : {of_mean, of_variance}) {
        if (!(difference <= worst)) worst = difference;
      }
    }
  }
  if (right && worst <= 1) return;
  ++failures;
  printf("FAILED %d streams, %d slots of %d rows, %d channels, shift %g: differs by %g times what it may\n", streams,
         slots, rows, channels, shift, worst);
}

}  // namespace

int main(int argc, char** argv) {
  return run_over_seeds("channel_statistics", argc, argv, [](int) {
    check<1, 1>(1, 1, 1, 8, 0);
    check<1, 2>(2, 3, 37, 16, 1);
    check<2, 3>(1, 9, 50, 19, 1000);
    check<2, 4>(1, 20, 33, 32, 100);
    check<2, 8>(2, 2, 70, 63, -10);
    check<1, 5>(1, 1, 100, 40, 3);
    check<1, 2>(3, 0, 0, 16, 0);
    check<1, 2>(1, 1, 16, 0, 0);
  });
}
