#include "cuda/pair_log_sum_exp.h"

#include <float.h>

#include "cuda/block_reduce.h"
#include "cuda/kernel.h"
#include "cuda/real_types.h"

namespace ikem_fast::cuda {

namespace {

struct Traits {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kPerWarp = 4;             // statistics whose sums a warp keeps in registers
  static constexpr int kPerBlock = kPerWarp * kWarps;
  static constexpr int kColumnStep = 128;        // four columns for each lane
  static constexpr int kMaxStageColumns = 1024;  // of all streams in shared memory at a time
  static constexpr int kStageBytes = 32 * 1024;
  static constexpr int kWantedBlocks = 1024;
};

constexpr float kLogOf2 = 0.693147181f;
// Stands for the maximum of nothing: finite, so that differences of maxima are no NaN.
constexpr float kLowest = -FLT_MAX;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

float in_units_of_log2(float scale) { return static_cast<float>(static_cast<double>(scale) * 1.4426950408889634); }

// Four columns of a stream's row, from a column that is a multiple of four.
__device__ __forceinline__ const float* similarity_at(const PairTile& tile, int stream, int row, int column) {
  const int segment = column / tile.segment_size, place = column % tile.segment_size;
  const int64_t matrix = static_cast<int64_t>(tile.num_rows) * tile.segment_size;
  const float* of_stream = stream < tile.num_x
                               ? tile.x_similarity + (static_cast<int64_t>(stream) * tile.segments + segment) * matrix
                               : tile.y_similarity +
                                     (static_cast<int64_t>(segment) * tile.num_y + stream - tile.num_x) * matrix;
  return of_stream + static_cast<int64_t>(row) * tile.segment_size + place;
}

// stage[stream][column] = similarity of the columns [begin, begin + count) of one row; more up to four may be loaded.
__device__ __forceinline__ void load_stage(float* stage, int stage_columns, const PairTile& tile, int row, int begin,
                                           int count) {
  const int fours = (count + 3) / 4;
  for (int i = threadIdx.x; i < tile.num_streams() * fours; i += Traits::kThreads) {
    const int stream = i / fours, column = 4 * (i % fours);
    *reinterpret_cast<Four<float>*>(stage + stream * stage_columns + column) =
        *reinterpret_cast<const Four<float>*>(similarity_at(tile, stream, row, begin + column));
  }
}

struct Streams {
  int first, second;  // second is -1 for a single
};

// Those of statistic number `index`: singles, then pairs.
__device__ __forceinline__ Streams streams_of(const PairTile& tile, int index) {
  if (index < tile.num_singles()) return {tile.num_y ? tile.num_x + index : index, -1};
  index -= tile.num_singles();
  if (tile.num_y) return {index / tile.num_y, tile.num_x + index % tile.num_y};
  int first = 0;
  for (int in_row = tile.num_x - 1; index >= in_row; --in_row, ++first) index -= in_row;
  return {first, first + 1 + index};
}

// Number of the pair of streams first < second without y.
__device__ __forceinline__ int pair_of(int num_x, int first, int second) {
  return first * (2 * num_x - first - 1) / 2 + second - first - 1;
}

// Logits are products that were rounded: a maximum that is not one of them would be off by more than exp can bear where
// they are huge.
struct RunningSum {
  float maximum, sum;

