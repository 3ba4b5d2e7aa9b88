// One tile of queue_log_sum_exp on CUDA: the launcher, on raw pointers.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "cuda/queue_tiles.h"

namespace ikem_fast::cuda {

// Tiles come in order, the first with start 0. Everything is (B, R) but what belongs to a tile's columns.
struct QueueLogSumExpTile {
  const float* similarity;  // (B, segments, R, segment size)
  const float* positive;    // logits that take part, scaled
  float scale;
  int64_t start;        // first column of the tile
  int num_columns;      // of the tile that are in the queue, at least 1
  void* shares;         // like similarity, exp(scale * similarity - maximum), zeros past the queue's end; may be null
  ElementType share_type;  // float or bfloat16
  float* maximum;       // running
  float* sum;           // running, relative to the maximum
  float* factor;        // turns sums relative to the maximum before this tile into such relative to the one after it
  float* log_sum_exp;   // of the positive and all columns up to here
  float* best;          // largest scale * similarity up to here
};

// Most columns of a tile.
constexpr int kMaxSoftmaxColumns = 32768;

// cudaErrorInvalidValue for wider tiles.
cudaError_t queue_log_sum_exp_tile(const QueueLogSumExpTile& tile, const TileShape& shape, cudaStream_t stream);

}  // namespace ikem_fast::cuda
