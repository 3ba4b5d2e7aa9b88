// TEST-ONLY: the CUDA kernels of batch_norm_coefficients against the formulas in double, over sizes and thread schedules.
// Usage: test_batch_norm_coefficients [SEEDS [FILE]]. One translation unit: it includes the kernels, or a copy with a
// planted bug.
#ifndef KERNEL_SOURCE
#define KERNEL_SOURCE "cuda/batch_norm_coefficients.cu"
#endif
#include KERNEL_SOURCE

#include <cmath>
#include <random>
#include <vector>

#include "testing/device_buffer.h"
#include "testing/kernel_test.h"

namespace {

void check(int64_t count) {
  std::mt19937 random(static_cast<unsigned>(count));
  std::normal_distribution<float> normal;
  std::vector<float> inputs[6];  // mean, variance, weight, bias, and what flows into scale and shift
  for (auto& values : inputs) {
    values.resize(count);
    for (float& value : values) value = normal(random);
  }
  for (float& value : inputs[1]) value = value * value;
  const double eps = 1e-5f;
  DeviceBuffer<float> mean(inputs[0]), variance(inputs[1]), weight(inputs[2]), bias(inputs[3]), of_scale(inputs[4]),
      of_shift(inputs[5]);
  DeviceBuffer<float> scale(count), shift(count), of_mean(count), of_variance(count), of_weight(count), of_bias(count);
  const ikem_fast::cuda::BatchNormInput input{mean.data(), variance.data(),          weight.data(),
                                              bias.data(), static_cast<float>(eps), count};
  const ikem_fast::cuda::BatchNormGradients gradients{of_scale.data(),    of_shift.data(),  of_mean.data(),
                                                      of_variance.data(), of_weight.data(), of_bias.data()};
  bool right = ikem_fast::cuda::batch_norm_coefficients(scale.data(), shift.data(), input, nullptr) == cudaSuccess &&
               ikem_fast::cuda::batch_norm_coefficients_backward(gradients, input, nullptr) == cudaSuccess;
  const std::vector<float> outputs[] = {scale.values(),       shift.values(),     of_mean.values(),
                                        of_variance.values(), of_weight.values(), of_bias.values()};
  for (int64_t i = 0; i < count; ++i) {
    const double deviation = std::sqrt(inputs[1][i] + eps), factor = inputs[2][i] / deviation;
    const double total = inputs[4][i] - double(inputs[0][i]) * inputs[5][i];
    const double size = 1 + std::abs(inputs[4][i]) + std::abs(inputs[0][i] * inputs[5][i]);
    const double wanted[] = {factor,
                             inputs[3][i] - inputs[0][i] * factor,
                             -factor * inputs[5][i],
                             -0.5 * total * factor / (deviation * deviation),
                             total / deviation,
                             inputs[5][i]};
    const double sizes[] = {std::abs(factor),
                            std::abs(inputs[3][i]) + std::abs(inputs[0][i] * factor),
                            std::abs(factor * inputs[5][i]),
                            size * std::abs(factor) / (deviation * deviation),
                            size / deviation,
                            0};
    for (int k = 0; k < 6; ++k) right = right && std::abs(outputs[k][i] - wanted[k]) <= 1e-6 * sizes[k];
  }
  if (right) return;
  ++failures;
  printf("FAILED %lld channels\n", static_cast<long long>(count));
}

}  // namespace

int main(int argc, char** argv) {
  return run_over_seeds("batch_norm_coefficients", argc, argv, [](int) {
    for (int64_t count : {0, 1, 128, 300}) check(count);
  });
}
