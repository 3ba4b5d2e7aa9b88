// The operators graph_convolution and graph_convolution_backward on CUDA tensors: checks, outputs, launches.
#include "cuda/graph_convolution.h"

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/partial_statistics.h"
#include "cuda/stable_tensor.h"
#include "ops/graph_convolution_checks.h"

namespace ikem_fast::cuda {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

float* mutable_floats(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// The tensors of an operator, dense, on the device of x.
class Arguments {
 public:
  Arguments(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& importance,
            const Tensor& adjacency, const Tensor& edges, int64_t stride)
      : guard_(x.get_device_index()), x_(x) {
    const std::string problem =
        find_graph_convolution_problem(sizes_of(x), sizes_of(weight), sizes_of(bias), sizes_of(importance),
                                       sizes_of(adjacency), sizes_of(edges), stride, sizes);
    STD_TORCH_CHECK(problem.empty(), problem);
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16,
                    "x must be float32 or bfloat16 on CUDA, got dtype number ", static_cast<int>(x.scalar_type()));
    STD_TORCH_CHECK(sizes.joints <= kMaxGraphJoints && sizes.partitions <= kMaxGraphPartitions && sizes.in_channels >= 1,
                    "x must have at most ", static_cast<int>(kMaxGraphJoints), " joints, at most ",
                    static_cast<int>(kMaxGraphPartitions), " partitions and at least one channel on CUDA, got ",
                    sizes.joints, ", ", sizes.partitions, " and ", sizes.in_channels);
    for (const int64_t size : {sizes.frames, sizes.in_channels, sizes.out_channels, sizes.edges, sizes.stride,
                               sizes.batch * sizes.out_frames}) {
      STD_TORCH_CHECK(size <= INT32_MAX / 2, "x must have sizes below 2^30 and as few frames on CUDA, got ",
                      describe_sizes(x));
    }
    input.shape = {sizes.streams,
                   sizes.batch,
                   static_cast<int>(sizes.frames),
                   static_cast<int>(sizes.stride),
                   static_cast<int>(sizes.joints),
                   static_cast<int>(sizes.partitions),
                   static_cast<int>(sizes.in_channels),
                   static_cast<int>(sizes.out_channels),
                   static_cast<int>(sizes.edges)};
    input.type = element_type("x", x);
    input.x = keep("x", x, x.scalar_type()).const_data_ptr();
    input.weight = floats(keep("weight", weight, ScalarType::Float));
    input.bias = floats(keep("bias", bias, ScalarType::Float));
    input.importance = floats(keep("importance", importance, ScalarType::Float));
    input.adjacency = floats(keep("adjacency", adjacency, ScalarType::Float));
    input.edges = static_cast<const int32_t*>(keep("edges", edges, ScalarType::Int).const_data_ptr());
    const auto attribute = [&](cudaDeviceAttr name) {
      int value = 0;
      const cudaError_t error = cudaDeviceGetAttribute(&value, name, x.get_device_index());
      STD_TORCH_CHECK(error == cudaSuccess, "the device of x does not tell its sizes: ", cudaGetErrorString(error));
      return value;
    };
    device = {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  }
  Arguments(const Arguments&) = delete;

  // A dense tensor of the wanted type, kept as long as this is.
  const Tensor& keep(const char* name, const Tensor& tensor, ScalarType type) {
    STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must be of dtype number ", static_cast<int>(type), ", got ",
                    describe_sizes(tensor), " of dtype number ", static_cast<int>(tensor.scalar_type()));
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x_.get_device_index(), name,
                    " must be on x's device, CUDA ", x_.get_device_index());
    kept_.push_back(torch::stable::contiguous(tensor));
    return kept_.back();
  }
  const Tensor& keep_sized(const char* name, const Tensor& tensor, const std::vector<int64_t>& wanted, ScalarType type) {
    STD_TORCH_CHECK(sizes_of(tensor) == wanted, name, " must be ", write_sizes(wanted), ", got ",
                    describe_sizes(tensor));
    return keep(name, tensor, type);
  }

  Tensor empty(const std::vector<int64_t>& of_sizes, ScalarType type) const {
    return torch::stable::new_empty(x_, of_sizes, type);
  }
  Tensor zeros(const std::vector<int64_t>& of_sizes, ScalarType type) const {
    return torch::stable::new_zeros(x_, of_sizes, type);
  }
  void check_launch(const char* name, cudaError_t error) const {
    STD_TORCH_CHECK(error == cudaSuccess, name, " cannot run on x ", describe_sizes(x_), ": ",
                    cudaGetErrorString(error));
  }

  std::vector<int64_t> y_sizes() const {
    return {sizes.streams, sizes.batch, sizes.out_frames, sizes.joints, sizes.out_channels};
  }
  std::vector<int64_t> channel_sizes() const { return {sizes.streams, sizes.out_channels}; }
  bool has_values() const {
    return sizes.streams * sizes.batch * sizes.out_frames * sizes.joints * sizes.out_channels > 0;
  }
  cudaStream_t stream() const { return current_stream(x_); }

  GraphConvolutionSizes sizes;
  GraphConvolutionInput input;
  GraphConvolutionDevice device;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  const Tensor& x_;
  std::vector<Tensor> kept_;
};

