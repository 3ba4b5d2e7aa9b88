#include "ops/queue_log_sum_exp.h"

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/queue_log_sum_exp.h"
#include "ops/queue_log_sum_exp_checks.h"
#include "ops/queue_tile.h"

namespace ikem_fast {

namespace {

cpu::QueueNumbers find_numbers(const at::Tensor& x, const at::Tensor& queue) {
  const auto of_x = x.scalar_type(), of_queue = queue.scalar_type();
  if (of_x == at::kFloat && of_queue == at::kFloat) return cpu::QueueNumbers::kFloat;
  if (of_x == at::kBFloat16 && of_queue == at::kBFloat16) return cpu::QueueNumbers::kBFloat16;
  if (of_x == at::kBFloat16 && of_queue == at::kFloat) return cpu::QueueNumbers::kBFloat16OverFloat;
  if (of_x == at::kDouble && of_queue == at::kDouble) return cpu::QueueNumbers::kDouble;
  TORCH_CHECK_VALUE(of_x == at::kFloat || of_x == at::kBFloat16 || of_x == at::kDouble,
                    "x must be float32, bfloat16 or float64, got ", of_x);
  TORCH_CHECK_VALUE(false, "queue must be of x's dtype ", of_x, " (or float32 for bfloat16), got ", of_queue);
}

// A tile of the queue that stays, in the layouts of both products, in a second-level cache.
int64_t automatic_tile(int64_t size) {
  constexpr int64_t kNumbers = 1 << 17;
  return std::clamp<int64_t>(kNumbers / std::max<int64_t>(size, 1) / 64 * 64, 64, 256);
}

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The work is (group, tile) for groups of rows of x[b] and tiles of queue[b], in this order. Worker w takes a contiguous
// share; the sums of a group that an earlier worker began go to its own memory and are added afterwards, in order.
class Work {
 public:
  Work(const cpu::QueueLogSumExp& parameters, int64_t batch)
      : tiles(divide_up(parameters.queue_size, parameters.tile)), batch_(batch), rows_(parameters.rows) {
    // Fewer products than these are not worth another thread.
    constexpr double kProductsOfAWorker = 1 << 20;
    const double products = static_cast<double>(batch) * parameters.rows * parameters.size * parameters.queue_size;
    num_workers = std::clamp<int64_t>(static_cast<int64_t>(std::min(products / kProductsOfAWorker, 1e6)), 1,
                                      at::get_num_threads());
    // Sums of all workers for a group of rows take up to 16 M numbers.
    constexpr int64_t kNumbers = 1 << 24, kFewestRows = 96;
    const int64_t numbers = num_workers * rows_ * parameters.size;
    const int64_t groups_of_rows = std::clamp<int64_t>(divide_up(numbers, kNumbers), 1, divide_up(rows_, kFewestRows));
    rows_of_group = divide_up(rows_, groups_of_rows);
    groups_per_batch_ = divide_up(rows_, rows_of_group);
    num_workers = std::min(num_workers, num_groups() * tiles);
  }

  int64_t num_groups() const { return batch_ * groups_per_batch_; }
  int64_t batch_of(int64_t group) const { return group / groups_per_batch_; }
  int64_t first_row(int64_t group) const { return group % groups_per_batch_ * rows_of_group; }
  int64_t num_rows(int64_t group) const { return std::min(rows_of_group, rows_ - first_row(group)); }
  int64_t group_of_row(int64_t batch, int64_t row) const { return batch * groups_per_batch_ + row / rows_of_group; }
  int64_t begin_of(int64_t worker) const { return num_groups() * tiles * worker / num_workers; }
  // Whether a worker begins inside a group, whose sums then are to be added to those of the workers before.
  bool begins_inside(int64_t worker) const { return begin_of(worker) % tiles != 0; }

  int64_t tiles, num_workers = 1, rows_of_group = 1;

