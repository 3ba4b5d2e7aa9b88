// TEST-ONLY: the CUDA kernels of pair_log_sum_exp, tile after tile, against plain loops in double over the whole queue,
// over sizes and thread schedules.
// Usage: test_pair_log_sum_exp [SEEDS [FILE]]. One translation unit: it includes the kernels, or a copy with a planted bug.
#ifndef KERNEL_SOURCE
#define KERNEL_SOURCE "cuda/pair_log_sum_exp.cu"
#endif
#include KERNEL_SOURCE

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "testing/device_buffer.h"
#include "testing/kernel_test.h"
#include "testing/values.h"

namespace {

using ikem_fast::cuda::ElementType;
using ikem_fast::cuda::PairGradient;
using ikem_fast::cuda::PairNeighbours;
using ikem_fast::cuda::PairStatistics;
using ikem_fast::cuda::PairTile;

struct Case {
  int num_x, num_y, num_rows, queue_size, segments, segment_size, slots;
  int64_t topk;
  double scale, deviation;
  bool whole_numbers;  // as similarities, so that many are equal
};

class Checker {
 public:
  explicit Checker(const Case& parameters) : c_(parameters), streams_(c_.num_x + c_.num_y) {
    std::mt19937 random(static_cast<unsigned>(c_.queue_size * 10 + c_.num_x));
    std::normal_distribution<double> normal;
    similarity_.resize(streams_);
    for (auto& stream : similarity_) {
      stream.resize(c_.num_rows);
      for (auto& row : stream) {
        row.resize(c_.queue_size);
        for (float& value : row) {
          value = static_cast<float>(c_.deviation * normal(random));
          if (c_.whole_numbers) value = std::round(value);  // also to minus zero
        }
      }
    }
    for (int r = 0; r < (c_.num_y ? c_.num_y : c_.num_x); ++r) singles_.push_back(c_.num_y ? c_.num_x + r : r);
    for (int a = 0; a < c_.num_x; ++a) {
      for (int other = c_.num_y ? c_.num_x : a + 1; other < streams_; ++other) pairs_.push_back({a, other});
    }
    for (int64_t i = 0; i < 4096; ++i) weights_.push_back(static_cast<float>(normal(random)));
    make_expected();
    make_tiles();
  }

  void check_all() {
    bool right = check_statistics();
    if (c_.topk > 1 || c_.num_rows == 1) right = check_neighbours() && right;
    right = check_gradient<float>() && right;
    right = check_gradient<__nv_bfloat16>() && right;
    if (right) return;
    ++failures;
    printf("FAILED A %d U %d N %d K %d topk %lld in %d segments of %d, %d slots, scale %g\n", c_.num_x, c_.num_y,
           c_.num_rows, c_.queue_size, static_cast<long long>(c_.topk), c_.segments, c_.segment_size, c_.slots, c_.scale);
  }

 private:
  int num_mined() const { return c_.num_y ? 1 + c_.num_y : c_.num_x; }
  int mined_stream(int a, int m) const { return !c_.num_y ? m : m == 0 ? a : c_.num_x + m - 1; }
  size_t num_lists() const { return static_cast<size_t>(c_.num_x) * c_.num_rows; }

  double logit(int index, int n, int j) const {
    const int num_singles = static_cast<int>(singles_.size());
    if (index < num_singles) return c_.scale * similarity_[singles_[index]][n][j];
    const auto [first, second] = pairs_[index - num_singles];
    return c_.scale * similarity_[first][n][j] * similarity_[second][n][j];
  }

