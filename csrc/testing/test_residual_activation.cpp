// TEST-ONLY: the CUDA kernels of residual_activation, forward and backward, against plain loops in double, over sizes,
// kinds of residual and thread schedules.
// Usage: test_residual_activation [SEEDS [FILE]]. One translation unit: it includes the kernels, or a copy with a planted
// bug.
#ifndef KERNEL_SOURCE
#define KERNEL_SOURCE "cuda/residual_activation.cu"
#endif
#include KERNEL_SOURCE

#include <cmath>
#include <random>
#include <vector>

#include "testing/device_buffer.h"
#include "testing/kernel_test.h"
#include "testing/values.h"

namespace {

using ikem_fast::cuda::ElementType;
using ikem_fast::cuda::ResidualActivationGradients;
using ikem_fast::cuda::ResidualActivationInput;

struct Case {
  int streams;
  int64_t rows, channels, pool_rows;
  int coefficients_of_residual;  // 0: no residual, 1: as it is, 2: with coefficients
  uint32_t threshold;
  int offset = 0;  // values by which tensors lie beside the alignment
};

// Philox4x32-10 as its authors write it, and the half that belongs to a value.
uint32_t random_half(uint64_t seed, uint32_t layer, uint32_t stream, uint64_t element) {
  const uint64_t call = element / 8;
  uint32_t counter[4] = {uint32_t(call), uint32_t(call >> 32), stream, layer};
  uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t products[2] = {0xD2511F53ull * counter[0], 0xCD9E8D57ull * counter[2]};
    const uint32_t next[4] = {uint32_t(products[1] >> 32) ^ counter[1] ^ key[0], uint32_t(products[1]),
                              uint32_t(products[0] >> 32) ^ counter[3] ^ key[1], uint32_t(products[0])};
    for (int i = 0; i < 4; ++i) counter[i] = next[i];
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  const uint32_t word = counter[element % 8 / 2];
  return element % 2 ? word >> 16 : word & 0xffff;
}

template <typename T>
T as(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else {
    return __float2bfloat16_rn(value);
  }
}
std::mt19937 random_state;

std::vector<float> draw(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random_state);
  return values;
}

template <typename T>
std::vector<T> draw_rounded(int64_t count) {
  std::vector<T> values;
  for (float value : draw(count)) values.push_back(as<T>(value));
  return values;
}

bool is_close(double value, double wanted, double tolerance) {
  return std::abs(value - wanted) <= tolerance * (1 + std::abs(wanted));
}