 private:
  int64_t batch_, rows_, groups_per_batch_ = 1;
};

cpu::QueueSums from_row(const cpu::QueueSums& sums, int64_t row, int64_t size, int64_t bytes) {
  return {sums.largest + row, sums.sum + row,
          sums.weighted ? static_cast<char*>(sums.weighted) + row * size * bytes : nullptr};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> queue_log_sum_exp(const at::Tensor& x, const at::Tensor& queue,
                                                                 const at::Tensor& positive, double scale,
                                                                 bool with_gradient) {
  const std::string problem = find_queue_problem(x.sizes(), queue.sizes(), positive.sizes(), scale);
  TORCH_CHECK_VALUE(problem.empty(), problem);
  cpu::QueueLogSumExp parameters;
  parameters.numbers = find_numbers(x, queue);
  const auto statistics = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(positive.scalar_type() == statistics, "positive must be ", statistics, " for x of ",
                    x.scalar_type(), ", got ", positive.scalar_type());
  const int64_t batch = x.size(0), rows = x.size(1), size = x.size(2);
  const bool is_paired = x.scalar_type() == at::kBFloat16;
  const at::Tensor dense_x = is_paired && size % 2 ? at::constant_pad_nd(x, {0, 1}).contiguous() : x.contiguous();
  const at::Tensor dense_positive = positive.contiguous();
  parameters.x = dense_x.const_data_ptr();
  parameters.queue = queue.const_data_ptr();
  parameters.rows = rows;
  parameters.size = size;
  parameters.row_stride = dense_x.size(2);
  parameters.queue_size = queue.size(2);
  parameters.batch_stride = queue.stride(0);
  parameters.size_stride = queue.stride(1);
  parameters.column_stride = queue.stride(2);
  parameters.tile = queue_tile(automatic_tile(size));
  parameters.scale = scale;
  parameters.with_gradient = with_gradient;

  const auto options = x.options().dtype(statistics);
  const at::Tensor log_sum_exp = at::empty({batch, rows}, options);
  const at::Tensor best = at::empty({batch, rows}, options);
  const bool has_columns = parameters.queue_size > 0;
  const at::Tensor gradient = !with_gradient ? at::empty({0}, options)
                              : has_columns  ? at::empty({batch, rows, size}, options)
                                             : at::zeros({batch, rows, size}, options);
  if (batch * rows == 0) return {log_sum_exp, best, gradient};

  const int64_t bytes = static_cast<int64_t>(gradient.element_size());
  std::vector<double> largest(batch * rows, -std::numeric_limits<double>::infinity()), sum(batch * rows, 0.0);
  const cpu::QueueSums sums{largest.data(), sum.data(), with_gradient ? gradient.mutable_data_ptr() : nullptr};

  const auto sum_tiles = IKEM_DISPATCH_CPU(sum_queue_tiles);
  const auto add_sums = IKEM_DISPATCH_CPU(add_queue_sums);
  const auto finish_row = IKEM_DISPATCH_CPU(finish_queue_row);

  const auto finish = [&](int64_t row) {
    const auto at_row = [&](const at::Tensor& tensor, double value) {
      if (statistics == at::kDouble) {
        tensor.mutable_data_ptr<double>()[row] = value;
      } else {
        tensor.mutable_data_ptr<float>()[row] = static_cast<float>(value);
      }
    };
    const double of_positive = statistics == at::kDouble ? dense_positive.const_data_ptr<double>()[row]
                                                         : dense_positive.const_data_ptr<float>()[row];
    at_row(best, scale * largest[row]);
    at_row(log_sum_exp, finish_row(parameters, sums, row, of_positive));
  };
  if (!has_columns) {
    for (int64_t row = 0; row < batch * rows; ++row) finish(row);
    return {log_sum_exp, best, gradient};
  }

  const Work work(parameters, batch);
  const int64_t spare_rows = work.rows_of_group * (work.num_workers - 1);
  std::vector<double> spare_largest(spare_rows), spare_sum(spare_rows);
  const at::Tensor spare_gradient = at::empty({with_gradient ? spare_rows * size : 0}, options);
  const cpu::QueueSums spare{spare_largest.data(), spare_sum.data(),
                             with_gradient ? spare_gradient.mutable_data_ptr() : nullptr};
  const auto spare_of = [&](int64_t worker) {
    return from_row(spare, (worker - 1) * work.rows_of_group, size, bytes);
  };

  at::parallel_for(0, work.num_workers, 1, [&](int64_t first_worker, int64_t last_worker) {
    for (int64_t worker = first_worker; worker < last_worker; ++worker) {
      const int64_t begin = work.begin_of(worker), end = work.begin_of(worker + 1);
      for (int64_t item = begin; item < end;) {
        const int64_t group = item / work.tiles, tile = item % work.tiles;
        const int64_t last_tile = std::min(work.tiles, tile + end - item);
        const int64_t b = work.batch_of(group), first_row = work.first_row(group);
        sum_tiles(parameters, b, first_row, work.num_rows(group), tile, last_tile,
                  tile == 0 ? from_row(sums, b * rows + first_row, size, bytes) : spare_of(worker));
        item += last_tile - tile;
      }
    }
  });
  constexpr int64_t kRowsOfATask = 16;
  at::parallel_for(0, batch * rows, kRowsOfATask, [&](int64_t first_row, int64_t last_row) {
    for (int64_t row = first_row; row < last_row; ++row) {
      const int64_t b = row / rows, group = work.group_of_row(b, row % rows);
      for (int64_t worker = 1; worker < work.num_workers; ++worker) {
        if (work.begins_inside(worker) && work.begin_of(worker) / work.tiles == group) {
          add_sums(parameters, sums, row, spare_of(worker), row % rows - work.first_row(group));
        }
      }
      finish(row);
    }
  });
  return {log_sum_exp, best, gradient};
}

TORCH_LIBRARY_IMPL(ikem_fast, CPU, m) { m.impl("queue_log_sum_exp", &queue_log_sum_exp); }

}  // namespace ikem_fast