  __device__ __forceinline__ void add(const float (&logits)[4]) {
    const float largest = fmaxf(fmaxf(logits[0], logits[1]), fmaxf(logits[2], logits[3]));
    if (largest > maximum) {
      sum *= exp2_approximate(maximum - largest);
      maximum = largest;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) sum += exp2_approximate(logits[k] - maximum);
  }
};

__device__ __forceinline__ RunningSum join(const RunningSum& a, const RunningSum& b) {
  const float maximum = fmaxf(a.maximum, b.maximum);
  return {maximum, a.sum * exp2_approximate(a.maximum - maximum) + b.sum * exp2_approximate(b.maximum - maximum)};
}

__device__ __forceinline__ RunningSum join_warp(RunningSum value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value = join(value, {__shfl_xor_sync(kAllLanes, value.maximum, offset),
                         __shfl_xor_sync(kAllLanes, value.sum, offset)});
  }
  return value;
}

// Orders as floats do, with equal zeros; NaN comes before or after all numbers.
__device__ __forceinline__ uint32_t ordered(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The larger value has the larger key, of equal values the lower position; 0 is no key.
__device__ __forceinline__ uint64_t candidate(float value, int position) {
  return static_cast<uint64_t>(ordered(value)) << 32 | ~static_cast<uint32_t>(position);
}
__device__ __forceinline__ int position_of(uint64_t candidate) {
  return static_cast<int>(~static_cast<uint32_t>(candidate));
}
__device__ __forceinline__ uint32_t value_of(uint64_t candidate) { return static_cast<uint32_t>(candidate >> 32); }

__device__ __forceinline__ uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

// Stream number `index` of those mined at the neighbours of s_a.
__device__ __forceinline__ int mined_stream(const PairTile& tile, int a, int index) {
  if (!tile.num_y) return index;
  return index == 0 ? a : tile.num_x + index - 1;
}
// Where s_a itself is among them.
__device__ __forceinline__ int own_index(const PairTile& tile, int a) { return tile.num_y ? 0 : a; }

// Writes the slot's best similarity of s_a and what is mined there, if the tile's, at `column`, is better. By one warp.
__device__ __forceinline__ void keep_best(const PairStatistics& statistics, const PairTile& tile, int slot, int a,
                                          int row, uint64_t best) {
  const int lane = threadIdx.x % 32;
  const int64_t place = (static_cast<int64_t>(slot) * tile.num_x + a) * tile.num_rows + row;
  float* mined = statistics.mined + place * tile.num_mined();
  const int64_t before = tile.start == 0 ? -1 : statistics.positions[place];
  bool is_better = best != 0;
  if (is_better && before >= 0) is_better = value_of(best) > ordered(mined[own_index(tile, a)]);
  __syncwarp();
  if (is_better) {
    const int column = position_of(best);
    for (int i = lane; i < tile.num_mined(); i += 32) {
      mined[i] = *similarity_at(tile, mined_stream(tile, a, i), row, column);
    }
  }
  if (lane == 0 && (is_better || tile.start == 0)) {
    statistics.positions[place] = is_better ? tile.start + position_of(best) : -1;
  }
}

// A block takes one row, a slot's columns of the tile and up to kPerBlock statistics, each of which is one warp's: it
// goes through the columns, which are in shared memory, with four in each lane.
__global__ void __launch_bounds__(Traits::kThreads)
    pair_statistics_kernel(PairTile tile, PairStatistics statistics, float scale_in_log2, int slot_columns,
                           int stage_columns) {
  IKEM_DYNAMIC_SHARED(float, stage);
  const int block = static_cast<int>(blockIdx.x);
  const int row = block % tile.num_rows;
  const int slot = block / tile.num_rows % statistics.slots, group = block / tile.num_rows / statistics.slots;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_sums = tile.num_singles() + tile.num_pairs();
  const int num_statistics = num_sums + (statistics.positions ? tile.num_x : 0);
  const int slot_begin = slot * slot_columns;
  const int slot_end = slot_begin + slot_columns < tile.num_columns ? slot_begin + slot_columns : tile.num_columns;

  RunningSum sums[Traits::kPerWarp];
  uint64_t best[Traits::kPerWarp];
#pragma unroll
  for (int q = 0; q < Traits::kPerWarp; ++q) {
    sums[q] = {kLowest, 0.0f};
    best[q] = 0;
  }
  for (int begin = slot_begin; begin < slot_end; begin += stage_columns) {
    const int count = slot_end - begin < stage_columns ? slot_end - begin : stage_columns;
    __syncthreads();
    load_stage(stage, stage_columns, tile, row, begin, count);
    __syncthreads();
#pragma unroll
    for (int q = 0; q < Traits::kPerWarp; ++q) {
      const int index = group * Traits::kPerBlock + q * Traits::kWarps + warp;
      if (index >= num_statistics) continue;
      if (index >= num_sums) {
        const float* values = stage + (index - num_sums) * stage_columns;
        float largest = 0;
        int position = -1;
        for (int column = 4 * lane; column < count; column += Traits::kColumnStep) {
          const Four<float> four = *reinterpret_cast<const Four<float>*>(values + column);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            if (column + k < count && (position < 0 || four.values[k] > largest)) {
              largest = four.values[k];
              position = begin + column + k;
            }
          }
        }
        if (position >= 0) best[q] = larger(best[q], candidate(largest, position));
        continue;
      }
      const Streams streams = streams_of(tile, index);
      const float* first = stage + streams.first * stage_columns;
      const float* second = stage + streams.second * stage_columns;
      for (int column = 4 * lane; column < count; column += Traits::kColumnStep) {
        float logits[4];
        const Four<float> one = *reinterpret_cast<const Four<float>*>(first + column);
#pragma unroll
        for (int k = 0; k < 4; ++k) logits[k] = __fmul_rn(one.values[k], scale_in_log2);
        if (streams.second >= 0) {
          const Four<float> other = *reinterpret_cast<const Four<float>*>(second + column);
#pragma unroll
          for (int k = 0; k < 4; ++k) logits[k] = __fmul_rn(logits[k], other.values[k]);
        }
        if (column + 4 > count) {
#pragma unroll
          for (int k = 0; k < 4; ++k) logits[k] = column + k < count ? logits[k] : -INFINITY;
        }
        sums[q].add(logits);
      }
    }
  }
#pragma unroll
  for (int q = 0; q < Traits::kPerWarp; ++q) {
    const int index = group * Traits::kPerBlock + q * Traits::kWarps + warp;
    if (index >= num_statistics) continue;
    if (index >= num_sums) {
      keep_best(statistics, tile, slot, index - num_sums, row, reduce_warp(best[q], larger));
      continue;
    }
    RunningSum sum = join_warp(sums[q]);
    if (lane == 0) {
      float* running = statistics.sums + 2 * ((static_cast<int64_t>(slot) * num_sums + index) * tile.num_rows + row);
      if (tile.start > 0) sum = join({running[0], running[1]}, sum);
      running[0] = sum.maximum;
      running[1] = sum.sum;
    }
  }
}

// A thread per statistic and row.
__global__ void __launch_bounds__(Traits::kThreads)
    pair_finish_kernel(float* __restrict__ single, float* __restrict__ pair, int64_t* __restrict__ neighbours,
                       float* __restrict__ mined, PairStatistics statistics, PairTile tile) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * Traits::kThreads + threadIdx.x;
  const int64_t rows_of_streams = static_cast<int64_t>(tile.num_x) * tile.num_rows;
  const int64_t singles = static_cast<int64_t>(tile.num_singles()) * tile.num_rows;
  const int64_t sums = singles + static_cast<int64_t>(tile.num_pairs()) * tile.num_rows;
  if (i < sums) {
    RunningSum sum{kLowest, 0.0f};
    for (int slot = 0; slot < statistics.slots; ++slot) {
      const float* running = statistics.sums + 2 * (slot * sums + i);
      sum = join(sum, {running[0], running[1]});
    }
    (i < singles ? single[i] : pair[i - singles]) = (sum.maximum + log2f(sum.sum)) * kLogOf2;
    return;
  }
  const int64_t rows = rows_of_streams, place = i - sums;
  if (!neighbours || place >= rows) return;
  const int own = own_index(tile, static_cast<int>(place / tile.num_rows));
  int64_t best = 0;
  for (int slot = 1; slot < statistics.slots; ++slot) {
    const int64_t position = statistics.positions[slot * rows + place];
    if (position < 0) continue;
    const uint32_t value = ordered(statistics.mined[(slot * rows + place) * tile.num_mined() + own]);
    const uint32_t largest = ordered(statistics.mined[(best * rows + place) * tile.num_mined() + own]);
    const bool is_earlier = position < statistics.positions[best * rows + place];
    if (value > largest || (value == largest && is_earlier)) best = slot;
  }
  neighbours[place] = statistics.positions[best * rows + place];
  for (int m = 0; m < tile.num_mined(); ++m) {
    mined[place * tile.num_mined() + m] = statistics.mined[(best * rows + place) * tile.num_mined() + m];
  }
}

