// One tile of pair_log_sum_exp on CUDA: the launchers, on raw pointers.
//
// Streams 0 ... A - 1 are s_a = x_a * queue_a. Without y, singles are of all streams and pairs of all two of them, in
// the order of an upper triangle. With y, streams A ... A + U - 1 are g_u = y_u * y_queue, singles are of those alone,
// and pair a * U + u is of s_a and g_u. Mined are the similarities of all streams, or s_a and every g_u, where s_a is largest.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "cuda/element_type.h"

namespace ikem_fast::cuda {

constexpr int kMaxPairStreams = 32;

struct PairTile {
  const float* x_similarity;  // (A, segments, N, segment size)
  const float* y_similarity;  // (segments, U, N, segment size)
  int num_x;                  // A
  int num_y;                  // U, 0 without y
  int num_rows;               // N
  int segments;
  int segment_size;  // a multiple of 8
  float scale;
  int64_t start;    // first column of the tile in the queue; tiles come in order
  int num_columns;  // of the tile that are in the queue, at least 1

  __host__ __device__ int num_streams() const { return num_x + num_y; }
  __host__ __device__ int num_singles() const { return num_y ? num_y : num_x; }
  __host__ __device__ int num_pairs() const { return num_y ? num_x * num_y : num_x * (num_x - 1) / 2; }
  __host__ __device__ int num_mined() const { return num_y ? 1 + num_y : num_x; }
};

// Running statistics in `slots` parts, each over its own share of the columns of every tile.
struct PairStatistics {
  float* sums;         // (slots, singles and pairs, N, 2): maximum in units of log 2, sum relative to it
  int64_t* positions;  // (slots, A, N) of the largest similarity, -1 where the slot has no columns; null: no mining
  float* mined;        // (slots, A, N, mined)
  int slots;
};

// Adds the tile to the statistics; its start being 0, they need not hold anything.
cudaError_t pair_statistics_tile(const PairTile& tile, const PairStatistics& statistics, cudaStream_t stream);

// Brings the slots together: single (singles, N), pair (pairs, N) and, unless null, neighbours (A, N) and mined
// (A, N, mined). Of `tile` only the numbers of streams and rows are read.
cudaError_t pair_statistics_finish(float* single, float* pair, int64_t* neighbours, float* mined,
                                   const PairStatistics& statistics, const PairTile& tile, cudaStream_t stream);

// The topk largest similarities of every row so far, largest first, of equal ones the lowest position.
struct PairNeighbours {
  int64_t* positions;  // (A, N, topk)
  float* mined;        // (A, N, topk, mined)
};

// Merges the tile's columns with the neighbours `before` it into those `after` it, which lie elsewhere. As many as there
// are columns before the tile count of `before`. scratch (A, N, topk).
cudaError_t pair_neighbours_tile(const PairTile& tile, int64_t topk, const PairNeighbours& before,
                                 const PairNeighbours& after, int64_t* scratch, cudaStream_t stream);

// What the gradient of a tile is made of: (singles, N), (pairs, N), (A, N, topk), and the gradients of these.
struct PairGradient {
  const float* single;
  const float* pair;
  const int64_t* neighbours;
  const float* single_gradient;
  const float* pair_gradient;
  const float* mined_gradient;  // (A, N, topk, mined)
  int64_t topk;
};

// Writes the gradient of the similarities of x, or of y where there is y, in their layout, as float or bfloat16; zeros
// past the queue's end.
cudaError_t pair_gradient_tile(void* gradient, ElementType gradient_type, const PairGradient& given,
                               const PairTile& tile, cudaStream_t stream);

}  // namespace ikem_fast::cuda
