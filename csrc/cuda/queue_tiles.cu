#include "cuda/queue_tiles.h"

#include "cuda/kernel.h"
#include "cuda/real_types.h"

namespace ikem_fast::cuda {

namespace {

struct Traits {
  static constexpr int kThreads = 256;
  static constexpr int kAddThreads = 128;
  static constexpr int kFours = 2;  // of neighbouring columns, that a thread has under way at once
  static constexpr int kColumns = 4 * kThreads * kFours;
};

// Four columns of the queue from `column` on; zeros after the queue's end.
template <typename From>
__device__ __forceinline__ void load_columns(float (&values)[4], const From* row, int64_t column, int64_t queue_size,
                                             int64_t stride, bool aligned) {
  if (aligned && column + 4 <= queue_size) {
    const Four<From> four = *reinterpret_cast<const Four<From>*>(row + column);
#pragma unroll
    for (int k = 0; k < 4; ++k) values[k] = widen(four.values[k]);
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) values[k] = column + k < queue_size ? widen(row[(column + k) * stride]) : 0.0f;
}

// A block converts a piece of one row.
template <typename From, typename To>
__global__ void __launch_bounds__(Traits::kThreads)
    pack_queue_tile_kernel(To* __restrict__ tile, QueueColumns columns, TileShape shape, int pieces, bool aligned) {
  const int piece = static_cast<int>(blockIdx.x) % pieces, number = static_cast<int>(blockIdx.x) / pieces;
  const int64_t row = number % shape.rows, batch = number / shape.rows;
  const From* from =
      static_cast<const From*>(columns.queue) + batch * columns.strides[0] + row * columns.strides[1];
  const int width = shape.segments * shape.segment_size;
  float values[Traits::kFours][4];
#pragma unroll
  for (int i = 0; i < Traits::kFours; ++i) {
    const int column = piece * Traits::kColumns + 4 * (i * Traits::kThreads + threadIdx.x);
    if (column < width) {
      load_columns(values[i], from, columns.start + column, columns.queue_size, columns.strides[2], aligned);
    }
  }
#pragma unroll
  for (int i = 0; i < Traits::kFours; ++i) {
    const int column = piece * Traits::kColumns + 4 * (i * Traits::kThreads + threadIdx.x);
    if (column < width) {
      const int64_t segment = batch * shape.segments + column / shape.segment_size;
      store_four(tile + (segment * shape.rows + row) * shape.segment_size + column % shape.segment_size, values[i]);
    }
  }
}

template <typename From, typename To>
cudaError_t pack(void* tile, const QueueColumns& columns, const TileShape& shape, cudaStream_t stream) {
  const int64_t width = static_cast<int64_t>(shape.segments) * shape.segment_size;
  const int64_t pieces = (width + Traits::kColumns - 1) / Traits::kColumns;
  const int64_t blocks = shape.batch * shape.rows * pieces;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX || width > INT32_MAX - Traits::kColumns) return cudaErrorInvalidValue;
  const bool aligned = columns.strides[2] == 1 && columns.start % 4 == 0 && columns.strides[0] % 4 == 0 &&
                       columns.strides[1] % 4 == 0 &&
                       reinterpret_cast<uintptr_t>(columns.queue) % sizeof(Four<From>) == 0;
  return IKEM_LAUNCH((pack_queue_tile_kernel<From, To>), dim3(static_cast<unsigned>(blocks)), dim3(Traits::kThreads), 0,
                     stream, static_cast<To*>(tile), columns, shape, static_cast<int>(pieces), aligned);
}

// A block per row.
__global__ void __launch_bounds__(Traits::kAddThreads) add_products_kernel(AddedProducts added) {
  const int row = static_cast<int>(blockIdx.x);
  const int64_t matrix = added.rows * added.size;
  const float* products =
      added.products + row / added.rows * (added.segments * matrix) + row % added.rows * added.size;
  float* sums = added.sums + row * added.size;
  const float factor = added.first ? 0.0f : added.factor ? added.factor[row] : 1.0f;
  const float divisor = added.divisor ? added.divisor[row] : 1.0f;
  for (int64_t i = threadIdx.x; i < added.size; i += Traits::kAddThreads) {
    float sum = products[i];
    for (int segment = 1; segment < added.segments; ++segment) sum += products[segment * matrix + i];
    if (!added.first) sum = fmaf(factor, sums[i], sum);
    sums[i] = sum * added.scale / divisor;
  }
}

}  // namespace

cudaError_t pack_queue_tile(void* tile, ElementType tile_type, const QueueColumns& columns, const TileShape& shape,
                            cudaStream_t stream) {
  const bool from_float = columns.queue_type == ElementType::kFloat, to_float = tile_type == ElementType::kFloat;
  if (columns.queue_type == ElementType::kDouble || tile_type == ElementType::kDouble || shape.segment_size % 8 != 0) {
    return cudaErrorInvalidValue;
  }
  if (from_float && to_float) return pack<float, float>(tile, columns, shape, stream);
  if (from_float) return pack<float, __nv_bfloat16>(tile, columns, shape, stream);
  if (to_float) return pack<__nv_bfloat16, float>(tile, columns, shape, stream);
  return pack<__nv_bfloat16, __nv_bfloat16>(tile, columns, shape, stream);
}

cudaError_t add_products(const AddedProducts& added, cudaStream_t stream) {
  const int64_t blocks = added.batch * added.rows;
  if (blocks > INT32_MAX || added.segments < 1) return cudaErrorInvalidValue;
  if (blocks * added.size == 0) return cudaSuccess;
  return IKEM_LAUNCH(add_products_kernel, dim3(static_cast<unsigned>(blocks)), dim3(Traits::kAddThreads), 0, stream,
                     added);
}

}  // namespace ikem_fast::cuda
