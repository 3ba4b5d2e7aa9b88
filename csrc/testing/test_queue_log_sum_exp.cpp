// TEST-ONLY: the CUDA kernel of queue_log_sum_exp, tile after tile, against plain loops in double, over sizes and thread
// schedules.
// Usage: test_queue_log_sum_exp [SEEDS [FILE]]. One translation unit: it includes the kernel, or a copy with a planted bug.
#ifndef KERNEL_SOURCE
#define KERNEL_SOURCE "cuda/queue_log_sum_exp.cu"
#endif
#include KERNEL_SOURCE

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "testing/device_buffer.h"
#include "testing/kernel_test.h"
#include "testing/values.h"

namespace {

using ikem_fast::cuda::ElementType;
using ikem_fast::cuda::QueueLogSumExpTile;
using ikem_fast::cuda::TileShape;

// Similarities of `deviation` around 0, that of the positive in units of 1 / scale.
template <typename Share>
void check(const TileShape& shape, int64_t queue_size, double scale, double deviation, bool with_shares = true) {
  std::mt19937 random(static_cast<unsigned>(queue_size + 7));
  std::normal_distribution<double> normal;
  const int64_t width = shape.segments * shape.segment_size, rows = shape.batch * shape.rows;
  std::vector<float> positive(rows);
  for (float& value : positive) value = static_cast<float>(scale * deviation * normal(random));
  DeviceBuffer<float> device_positive(positive), state(3 * rows), device_result(rows), device_best(rows);
  std::vector<double> best(rows, -INFINITY), maxima(positive.begin(), positive.end());
  std::vector<std::vector<double>> logits(rows);
  for (int64_t row = 0; row < rows; ++row) logits[row] = {positive[row]};

  for (int64_t start = 0; start < queue_size; start += width) {
    const int num_columns = static_cast<int>(std::min(width, queue_size - start));
    std::vector<float> similarity(rows * width, 0.0f);
    const auto place = [&](int64_t row, int64_t column) {
      const int64_t matrix = row / shape.rows * shape.segments + column / shape.segment_size;
      return (matrix * shape.rows + row % shape.rows) * shape.segment_size + column % shape.segment_size;
    };
    const std::vector<double> maxima_before = maxima;
    for (int64_t row = 0; row < rows; ++row) {
      for (int column = 0; column < num_columns; ++column) {
        const float value = static_cast<float>(deviation * normal(random));
        similarity[place(row, column)] = value;
        logits[row].push_back(scale * value);
        best[row] = std::max(best[row], scale * value);
        maxima[row] = std::max(maxima[row], scale * value);
      }
    }
    DeviceBuffer<float> device_similarity(similarity);
    DeviceBuffer<Share> device_shares(rows * width);
    const QueueLogSumExpTile tile{device_similarity.data(),
                                  device_positive.data(),
                                  static_cast<float>(scale),
                                  start,
                                  num_columns,
                                  with_shares ? device_shares.data() : nullptr,
                                  sizeof(Share) == 4 ? ElementType::kFloat : ElementType::kBFloat16,
                                  state.data(),
                                  state.data() + rows,
                                  state.data() + 2 * rows,
                                  device_result.data(),
                                  device_best.data()};
    const cudaError_t error = ikem_fast::cuda::queue_log_sum_exp_tile(tile, shape, nullptr);

    bool right = error == cudaSuccess;
    const std::vector<float> results = device_result.values(), bests = device_best.values(), states = state.values();
    const std::vector<Share> shares = with_shares ? device_shares.values() : std::vector<Share>();
    for (int64_t row = 0; row < rows; ++row) {
      double sum = 0;
      for (double logit : logits[row]) sum += std::exp(logit - maxima[row]);
      const double wanted = maxima[row] + std::log(sum);
      // Of a float that large: its last digits are all that a difference of logits has.
      const double digits = 1e-6 * (1 + std::abs(maxima[row]) + scale * deviation);
      right = right && std::abs(results[row] - wanted) <= digits && std::abs(bests[row] - best[row]) <= digits;
      const double factor = std::exp(maxima_before[row] - maxima[row]);
      if (start > 0) right = right && std::abs(states[2 * rows + row] - factor) <= 4 * digits;
      // Shares are relative to the maximum as it was rounded, and so is the sum.
      const double rounded_maximum = states[row];
      const double of_sum = std::abs(states[rows + row] * std::exp(rounded_maximum - wanted) - 1);
      right = right && (digits >= 0.1 || of_sum <= 4e-6 + 2 * digits);
      for (int64_t column = 0; with_shares && column < width; ++column) {
        const double logit = scale * similarity[place(row, column)];
        const double share = column < num_columns ? std::exp(logit - rounded_maximum) : 0.0;
        const double tolerance = share * (sizeof(Share) == 4 ? 4e-6 : 4.1e-3) + 1e-37;
        const double actual = exact(shares[place(row, column)]);
        // Nothing but their size is known of shares whose logits differ by less than their last digits.
        const bool is_known = digits < 0.1 || column >= num_columns;
        right = right && (is_known ? std::abs(actual - share) <= tolerance + 2 * share * digits
                                   : actual >= 0 && actual <= 1);
      }
    }
    if (right) continue;
    ++failures;
    printf("FAILED B %lld R %d K %lld from %lld in %d segments of %d, scale %g, %zu-byte shares: error %d\n",
           static_cast<long long>(shape.batch), shape.rows, static_cast<long long>(queue_size),
           static_cast<long long>(start), shape.segments, shape.segment_size, scale, sizeof(Share),
           static_cast<int>(error));
    return;
  }
}

void check_refusals() {
  const auto run = [](const TileShape& shape, int num_columns) {
    QueueLogSumExpTile tile{};
    tile.num_columns = num_columns;
    return ikem_fast::cuda::queue_log_sum_exp_tile(tile, shape, nullptr);
  };
  const bool refused = run({1, 1, 2, 16392}, 1) == cudaErrorInvalidValue &&  // too wide
                       run({1, 1, 1, 9}, 1) == cudaErrorInvalidValue && run({1, 1, 1, 8}, 0) == cudaErrorInvalidValue &&
                       run({1, 1, 1, 8}, 9) == cudaErrorInvalidValue && run({0, 1, 1, 8}, 8) == cudaSuccess;
  if (refused) return;
  ++failures;
  printf("FAILED the launcher must refuse tiles that are too wide, odd or empty, and accept no rows\n");
}

}  // namespace

int main(int argc, char** argv) {
  return run_over_seeds("queue_log_sum_exp", argc, argv, [](int seed) {
    check<float>({1, 1, 1, 8}, 1, 14.0, 0.1);
    check<float>({2, 3, 2, 16}, 77, 14.0, 0.3);
    check<__nv_bfloat16>({1, 2, 4, 24}, 300, 100.0, 0.5);
    check<float>({1, 2, 1, 40}, 121, 100.0, 1e4);  // huge logits
    check<__nv_bfloat16>({1, 3, 2, 8}, 50, 1.0, 1e30);
    check<float>({1, 1, 1, 8}, 16, 14.0, 0.0);      // all equal
    check<float>({2, 2, 1, 16}, 40, 20.0, 0.3, false);
    // One size for each number of threads.
    if (seed == 0) check<float>({1, 1, 3, 2000}, 11000, 14.0, 0.1);
    if (seed == 1) check<__nv_bfloat16>({1, 1, 2, 5000}, 9001, 14.0, 0.1);
    check_refusals();
  });
}