// A block per row of a stream. Takes the tile's largest candidates one after another, as long as they displace a
// neighbour from before, then merges both lists.
__global__ void __launch_bounds__(Traits::kThreads)
    pair_neighbours_kernel(PairTile tile, int64_t topk, PairNeighbours before, PairNeighbours after,
                           int64_t* __restrict__ scratch) {
  IKEM_SHARED(uint64_t, warp_candidates, [2][Traits::kWarps]);
  const int64_t list = blockIdx.x;
  const int row = static_cast<int>(blockIdx.x) % tile.num_rows;
  const int a = static_cast<int>(blockIdx.x) / tile.num_rows, own = own_index(tile, a), num_mined = tile.num_mined();
  const int64_t num_before = tile.start < topk ? tile.start : topk;
  const auto value_before = [&](int64_t i) { return ordered(before.mined[(list * topk + i) * num_mined + own]); };
  int64_t* chosen = scratch + list * topk;

  // This thread's largest candidate below `limit`.
  const auto next_candidate = [&](uint64_t limit) {
    uint64_t best = 0;
    for (int column = threadIdx.x; column < tile.num_columns; column += Traits::kThreads) {
      const uint64_t here = candidate(*similarity_at(tile, a, row, column), column);
      if (here < limit) best = larger(best, here);
    }
    return best;
  };
  uint64_t own_best = next_candidate(~uint64_t{0});
  int64_t num_chosen = 0;
  for (; num_chosen < topk; ++num_chosen) {
    const uint64_t best = reduce_block<Traits::kWarps>(own_best, warp_candidates[num_chosen % 2], larger);
    if (best == 0) break;
    // An equal value from before stays: its position is lower.
    const int64_t last = topk - 1 - num_chosen;
    if (last < num_before && value_of(best) <= value_before(last)) break;
    if (best == own_best) {
      chosen[num_chosen] = static_cast<int64_t>(best);
      own_best = next_candidate(best);
    }
  }
  __syncthreads();

  // A neighbour's new place: its own number and how many of the other list come first.
  for (int64_t i = threadIdx.x; i < num_before; i += Traits::kThreads) {
    const uint32_t value = value_before(i);
    int64_t low = 0, high = num_chosen;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (value_of(static_cast<uint64_t>(chosen[middle])) > value) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    if (i + low >= topk) continue;
    after.positions[list * topk + i + low] = before.positions[list * topk + i];
    for (int m = 0; m < num_mined; ++m) {
      after.mined[(list * topk + i + low) * num_mined + m] = before.mined[(list * topk + i) * num_mined + m];
    }
  }
  for (int64_t i = threadIdx.x; i < num_chosen; i += Traits::kThreads) {
    const uint64_t here = static_cast<uint64_t>(chosen[i]);
    int64_t low = 0, high = num_before;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (value_before(middle) >= value_of(here)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    if (i + low >= topk) continue;
    after.positions[list * topk + i + low] = tile.start + position_of(here);
    for (int m = 0; m < num_mined; ++m) {
      after.mined[(list * topk + i + low) * num_mined + m] =
          *similarity_at(tile, mined_stream(tile, a, m), row, position_of(here));
    }
  }
}

// exp of a logit less a log-sum-exp that it is part of; not above 1 where rounding huge logits says so.
__device__ __forceinline__ float share_of(float scaled, float other, float log_sum) {
  return exp2_approximate(fminf(fmaf(scaled, other, -log_sum), 0.0f));
}

// A block takes one row and some columns of all streams. A warp takes four columns a lane of one stream at a time, whose
// gradient it makes from all its partners.
template <typename Gradient>
__global__ void __launch_bounds__(Traits::kThreads)
    pair_gradient_kernel(Gradient* __restrict__ gradient, PairGradient given, PairTile tile, float scale_in_log2,
                         int block_columns, int stage_columns) {
  IKEM_DYNAMIC_SHARED(float, shared);
  const int num_out = tile.num_singles(), num_sums = num_out + tile.num_pairs(), num_mined = tile.num_mined();
  const int first_out = tile.num_y ? tile.num_x : 0;
  float* stage = shared;
  float* mined = stage + tile.num_streams() * stage_columns;  // gradients that come by way of mined similarities
  float* weights = mined + num_out * stage_columns;
  float* log_sums = weights + num_sums;
  const int row = static_cast<int>(blockIdx.x) % tile.num_rows;
  const int block_begin = static_cast<int>(blockIdx.x) / tile.num_rows * block_columns;
  const int width = tile.segments * tile.segment_size;
  const int block_end = block_begin + block_columns < width ? block_begin + block_columns : width;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < num_sums; i += Traits::kThreads) {
    const bool is_single = i < num_out;
    const int64_t place = static_cast<int64_t>(is_single ? i : i - num_out) * tile.num_rows + row;
    weights[i] = is_single ? given.single_gradient[place] : given.pair_gradient[place];
    log_sums[i] = (is_single ? given.single[place] : given.pair[place]) * 1.44269504f;
  }
  for (int begin = block_begin; begin < block_end; begin += stage_columns) {
    const int count = block_end - begin < stage_columns ? block_end - begin : stage_columns;
    __syncthreads();
    load_stage(stage, stage_columns, tile, row, begin, count);
    for (int i = threadIdx.x; i < num_out * stage_columns; i += Traits::kThreads) mined[i] = 0;
    // One stream's neighbours at a time: their positions differ, so that no two threads add to the same place.
    for (int b = 0; b < tile.num_x; ++b) {
      __syncthreads();
      const int64_t list = (static_cast<int64_t>(b) * tile.num_rows + row) * given.topk;
      for (int i = threadIdx.x; i < given.topk * num_out; i += Traits::kThreads) {
        const int64_t neighbour = list + i / num_out;
        const int out = i % num_out;
        const int64_t column = given.neighbours[neighbour] - tile.start - begin;
        if (column >= 0 && column < count) {
          const int64_t place = neighbour * num_mined + (tile.num_y ? 1 + out : out);
          mined[out * stage_columns + column] += given.mined_gradient[place];
        }
      }
    }
    __syncthreads();
    const int steps = (count + Traits::kColumnStep - 1) / Traits::kColumnStep;
    for (int item = warp; item < num_out * steps; item += Traits::kWarps) {
      const int out = item / steps, column = item % steps * Traits::kColumnStep + 4 * lane;
      if (column >= count) continue;
      const Four<float> own = *reinterpret_cast<const Four<float>*>(stage + (first_out + out) * stage_columns + column);
      float scaled[4], sums[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        scaled[k] = own.values[k] * scale_in_log2;
        sums[k] = weights[out] * share_of(scaled[k], 1.0f, log_sums[out]);
      }
      for (int partner = 0; partner < tile.num_x; ++partner) {
        if (!tile.num_y && partner == out) continue;
        const int pair = num_out + (tile.num_y        ? partner * tile.num_y + out
                                    : out < partner ? pair_of(tile.num_x, out, partner)
                                                    : pair_of(tile.num_x, partner, out));
        const float weight = weights[pair], log_sum = log_sums[pair];
        const Four<float> other = *reinterpret_cast<const Four<float>*>(stage + partner * stage_columns + column);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          sums[k] = fmaf(weight * other.values[k], share_of(scaled[k], other.values[k], log_sum), sums[k]);
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool is_inside = begin + column + k < tile.num_columns;
        sums[k] = is_inside ? fmaf(sums[k], tile.scale, mined[out * stage_columns + column + k]) : 0.0f;
      }
      const float* layout = tile.num_y ? tile.y_similarity : tile.x_similarity;
      store_four(gradient + (similarity_at(tile, first_out + out, row, begin + column) - layout), sums);
    }
  }
}

