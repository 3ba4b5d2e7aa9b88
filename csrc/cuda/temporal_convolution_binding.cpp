// The operators _temporal_convolution_direct and _temporal_convolution_direct_backward: checks, outputs, launches.
#include "cuda/temporal_convolution.h"

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/stable_tensor.h"
#include "ops/temporal_convolution_checks.h"

namespace ikem_fast::cuda {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

float* floats(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// The tensors of an operator, dense and from a multiple of 16 bytes on, on the device of x.
class Arguments {
 public:
  Arguments(const Tensor& x, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
            const Tensor& weight, int64_t stride)
      : guard_(x.get_device_index()), x_(x) {
    const std::string problem = find_temporal_convolution_problem(sizes_of(x), sizes_of(weight), stride);
    STD_TORCH_CHECK(problem.empty(), problem);
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16,
                    "x must be float32 or bfloat16 on CUDA, got dtype number ", static_cast<int>(x.scalar_type()));
    STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "scale and shift must be given together");
    sizes = temporal_convolution_sizes(sizes_of(x), sizes_of(weight), stride);
    const int64_t vector = x.scalar_type() == ScalarType::Float ? 4 : 8;
    for (const int64_t size : {sizes.frames, sizes.joints, sizes.in_channels, sizes.out_channels, sizes.taps, stride}) {
      STD_TORCH_CHECK(size <= INT32_MAX, "x and weight must have sizes below 2^31, got ", describe_sizes(x), " and ",
                      describe_sizes(weight));
    }
    STD_TORCH_CHECK(sizes.in_channels % vector == 0 && sizes.out_channels % vector == 0,
                    "x and y must have a multiple of ", vector, " channels, got ", sizes.in_channels, " and ",
                    sizes.out_channels);
    shape = {sizes.streams,
             sizes.sequences,
             static_cast<int>(sizes.frames),
             static_cast<int>(sizes.joints),
             static_cast<int>(sizes.in_channels),
             static_cast<int>(sizes.out_channels),
             static_cast<int>(sizes.taps),
             static_cast<int>(stride)};
    const cudaError_t known =
        cudaDeviceGetAttribute(&shape.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, x.get_device_index());
    STD_TORCH_CHECK(known == cudaSuccess, "the device of x does not tell its sizes: ", cudaGetErrorString(known));
    type = element_type("x", x);
    STD_TORCH_CHECK(find_scratch(scratch, shape, type), "x ", describe_sizes(x), " and weight ",
                    describe_sizes(weight), " are too large for the kernels");
    x_data = of_frames("x", x, sizes.of_x());
    activation = {of_channels("scale", scale, sizes.of_in_channels()),
                  of_channels("shift", shift, sizes.of_in_channels())};
    weight_data = of_channels("weight", weight, sizes.of_weight());
  }
  Arguments(const Arguments&) = delete;

  // Of x's type.
  const void* of_frames(const char* name, const Tensor& tensor, const std::vector<int64_t>& wanted) {
    return keep(name, tensor, wanted, x_.scalar_type()).const_data_ptr();
  }
  const float* of_channels(const char* name, const std::optional<Tensor>& tensor, const std::vector<int64_t>& wanted) {
    if (!tensor) return nullptr;
    return static_cast<const float*>(keep(name, *tensor, wanted, ScalarType::Float).const_data_ptr());
  }

  Tensor empty(const std::vector<int64_t>& of_sizes, ScalarType of_type = ScalarType::Float) const {
    return torch::stable::new_empty(x_, of_sizes, of_type);
  }
  void check_launch(const char* name, cudaError_t error) const {
    STD_TORCH_CHECK(error == cudaSuccess, name, " cannot run on x ", describe_sizes(x_), ": ",
                    cudaGetErrorString(error));
  }
  // The weights as the kernels read them.
  Tensor packed_weights() const {
    Tensor packed = empty({scratch.packed_weights}, x_.scalar_type());
    check_launch("temporal_convolution",
                 pack_temporal_weights(packed.mutable_data_ptr(), type, weight_data, shape, stream()));
    return packed;
  }
  cudaStream_t stream() const { return current_stream(x_); }

  TemporalConvolutionSizes sizes;
  TemporalConvolutionShape shape;
  TemporalConvolutionScratch scratch{};
  ElementType type;
  const void* x_data;
  const float* weight_data;
  ActivationInput activation;

 private:
  // Kept as long as this is.
  const Tensor& keep(const char* name, const Tensor& tensor, const std::vector<int64_t>& wanted, ScalarType of_type) {
    STD_TORCH_CHECK(tensor.scalar_type() == of_type && sizes_of(tensor) == wanted && tensor.is_cuda() &&
                        tensor.get_device_index() == x_.get_device_index(),
                    name, " must be ", describe_shape(wanted), " of dtype number ", static_cast<int>(of_type),
                    " on x's device, CUDA ", x_.get_device_index(), ", got ", describe_sizes(tensor),
                    " of dtype number ", static_cast<int>(tensor.scalar_type()));
    kept_.push_back(torch::stable::contiguous(tensor));
    if (reinterpret_cast<uintptr_t>(kept_.back().const_data_ptr()) % 16 != 0) {
      kept_.back() = torch::stable::clone(kept_.back());
    }
    return kept_.back();
  }

  torch::stable::accelerator::DeviceGuard guard_;
  const Tensor& x_;
  std::vector<Tensor> kept_;
};