template <typename T>
void check(const Case& c) {
  random_state.seed(static_cast<unsigned>(c.rows * 31 + c.channels));
  const int64_t size = c.streams * c.rows * c.channels, coefficients = c.streams * c.channels;
  const int64_t means = c.pool_rows ? c.streams * (c.rows / c.pool_rows) * c.channels : 0;
  const std::vector<T> x = draw_rounded<T>(size + c.offset), residual = draw_rounded<T>(size + c.offset);
  const std::vector<float> scale = draw(coefficients), shift = draw(coefficients);
  const std::vector<float> residual_scale = draw(coefficients), residual_shift = draw(coefficients);
  const uint64_t seed = 0x9876543210fedcbaull;
  DeviceBuffer<T> device_x(x), device_residual(residual);
  DeviceBuffer<float> device_scale(scale), device_shift(shift), device_residual_scale(residual_scale),
      device_residual_shift(residual_shift);
  DeviceBuffer<int64_t> device_seed(std::vector<int64_t>{static_cast<int64_t>(seed)});

  ResidualActivationInput input{};
  input.x = device_x.data() + c.offset;
  input.residual = c.coefficients_of_residual > 0 ? device_residual.data() + c.offset : nullptr;
  input.type = sizeof(T) == 4 ? ElementType::kFloat : ElementType::kBFloat16;
  input.scale = device_scale.data();
  input.shift = device_shift.data();
  input.residual_scale = c.coefficients_of_residual > 1 ? device_residual_scale.data() : nullptr;
  input.residual_shift = c.coefficients_of_residual > 1 ? device_residual_shift.data() : nullptr;
  input.num_streams = c.streams;
  input.rows = c.rows;
  input.channels = c.channels;
  input.pool_rows = c.pool_rows;
  input.threshold = c.threshold;
  input.layer = 7;
  input.seed = c.threshold ? device_seed.data() : nullptr;

  DeviceBuffer<T> device_out(c.pool_rows ? 0 : size + c.offset);
  DeviceBuffer<float> device_means(means);
  void* const out = c.pool_rows ? static_cast<void*>(device_means.data()) : device_out.data() + c.offset;
  cudaError_t error = ikem_fast::cuda::residual_activation(out, input, nullptr);
  bool right = error == cudaSuccess;

  // What flows back: into each value, or into each mean.
  const std::vector<T> given = draw_rounded<T>(c.pool_rows ? 0 : size + c.offset);
  const std::vector<float> given_of_means = draw(means);
  DeviceBuffer<T> device_given(given);
  DeviceBuffer<float> device_given_of_means(given_of_means);
  DeviceBuffer<T> of_x(size + c.offset), of_residual(size + c.offset);
  DeviceBuffer<float> sums(4 * coefficients),
      scratch(ikem_fast::cuda::residual_activation_scratch_size(input));
  ResidualActivationGradients gradients{};
  gradients.out = c.pool_rows ? static_cast<void*>(device_given_of_means.data()) : device_given.data() + c.offset;
  gradients.x = of_x.data() + c.offset;
  gradients.residual = c.coefficients_of_residual > 0 ? of_residual.data() + c.offset : nullptr;
  for (int i = 0; i < (c.coefficients_of_residual > 1 ? 4 : 2); ++i) gradients.sums[i] = sums.data() + i * coefficients;
  gradients.scratch = scratch.data();
  error = ikem_fast::cuda::residual_activation_backward(gradients, input, nullptr);
  right = right && error == cudaSuccess;

  const double digits = sizeof(T) == 4 ? 2e-6 : 5e-3;
  std::vector<double> wanted_means(means, 0.0), wanted_sums(4 * coefficients, 0.0), allowed(4 * coefficients, 1e-9);
  const std::vector<T> outs = device_out.values(), of_xs = of_x.values(), of_residuals = of_residual.values();
  for (int64_t i = 0; i < size && right; ++i) {
    const int64_t channel = i % c.channels, stream = i / (c.rows * c.channels), row = i / c.channels % c.rows;
    const int64_t place = stream * c.channels + channel, at = i + c.offset;
    const int64_t mean = c.pool_rows ? (stream * (c.rows / c.pool_rows) + row / c.pool_rows) * c.channels + channel : 0;
    double value = double(scale[place]) * exact(x[at]) + shift[place], kept = 1;
    if (c.threshold) {
      const bool is_kept = random_half(seed, 7, stream, row * c.channels + channel) >= c.threshold;
      kept = is_kept ? 65536.0 / (65536 - c.threshold) : 0;
      value *= kept;
    }
    double factor = 1;
    if (c.coefficients_of_residual > 1) {
      factor = residual_scale[place];
      value += factor * exact(residual[at]) + residual_shift[place];
    } else if (c.coefficients_of_residual > 0) {
      value += exact(residual[at]);
    }
    const bool is_near_the_corner = value != 0 && std::abs(value) < 1e-5;
    if (c.pool_rows) {
      wanted_means[mean] += std::max(value, 0.0) / c.pool_rows;
    } else {
      right = right && is_close(exact(outs[at]), std::max(value, 0.0), digits);
    }
    double flowing = c.pool_rows ? double(given_of_means[mean]) / c.pool_rows : exact(given[at]);
    if (!(value > 0) && !is_near_the_corner) flowing = 0;
    const double of_dropped = flowing * kept;
    if (!is_near_the_corner) {
      right = right && is_close(exact(of_xs[at]), of_dropped * scale[place], digits);
      if (c.coefficients_of_residual > 0) right = right && is_close(exact(of_residuals[at]), flowing * factor, digits);
    }
    const double parts[] = {of_dropped * exact(x[at]), of_dropped, flowing * exact(residual[at]), flowing};
    for (int sum = 0; sum < 4; ++sum) {
      // There a rounding decides whether anything flows.
      if (!is_near_the_corner) wanted_sums[sum * coefficients + place] += parts[sum];
      allowed[sum * coefficients + place] += std::abs(parts[sum]) * (is_near_the_corner ? 1 : 2e-6);
    }
  }
  const std::vector<float> all_means = device_means.values(), all_sums = sums.values();
  for (int64_t i = 0; i < means && right; ++i) right = is_close(all_means[i], wanted_means[i], 2e-6);
  for (int64_t i = 0; i < (c.coefficients_of_residual > 1 ? 4 : 2) * coefficients && right; ++i) {
    right = std::abs(all_sums[i] - wanted_sums[i]) <= allowed[i];
  }
  if (right) return;
  ++failures;
  printf("FAILED %zu-byte values, %d streams of %lld rows of %lld channels, means of %lld, residual %d, threshold %u, "
         "offset %d: error %d\n",
         sizeof(T), c.streams, static_cast<long long>(c.rows), static_cast<long long>(c.channels),
         static_cast<long long>(c.pool_rows), c.coefficients_of_residual, c.threshold, c.offset,
         static_cast<int>(error));
}