std::tuple<Tensor, Tensor, Tensor> graph_convolution_op(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                        const Tensor& importance, const Tensor& adjacency,
                                                        const Tensor& edges, int64_t stride, bool statistics,
                                                        std::optional<Tensor> output_scale,
                                                        std::optional<Tensor> output_shift, bool output_activation) {
  Arguments arguments(x, weight, bias, importance, adjacency, edges, stride);
  STD_TORCH_CHECK(output_scale.has_value() == output_shift.has_value(),
                  "output_scale and output_shift must be given together");
  STD_TORCH_CHECK(!output_scale || !statistics, "statistics must be False with output_scale, got True");
  GraphConvolutionOutput output{nullptr, nullptr, nullptr, nullptr, output_activation};
  if (output_scale) {
    output.scale =
        floats(arguments.keep_sized("output_scale", *output_scale, arguments.channel_sizes(), ScalarType::Float));
    output.shift =
        floats(arguments.keep_sized("output_shift", *output_shift, arguments.channel_sizes(), ScalarType::Float));
  }
  Tensor y = arguments.empty(arguments.y_sizes(), x.scalar_type());
  const std::vector<int64_t> statistics_sizes = statistics ? arguments.channel_sizes() : std::vector<int64_t>{0};
  if (!arguments.has_values()) {
    return {y, arguments.zeros(statistics_sizes, ScalarType::Float),
            arguments.zeros(statistics_sizes, ScalarType::Float)};
  }
  Tensor mean = arguments.empty(statistics_sizes, ScalarType::Float);
  Tensor variance = arguments.empty(statistics_sizes, ScalarType::Float);
  const auto& sizes = arguments.sizes;
  const int slots =
      statistics ? graph_convolution_slots(arguments.input.shape, arguments.input.type, arguments.device) : 0;
  Tensor moments = arguments.empty({sizes.streams, slots, 3, sizes.out_channels}, ScalarType::Float);
  output.y = y.mutable_data_ptr();
  if (statistics) output.moments = mutable_floats(moments);
  const cudaStream_t stream = arguments.stream();
  arguments.check_launch("graph_convolution", graph_convolution(output, arguments.input, arguments.device, stream));
  if (statistics) {
    const PartialStatistics partial{floats(moments), sizes.streams, slots, sizes.out_channels};
    arguments.check_launch("graph_convolution", combine_channel_statistics(mutable_floats(mean), mutable_floats(variance),
                                                                           partial, stream));
  }
  return {y, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> graph_convolution_backward_op(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& importance, const Tensor& adjacency,
    const Tensor& edges, int64_t stride, const Tensor& y, const Tensor& mean, const Tensor& y_gradient,
    std::optional<Tensor> mean_gradient, std::optional<Tensor> variance_gradient, bool with_x_gradient) {
  Arguments arguments(x, weight, bias, importance, adjacency, edges, stride);
  const std::vector<int64_t> x_sizes = with_x_gradient ? sizes_of(x) : std::vector<int64_t>{0};
  if (!arguments.has_values()) {
    return {arguments.zeros(x_sizes, x.scalar_type()), arguments.zeros(sizes_of(weight), ScalarType::Float),
            arguments.zeros(sizes_of(bias), ScalarType::Float), arguments.zeros(sizes_of(importance), ScalarType::Float)};
  }
  GraphConvolutionGradients gradients{};
  gradients.y_gradient =
      arguments.keep_sized("y_gradient", y_gradient, arguments.y_sizes(), x.scalar_type()).const_data_ptr();
  if (mean_gradient) {
    gradients.mean_gradient =
        floats(arguments.keep_sized("mean_gradient", *mean_gradient, arguments.channel_sizes(), ScalarType::Float));
  }
  if (variance_gradient) {
    gradients.variance_gradient = floats(
        arguments.keep_sized("variance_gradient", *variance_gradient, arguments.channel_sizes(), ScalarType::Float));
    gradients.mean = floats(arguments.keep_sized("mean", mean, arguments.channel_sizes(), ScalarType::Float));
    gradients.y = arguments.keep_sized("y", y, arguments.y_sizes(), x.scalar_type()).const_data_ptr();
  }
  Tensor x_gradient = arguments.empty(x_sizes, x.scalar_type());
  Tensor weight_gradient = arguments.empty(sizes_of(weight), ScalarType::Float);
  Tensor bias_gradient = arguments.empty(sizes_of(bias), ScalarType::Float);
  Tensor importance_gradient = arguments.empty(sizes_of(importance), ScalarType::Float);
  Tensor workspace = arguments.empty(
      {graph_convolution_backward_workspace(arguments.input.shape, arguments.input.type, arguments.device)},
      ScalarType::Float);
  if (with_x_gradient) gradients.x_gradient = x_gradient.mutable_data_ptr();
  gradients.weight_gradient = mutable_floats(weight_gradient);
  gradients.bias_gradient = mutable_floats(bias_gradient);
  gradients.importance_gradient = mutable_floats(importance_gradient);
  gradients.workspace = mutable_floats(workspace);
  arguments.check_launch("graph_convolution_backward",
                         graph_convolution_backward(gradients, arguments.input, arguments.device, arguments.stream()));
  return {x_gradient, weight_gradient, bias_gradient, importance_gradient};
}

}  // namespace

}  // namespace ikem_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ikem_fast, CUDA, m) {
  m.impl("graph_convolution", TORCH_BOX(&ikem_fast::cuda::graph_convolution_op));
  m.impl("graph_convolution_backward", TORCH_BOX(&ikem_fast::cuda::graph_convolution_backward_op));
}
