// Products of tiles in shared memory, warp by warp: bfloat16 by tensor cores, float by fused multiply-adds. Both sum in
// float and leave the sums in the same places of the same lanes, so that what comes before and after is written once.
#pragma once

#include <type_traits>

#include "cuda/kernel.h"

namespace ikem_fast::cuda {

// How a factor's element of row or column i and depth k lies in memory.
enum class TileOrder {
  kDepthLast,   // at i * stride + k
  kDepthFirst,  // at k * stride + i
};

// The least stride from `columns` on that lets the rows of a tile be read without conflicts and with 16-byte alignment.
template <typename T>
__host__ __device__ constexpr int tile_stride(int columns) {
  constexpr int kVector = 16 / sizeof(T);
  return ((columns + kVector - 1) / kVector | 1) * kVector;
}

// Sums of a warp: kM x kN fragments of 16 rows and 8 columns. Element q of fragment (i, j) is in row
// 16 i + accumulator_row(q), column 8 j + accumulator_column(q); q and q + 1 are neighbours in a row for even q.
template <int kM, int kN>
using Accumulators = float[kM][kN][4];

__device__ __forceinline__ int accumulator_row(int q) { return static_cast<int>(threadIdx.x) % 32 / 4 + 8 * (q / 2); }
__device__ __forceinline__ int accumulator_column(int q) { return 2 * (static_cast<int>(threadIdx.x) % 4) + q % 2; }

namespace tile_product_detail {

// What tensor cores take of the left factor's 16 rows and 16 of depth.
template <TileOrder kOrder>
__device__ __forceinline__ void load_left(uint32_t (&fragment)[4], const __nv_bfloat16* tile, int stride) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (kOrder == TileOrder::kDepthLast) {
    ldmatrix_x4(fragment, tile + lane % 16 * stride + lane / 16 * 8);
  } else {
    ldmatrix_x4_trans(fragment, tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
  }
}

// Of 8 columns of the right factor.
template <TileOrder kOrder>
__device__ __forceinline__ void load_right(uint32_t (&fragment)[2], const __nv_bfloat16* tile, int stride) {
  const int lane = static_cast<int>(threadIdx.x) % 16;  // the other lanes' addresses are not looked at
  if constexpr (kOrder == TileOrder::kDepthLast) {
    ldmatrix_x2(fragment, tile + lane % 8 * stride + lane / 8 * 8);
  } else {
    ldmatrix_x2_trans(fragment, tile + lane * stride);
  }
}

// Of 16 columns.
template <TileOrder kOrder>
__device__ __forceinline__ void load_right(uint32_t (&fragments)[4], const __nv_bfloat16* tile, int stride) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (kOrder == TileOrder::kDepthLast) {
    ldmatrix_x4(fragments, tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
  } else {
    ldmatrix_x4_trans(fragments, tile + lane % 16 * stride + lane / 16 * 8);
  }
}

// Four of depth of one row or column.
template <TileOrder kOrder>
__device__ __forceinline__ void load_depths(float (&values)[4], const float* tile, int stride, int i) {
  if constexpr (kOrder == TileOrder::kDepthLast) {
    const float4 four = *reinterpret_cast<const float4*>(tile + i * stride);
    values[0] = four.x;
    values[1] = four.y;
    values[2] = four.z;
    values[3] = four.w;
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) values[k] = tile[k * stride + i];
  }
}

}  // namespace tile_product_detail

// sums(m, n) += sum over k < depth of left(m, k) * right(k, n), by all lanes of a warp, for 16 kM rows and 8 kN columns.
// depth is a multiple of 16 and the factors hold as much; strides are such as tile_stride() gives, the tiles' addresses
// multiples of 16 bytes.
template <TileOrder kLeft, TileOrder kRight, int kM, int kN>
__device__ __forceinline__ void add_tile_product(Accumulators<kM, kN>& sums, const __nv_bfloat16* left, int left_stride,
                                                 const __nv_bfloat16* right, int right_stride, int depth) {
  namespace detail = tile_product_detail;
  const int left_row = kLeft == TileOrder::kDepthLast ? left_stride : 1;
  const int left_depth = kLeft == TileOrder::kDepthLast ? 1 : left_stride;
  const int right_column = kRight == TileOrder::kDepthLast ? right_stride : 1;
  const int right_depth = kRight == TileOrder::kDepthLast ? 1 : right_stride;
  for (int k = 0; k < depth; k += 16) {
    uint32_t a[kM][4];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      detail::load_left<kLeft>(a[i], left + k * left_depth + 16 * i * left_row, left_stride);
    }
#pragma unroll
    for (int j = 0; j < kN; j += 2) {
      const __nv_bfloat16* here = right + k * right_depth + 8 * j * right_column;
      if (j + 1 < kN) {
        uint32_t b[4];
        detail::load_right<kRight>(b, here, right_stride);
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          mma_m16n8k16_bf16(sums[i][j], a[i], first);
          mma_m16n8k16_bf16(sums[i][j + 1 < kN ? j + 1 : j], a[i], second);
        }
      } else {
        uint32_t b[2];
        detail::load_right<kRight>(b, here, right_stride);
#pragma unroll
        for (int i = 0; i < kM; ++i) mma_m16n8k16_bf16(sums[i][j], a[i], b);
      }
    }
  }
}

template <TileOrder kLeft, TileOrder kRight, int kM, int kN>
__device__ __forceinline__ void add_tile_product(Accumulators<kM, kN>& sums, const float* left, int left_stride,
                                                 const float* right, int right_stride, int depth) {
  namespace detail = tile_product_detail;
  const int left_depth = kLeft == TileOrder::kDepthLast ? 1 : left_stride;
  const int right_depth = kRight == TileOrder::kDepthLast ? 1 : right_stride;
  const int row = accumulator_row(0), column = accumulator_column(0);
  for (int k = 0; k < depth; k += 4) {
    float a[kM][2][4];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        detail::load_depths<kLeft>(a[i][half], left + k * left_depth, left_stride, 16 * i + 8 * half + row);
      }
    }
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float b[4];
        detail::load_depths<kRight>(b, right + k * right_depth, right_stride, 8 * j + side + column);
#pragma unroll
        for (int i = 0; i < kM; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int d = 0; d < 4; ++d) {
              sums[i][j][2 * half + side] = fmaf(a[i][half][d], b[d], sums[i][j][2 * half + side]);
            }
          }
        }
      }
    }
  }
}

}  // namespace ikem_fast::cuda