std::tuple<Tensor, Tensor, Tensor> direct_op(const Tensor& x, std::optional<Tensor> scale, std::optional<Tensor> shift,
                                             const Tensor& weight, const Tensor& bias, int64_t stride, bool statistics,
                                             std::optional<Tensor> output_scale, std::optional<Tensor> output_shift,
                                             std::optional<Tensor> residual) {
  Arguments arguments(x, scale, shift, weight, stride);
  STD_TORCH_CHECK(output_scale.has_value() == output_shift.has_value(),
                  "output_scale and output_shift must be given together");
  STD_TORCH_CHECK(!(statistics && output_scale), "statistics must be False with output_scale, got True");
  STD_TORCH_CHECK(!residual || output_scale, "residual must be given with output_scale and output_shift");
  const std::vector<int64_t> channels = arguments.sizes.of_out_channels();
  Tensor y = arguments.empty(arguments.sizes.of_y(), x.scalar_type());
  Tensor mean = arguments.empty(statistics ? channels : std::vector<int64_t>{0});
  Tensor variance = arguments.empty(statistics ? channels : std::vector<int64_t>{0});
  Tensor moments = arguments.empty({statistics ? arguments.scratch.moments : 0});
  Tensor packed = arguments.packed_weights();
  TemporalConvolutionResult result{};
  result.y = y.mutable_data_ptr();
  result.bias = arguments.of_channels("bias", bias, channels);
  result.output_scale = arguments.of_channels("output_scale", output_scale, channels);
  result.output_shift = arguments.of_channels("output_shift", output_shift, channels);
  if (residual) result.residual = arguments.of_frames("residual", *residual, arguments.sizes.of_y());
  if (statistics) {
    result.with_statistics = true;
    result.moments = floats(moments);
    result.mean = floats(mean);
    result.variance = floats(variance);
  }
  arguments.check_launch("temporal_convolution",
                         temporal_convolution(result, arguments.x_data, arguments.type, arguments.activation,
                                              packed.const_data_ptr(), arguments.shape, arguments.stream()));
  return {y, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> direct_backward_op(
    const Tensor& x, std::optional<Tensor> scale, std::optional<Tensor> shift, const Tensor& weight, int64_t stride,
    const Tensor& y, const Tensor& mean, const Tensor& y_gradient, std::optional<Tensor> mean_gradient,
    std::optional<Tensor> variance_gradient, bool with_x_gradient) {
  Arguments arguments(x, scale, shift, weight, stride);
  const auto& sizes = arguments.sizes;
  const void* given = arguments.of_frames("y_gradient", y_gradient, sizes.of_y());
  GradientInput gradient{};
  gradient.mean_gradient = arguments.of_channels("mean_gradient", mean_gradient, sizes.of_out_channels());
  gradient.variance_gradient = arguments.of_channels("variance_gradient", variance_gradient, sizes.of_out_channels());
  if (variance_gradient) {
    gradient.y = arguments.of_frames("y", y, sizes.of_y());
    gradient.mean = arguments.of_channels("mean", mean, sizes.of_out_channels());
  }
  gradient.inverse_count = sizes.values() > 0 ? static_cast<float>(1.0 / static_cast<double>(sizes.values())) : 0.0f;

  const std::vector<int64_t> nothing{0};
  Tensor x_gradient = arguments.empty(with_x_gradient ? sizes.of_x() : nothing, x.scalar_type());
  Tensor scale_gradient = arguments.empty(scale ? sizes.of_in_channels() : nothing);
  Tensor shift_gradient = arguments.empty(scale ? sizes.of_in_channels() : nothing);
  Tensor weight_gradient = arguments.empty(sizes.of_weight());
  Tensor bias_gradient = arguments.empty(sizes.of_out_channels());
  if (with_x_gradient || scale) {
    Tensor packed = arguments.packed_weights();
    Tensor coefficient_sums = arguments.empty({scale ? arguments.scratch.coefficient_sums : 0});
    TemporalXGradient result{};
    if (with_x_gradient) result.x_gradient = x_gradient.mutable_data_ptr();
    result.coefficient_sums = floats(coefficient_sums);
    result.scale_gradient = floats(scale_gradient);
    result.shift_gradient = floats(shift_gradient);
    arguments.check_launch("temporal_convolution_backward",
                           temporal_convolution_x_gradient(result, arguments.x_data, arguments.type,
                                                           arguments.activation, given, gradient,
                                                           packed.const_data_ptr(), arguments.shape,
                                                           arguments.stream()));
  }
  Tensor weight_sums = arguments.empty({arguments.scratch.weight_sums});
  arguments.check_launch(
      "temporal_convolution_backward",
      temporal_convolution_weight_gradient({floats(weight_gradient), floats(bias_gradient), floats(weight_sums)},
                                           arguments.x_data, arguments.type, arguments.activation, given, gradient,
                                           arguments.shape, arguments.stream()));
  return {x_gradient, scale_gradient, shift_gradient, weight_gradient, bias_gradient};
}

}  // namespace

}  // namespace ikem_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ikem_fast, CUDA, m) {
  m.impl("_temporal_convolution_direct", TORCH_BOX(&ikem_fast::cuda::direct_op));
  m.impl("_temporal_convolution_direct_backward", TORCH_BOX(&ikem_fast::cuda::direct_backward_op));
}
