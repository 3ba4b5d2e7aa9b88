#include "ops/batch_norm_coefficients.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/batch_norm_coefficients.h"
#include "ops/batch_norm_coefficients_checks.h"

namespace ikem_fast {

namespace {

at::Tensor dense(const at::Tensor& mean, const char* name, const at::Tensor& tensor) {
  const std::string problem = find_coefficients_problem(mean.sizes(), name, tensor.sizes());
  TORCH_CHECK_VALUE(problem.empty(), problem);
  TORCH_CHECK_VALUE(mean.scalar_type() == at::kFloat || mean.scalar_type() == at::kDouble,
                    "mean must be float32 or float64, got ", mean.scalar_type());
  TORCH_CHECK_VALUE(tensor.scalar_type() == mean.scalar_type() && tensor.device().is_cpu(), name, " must be ",
                    mean.scalar_type(), " on the CPU, got ", tensor.scalar_type(), " on ", tensor.device());
  return tensor.contiguous();
}

cpu::BatchNormCoefficients parameters_of(const at::Tensor& mean, const at::Tensor& variance, const at::Tensor& weight,
                                         double eps) {
  const std::string problem = find_eps_problem(eps);
  TORCH_CHECK_VALUE(problem.empty(), problem);
  cpu::BatchNormCoefficients p;
  p.is_double = mean.scalar_type() == at::kDouble;
  p.count = mean.numel();
  p.mean = mean.const_data_ptr();
  p.variance = variance.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.eps = eps;
  return p;
}

at::Tensor empty_like_mean(const at::Tensor& mean) { return at::empty(mean.sizes(), mean.options()); }

}  // namespace

std::tuple<at::Tensor, at::Tensor> batch_norm_coefficients(const at::Tensor& mean, const at::Tensor& variance,
                                                           const at::Tensor& weight, const at::Tensor& bias,
                                                           double eps) {
  const at::Tensor dense_mean = dense(mean, "mean", mean), dense_variance = dense(mean, "variance", variance);
  const at::Tensor dense_weight = dense(mean, "weight", weight), dense_bias = dense(mean, "bias", bias);
  cpu::BatchNormCoefficients p = parameters_of(dense_mean, dense_variance, dense_weight, eps);
  p.bias = dense_bias.const_data_ptr();
  const at::Tensor scale = empty_like_mean(mean), shift = empty_like_mean(mean);
  IKEM_DISPATCH_CPU(batch_norm_coefficients)(p, scale.mutable_data_ptr(), shift.mutable_data_ptr());
  return {scale, shift};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_coefficients_backward(
    const at::Tensor& mean, const at::Tensor& variance, const at::Tensor& weight, double eps,
    const at::Tensor& scale_gradient, const at::Tensor& shift_gradient) {
  const at::Tensor dense_mean = dense(mean, "mean", mean), dense_variance = dense(mean, "variance", variance);
  const at::Tensor dense_weight = dense(mean, "weight", weight);
  const at::Tensor of_scale = dense(mean, "scale_gradient", scale_gradient);
  const at::Tensor of_shift = dense(mean, "shift_gradient", shift_gradient);
  const at::Tensor of_mean = empty_like_mean(mean), of_variance = empty_like_mean(mean);
  const at::Tensor of_weight = empty_like_mean(mean), of_bias = empty_like_mean(mean);
  IKEM_DISPATCH_CPU(batch_norm_coefficients_backward)
  (parameters_of(dense_mean, dense_variance, dense_weight, eps),
   cpu::BatchNormGradients{of_scale.const_data_ptr(), of_shift.const_data_ptr(), of_mean.mutable_data_ptr(),
                           of_variance.mutable_data_ptr(), of_weight.mutable_data_ptr(), of_bias.mutable_data_ptr()});
  return {of_mean, of_variance, of_weight, of_bias};
}

TORCH_LIBRARY_IMPL(ikem_fast, CPU, m) {
  m.impl("batch_norm_coefficients", &batch_norm_coefficients);
  m.impl("batch_norm_coefficients_backward", &batch_norm_coefficients_backward);
}

}  // namespace ikem_fast
