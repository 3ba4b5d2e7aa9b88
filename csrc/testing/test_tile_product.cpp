// TEST-ONLY: products of tiles in shared memory against plain loops in double, in every order of the factors.
// Usage: test_tile_product [SEEDS [FILE]]. One translation unit: it includes the header, or a copy with a planted bug.
#ifndef KERNEL_SOURCE
#define KERNEL_SOURCE "cuda/tile_product.h"
#endif
#include KERNEL_SOURCE

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "testing/device_buffer.h"
#include "testing/kernel_test.h"
#include "testing/values.h"

namespace {

using ikem_fast::cuda::Accumulators;
using ikem_fast::cuda::TileOrder;

// Each of two warps takes half of the depth.
template <typename T, TileOrder kLeft, TileOrder kRight, int kM, int kN>
__global__ void tile_product_kernel(float* sums, const T* left, int left_size, int left_stride, const T* right,
                                    int right_size, int right_stride, int depth) {
  IKEM_DYNAMIC_SHARED(T, shared);
  for (int i = threadIdx.x; i < left_size; i += 64) shared[i] = left[i];
  for (int i = threadIdx.x; i < right_size; i += 64) shared[left_size + i] = right[i];
  __syncthreads();
  const int warp = threadIdx.x / 32, begin = warp * (depth / 2);
  Accumulators<kM, kN> values;
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kN; ++j) {
      for (int q = 0; q < 4; ++q) values[i][j][q] = 1;
    }
  }
  ikem_fast::cuda::add_tile_product<kLeft, kRight>(
      values, shared + begin * (kLeft == TileOrder::kDepthLast ? 1 : left_stride), left_stride,
      shared + left_size + begin * (kRight == TileOrder::kDepthLast ? 1 : right_stride), right_stride, depth / 2);
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kN; ++j) {
      for (int q = 0; q < 4; ++q) {
        const int row = 16 * i + ikem_fast::cuda::accumulator_row(q);
        sums[(warp * 16 * kM + row) * 8 * kN + 8 * j + ikem_fast::cuda::accumulator_column(q)] = values[i][j][q];
      }
    }
  }
}

template <typename T, TileOrder kLeft, TileOrder kRight, int kM, int kN>
void check(int depth) {
  constexpr int kRows = 16 * kM, kColumns = 8 * kN;
  std::mt19937 random(depth * 100 + kM * 10 + kN);
  std::normal_distribution<double> normal;
  const auto make = [&](TileOrder order, int size, int& stride) {
    const int lines = order == TileOrder::kDepthLast ? size : depth, length = size * depth / lines;
    stride = ikem_fast::cuda::tile_stride<T>(length);
    std::vector<T> values(lines * stride, rounded<T>(NAN));
    for (int line = 0; line < lines; ++line) {
      for (int i = 0; i < length; ++i) values[line * stride + i] = rounded<T>(normal(random));
    }
    return values;
  };
  const auto at = [](const std::vector<T>& values, TileOrder order, int stride, int i, int k) {
    return exact(values[order == TileOrder::kDepthLast ? i * stride + k : k * stride + i]);
  };
  int left_stride = 0, right_stride = 0;
  const std::vector<T> left = make(kLeft, kRows, left_stride), right = make(kRight, kColumns, right_stride);
  DeviceBuffer<T> left_buffer(left), right_buffer(right);
  DeviceBuffer<float> sums(2 * kRows * kColumns);
  const cudaError_t error = IKEM_LAUNCH(
      (tile_product_kernel<T, kLeft, kRight, kM, kN>), dim3(1), dim3(64), (left.size() + right.size()) * sizeof(T),
      nullptr, sums.data(), left_buffer.data(), static_cast<int>(left.size()), left_stride, right_buffer.data(),
      static_cast<int>(right.size()), right_stride, depth);
  const std::vector<float> got = sums.values();
  double worst = 0;
  for (int part = 0; part < 2; ++part) {
    for (int m = 0; m < kRows; ++m) {
      for (int n = 0; n < kColumns; ++n) {
        double wanted = 1, magnitude = 1;
        for (int k = part * depth / 2; k < (part + 1) * depth / 2; ++k) {
          const double term = at(left, kLeft, left_stride, m, k) * at(right, kRight, right_stride, n, k);
          wanted += term;
          magnitude += std::abs(term);
        }
        const double difference = std::abs(got[(part * kRows + m) * kColumns + n] - wanted) / magnitude;
        if (!(difference <= worst)) worst = difference;
      }
    }
  }
  if (error == cudaSuccess && worst <= 1e-6) return;
  ++failures;
  printf("FAILED %zu-byte product of %d x %d fragments over %d, orders %d and %d: error %d, differs by %g\n", sizeof(T),
         kM, kN, depth, static_cast<int>(kLeft), static_cast<int>(kRight), static_cast<int>(error), worst);
}

template <typename T, int kM, int kN>
void check_orders(int depth) {
  check<T, TileOrder::kDepthLast, TileOrder::kDepthLast, kM, kN>(depth);
  check<T, TileOrder::kDepthLast, TileOrder::kDepthFirst, kM, kN>(depth);
  check<T, TileOrder::kDepthFirst, TileOrder::kDepthLast, kM, kN>(depth);
  check<T, TileOrder::kDepthFirst, TileOrder::kDepthFirst, kM, kN>(depth);
}

}  // namespace

int main(int argc, char** argv) {
  return run_over_seeds("tile_product", argc, argv, [](int) {
    check_orders<__nv_bfloat16, 1, 1>(32);
    check_orders<__nv_bfloat16, 2, 3>(64);
    check_orders<__nv_bfloat16, 1, 4>(96);
    check_orders<float, 1, 1>(32);
    check_orders<float, 2, 3>(64);
  });
}
