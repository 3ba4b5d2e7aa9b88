// The operators residual_activation and residual_activation_backward on CUDA tensors: checks, outputs, launches.
#include "cuda/residual_activation.h"

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/stable_tensor.h"
#include "math/dropout_mask.h"
#include "ops/residual_activation_checks.h"

namespace ikem_fast::cuda {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor dense(const char* name, const Tensor& tensor, const Tensor& x, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_cuda() &&
                      tensor.get_device_index() == x.get_device_index(),
                  name, " must be of dtype number ", static_cast<int>(type), " on x's device, CUDA ",
                  x.get_device_index(), ", got dtype number ", static_cast<int>(tensor.scalar_type()));
  return torch::stable::contiguous(tensor);
}

std::optional<Tensor> dense(const char* name, const std::optional<Tensor>& tensor, const Tensor& x, ScalarType type) {
  if (!tensor) return std::nullopt;
  return dense(name, *tensor, x, type);
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// Arguments in one piece each, and what the launchers want to know of them.
struct Arguments {
  Arguments(const Tensor& given_x, const Tensor& given_scale, const Tensor& given_shift,
            const std::optional<Tensor>& given_residual, const std::optional<Tensor>& given_residual_scale,
            const std::optional<Tensor>& given_residual_shift, double dropout, const std::optional<Tensor>& given_seed,
            int64_t layer, int64_t pool)
      : x(torch::stable::contiguous(given_x)), scale(dense("scale", given_scale, x, ScalarType::Float)),
        shift(dense("shift", given_shift, x, ScalarType::Float)),
        residual(dense("residual", given_residual, x, x.scalar_type())),
        residual_scale(dense("residual_scale", given_residual_scale, x, ScalarType::Float)),
        residual_shift(dense("residual_shift", given_residual_shift, x, ScalarType::Float)),
        seed(dense("seed", given_seed, x, ScalarType::Long)) {
    const auto sizes_or_none = [](const std::optional<Tensor>& tensor) -> std::optional<std::vector<int64_t>> {
      if (!tensor) return std::nullopt;
      return sizes_of(*tensor);
    };
    const std::string problem = find_residual_activation_problem(
        {sizes_of(x), sizes_of(scale), sizes_of(shift), sizes_or_none(residual), sizes_or_none(residual_scale),
         sizes_or_none(residual_shift), sizes_or_none(seed)},
        dropout, layer, pool);
    STD_TORCH_CHECK(problem.empty(), problem);
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16,
                    "x must be float32 or bfloat16 on CUDA, got dtype number ", static_cast<int>(x.scalar_type()));
    STD_TORCH_CHECK(x.size(0) <= INT32_MAX, "x must have fewer than 2^31 streams, got ", x.size(0));
    input.x = x.const_data_ptr();
    input.residual = data_or_null<void>(residual);
    input.type = element_type("x", x);
    input.scale = static_cast<const float*>(scale.const_data_ptr());
    input.shift = static_cast<const float*>(shift.const_data_ptr());
    input.residual_scale = data_or_null<float>(residual_scale);
    input.residual_shift = data_or_null<float>(residual_shift);
    input.num_streams = static_cast<int>(x.size(0));
    input.rows = x.size(1) * x.size(2) * x.size(3);
    input.channels = x.size(4);
    input.pool_rows = pool * x.size(2) * x.size(3);
    input.threshold = math::dropout_threshold(dropout);
    input.layer = static_cast<uint32_t>(layer);
    input.seed = data_or_null<int64_t>(seed);
    output_sizes = residual_activation_output(sizes_of(x), pool);
    output_type = pool ? ScalarType::Float : x.scalar_type();
  }

  Tensor x, scale, shift;
  std::optional<Tensor> residual, residual_scale, residual_shift, seed;
  ResidualActivationInput input{};
  std::vector<int64_t> output_sizes;
  ScalarType output_type;
};

