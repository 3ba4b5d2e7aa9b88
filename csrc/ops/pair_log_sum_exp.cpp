#include "ops/pair_log_sum_exp.h"

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>

#include "cpu/pair_log_sum_exp.h"
#include "cpu/workspace.h"
#include "ops/pair_log_sum_exp_checks.h"
#include "ops/queue_tile.h"

namespace ikem_fast {

namespace {

// Columns of the queues and the similarities of a block of rows are to stay in the second-level cache.
constexpr int64_t kQueueBytes = 768 * 1024;
constexpr int64_t kSimilarityBytes = 384 * 1024;
// Chunks of columns have a gradient each.
constexpr int64_t kGradientBytes = 64 * 1024 * 1024;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check_element_types(const char* row_name, const at::Tensor& rows, const char* queue_name,
                         const at::Tensor& queue) {
  const at::ScalarType type = rows.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16, row_name,
                    " must be float32, float64 or bfloat16, got ", type);
  TORCH_CHECK_VALUE(queue.scalar_type() == type || (type == at::kBFloat16 && queue.scalar_type() == at::kFloat),
                    queue_name, " must be of ", row_name, "'s dtype (float32 beside bfloat16 will do), got ",
                    queue.scalar_type(), " beside ", type);
}

PairSizes check(const at::Tensor& x, const at::Tensor& queue, const std::optional<at::Tensor>& y,
                const std::optional<at::Tensor>& y_queue, double scale, int64_t topk) {
  TORCH_CHECK_VALUE(y.has_value() == y_queue.has_value(), "y and y_queue must be given together");
  PairSizes sizes{x.sizes().vec(), queue.sizes().vec(), y.has_value(), {}, {}};
  check_element_types("x", x, "queue", queue);
  if (y) {
    sizes.y = y->sizes().vec();
    sizes.y_queue = y_queue->sizes().vec();
    check_element_types("y", *y, "y_queue", *y_queue);
    TORCH_CHECK_VALUE(y->scalar_type() == x.scalar_type() && y_queue->scalar_type() == queue.scalar_type(),
                      "y and y_queue must have the dtypes of x and queue, got ", y->scalar_type(), " and ",
                      y_queue->scalar_type(), " beside ", x.scalar_type(), " and ", queue.scalar_type());
  }
  const std::string problem = find_pair_problem(sizes, scale, topk);
  TORCH_CHECK_VALUE(problem.empty(), problem);
  return sizes;
}

cpu::MatrixElement element(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return cpu::MatrixElement::kDouble;
    case at::kBFloat16:
      return cpu::MatrixElement::kBFloat16;
    default:
      return cpu::MatrixElement::kFloat;
  }
}