  void make_expected() {
    const int count = static_cast<int>(singles_.size() + pairs_.size());
    for (int index = 0; index < count; ++index) {
      for (int n = 0; n < c_.num_rows; ++n) {
        double largest = -INFINITY, sum = 0, magnitude = 1;
        for (int j = 0; j < c_.queue_size; ++j) {
          largest = std::max(largest, logit(index, n, j));
          magnitude = std::max(magnitude, std::abs(logit(index, n, j)));
        }
        for (int j = 0; j < c_.queue_size; ++j) sum += std::exp(logit(index, n, j) - largest);
        log_sum_exp_.push_back(static_cast<float>(largest + std::log(sum)));
        digits_ = std::max(digits_, 1e-6 * magnitude);
      }
    }
    for (int a = 0; a < c_.num_x; ++a) {
      for (int n = 0; n < c_.num_rows; ++n) {
        std::vector<int64_t> order(c_.queue_size);
        std::iota(order.begin(), order.end(), int64_t{0});
        const auto& row = similarity_[a][n];
        std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return row[i] > row[j]; });
        neighbours_.insert(neighbours_.end(), order.begin(), order.begin() + c_.topk);
      }
    }
  }

  void make_tiles() {
    const int width = c_.segments * c_.segment_size;
    for (int start = 0; start < c_.queue_size; start += width) {
      std::vector<float> x(static_cast<size_t>(c_.num_x) * c_.num_rows * width);
      std::vector<float> y(static_cast<size_t>(c_.num_y) * c_.num_rows * width);
      for (int stream = 0; stream < streams_; ++stream) {
        for (int n = 0; n < c_.num_rows; ++n) {
          for (int column = 0; column < width && start + column < c_.queue_size; ++column) {
            (stream < c_.num_x ? x : y)[place(stream, n, column)] = similarity_[stream][n][start + column];
          }
        }
      }
      x_tiles_.push_back(std::make_unique<DeviceBuffer<float>>(x));
      y_tiles_.push_back(std::make_unique<DeviceBuffer<float>>(y));
    }
  }

  // In the stream's tile.
  size_t place(int stream, int n, int column) const {
    const int segment = column / c_.segment_size;
    const size_t matrix = stream < c_.num_x ? static_cast<size_t>(stream) * c_.segments + segment
                                            : static_cast<size_t>(segment) * c_.num_y + stream - c_.num_x;
    return (matrix * c_.num_rows + n) * c_.segment_size + column % c_.segment_size;
  }

  PairTile tile(size_t number) const {
    const int width = c_.segments * c_.segment_size, start = static_cast<int>(number) * width;
    return {x_tiles_[number]->data(),
            c_.num_y ? y_tiles_[number]->data() : nullptr,
            c_.num_x,
            c_.num_y,
            c_.num_rows,
            c_.segments,
            c_.segment_size,
            static_cast<float>(c_.scale),
            start,
            std::min(width, c_.queue_size - start)};
  }

  bool same_neighbours(const std::vector<int64_t>& positions, const std::vector<float>& mined, int64_t topk) const {
    for (size_t list = 0; list < num_lists(); ++list) {
      const int a = static_cast<int>(list) / c_.num_rows, n = static_cast<int>(list) % c_.num_rows;
      for (int64_t i = 0; i < topk; ++i) {
        const int64_t wanted = neighbours_[list * c_.topk + i];
        if (positions[list * topk + i] != wanted) return false;
        for (int m = 0; m < num_mined(); ++m) {
          if (mined[(list * topk + i) * num_mined() + m] != similarity_[mined_stream(a, m)][n][wanted]) return false;
        }
      }
    }
    return true;
  }

  bool check_statistics() const {
    const size_t rows = c_.num_rows, count = singles_.size() + pairs_.size();
    bool right = true;
    for (bool with_mining : {true, false}) {
      DeviceBuffer<float> sums(c_.slots * count * rows * 2), slots_mined(c_.slots * num_lists() * num_mined());
      DeviceBuffer<int64_t> slots_positions(c_.slots * num_lists());
      DeviceBuffer<float> single(singles_.size() * rows), pair(pairs_.size() * rows), mined(num_lists() * num_mined());
      DeviceBuffer<int64_t> neighbours(num_lists());
      const PairStatistics statistics{sums.data(), with_mining ? slots_positions.data() : nullptr, slots_mined.data(),
                                      c_.slots};
      for (size_t number = 0; number < x_tiles_.size(); ++number) {
        right = right && ikem_fast::cuda::pair_statistics_tile(tile(number), statistics, nullptr) == cudaSuccess;
      }
      right = right && ikem_fast::cuda::pair_statistics_finish(single.data(), pair.data(),
                                                               with_mining ? neighbours.data() : nullptr, mined.data(),
                                                               statistics, tile(0), nullptr) == cudaSuccess;
      std::vector<float> results = single.values(), of_pairs = pair.values();
      results.insert(results.end(), of_pairs.begin(), of_pairs.end());
      double worst = 0;
      for (size_t i = 0; i < results.size(); ++i) {
        const double difference = std::abs(results[i] - double(log_sum_exp_[i]));
        if (!(difference <= worst)) worst = difference;
      }
      if (!(worst <= 2 * digits_ + 2e-6)) {
        printf("FAILED log-sum-exps differ by %g\n", worst);
        right = false;
      }
      if (with_mining && !same_neighbours(neighbours.values(), mined.values(), 1)) {
        printf("FAILED other nearest neighbours\n");
        right = false;
      }
    }
    return right;
  }

  bool check_neighbours() const {
    const size_t count = num_lists() * c_.topk;
    DeviceBuffer<int64_t> first_positions(count), second_positions(count), scratch(count);
    DeviceBuffer<float> first_mined(count * num_mined()), second_mined(count * num_mined());
    PairNeighbours before{first_positions.data(), first_mined.data()};
    PairNeighbours after{second_positions.data(), second_mined.data()};
    bool right = true;
    for (size_t number = 0; number < x_tiles_.size(); ++number) {
      right = right && ikem_fast::cuda::pair_neighbours_tile(tile(number), c_.topk, before, after, scratch.data(),
                                                             nullptr) == cudaSuccess;
      std::swap(before, after);
    }
    const bool is_second = x_tiles_.size() % 2 == 1;
    if (same_neighbours(is_second ? second_positions.values() : first_positions.values(),
                        is_second ? second_mined.values() : first_mined.values(), c_.topk)) {
      return right;
    }
    printf("FAILED other neighbours\n");
    return false;
  }

  template <typename Gradient>
  bool check_gradient() const {
    const size_t rows = c_.num_rows, num_singles = singles_.size();
    const auto draw = [&](size_t count) {
      std::vector<float> values(count);
      for (size_t i = 0; i < count; ++i) values[i] = weights_[(i * 7 + count) % weights_.size()];
      return values;
    };
    const std::vector<float> single_gradient = draw(num_singles * rows), pair_gradient = draw(pairs_.size() * rows);
    const std::vector<float> mined_gradient = draw(num_lists() * c_.topk * num_mined());
    DeviceBuffer<float> single(std::vector<float>(log_sum_exp_.begin(), log_sum_exp_.begin() + num_singles * rows));
    DeviceBuffer<float> pair(std::vector<float>(log_sum_exp_.begin() + num_singles * rows, log_sum_exp_.end()));
    DeviceBuffer<float> of_single(single_gradient), of_pair(pair_gradient), of_mined(mined_gradient);
    DeviceBuffer<int64_t> neighbours(neighbours_);
    const PairGradient given{single.data(),    pair.data(),    neighbours.data(), of_single.data(),
                             of_pair.data(), of_mined.data(), c_.topk};
    const int width = c_.segments * c_.segment_size;
    double worst = 0;
    bool right = true;
    for (size_t number = 0; number < x_tiles_.size(); ++number) {
      const PairTile here = tile(number);
      DeviceBuffer<Gradient> gradient(num_singles * rows * width);
      right = right && ikem_fast::cuda::pair_gradient_tile(
                           gradient.data(), sizeof(Gradient) == 4 ? ElementType::kFloat : ElementType::kBFloat16, given,
                           here, nullptr) == cudaSuccess;
      const std::vector<Gradient> output = gradient.values();
      for (size_t r = 0; r < num_singles; ++r) {
        for (int n = 0; n < c_.num_rows; ++n) {
          for (int column = 0; column < width; ++column) {
            const double value = exact(output[place(singles_[r], n, column)]);
            if (column >= here.num_columns) {
              right = right && value == 0;
              continue;
            }
            const int j = static_cast<int>(here.start) + column;
            double wanted = 0, magnitude = 1;
            const auto add = [&](double term) {
              wanted += term;
              magnitude += std::abs(term);
            };
            const auto share = [&](size_t index) {
              return c_.scale * std::exp(logit(static_cast<int>(index), n, j) - log_sum_exp_[index * rows + n]);
            };
            add(single_gradient[r * rows + n] * share(r));
            for (size_t p = 0; p < pairs_.size(); ++p) {
              const auto [first, second] = pairs_[p];
              const double of_this = pair_gradient[p * rows + n] * share(num_singles + p);
              if (first == singles_[r]) add(of_this * similarity_[second][n][j]);
              if (second == singles_[r]) add(of_this * similarity_[first][n][j]);
            }
            for (int b = 0; b < c_.num_x; ++b) {
              for (int64_t i = 0; i < c_.topk; ++i) {
                const size_t entry = (static_cast<size_t>(b) * rows + n) * c_.topk + i;
                if (neighbours_[entry] == j) add(mined_gradient[entry * num_mined() + r + (c_.num_y ? 1 : 0)]);
              }
            }
            const double rounding = sizeof(Gradient) == 4 ? 4e-6 : 4.1e-3;
            const double difference = std::abs(value - wanted) / (magnitude * (rounding + 4 * digits_));
            if (!(difference <= worst)) worst = difference;
          }
        }
      }
    }
    if (worst <= 1) return right;
    printf("FAILED %zu-byte gradients differ by %g times what they may\n", sizeof(Gradient), worst);
    return false;
  }

  Case c_;
  int streams_;
  std::vector<std::vector<std::vector<float>>> similarity_;  // by stream, row and column of the queue
  std::vector<int> singles_;
  std::vector<std::pair<int, int>> pairs_;
  std::vector<float> log_sum_exp_, weights_;
  std::vector<int64_t> neighbours_;
  double digits_ = 0;  // absolute precision of a float as large as the logits
  std::vector<std::unique_ptr<DeviceBuffer<float>>> x_tiles_, y_tiles_;
};

