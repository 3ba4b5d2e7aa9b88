#include "cuda/queue_log_sum_exp.h"

#include "cuda/block_reduce.h"
#include "cuda/kernel.h"
#include "cuda/real_types.h"

namespace ikem_fast::cuda {

namespace {

constexpr int kFours = 8;  // groups of four columns that a thread keeps in registers
constexpr float kLog2OfE = 1.44269504f;

// A block per row, which it reads once.
template <typename Share, int kThreads>
__global__ void __launch_bounds__(kThreads)
    queue_log_sum_exp_tile_kernel(QueueLogSumExpTile tile, TileShape shape) {
  constexpr int kWarps = kThreads / 32;
  IKEM_SHARED(float, warp_maxima, [kWarps]);
  IKEM_SHARED(float, warp_sums, [kWarps]);
  const int row = static_cast<int>(blockIdx.x);
  const int64_t segment_stride = static_cast<int64_t>(shape.rows) * shape.segment_size;
  const int64_t first_of_row = row / shape.rows * (shape.segments * segment_stride) +
                               static_cast<int64_t>(row % shape.rows) * shape.segment_size;
  const auto offset = [&](int column) {
    return first_of_row + column / shape.segment_size * segment_stride + column % shape.segment_size;
  };
  const int width = shape.segments * shape.segment_size;

  float values[kFours][4];
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    const int column = 4 * (i * kThreads + threadIdx.x);
    if (column >= width) continue;
    const Four<float> four = *reinterpret_cast<const Four<float>*>(tile.similarity + offset(column));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      values[i][k] = column + k < tile.num_columns ? four.values[k] : -INFINITY;
      largest = fmaxf(largest, values[i][k]);
    }
  }
  largest = reduce_block<kWarps>(largest, warp_maxima, [](float a, float b) { return fmaxf(a, b); });

  const bool is_first = tile.start == 0;
  const float maximum_before = is_first ? tile.positive[row] : tile.maximum[row];
  const float sum_before = is_first ? 1.0f : tile.sum[row];
  const float maximum = fmaxf(maximum_before, __fmul_rn(largest, tile.scale));
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    const int column = 4 * (i * kThreads + threadIdx.x);
    if (column >= width) continue;
    float shares[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      // Rounded as the maximum was, so that the largest difference is 0 however large the logits are.
      shares[k] = exp2_approximate((__fmul_rn(values[i][k], tile.scale) - maximum) * kLog2OfE);
      sum += shares[k];
    }
    if (tile.shares) store_four(static_cast<Share*>(tile.shares) + offset(column), shares);
  }
  sum = reduce_block<kWarps>(sum, warp_sums, [](float a, float b) { return a + b; });
  if (threadIdx.x != 0) return;
  const float factor = exp2_approximate((maximum_before - maximum) * kLog2OfE);
  sum = fmaf(sum_before, factor, sum);
  const float best = __fmul_rn(largest, tile.scale);
  tile.maximum[row] = maximum;
  tile.sum[row] = sum;
  tile.factor[row] = factor;
  tile.log_sum_exp[row] = maximum + logf(sum);
  tile.best[row] = is_first ? best : fmaxf(best, tile.best[row]);
}

template <typename Share, int kThreads>
cudaError_t launch_tile(const QueueLogSumExpTile& tile, const TileShape& shape, cudaStream_t stream) {
  return IKEM_LAUNCH((queue_log_sum_exp_tile_kernel<Share, kThreads>),
                     dim3(static_cast<unsigned>(shape.batch * shape.rows)), dim3(kThreads), 0, stream, tile, shape);
}

template <typename Share>
cudaError_t launch_tile_of(const QueueLogSumExpTile& tile, const TileShape& shape, cudaStream_t stream) {
  const int64_t width = static_cast<int64_t>(shape.segments) * shape.segment_size;
  constexpr int kColumnsPerThread = 4 * kFours;
  if (width <= 128 * kColumnsPerThread) return launch_tile<Share, 128>(tile, shape, stream);
  if (width <= 256 * kColumnsPerThread) return launch_tile<Share, 256>(tile, shape, stream);
  return launch_tile<Share, kMaxSoftmaxColumns / kColumnsPerThread>(tile, shape, stream);
}

}  // namespace

cudaError_t queue_log_sum_exp_tile(const QueueLogSumExpTile& tile, const TileShape& shape, cudaStream_t stream) {
  const int64_t width = static_cast<int64_t>(shape.segments) * shape.segment_size;
  if (width > kMaxSoftmaxColumns || shape.segment_size % 8 != 0 || tile.num_columns < 1 || tile.num_columns > width ||
      shape.batch * shape.rows > INT32_MAX || tile.share_type == ElementType::kDouble) {
    return cudaErrorInvalidValue;
  }
  if (shape.batch * shape.rows == 0) return cudaSuccess;
  return tile.share_type == ElementType::kFloat ? launch_tile_of<float>(tile, shape, stream)
                                                : launch_tile_of<__nv_bfloat16>(tile, shape, stream);
}

}  // namespace ikem_fast::cuda