at::ScalarType real_type(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Rows as the products take them: dense and, of bfloat16, of even size.
at::Tensor dense_rows(const at::Tensor& rows) {
  if (rows.scalar_type() == at::kBFloat16 && rows.size(2) % 2 != 0) {
    return at::constant_pad_nd(rows, {0, 1}).contiguous();
  }
  return rows.contiguous();
}

// Parameters with a partition of the work that depends on sizes and the number of threads alone.
class Work {
 public:
  Work(const PairSizes& sizes, const at::Tensor& x, const at::Tensor& queue, const std::optional<at::Tensor>& y,
       const std::optional<at::Tensor>& y_queue, double scale, int64_t topk)
      : rows_(dense_rows(x)), y_rows_(y ? dense_rows(*y) : at::Tensor()) {
    parameters.element = element(x.scalar_type());
    parameters.queue_element = element(queue.scalar_type());
    parameters.num_x = x.size(0);
    parameters.num_rows = x.size(1);
    parameters.size = x.size(2);
    parameters.num_columns = queue.size(2);
    parameters.topk = topk;
    parameters.scale = scale;
    parameters.x = rows_.const_data_ptr();
    parameters.x_stride = rows_.size(2);
    parameters.queue = queue.const_data_ptr();
    std::copy_n(queue.strides().begin(), 3, parameters.queue_strides);
    if (sizes.with_y) {
      parameters.num_y = y->size(0);
      parameters.y_size = y->size(2);
      parameters.y = y_rows_.const_data_ptr();
      parameters.y_stride = y_rows_.size(2);
      parameters.y_queue = y_queue->const_data_ptr();
      std::copy_n(y_queue->strides().begin(), 2, parameters.y_queue_strides);
    }
    const int64_t threads = at::get_num_threads();
    const int64_t real_bytes = real_type(x) == at::kDouble ? 8 : 4;
    const int64_t column_bytes =
        (parameters.num_x * parameters.size + parameters.y_size) * static_cast<int64_t>(x.element_size());
    const int64_t wanted = std::min(kQueueBytes / column_bytes, divide_up(parameters.num_columns, threads));
    parameters.tile = std::min(queue_tile(std::clamp<int64_t>(wanted / 64 * 64, 64, 512)), parameters.num_columns);
    parameters.row_block = std::clamp<int64_t>(
        kSimilarityBytes / (parameters.num_channels() * parameters.tile * real_bytes) / 16 * 16, 16, 128);
    const int64_t gradient_bytes =
        parameters.num_left() * parameters.num_rows * parameters.left_size() * real_bytes;
    parameters.column_chunks =
        std::min({threads, parameters.num_tiles(), std::max<int64_t>(1, kGradientBytes / std::max<int64_t>(1, gradient_bytes))});
    parameters.row_chunks = std::clamp<int64_t>(threads / parameters.column_chunks, 1,
                                                std::max<int64_t>(1, divide_up(parameters.num_rows, parameters.row_block)));
  }

  cpu::PairLogSumExp parameters;

 private:
  at::Tensor rows_;
  at::Tensor y_rows_;
};

template <typename Kernel>
void run_items(const cpu::PairLogSumExp& parameters, Kernel kernel) {
  if (parameters.num_rows == 0) return;
  at::parallel_for(0, parameters.num_items(), 1, [&](int64_t begin, int64_t end) { kernel(parameters, begin, end); });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> pair_log_sum_exp(const at::Tensor& x,
                                                                            const at::Tensor& queue,
                                                                            const std::optional<at::Tensor>& y,
                                                                            const std::optional<at::Tensor>& y_queue,
                                                                            double scale, int64_t topk) {
  const PairSizes sizes = check(x, queue, y, y_queue, scale, topk);
  Work work(sizes, x, queue, y, y_queue, scale, topk);
  cpu::PairLogSumExp& p = work.parameters;
  const auto options = x.options().dtype(real_type(x)).memory_format(at::MemoryFormat::Contiguous);
  const at::Tensor single = at::empty(sizes.single(), options);
  const at::Tensor pair = at::empty(sizes.pair(), options);
  const at::Tensor neighbours = at::empty(sizes.neighbours(topk), options.dtype(at::kLong));
  const at::Tensor mined = at::empty(sizes.mined(topk), options);
  p.single = single.mutable_data_ptr();
  p.pair = pair.mutable_data_ptr();
  p.positions = neighbours.mutable_data_ptr<int64_t>();
  p.mined = mined.mutable_data_ptr();

  const int64_t chunk_columns = divide_up(p.num_tiles(), p.column_chunks) * p.tile;
  p.most_neighbours = std::min(topk, chunk_columns);
  const int64_t num_found = p.column_chunks * p.num_x * p.num_rows * p.most_neighbours;
  const int64_t real_bytes = real_type(x) == at::kDouble ? 8 : 4;
  const cpu::Workspace<double> partial(p.column_chunks * p.num_sums() * p.num_rows);
  const cpu::Workspace<cpu::Neighbour<double>> found(num_found);
  const cpu::Workspace<char> mined_values(num_found * p.num_mined() * real_bytes);
  p.partial = partial.data();
  p.neighbours = found.data();
  p.mined_values = mined_values.data();

  run_items(p, IKEM_DISPATCH_CPU(pair_log_sum_exp));
  const auto join = IKEM_DISPATCH_CPU(join_pair_log_sum_exp);
  at::parallel_for(0, p.num_rows, 16, [&](int64_t begin, int64_t end) { join(p, begin, end); });
  return {single, pair, neighbours, mined};
}

at::Tensor pair_log_sum_exp_backward(const at::Tensor& x, const at::Tensor& queue, const std::optional<at::Tensor>& y,
                                     const std::optional<at::Tensor>& y_queue, double scale, const at::Tensor& single,
                                     const at::Tensor& pair, const at::Tensor& neighbours,
                                     const at::Tensor& single_gradient, const at::Tensor& pair_gradient,
                                     const at::Tensor& mined_gradient) {
  const int64_t topk = neighbours.dim() == 3 ? neighbours.size(2) : 0;
  const PairSizes sizes = check(x, queue, y, y_queue, scale, topk);
  const auto dense = [](const char* name, const at::Tensor& tensor, const std::vector<int64_t>& wanted,
                        at::ScalarType type) {
    TORCH_CHECK_VALUE(tensor.sizes() == wanted && tensor.scalar_type() == type, name, " must be ",
                      describe_sizes(wanted), " ", type, ", got ", describe_sizes(tensor.sizes().vec()), " ",
                      tensor.scalar_type());
    return tensor.contiguous();
  };
  const at::ScalarType real = real_type(x);
  const at::Tensor dense_single = dense("single", single, sizes.single(), real);
  const at::Tensor dense_pair = dense("pair", pair, sizes.pair(), real);
  const at::Tensor dense_neighbours = dense("neighbours", neighbours, sizes.neighbours(topk), at::kLong);
  const at::Tensor dense_single_gradient = dense("single_gradient", single_gradient, sizes.single(), real);
  const at::Tensor dense_pair_gradient = dense("pair_gradient", pair_gradient, sizes.pair(), real);
  const at::Tensor dense_mined_gradient = dense("mined_gradient", mined_gradient, sizes.mined(topk), real);

  Work work(sizes, x, queue, y, y_queue, scale, topk);
  cpu::PairLogSumExp& p = work.parameters;
  p.single = const_cast<void*>(dense_single.const_data_ptr());  // read by the backward pass
  p.pair = const_cast<void*>(dense_pair.const_data_ptr());
  p.positions = const_cast<int64_t*>(dense_neighbours.const_data_ptr<int64_t>());
  p.single_gradient = dense_single_gradient.const_data_ptr();
  p.pair_gradient = dense_pair_gradient.const_data_ptr();
  p.mined_gradient = dense_mined_gradient.const_data_ptr();

  const int64_t num_mined = p.num_x * topk;
  const cpu::Workspace<int64_t> order(p.num_rows * num_mined);
  at::parallel_for(0, p.num_rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      int64_t* const of_row = order.data() + n * num_mined;
      const auto position = [&](int64_t entry) {
        return p.positions[(entry / topk * p.num_rows + n) * topk + entry % topk];
      };
      std::iota(of_row, of_row + num_mined, int64_t{0});
      std::sort(of_row, of_row + num_mined, [&](int64_t a, int64_t b) {
        return position(a) != position(b) ? position(a) < position(b) : a < b;
      });
    }
  });
  p.mined_order = order.data();

  const at::Tensor parts =
      at::empty({p.column_chunks, p.num_left(), p.num_rows, p.left_size()},
                x.options().dtype(real).memory_format(at::MemoryFormat::Contiguous));
  p.gradient = parts.mutable_data_ptr();
  run_items(p, IKEM_DISPATCH_CPU(pair_log_sum_exp_backward));
  // Chunks in order, so that the bits are the same every time.
  at::Tensor gradient = parts.select(0, 0);
  for (int64_t chunk = 1; chunk < p.column_chunks; ++chunk) {
    gradient.add_(parts.select(0, chunk));
  }
  return p.column_chunks == 1 ? gradient : gradient.clone();
}

TORCH_LIBRARY_IMPL(ikem_fast, CPU, m) {
  m.impl("pair_log_sum_exp", &pair_log_sum_exp);
  m.impl("pair_log_sum_exp_backward", &pair_log_sum_exp_backward);
}

}  // namespace ikem_fast
