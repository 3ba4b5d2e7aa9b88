// The operators _pair_statistics_tile_, _pair_statistics_finish_, _pair_neighbours_tile_ and _pair_gradient_tile_.
#include "cuda/pair_log_sum_exp.h"

#include <optional>

#include "cuda/tile_arguments.h"

namespace ikem_fast::cuda {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
T* data_or_null(std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

PairTile pair_tile(const Tensor& x_similarity, const std::optional<Tensor>& y_similarity, double scale, int64_t start,
                   int64_t num_columns) {
  const TileShape shape = tile_shape(x_similarity);
  check_columns(shape, start, num_columns);
  check_dense("x_similarity", x_similarity, x_similarity, ScalarType::Float, {-1, -1, -1, -1});
  const int64_t num_y = y_similarity ? y_similarity->size(1) : 0;
  if (y_similarity) {
    check_dense("y_similarity", *y_similarity, x_similarity, ScalarType::Float,
                {shape.segments, -1, shape.rows, shape.segment_size});
  }
  STD_TORCH_CHECK(shape.batch + num_y <= kMaxPairStreams, "there must be at most ", static_cast<int>(kMaxPairStreams),
                  " streams, got ", shape.batch + num_y);
  return {floats(x_similarity),
          y_similarity ? floats(*y_similarity) : nullptr,
          static_cast<int>(shape.batch),
          static_cast<int>(num_y),
          shape.rows,
          shape.segments,
          shape.segment_size,
          static_cast<float>(scale),
          start,
          static_cast<int>(num_columns)};
}

PairStatistics pair_statistics(Tensor& sums, std::optional<Tensor>& positions, std::optional<Tensor>& mined,
                               const PairTile& tile) {
  check_dense("sums", sums, sums, ScalarType::Float, {-1, tile.num_singles() + tile.num_pairs(), tile.num_rows, 2});
  STD_TORCH_CHECK(positions.has_value() == mined.has_value(), "positions and mined must be given together");
  const int64_t slots = sums.size(0);
  if (positions) {
    check_dense("positions", *positions, sums, ScalarType::Long, {slots, tile.num_x, tile.num_rows});
    check_dense("mined", *mined, sums, ScalarType::Float, {slots, tile.num_x, tile.num_rows, tile.num_mined()});
  }
  return {static_cast<float*>(sums.mutable_data_ptr()), data_or_null<int64_t>(positions), data_or_null<float>(mined),
          static_cast<int>(slots)};
}

void pair_statistics_tile_op(Tensor x_similarity, std::optional<Tensor> y_similarity, double scale, int64_t start,
                             int64_t num_columns, Tensor sums, std::optional<Tensor> positions,
                             std::optional<Tensor> mined) {
  const PairTile tile = pair_tile(x_similarity, y_similarity, scale, start, num_columns);
  const PairStatistics statistics = pair_statistics(sums, positions, mined, tile);
  const torch::stable::accelerator::DeviceGuard guard(x_similarity.get_device_index());
  check_launch("_pair_statistics_tile_", x_similarity,
               pair_statistics_tile(tile, statistics, current_stream(x_similarity)));
}

void pair_statistics_finish_op(Tensor sums, std::optional<Tensor> positions, std::optional<Tensor> mined_of_slots,
                               int64_t num_y, Tensor single, Tensor pair, std::optional<Tensor> neighbours,
                               std::optional<Tensor> mined) {
  check_dense("single", single, sums, ScalarType::Float, {-1, -1});
  PairTile tile{};
  tile.num_rows = static_cast<int>(single.size(1));
  tile.num_y = static_cast<int>(num_y);
  tile.num_x = static_cast<int>(num_y ? pair.size(0) / num_y : single.size(0));
  const PairStatistics statistics = pair_statistics(sums, positions, mined_of_slots, tile);
  check_dense("single", single, sums, ScalarType::Float, {tile.num_singles(), tile.num_rows});
  check_dense("pair", pair, sums, ScalarType::Float, {tile.num_pairs(), tile.num_rows});
  STD_TORCH_CHECK(positions.has_value() == neighbours.has_value() && positions.has_value() == mined.has_value(),
                  "neighbours and mined must be given where positions are");
  if (neighbours) {
    check_dense("neighbours", *neighbours, sums, ScalarType::Long, {tile.num_x, tile.num_rows, 1});
    check_dense("mined", *mined, sums, ScalarType::Float, {tile.num_x, tile.num_rows, 1, tile.num_mined()});
  }
  const torch::stable::accelerator::DeviceGuard guard(sums.get_device_index());
  check_launch("_pair_statistics_finish_", sums,
               pair_statistics_finish(static_cast<float*>(single.mutable_data_ptr()),
                                      static_cast<float*>(pair.mutable_data_ptr()), data_or_null<int64_t>(neighbours),
                                      data_or_null<float>(mined), statistics, tile, current_stream(sums)));
}

void pair_neighbours_tile_op(Tensor x_similarity, std::optional<Tensor> y_similarity, int64_t start,
                             int64_t num_columns, Tensor positions_before, Tensor mined_before, Tensor positions,
                             Tensor mined, Tensor scratch) {
  const PairTile tile = pair_tile(x_similarity, y_similarity, 1.0, start, num_columns);
  check_dense("positions", positions, x_similarity, ScalarType::Long, {tile.num_x, tile.num_rows, -1});
  const int64_t topk = positions.size(2);
  for (const Tensor& tensor : {positions_before, scratch}) {
    check_dense("positions_before and scratch", tensor, x_similarity, ScalarType::Long,
                {tile.num_x, tile.num_rows, topk});
  }
  for (const Tensor& tensor : {mined_before, mined}) {
    check_dense("mined_before and mined", tensor, x_similarity, ScalarType::Float,
                {tile.num_x, tile.num_rows, topk, tile.num_mined()});
  }
  const auto neighbours = [](Tensor& places, Tensor& values) {
    return PairNeighbours{static_cast<int64_t*>(places.mutable_data_ptr()),
                          static_cast<float*>(values.mutable_data_ptr())};
  };
  const torch::stable::accelerator::DeviceGuard guard(x_similarity.get_device_index());
  check_launch("_pair_neighbours_tile_", x_similarity,
               pair_neighbours_tile(tile, topk, neighbours(positions_before, mined_before),
                                    neighbours(positions, mined), static_cast<int64_t*>(scratch.mutable_data_ptr()),
                                    current_stream(x_similarity)));
}

void pair_gradient_tile_op(Tensor x_similarity, std::optional<Tensor> y_similarity, double scale, int64_t start,
                           int64_t num_columns, Tensor single, Tensor pair, Tensor neighbours, Tensor single_gradient,
                           Tensor pair_gradient, Tensor mined_gradient, Tensor gradient) {
  const PairTile tile = pair_tile(x_similarity, y_similarity, scale, start, num_columns);
  const std::vector<int64_t> singles{tile.num_singles(), tile.num_rows}, pairs{tile.num_pairs(), tile.num_rows};
  check_dense("single", single, x_similarity, ScalarType::Float, singles);
  check_dense("single_gradient", single_gradient, x_similarity, ScalarType::Float, singles);
  check_dense("pair", pair, x_similarity, ScalarType::Float, pairs);
  check_dense("pair_gradient", pair_gradient, x_similarity, ScalarType::Float, pairs);
  check_dense("neighbours", neighbours, x_similarity, ScalarType::Long, {tile.num_x, tile.num_rows, -1});
  const int64_t topk = neighbours.size(2);
  check_dense("mined_gradient", mined_gradient, x_similarity, ScalarType::Float,
              {tile.num_x, tile.num_rows, topk, tile.num_mined()});
  const Tensor& layout = y_similarity ? *y_similarity : x_similarity;
  check_dense("gradient", gradient, x_similarity, gradient.scalar_type(),
              {layout.size(0), layout.size(1), layout.size(2), layout.size(3)});
  const PairGradient given{floats(single),
                           floats(pair),
                           static_cast<const int64_t*>(neighbours.const_data_ptr()),
                           floats(single_gradient),
                           floats(pair_gradient),
                           floats(mined_gradient),
                           topk};
  const torch::stable::accelerator::DeviceGuard guard(x_similarity.get_device_index());
  check_launch("_pair_gradient_tile_", x_similarity,
               pair_gradient_tile(gradient.mutable_data_ptr(), element_type("gradient", gradient), given, tile,
                                  current_stream(x_similarity)));
}

}  // namespace

}  // namespace ikem_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ikem_fast, CUDA, m) {
  m.impl("_pair_statistics_tile_", TORCH_BOX(&ikem_fast::cuda::pair_statistics_tile_op));
  m.impl("_pair_statistics_finish_", TORCH_BOX(&ikem_fast::cuda::pair_statistics_finish_op));
  m.impl("_pair_neighbours_tile_", TORCH_BOX(&ikem_fast::cuda::pair_neighbours_tile_op));
  m.impl("_pair_gradient_tile_", TORCH_BOX(&ikem_fast::cuda::pair_gradient_tile_op));
}
