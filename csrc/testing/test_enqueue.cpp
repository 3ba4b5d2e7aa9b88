// TEST-ONLY: the CUDA kernels of enqueue_ against keys put in one after another, over sizes, strides and thread schedules.
// Usage: test_enqueue [SEEDS [FILE]]. One translation unit: it includes the kernel, or a copy with a planted bug.
#ifndef KERNEL_SOURCE
#define KERNEL_SOURCE "cuda/enqueue.cu"
#endif
#include KERNEL_SOURCE

#include <random>
#include <vector>

#include "testing/device_buffer.h"
#include "testing/kernel_test.h"
#include "testing/values.h"

namespace {

using ikem_fast::cuda::EnqueueInput;
using ikem_fast::cuda::ElementType;

template <typename T>
constexpr ElementType kType = sizeof(T) == 8   ? ElementType::kDouble
                           : sizeof(T) == 4 ? ElementType::kFloat
                                            : ElementType::kBFloat16;

struct Shape {
  int streams, keys, size, columns;
  int first_column = 0, queue_size = columns;  // of a queue of which `columns` are here
};

// Rows of keys and of the queue lie `gap` values apart from each other.
template <typename Key, typename Queue>
void check(const Shape& shape, int64_t start, int gap = 0) {
  std::mt19937 random(shape.keys * 100 + shape.columns);
  std::normal_distribution<double> normal;
  const int64_t key_step = shape.size + gap, row_step = shape.columns + gap;
  std::vector<Key> keys(shape.streams * shape.keys * key_step);
  for (Key& key : keys) key = rounded<Key>(normal(random));
  std::vector<Queue> queue(shape.streams * shape.size * row_step);
  for (Queue& value : queue) value = rounded<Queue>(normal(random));

  std::vector<Queue> wanted = queue;
  const auto column = [&](int64_t n) { return ((start + n) % shape.queue_size + shape.queue_size) % shape.queue_size; };
  for (int s = 0; s < shape.streams; ++s) {
    for (int n = 0; n < shape.keys; ++n) {
      const int64_t here = column(n) - shape.first_column;
      if (here < 0 || here >= shape.columns) continue;
      for (int d = 0; d < shape.size; ++d) {
        const double value = exact(keys[(s * shape.keys + n) * key_step + d]);
        wanted[(s * shape.size + d) * row_step + here] = rounded<Queue>(value);
      }
    }
  }

  DeviceBuffer<Key> device_keys(keys);
  DeviceBuffer<Queue> device_queue(queue);
  DeviceBuffer<int64_t> pointer(std::vector<int64_t>{start});
  const EnqueueInput input{device_keys.data(),  kType<Key>,   {shape.keys * key_step, key_step, 1},
                           device_queue.data(), kType<Queue>, {shape.size * row_step, row_step, 1},
                           pointer.data(),      shape.streams, shape.keys, shape.size, shape.columns,
                           shape.first_column,  shape.queue_size};
  const cudaError_t error = ikem_fast::cuda::enqueue(input, nullptr);
  const std::vector<Queue> output = device_queue.values();
  bool right = error == cudaSuccess && pointer.values()[0] == column(shape.keys);
  for (size_t i = 0; i < output.size(); ++i) right = right && exact(output[i]) == exact(wanted[i]);
  if (right) return;
  ++failures;
  printf("FAILED S %d N %d D %d, %d columns from %d on of K %d, from %lld, %zu- into %zu-byte values: error %d\n",
         shape.streams, shape.keys, shape.size, shape.columns, shape.first_column, shape.queue_size,
         static_cast<long long>(start), sizeof(Key), sizeof(Queue), static_cast<int>(error));
}

}  // namespace

int main(int argc, char** argv) {
  return run_over_seeds("enqueue_", argc, argv, [](int) {
    check<float, float>({2, 5, 7, 11}, 9);
    check<float, float>({1, 40, 33, 37}, 36, 3);       // more keys than columns, two tiles each way
    check<float, float>({2, 64, 32, 1000}, 970);       // whole tiles, wrapping around
    check<float, __nv_bfloat16>({1, 33, 40, 50}, -3);  // a pointer out of range is taken modulo K
    check<__nv_bfloat16, float>({3, 1, 1, 1}, 0);
    check<double, double>({1, 3, 5, 2}, 12345678901);
    check<double, __nv_bfloat16>({1, 3, 5, 4}, 2, 1);
    check<__nv_bfloat16, __nv_bfloat16>({1, 7, 5, 7}, 3);
    check<__nv_bfloat16, double>({1, 2, 5, 7}, 3);
    check<double, float>({1, 2, 5, 7}, 6);
    check<float, double>({1, 100, 2, 3}, 1);
    check<float, float>({2, 0, 5, 7}, 6);
    check<float, float>({0, 3, 5, 7}, 6);
    check<float, float>({2, 3, 0, 7}, 6);
    for (const int start : {0, 4, 5, 9, 10, 14}) {  // before, in and past the columns here; fewer and more keys than K
      for (const int keys : {3, 9, 15, 40}) {
        for (const int first_column : {0, 5, 10}) check<float, float>({2, keys, 3, 5, first_column, 15}, start);
      }
    }
    check<float, __nv_bfloat16>({1, 70, 33, 40, 40, 120}, 100);  // two tiles, of which one begins before the columns
    check<float, float>({1, 10, 3, 7, 2, 11}, -3);
    check<float, float>({2, 0, 5, 7, 7, 14}, 6);
    EnqueueInput refused{};
    if (ikem_fast::cuda::enqueue(refused, nullptr) != cudaErrorInvalidValue) {
      ++failures;
      printf("FAILED the launcher must refuse a queue without columns\n");
    }
    refused.columns = 5, refused.queue_size = 9;
    for (const int first_column : {-1, 5}) {
      refused.first_column = first_column;
      if (ikem_fast::cuda::enqueue(refused, nullptr) != cudaErrorInvalidValue) {
        ++failures;
        printf("FAILED the launcher must refuse 5 columns of 9 from %d on\n", first_column);
      }
    }
  });
}