Tensor residual_activation_op(Tensor x, Tensor scale, Tensor shift, std::optional<Tensor> residual,
                              std::optional<Tensor> residual_scale, std::optional<Tensor> residual_shift,
                              double dropout, std::optional<Tensor> seed, int64_t layer, int64_t pool) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Arguments arguments(x, scale, shift, residual, residual_scale, residual_shift, dropout, seed, layer, pool);
  Tensor out = torch::stable::new_empty(arguments.x, arguments.output_sizes, arguments.output_type);
  if (x.numel() == 0) {
    torch::stable::fill_(out, std::numeric_limits<double>::quiet_NaN());  // the mean of nothing, as everywhere
    return out;
  }
  const cudaError_t error = residual_activation(out.mutable_data_ptr(), arguments.input, current_stream(x));
  STD_TORCH_CHECK(error == cudaSuccess, "residual_activation cannot run on x ", describe_sizes(x), ": ",
                  cudaGetErrorString(error));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> residual_activation_backward_op(
    Tensor x, Tensor scale, Tensor shift, std::optional<Tensor> residual, std::optional<Tensor> residual_scale,
    std::optional<Tensor> residual_shift, double dropout, std::optional<Tensor> seed, int64_t layer, int64_t pool,
    Tensor gradient) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Arguments arguments(x, scale, shift, residual, residual_scale, residual_shift, dropout, seed, layer, pool);
  STD_TORCH_CHECK(sizes_of(gradient) == arguments.output_sizes, "gradient must be like the result, got ",
                  describe_sizes(gradient));
  const Tensor dense_gradient = dense("gradient", gradient, x, arguments.output_type);
  const auto make = [&](bool given, std::vector<int64_t> sizes, ScalarType type) {
    return torch::stable::new_empty(arguments.x, given ? sizes : std::vector<int64_t>{0}, type);
  };
  const std::vector<int64_t> sizes = sizes_of(x), coefficients = sizes_of(scale);
  const bool is_scaled = arguments.residual_scale.has_value();
  Tensor of_x = make(true, sizes, x.scalar_type());
  Tensor of_residual = make(residual.has_value(), sizes, residual ? x.scalar_type() : ScalarType::Float);
  Tensor sums[] = {make(true, coefficients, ScalarType::Float), make(true, coefficients, ScalarType::Float),
                   make(is_scaled, coefficients, ScalarType::Float), make(is_scaled, coefficients, ScalarType::Float)};
  if (x.numel() == 0) {
    for (Tensor& sum : sums) torch::stable::zero_(sum);
  } else {
    Tensor scratch = torch::stable::new_empty(
        arguments.x, {residual_activation_scratch_size(arguments.input)}, ScalarType::Float);
    ResidualActivationGradients gradients{};
    gradients.out = dense_gradient.const_data_ptr();
    gradients.x = of_x.mutable_data_ptr();
    gradients.residual = residual ? of_residual.mutable_data_ptr() : nullptr;
    for (int i = 0; i < (is_scaled ? 4 : 2); ++i) gradients.sums[i] = static_cast<float*>(sums[i].mutable_data_ptr());
    gradients.scratch = static_cast<float*>(scratch.mutable_data_ptr());
    const cudaError_t error = residual_activation_backward(gradients, arguments.input, current_stream(x));
    STD_TORCH_CHECK(error == cudaSuccess, "residual_activation_backward cannot run on x ", describe_sizes(x), ": ",
                    cudaGetErrorString(error));
  }
  return {of_x, sums[0], sums[1], of_residual, sums[2], sums[3]};
}

}  // namespace

}  // namespace ikem_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ikem_fast, CUDA, m) {
  m.impl("residual_activation", TORCH_BOX(&ikem_fast::cuda::residual_activation_op));
  m.impl("residual_activation_backward", TORCH_BOX(&ikem_fast::cuda::residual_activation_backward_op));
}
