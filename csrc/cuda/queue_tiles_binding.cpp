// The operators _pack_queue_tile_ and _add_products_.
#include "cuda/queue_tiles.h"

#include <optional>

#include "cuda/tile_arguments.h"

namespace ikem_fast::cuda {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void pack_queue_tile_op(Tensor tile, Tensor queue, int64_t start) {
  const TileShape shape = tile_shape(tile);
  STD_TORCH_CHECK(queue.dim() == 3 && queue.size(0) == shape.batch && queue.size(1) == shape.rows &&
                      queue.is_cuda() && queue.get_device_index() == tile.get_device_index(),
                  "queue must be (", shape.batch, ", ", shape.rows, ", K) on the tile's device, got ",
                  describe_sizes(queue));
  STD_TORCH_CHECK(start >= 0, "start must be 0 or more, got ", start);
  const QueueColumns columns{queue.const_data_ptr(),
                             element_type("queue", queue),
                             {queue.stride(0), queue.stride(1), queue.stride(2)},
                             queue.size(2),
                             start};
  const torch::stable::accelerator::DeviceGuard guard(tile.get_device_index());
  check_launch("_pack_queue_tile_", tile,
               pack_queue_tile(tile.mutable_data_ptr(), element_type("tile", tile), columns, shape,
                               current_stream(tile)));
}

void add_products_op(Tensor sums, Tensor products, std::optional<Tensor> factor, std::optional<Tensor> divisor,
                     bool first, double scale) {
  check_dense("sums", sums, sums, ScalarType::Float, {-1, -1, -1});
  const int64_t batch = sums.size(0), rows = sums.size(1), size = sums.size(2);
  STD_TORCH_CHECK(rows <= INT32_MAX, "sums must have at most 2^31 - 1 rows, got ", rows);
  check_dense("products", products, sums, ScalarType::Float, {batch, -1, rows, size});
  const auto of_rows = [&](const char* name, const std::optional<Tensor>& tensor) -> const float* {
    if (!tensor) return nullptr;
    check_dense(name, *tensor, sums, ScalarType::Float, {batch, rows});
    return static_cast<const float*>(tensor->const_data_ptr());
  };
  const AddedProducts added{static_cast<float*>(sums.mutable_data_ptr()),
                            static_cast<const float*>(products.const_data_ptr()),
                            of_rows("factor", factor),
                            of_rows("divisor", divisor),
                            batch,
                            size,
                            static_cast<int>(rows),
                            static_cast<int>(products.size(1)),
                            first,
                            static_cast<float>(scale)};
  const torch::stable::accelerator::DeviceGuard guard(sums.get_device_index());
  check_launch("_add_products_", sums, add_products(added, current_stream(sums)));
}

}  // namespace

}  // namespace ikem_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ikem_fast, CUDA, m) {
  m.impl("_pack_queue_tile_", TORCH_BOX(&ikem_fast::cuda::pack_queue_tile_op));
  m.impl("_add_products_", TORCH_BOX(&ikem_fast::cuda::add_products_op));
}