// Columns of every stream that fit into a stage with `vectors` values a column.
int stage_columns(int vectors) {
  const int most = Traits::kStageBytes / static_cast<int>(sizeof(float)) / vectors / Traits::kColumnStep *
                   Traits::kColumnStep;
  return most < Traits::kColumnStep ? Traits::kColumnStep : most < Traits::kMaxStageColumns ? most
                                                                                            : Traits::kMaxStageColumns;
}

bool is_valid(const PairTile& tile) {
  const int64_t width = static_cast<int64_t>(tile.segments) * tile.segment_size;
  return tile.num_x >= 1 && tile.num_y >= 0 && tile.num_streams() <= kMaxPairStreams && tile.segment_size % 8 == 0 &&
         tile.num_columns >= 1 && tile.num_columns <= width && width <= INT32_MAX / 2;
}

// Columns of each of `parts` parts of a tile, whole groups of four.
int64_t part_columns(const PairTile& tile, int64_t parts) {
  return divide_up(divide_up(static_cast<int64_t>(tile.segments) * tile.segment_size, parts), 4) * 4;
}

template <typename Gradient>
cudaError_t launch_gradient(void* gradient, const PairGradient& given, const PairTile& tile, cudaStream_t stream) {
  const int num_out = tile.num_singles(), num_sums = num_out + tile.num_pairs();
  const int columns = stage_columns(tile.num_streams() + num_out);
  const int64_t width = static_cast<int64_t>(tile.segments) * tile.segment_size;
  const int64_t stages = divide_up(width, columns);
  const int64_t wanted = divide_up(Traits::kWantedBlocks, tile.num_rows);
  const int64_t block_columns = divide_up(stages, wanted < stages ? wanted : stages) * columns;
  const int64_t blocks = divide_up(width, block_columns) * tile.num_rows;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const size_t bytes = sizeof(float) * ((tile.num_streams() + num_out) * columns + 2 * num_sums);
  return IKEM_LAUNCH((pair_gradient_kernel<Gradient>), dim3(static_cast<unsigned>(blocks)), dim3(Traits::kThreads),
                     bytes, stream, static_cast<Gradient*>(gradient), given, tile, in_units_of_log2(tile.scale),
                     static_cast<int>(block_columns), columns);
}

}  // namespace

