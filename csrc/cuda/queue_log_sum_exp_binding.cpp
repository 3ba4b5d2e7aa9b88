// The operator _queue_log_sum_exp_tile_.
#include "cuda/queue_log_sum_exp.h"

#include <optional>

#include "cuda/tile_arguments.h"

namespace ikem_fast::cuda {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void queue_log_sum_exp_tile_op(Tensor similarity, Tensor positive, double scale, int64_t start, int64_t num_columns,
                               Tensor state, Tensor log_sum_exp, Tensor best, std::optional<Tensor> shares) {
  const TileShape shape = tile_shape(similarity);
  check_columns(shape, start, num_columns);
  const std::vector<int64_t> rows{shape.batch, shape.rows};
  check_dense("similarity", similarity, similarity, ScalarType::Float, {-1, -1, -1, -1});
  check_dense("positive", positive, similarity, ScalarType::Float, rows);
  check_dense("state", state, similarity, ScalarType::Float, {3, shape.batch, shape.rows});
  check_dense("log_sum_exp", log_sum_exp, similarity, ScalarType::Float, rows);
  check_dense("best", best, similarity, ScalarType::Float, rows);
  if (shares) {
    check_dense("shares", *shares, similarity, shares->scalar_type(),
                {shape.batch, shape.segments, shape.rows, shape.segment_size});
  }
  const int64_t count = shape.batch * shape.rows;
  float* running = static_cast<float*>(state.mutable_data_ptr());
  const QueueLogSumExpTile tile{static_cast<const float*>(similarity.const_data_ptr()),
                                static_cast<const float*>(positive.const_data_ptr()),
                                static_cast<float>(scale),
                                start,
                                static_cast<int>(num_columns),
                                shares ? shares->mutable_data_ptr() : nullptr,
                                shares ? element_type("shares", *shares) : ElementType::kFloat,
                                running,
                                running + count,
                                running + 2 * count,
                                static_cast<float*>(log_sum_exp.mutable_data_ptr()),
                                static_cast<float*>(best.mutable_data_ptr())};
  const torch::stable::accelerator::DeviceGuard guard(similarity.get_device_index());
  check_launch("_queue_log_sum_exp_tile_", similarity,
               queue_log_sum_exp_tile(tile, shape, current_stream(similarity)));
}

}  // namespace

}  // namespace ikem_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ikem_fast, CUDA, m) {
  m.impl("_queue_log_sum_exp_tile_", TORCH_BOX(&ikem_fast::cuda::queue_log_sum_exp_tile_op));
}