void check_refusals() {
  const auto run = [](const PairTile& tile) {
    return ikem_fast::cuda::pair_statistics_tile(tile, {nullptr, nullptr, nullptr, 1}, nullptr);
  };
  PairTile tile{};
  tile.num_x = 2;
  tile.segments = 1;
  tile.segment_size = 8;
  tile.num_columns = 8;
  PairTile odd = tile, many = tile, empty = tile;
  odd.segment_size = 9;
  many.num_y = 31;
  empty.num_columns = 0;
  const bool refused = run(odd) == cudaErrorInvalidValue && run(many) == cudaErrorInvalidValue &&
                       run(empty) == cudaErrorInvalidValue && run(tile) == cudaSuccess;
  if (refused) return;
  ++failures;
  printf("FAILED the launcher must refuse odd segments, too many streams and no columns, and accept no rows\n");
}

}  // namespace

int main(int argc, char** argv) {
  return run_over_seeds("pair_log_sum_exp", argc, argv, [](int seed) {
    const auto check = [](const Case& parameters) { Checker(parameters).check_all(); };
    // A, U, N, K, segments, segment size, slots, topk, scale, deviation, whole numbers
    check({1, 0, 1, 1, 1, 8, 1, 1, 14.0, 0.3, false});
    check({3, 0, 2, 37, 1, 16, 2, 3, 14.0, 0.3, false});
    check({2, 2, 1, 50, 2, 8, 3, 5, 10.0, 0.5, false});
    check({3, 0, 1, 70, 1, 24, 2, 9, 1.0, 1.5, true});   // equal similarities in and across tiles
    check({2, 0, 2, 20, 1, 8, 8, 20, 2.0, 1.0, true});   // all are neighbours; slots without columns
    check({1, 3, 2, 33, 1, 40, 1, 1, 100.0, 1.0, false});
    check({2, 0, 1, 40, 2, 8, 1, 2, 100.0, 300.0, false});  // huge logits
    // More statistics than a block takes, and more columns than a stage.
    if (seed == 0) check({9, 0, 1, 150, 1, 152, 1, 1, 14.0, 0.2, false});
    if (seed == 1) check({2, 0, 1, 2500, 2, 1256, 2, 4, 14.0, 0.2, false});
    if (seed == 2) check({6, 0, 1, 1500, 4, 304, 1, 1, 14.0, 0.2, false});
    if (seed == 3) check({30, 2, 1, 300, 1, 304, 1, 1, 5.0, 0.2, false});
    check_refusals();
  });
}