cudaError_t pair_statistics_tile(const PairTile& tile, const PairStatistics& statistics, cudaStream_t stream) {
  if (!is_valid(tile) || statistics.slots < 1) return cudaErrorInvalidValue;
  const int num_statistics = tile.num_singles() + tile.num_pairs() + (statistics.positions ? tile.num_x : 0);
  const int64_t blocks =
      divide_up(num_statistics, Traits::kPerBlock) * statistics.slots * static_cast<int64_t>(tile.num_rows);
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const int columns = stage_columns(tile.num_streams());
  return IKEM_LAUNCH(pair_statistics_kernel, dim3(static_cast<unsigned>(blocks)), dim3(Traits::kThreads),
                     sizeof(float) * tile.num_streams() * columns, stream, tile, statistics,
                     in_units_of_log2(tile.scale), static_cast<int>(part_columns(tile, statistics.slots)), columns);
}

cudaError_t pair_statistics_finish(float* single, float* pair, int64_t* neighbours, float* mined,
                                   const PairStatistics& statistics, const PairTile& tile, cudaStream_t stream) {
  const int64_t threads =
      static_cast<int64_t>(tile.num_singles() + tile.num_pairs() + (neighbours ? tile.num_x : 0)) * tile.num_rows;
  if (threads == 0) return cudaSuccess;
  const int64_t blocks = divide_up(threads, Traits::kThreads);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return IKEM_LAUNCH(pair_finish_kernel, dim3(static_cast<unsigned>(blocks)), dim3(Traits::kThreads), 0, stream, single,
                     pair, neighbours, mined, statistics, tile);
}

cudaError_t pair_neighbours_tile(const PairTile& tile, int64_t topk, const PairNeighbours& before,
                                 const PairNeighbours& after, int64_t* scratch, cudaStream_t stream) {
  const int64_t blocks = static_cast<int64_t>(tile.num_x) * tile.num_rows;
  if (!is_valid(tile) || topk < 1 || blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  return IKEM_LAUNCH(pair_neighbours_kernel, dim3(static_cast<unsigned>(blocks)), dim3(Traits::kThreads), 0, stream,
                     tile, topk, before, after, scratch);
}

cudaError_t pair_gradient_tile(void* gradient, ElementType gradient_type, const PairGradient& given,
                               const PairTile& tile, cudaStream_t stream) {
  // Indices of neighbours times streams are 32 bits wide.
  if (!is_valid(tile) || gradient_type == ElementType::kDouble || given.topk > INT32_MAX / 2 / kMaxPairStreams) {
    return cudaErrorInvalidValue;
  }
  if (tile.num_rows == 0) return cudaSuccess;
  return gradient_type == ElementType::kFloat ? launch_gradient<float>(gradient, given, tile, stream)
                                              : launch_gradient<__nv_bfloat16>(gradient, given, tile, stream);
}

}  // namespace ikem_fast::cuda
