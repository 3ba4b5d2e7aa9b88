#include "ops/temporal_convolution.h"

#include <string>

namespace ikem_fast {

namespace {

at::ScalarType computed_type(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

at::Tensor dense_argument(const char* name, const char* letters, const at::Tensor& argument,
                          const std::vector<int64_t>& shape, at::ScalarType type) {
  const std::string problem = find_shape_problem(name, letters, argument.sizes().vec(), shape);
  TORCH_CHECK_VALUE(problem.empty(), problem);
  TORCH_CHECK_VALUE(argument.scalar_type() == type, name, " must be ", type, ", got ", argument.scalar_type());
  return argument.contiguous();
}

at::Tensor dense_argument(const char* name, const char* letters, const std::optional<at::Tensor>& argument,
                          const std::vector<int64_t>& shape, at::ScalarType type) {
  return argument ? dense_argument(name, letters, *argument, shape, type) : at::Tensor();
}

// What forward and backward pass share.
TemporalConvolution check_inputs(const at::Tensor& x, const std::optional<at::Tensor>& scale,
                                 const std::optional<at::Tensor>& shift, const at::Tensor& weight, int64_t stride) {
  const at::ScalarType type = x.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16 || type == at::kDouble,
                    "x must be float32, bfloat16 or float64, got ", type);
  const std::string problem = find_temporal_convolution_problem(x.sizes().vec(), weight.sizes().vec(), stride);
  TORCH_CHECK_VALUE(problem.empty(), problem);
  TORCH_CHECK_VALUE(scale.has_value() == shift.has_value(), "scale and shift must be given together");
  TemporalConvolution arguments;
  arguments.sizes = temporal_convolution_sizes(x.sizes().vec(), weight.sizes().vec(), stride);
  const auto& sizes = arguments.sizes;
  const at::ScalarType computed = computed_type(x);
  arguments.x = x.contiguous();
  arguments.scale = dense_argument("scale", "(S, C_in)", scale, sizes.of_in_channels(), computed);
  arguments.shift = dense_argument("shift", "(S, C_in)", shift, sizes.of_in_channels(), computed);
  arguments.weight = dense_argument("weight", "(S, C_out, C_in, K)", weight, sizes.of_weight(), computed);
  return arguments;
}

}  // namespace

TemporalConvolution check_temporal_convolution(
    const at::Tensor& x, const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift,
    const at::Tensor& weight, const at::Tensor& bias, int64_t stride, bool statistics,
    const std::optional<at::Tensor>& output_scale, const std::optional<at::Tensor>& output_shift,
    const std::optional<at::Tensor>& residual) {
  TORCH_CHECK_VALUE(output_scale.has_value() == output_shift.has_value(),
                    "output_scale and output_shift must be given together");
  TORCH_CHECK_VALUE(!(statistics && output_scale), "statistics must be False with output_scale, got True");
  TORCH_CHECK_VALUE(!residual || output_scale, "residual must be given with output_scale and output_shift");
  TemporalConvolution arguments = check_inputs(x, scale, shift, weight, stride);
  const auto& sizes = arguments.sizes;
  const at::ScalarType computed = computed_type(x);
  arguments.bias = dense_argument("bias", "(S, C_out)", bias, sizes.of_out_channels(), computed);
  arguments.statistics = statistics;
  arguments.output_scale = dense_argument("output_scale", "(S, C_out)", output_scale, sizes.of_out_channels(), computed);
  arguments.output_shift = dense_argument("output_shift", "(S, C_out)", output_shift, sizes.of_out_channels(), computed);
  arguments.residual = dense_argument("residual", "(S, B, T', V, C_out)", residual, sizes.of_y(), x.scalar_type());
  return arguments;
}

TemporalConvolutionBackward check_temporal_convolution_backward(
    const at::Tensor& x, const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift,
    const at::Tensor& weight, int64_t stride, const at::Tensor& y, const at::Tensor& mean, const at::Tensor& y_gradient,
    const std::optional<at::Tensor>& mean_gradient, const std::optional<at::Tensor>& variance_gradient,
    bool with_x_gradient) {
  TemporalConvolutionBackward arguments;
  arguments.forward = check_inputs(x, scale, shift, weight, stride);
  const auto& sizes = arguments.forward.sizes;
  const at::ScalarType computed = computed_type(x);
  arguments.y = dense_argument("y", "(S, B, T', V, C_out)", y, sizes.of_y(), x.scalar_type());
  arguments.y_gradient =
      dense_argument("y_gradient", "(S, B, T', V, C_out)", y_gradient, sizes.of_y(), x.scalar_type());
  arguments.mean_gradient =
      dense_argument("mean_gradient", "(S, C_out)", mean_gradient, sizes.of_out_channels(), computed);
  arguments.variance_gradient =
      dense_argument("variance_gradient", "(S, C_out)", variance_gradient, sizes.of_out_channels(), computed);
  if (variance_gradient) arguments.mean = dense_argument("mean", "(S, C_out)", mean, sizes.of_out_channels(), computed);
  arguments.with_x_gradient = with_x_gradient;
  return arguments;
}

}  // namespace ikem_fast
