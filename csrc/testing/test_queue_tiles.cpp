// TEST-ONLY: the CUDA kernels of queue_tiles against plain loops, over sizes, strides and thread schedules.
// Usage: test_queue_tiles [SEEDS [FILE]]. One translation unit: it includes the kernels, or a copy with a planted bug.
#ifndef KERNEL_SOURCE
#define KERNEL_SOURCE "cuda/queue_tiles.cu"
#endif
#include KERNEL_SOURCE

#include <cmath>
#include <random>
#include <vector>

#include "testing/device_buffer.h"
#include "testing/kernel_test.h"
#include "testing/values.h"

namespace {

using ikem_fast::cuda::AddedProducts;
using ikem_fast::cuda::ElementType;
using ikem_fast::cuda::QueueColumns;
using ikem_fast::cuda::TileShape;

template <typename T>
constexpr ElementType kType = sizeof(T) == 4 ? ElementType::kFloat : ElementType::kBFloat16;

// Columns of the queue lie `step` values apart, its rows in whole groups of four, the first `offset` values from the
// allocation's beginning.
template <typename From, typename To>
void check_pack(const TileShape& shape, int64_t queue_size, int64_t start, int step = 1, int offset = 0) {
  std::mt19937 random(static_cast<unsigned>(queue_size));
  std::normal_distribution<double> normal;
  const int64_t row_stride = (queue_size * step + 3) / 4 * 4, size = shape.rows;
  std::vector<From> queue(offset + shape.batch * size * row_stride);
  for (From& value : queue) value = rounded<From>(normal(random));
  DeviceBuffer<From> device_queue(queue);
  DeviceBuffer<To> tile(shape.batch * size * shape.segments * shape.segment_size);
  const QueueColumns columns{device_queue.data() + offset, kType<From>, {size * row_stride, row_stride, step},
                             queue_size, start};
  const cudaError_t error = ikem_fast::cuda::pack_queue_tile(tile.data(), kType<To>, columns, shape, nullptr);
  const std::vector<To> output = tile.values();
  bool right = error == cudaSuccess;
  size_t i = 0;
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int segment = 0; segment < shape.segments; ++segment) {
      for (int64_t d = 0; d < size; ++d) {
        for (int place = 0; place < shape.segment_size; ++place, ++i) {
          const int64_t column = start + segment * shape.segment_size + place;
          const double wanted =
              column < queue_size
                  ? exact(rounded<To>(exact(queue[offset + (b * size + d) * row_stride + column * step])))
                  : 0.0;
          right = right && exact(output[i]) == wanted;
        }
      }
    }
  }
  if (right) return;
  ++failures;
  printf("FAILED tile of B %lld D %d K %lld from %lld in %d segments of %d, columns %d apart: error %d\n",
         static_cast<long long>(shape.batch), shape.rows, static_cast<long long>(queue_size),
         static_cast<long long>(start), shape.segments, shape.segment_size, step, static_cast<int>(error));
}

void check_add(int64_t batch, int rows, int64_t size, int segments, bool first, bool with_factor, bool with_divisor) {
  std::mt19937 random(static_cast<unsigned>(rows * 100 + segments));
  std::uniform_real_distribution<float> uniform(0.5f, 2.0f);
  const auto draw = [&](int64_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = uniform(random);
    return values;
  };
  const std::vector<float> before = draw(batch * rows * size), products = draw(batch * segments * rows * size);
  const std::vector<float> factor = draw(batch * rows), divisor = draw(batch * rows);
  // Where sums count as zero they need not have been written.
  DeviceBuffer<float> sums(before.size());
  if (!first) cudaMemcpy(sums.data(), before.data(), before.size() * sizeof(float), cudaMemcpyHostToDevice);
  DeviceBuffer<float> device_products(products), device_factor(factor), device_divisor(divisor);
  const cudaError_t error = ikem_fast::cuda::add_products(
      {sums.data(), device_products.data(), with_factor ? device_factor.data() : nullptr,
       with_divisor ? device_divisor.data() : nullptr, batch, size, rows, segments, first, 1.5f},
      nullptr);
  const std::vector<float> output = sums.values();
  bool right = error == cudaSuccess;
  for (int64_t i = 0; i < batch * rows * size; ++i) {
    const int64_t row = i / size;
    double wanted = first ? 0.0 : double(before[i]) * (with_factor ? factor[row] : 1.0f);
    for (int segment = 0; segment < segments; ++segment) {
      wanted += products[(i / (rows * size) * segments + segment) * rows * size + i % (rows * size)];
    }
    wanted *= 1.5 / (with_divisor ? divisor[row] : 1.0f);
    right = right && std::abs(output[i] - wanted) <= 2e-6 * wanted;
  }
  if (right) return;
  ++failures;
  printf("FAILED sums of B %lld R %d D %lld in %d segments: error %d\n", static_cast<long long>(batch), rows,
         static_cast<long long>(size), segments, static_cast<int>(error));
}

}  // namespace

int main(int argc, char** argv) {
  return run_over_seeds("queue_tiles", argc, argv, [](int) {
    check_pack<float, float>({1, 3, 1, 8}, 1, 0);
    check_pack<float, __nv_bfloat16>({2, 5, 3, 16}, 100, 48);     // the queue ends inside the last segment
    check_pack<__nv_bfloat16, __nv_bfloat16>({2, 2, 2, 8}, 33, 16);  // ... inside a group of four
    check_pack<__nv_bfloat16, float>({1, 2, 1, 24}, 24, 0);
    check_pack<float, __nv_bfloat16>({1, 2, 2, 16}, 40, 8, 3);
    check_pack<float, float>({1, 2, 1, 2056}, 4096, 2040);  // more than a block takes
    check_pack<float, float>({1, 2, 1, 16}, 16, 0, 1, 1);  // not aligned
    check_pack<float, float>({0, 2, 1, 16}, 16, 0);
    check_add(1, 1, 1, 1, true, false, false);
    check_add(2, 3, 130, 4, true, false, true);
    check_add(2, 3, 130, 3, false, true, false);
    check_add(1, 5, 7, 16, false, true, true);
    check_add(3, 2, 129, 2, false, false, false);
    check_add(0, 2, 9, 2, false, false, false);
    const bool refused =
        ikem_fast::cuda::pack_queue_tile(nullptr, ElementType::kDouble, {}, {1, 1, 1, 8}, nullptr) ==
            cudaErrorInvalidValue &&
        ikem_fast::cuda::pack_queue_tile(nullptr, ElementType::kFloat, {}, {1, 1, 1, 9}, nullptr) ==
            cudaErrorInvalidValue &&
        ikem_fast::cuda::add_products(AddedProducts{}, nullptr) == cudaErrorInvalidValue;
    if (!refused) {
      ++failures;
      printf("FAILED the launchers must refuse float64, segments of 9 columns and none\n");
    }
  });
}
