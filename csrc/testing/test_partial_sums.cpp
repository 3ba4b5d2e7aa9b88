// TEST-ONLY: sums of parts against a loop in double.
// Usage: test_partial_sums [SEEDS [FILE]]. One translation unit: it includes the kernel, or a copy with a planted bug.
#ifndef KERNEL_SOURCE
#define KERNEL_SOURCE "cuda/partial_sums.cu"
#endif
#include KERNEL_SOURCE

#include <cmath>
#include <random>
#include <vector>

#include "testing/device_buffer.h"
#include "testing/kernel_test.h"

namespace {

void check(int64_t streams, int64_t size, int64_t pitch, int count) {
  std::mt19937 random(static_cast<unsigned>(size * 100 + count));
  std::normal_distribution<float> normal;
  std::vector<float> parts(streams * count * pitch);
  for (float& value : parts) value = normal(random);
  DeviceBuffer<float> given(parts), sums(streams * size);
  const cudaError_t error =
      ikem_fast::cuda::add_partial_sums(sums.data(), {given.data(), streams, size, pitch, count}, nullptr);
  const std::vector<float> output = sums.values();
  bool right = error == cudaSuccess;
  for (int64_t i = 0; i < streams * size; ++i) {
    double wanted = 0;
    for (int part = 0; part < count; ++part) wanted += parts[(i / size * count + part) * pitch + i % size];
    right = right && std::abs(output[i] - wanted) <= 1e-6 * (1 + std::abs(wanted));
  }
  if (right) return;
  ++failures;
  printf("FAILED %d parts of %lld streams of %lld, %lld apart: error %d\n", count, static_cast<long long>(streams),
         static_cast<long long>(size), static_cast<long long>(pitch), static_cast<int>(error));
}

}  // namespace

int main(int argc, char** argv) {
  return run_over_seeds("partial_sums", argc, argv, [](int) {
    check(1, 1, 1, 1);
    check(2, 16, 32, 37);
    check(3, 70, 71, 8);
    check(2, 5, 5, 0);
    check(0, 5, 5, 3);
    check(2, 0, 4, 3);
    if (ikem_fast::cuda::add_partial_sums(nullptr, {nullptr, 1, 4, 3, 1}, nullptr) != cudaErrorInvalidValue) {
      ++failures;
      printf("FAILED parts that overlap must be refused\n");
    }
  });
}