void check_refusals() {
  ResidualActivationInput input{};
  bool right = ikem_fast::cuda::residual_activation(nullptr, input, nullptr) == cudaSuccess &&
               ikem_fast::cuda::residual_activation_backward({}, input, nullptr) == cudaSuccess &&
               ikem_fast::cuda::residual_activation_scratch_size(input) == 0;
  input.num_streams = 65536;
  input.rows = input.channels = 1;
  right = right && ikem_fast::cuda::residual_activation(nullptr, input, nullptr) == cudaErrorInvalidValue;
  input.num_streams = 1;
  input.type = ElementType::kDouble;
  right = right && ikem_fast::cuda::residual_activation(nullptr, input, nullptr) == cudaErrorInvalidValue;
  if (right) return;
  ++failures;
  printf("FAILED the launchers must accept nothing, and refuse too many streams and double\n");
}

}  // namespace

int main(int argc, char** argv) {
  return run_over_seeds("residual_activation", argc, argv, [](int seed) {
    check<float>({1, 1, 1, 0, 0, 0});
    check<float>({2, 150, 16, 0, 2, 32768});
    check<__nv_bfloat16>({2, 40, 64, 0, 1, 20000});
    check<__nv_bfloat16>({1, 90, 24, 0, 2, 0});     // threads that do not divide the block's
    check<float>({1, 3, 2064, 0, 1, 0});            // more channels than a block takes
    check<float>({2, 60, 5, 0, 2, 32768});          // channels one by one
    check<__nv_bfloat16>({1, 7, 300, 0, 0, 65535});
    check<__nv_bfloat16>({1, 33, 8, 0, 1, 32768, 3});
    check<float>({2, 66, 72, 33, 2, 32768});        // means; the last piece of the channels is not full
    check<__nv_bfloat16>({1, 75, 128, 25, 1, 32768});
    check<__nv_bfloat16>({2, 4, 16, 1, 0, 0});
    check<float>({1, 40, 70, 20, 1, 9000});         // means of channels one by one
    check<float>({1, 12, 8, 6, 2, 1000, 1});
    // Blocks that take several rows a thread, and many chunks.
    if (seed == 0) check<float>({353, 600, 8, 0, 0, 0});
    if (seed == 1) check<__nv_bfloat16>({1, 5000, 16, 0, 2, 0});
    check_refusals();
  });
}
