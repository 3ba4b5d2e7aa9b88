// The operators batch_norm_coefficients and batch_norm_coefficients_backward on CUDA tensors: checks, outputs, launches.
#include "cuda/batch_norm_coefficients.h"

#include <tuple>

#include "cuda/stable_tensor.h"
#include "ops/batch_norm_coefficients_checks.h"

namespace ikem_fast::cuda {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor dense(const Tensor& mean, const char* name, const Tensor& tensor) {
  const std::string problem = find_coefficients_problem(mean.sizes(), name, tensor.sizes());
  STD_TORCH_CHECK(problem.empty(), problem);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_cuda() &&
                      tensor.get_device_index() == mean.get_device_index(),
                  name, " must be float32 on CUDA ", mean.get_device_index(), ", got dtype number ",
                  static_cast<int>(tensor.scalar_type()));
  return torch::stable::contiguous(tensor);
}

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }
float* floats(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

void check_eps(double eps) {
  const std::string problem = find_eps_problem(eps);
  STD_TORCH_CHECK(problem.empty(), problem);
}

void check_error(const char* name, const Tensor& mean, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, name, " cannot run on a mean ", describe_sizes(mean), ": ",
                  cudaGetErrorString(error));
}

Tensor new_like(const Tensor& mean) {
  return torch::stable::new_empty(mean, {mean.size(0), mean.size(1)}, ScalarType::Float);
}

std::tuple<Tensor, Tensor> batch_norm_coefficients_op(Tensor mean, Tensor variance, Tensor weight, Tensor bias,
                                                      double eps) {
  check_eps(eps);
  const torch::stable::accelerator::DeviceGuard guard(mean.get_device_index());
  const Tensor means = dense(mean, "mean", mean), variances = dense(mean, "variance", variance);
  const Tensor weights = dense(mean, "weight", weight), biases = dense(mean, "bias", bias);
  Tensor scale = new_like(means), shift = new_like(means);
  const BatchNormInput input{floats(means),  floats(variances),       floats(weights),
                             floats(biases), static_cast<float>(eps), mean.numel()};
  check_error("batch_norm_coefficients", mean,
              batch_norm_coefficients(floats(scale), floats(shift), input, current_stream(mean)));
  return {scale, shift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_coefficients_backward_op(Tensor mean, Tensor variance,
                                                                               Tensor weight, double eps,
                                                                               Tensor scale_gradient,
                                                                               Tensor shift_gradient) {
  check_eps(eps);
  const torch::stable::accelerator::DeviceGuard guard(mean.get_device_index());
  const Tensor means = dense(mean, "mean", mean), variances = dense(mean, "variance", variance);
  const Tensor weights = dense(mean, "weight", weight);
  const Tensor of_scale = dense(mean, "scale_gradient", scale_gradient);
  const Tensor of_shift = dense(mean, "shift_gradient", shift_gradient);
  Tensor of_mean = new_like(means), of_variance = new_like(means), of_weight = new_like(means),
         of_bias = new_like(means);
  const BatchNormInput input{floats(means), floats(variances),       floats(weights),
                             nullptr,       static_cast<float>(eps), mean.numel()};
  const BatchNormGradients gradients{floats(of_scale),    floats(of_shift),  floats(of_mean),
                                     floats(of_variance), floats(of_weight), floats(of_bias)};
  check_error("batch_norm_coefficients_backward", mean,
              batch_norm_coefficients_backward(gradients, input, current_stream(mean)));
  return {of_mean, of_variance, of_weight, of_bias};
}

}  // namespace

}  // namespace ikem_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ikem_fast, CUDA, m) {
  m.impl("batch_norm_coefficients", TORCH_BOX(&ikem_fast::cuda::batch_norm_coefficients_op));
  m.impl("batch_norm_coefficients_backward", TORCH_BOX(&ikem_fast::cuda::batch_norm_coefficients_backward_op));
}
