// TEST-ONLY: the CUDA kernel of momentum_update_ against the formula in double, over sizes, alignments and thread
// schedules.
// Usage: test_momentum_update [SEEDS [FILE]]. One translation unit: it includes the kernel, or a copy with a planted bug.
#ifndef KERNEL_SOURCE
#define KERNEL_SOURCE "cuda/momentum_update.cu"
#endif
#include KERNEL_SOURCE

#include <cmath>
#include <random>
#include <vector>

#include "testing/device_buffer.h"
#include "testing/kernel_test.h"

namespace {

// Tensors of these sizes, `gap` values apart in one allocation, so that an odd gap leaves most of them unaligned.
template <typename T>
void check(const std::vector<int64_t>& sizes, int gap, double momentum) {
  int64_t total = 0;
  for (int64_t size : sizes) total += size + gap;
  std::mt19937 random(static_cast<unsigned>(sizes.size()));
  std::normal_distribution<double> normal;
  std::vector<T> keys(total), queries(total);
  for (T& value : keys) value = static_cast<T>(normal(random));
  for (T& value : queries) value = static_cast<T>(normal(random));
  DeviceBuffer<T> device_keys(keys), device_queries(queries);
  std::vector<ikem_fast::cuda::MomentumPair<T>> pairs;
  std::vector<bool> updated(total, false);
  int64_t place = 0;
  for (int64_t size : sizes) {
    pairs.push_back({device_keys.data() + place, device_queries.data() + place, size});
    for (int64_t i = 0; i < size; ++i) updated[place + i] = true;
    place += size + gap;
  }
  const cudaError_t error = ikem_fast::cuda::momentum_update(pairs, momentum, nullptr);
  const std::vector<T> output = device_keys.values();
  const double tolerance = sizeof(T) == 4 ? 3e-7 : 1e-15;
  bool right = error == cudaSuccess;
  for (int64_t i = 0; i < total; ++i) {
    const double wanted = updated[i] ? momentum * keys[i] + (1 - momentum) * queries[i] : double(keys[i]);
    right = right && std::abs(output[i] - wanted) <= tolerance * (std::abs(wanted) + std::abs(queries[i]) + 1);
  }
  if (right) return;
  ++failures;
  printf("FAILED %zu tensors of %zu-byte values, %d apart, momentum %g: error %d\n", sizes.size(), sizeof(T), gap,
         momentum, static_cast<int>(error));
}

}  // namespace

int main(int argc, char** argv) {
  return run_over_seeds("momentum_update_", argc, argv, [](int) {
    check<float>({}, 0, 0.9);
    check<float>({0, 1, 3, 0, 4096, 17, 4097}, 0, 0.999);
    check<float>({5000, 1, 9000}, 4, 0.5);
    check<float>({5000, 5, 9000}, 1, 0.25);
    check<double>({2048, 7, 5000}, 2, 0.999);
    check<double>({2049, 1}, 1, 0.0);
    check<float>({33}, 0, 1.0);
    check<float>(std::vector<int64_t>(300, 3), 1, 0.75);  // more than one launch takes
  });
}
