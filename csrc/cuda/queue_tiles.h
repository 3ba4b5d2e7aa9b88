// Tiles of a queue on CUDA: the launchers, on raw pointers.
//
// A tile is `segments` times `segment_size` columns of the queue, and whatever belongs to its columns lies segment by
// segment: the library multiplies segments as matrices of a batch, so that sums over a tile's columns, which are long
// and have few rows, come in as many parts as fill the device. Sizes of segments are multiples of 8. Columns past the
// queue's end are zero in the tile and left out by the kernels.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "cuda/element_type.h"

namespace ikem_fast::cuda {

struct QueueColumns {
  const void* queue;  // (B, D, K)
  ElementType queue_type;
  int64_t strides[3];
  int64_t queue_size;  // K
  int64_t start;       // first column of the tile
};

struct TileShape {
  int64_t batch;     // B
  int rows;          // R
  int segments;      // of a tile
  int segment_size;  // columns of a segment
};

// tile (B, segments, R, segment size) with R = D: the queue's columns from `start` on, converted to tile_type, zeros
// after its end. Types are float and bfloat16.
cudaError_t pack_queue_tile(void* tile, ElementType tile_type, const QueueColumns& columns, const TileShape& shape,
                            cudaStream_t stream);

// sums (B, R, D) = scale / divisor * (factor * sums + products), products (B, segments, R, D) added up over segments;
// factor and divisor (B, R) may be null, and sums count as zero where `first`.
struct AddedProducts {
  float* sums;
  const float* products;
  const float* factor;
  const float* divisor;
  int64_t batch, size;
  int rows;
  int segments;
  bool first;
  float scale;
};

cudaError_t add_products(const AddedProducts& added, cudaStream_t stream);

}  // namespace ikem_fast::cuda
