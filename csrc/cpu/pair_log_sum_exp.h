// Log-sum-exps of similarities and of their products on the CPU, see csrc/ops/pair_log_sum_exp.cpp.
//
// The kernel goes through the queues in tiles of columns and, within a tile, through blocks of rows, so that the
// similarities of a block stay in the cache. An item of work is one chunk of tiles and one chunk of rows. Similarities
// have a channel each: first the A of x, then the U of y. "Left" channels are those with a log-sum-exp of their own and
// a gradient: all of x without y, those of y otherwise. Their partners are the channels of x, without y only the later
// ones.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace ikem_fast::cpu {

enum class MatrixElement { kFloat, kDouble, kBFloat16 };

// A similarity in the running for the largest ones, with a row of `mined` values.
template <typename Real>
struct Neighbour {
  Real value;
  int32_t mined_row;
  int64_t position;
};

struct PairLogSumExp {
  MatrixElement element;        // of x and y
  MatrixElement queue_element;  // of the queues: the same, or kFloat beside bfloat16 rows
  int64_t num_x = 0;            // A
  int64_t num_y = 0;            // U, 0 without y
  int64_t num_rows = 0;         // N
  int64_t size = 0;             // D
  int64_t y_size = 0;           // E
  int64_t num_columns = 0;      // K
  int64_t topk = 0;
  double scale = 0;
  const void* x = nullptr;  // (A, N, x_stride), dense; bfloat16 rows of odd size end with a zero
  int64_t x_stride = 0;
  const void* y = nullptr;  // (U, N, y_stride), alike
  int64_t y_stride = 0;
  const void* queue = nullptr;  // (A, D, K)
  int64_t queue_strides[3] = {};
  const void* y_queue = nullptr;  // (E, K)
  int64_t y_queue_strides[2] = {};

  int64_t tile = 0;       // columns
  int64_t row_block = 0;  // rows whose similarities are there at once
  int64_t column_chunks = 1;
  int64_t row_chunks = 1;

  // Per chunk of columns.
  double* partial = nullptr;     // (column_chunks, num_sums, N)
  int64_t most_neighbours = 0;   // of a chunk
  void* neighbours = nullptr;    // (column_chunks, A, N, most_neighbours) Neighbour<Real>
  void* mined_values = nullptr;  // (column_chunks, A, N, most_neighbours, num_mined) Real
  // Forward.
  void* single = nullptr;            // (num_left, N) Real, written by the forward pass and read by the backward pass
  void* pair = nullptr;              // (num_pairs, N) Real, alike
  int64_t* positions = nullptr;      // (A, N, topk)
  void* mined = nullptr;             // (A, N, topk, num_mined) Real
  // Backward.
  const void* single_gradient = nullptr;       // as single
  const void* pair_gradient = nullptr;         // as pair
  const void* mined_gradient = nullptr;        // as mined
  const int64_t* mined_order = nullptr;        // (N, A * topk) rows a * topk + i of mined, by position
  void* gradient = nullptr;                    // (column_chunks, num_left, N, left_size) Real

  bool with_y() const { return num_y > 0; }
  int64_t num_channels() const { return num_x + num_y; }
  int64_t num_left() const { return with_y() ? num_y : num_x; }
  int64_t left_channel(int64_t left) const { return with_y() ? num_x + left : left; }
  int64_t left_size() const { return with_y() ? y_size : size; }
  int64_t first_partner(int64_t left) const { return with_y() ? 0 : left + 1; }
  int64_t num_pairs() const { return with_y() ? num_x * num_y : num_x * (num_x - 1) / 2; }
  int64_t pair_row(int64_t left, int64_t partner) const {
    return with_y() ? partner * num_y + left : left * (2 * num_x - left - 1) / 2 + partner - left - 1;
  }
  int64_t num_sums() const { return num_left() + num_pairs(); }
  int64_t num_mined() const { return with_y() ? 1 + num_y : num_x; }
  // The channel of a value of `mined` at the neighbours of x's channel `of`.
  int64_t mined_channel(int64_t of, int64_t index) const {
    return !with_y() ? index : index == 0 ? of : num_x + index - 1;
  }
  int64_t num_tiles() const { return (num_columns + tile - 1) / tile; }
  int64_t num_items() const { return column_chunks * row_chunks; }
  int64_t first_tile(int64_t chunk) const { return chunk * num_tiles() / column_chunks; }
  int64_t first_row(int64_t chunk) const { return chunk * num_rows / row_chunks; }
};

// Items [begin, end) of the forward pass; then the chunks' results of rows [begin, end) are joined.
IKEM_DECLARE_CPU(void, pair_log_sum_exp, const PairLogSumExp& parameters, int64_t begin, int64_t end)
IKEM_DECLARE_CPU(void, join_pair_log_sum_exp, const PairLogSumExp& parameters, int64_t begin, int64_t end)

// Items [begin, end) of the backward pass: each chunk of columns has its own part of the gradient.
IKEM_DECLARE_CPU(void, pair_log_sum_exp_backward, const PairLogSumExp& parameters, int64_t begin, int64_t end)

}  // namespace ikem_fast::cpu
