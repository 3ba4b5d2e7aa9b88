#include "cuda/batch_norm_coefficients.h"

#include "cuda/kernel.h"
#include "math/batch_norm.h"

namespace ikem_fast::cuda {

namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    batch_norm_coefficients_kernel(BatchNormInput input, float* scale, float* shift) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= input.count) return;
  const auto made =
      math::norm_coefficients(input.mean[i], input.variance[i], input.weight[i], input.bias[i], input.eps);
  scale[i] = made.scale;
  shift[i] = made.shift;
}

__global__ void __launch_bounds__(kThreads)
    batch_norm_coefficients_backward_kernel(BatchNormInput input, BatchNormGradients gradients) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= input.count) return;
  const auto made = math::norm_gradients(input.mean[i], input.variance[i], input.weight[i], input.eps,
                                         gradients.scale[i], gradients.shift[i]);
  gradients.mean[i] = made.mean;
  gradients.variance[i] = made.variance;
  gradients.weight[i] = made.weight;
  gradients.bias[i] = made.bias;
}

dim3 grid_of(const BatchNormInput& input) { return dim3(static_cast<unsigned>((input.count + kThreads - 1) / kThreads)); }

}  // namespace

cudaError_t batch_norm_coefficients(float* scale, float* shift, const BatchNormInput& input, cudaStream_t stream) {
  if (input.count == 0) return cudaSuccess;
  if (input.count > INT32_MAX) return cudaErrorInvalidValue;
  return IKEM_LAUNCH(batch_norm_coefficients_kernel, grid_of(input), dim3(kThreads), 0, stream, input, scale, shift);
}

cudaError_t batch_norm_coefficients_backward(const BatchNormGradients& gradients, const BatchNormInput& input,
                                             cudaStream_t stream) {
  if (input.count == 0) return cudaSuccess;
  if (input.count > INT32_MAX) return cudaErrorInvalidValue;
  return IKEM_LAUNCH(batch_norm_coefficients_backward_kernel, grid_of(input), dim3(kThreads), 0, stream, input,
                     gradients);
}

}  // namespace ikem_fast::cuda
