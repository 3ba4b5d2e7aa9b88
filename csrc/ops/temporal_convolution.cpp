#include "ops/temporal_convolution.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/temporal_convolution.h"
#include "ops/numbers.h"
#include "ops/temporal_convolution_spectral.h"

namespace ikem_fast {

namespace {

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
  find_numbers(x);  // for its check
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

void set_inputs(cpu::FrameConvolution& parameters, const TemporalConvolution& arguments) {
  parameters.numbers = find_numbers(arguments.x);
  parameters.sizes = arguments.sizes;
  parameters.x = arguments.x.const_data_ptr();
  parameters.scale = data_or_null(arguments.scale);
  parameters.shift = data_or_null(arguments.shift);
  parameters.weight = arguments.weight.const_data_ptr();
}

at::Tensor pack_weights(cpu::FrameConvolution& parameters, bool backward) {
  const int64_t bytes = IKEM_DISPATCH_CPU(packed_frame_weight_bytes)(parameters, backward);
  const at::Tensor packed = at::empty({parameters.sizes.streams, bytes}, at::kByte);
  auto* data = static_cast<char*>(packed.mutable_data_ptr());
  const auto pack = IKEM_DISPATCH_CPU(pack_frame_weight);
  at::parallel_for(0, parameters.sizes.streams, 1, [&](int64_t first, int64_t last) {
    for (int64_t stream = first; stream < last; ++stream) {
      pack(parameters, backward, stream, data + stream * bytes);
    }
  });
  parameters.packed = data;
  return packed;
}

// Sequences [first, last) of a stream, that one thread works on.
struct Segment {
  int64_t stream, first, last;
};

// The sequences of all streams in equal shares for the threads. A stream's sums are those of its segments, in order.
// There is at least one sequence.
struct Segments {
  explicit Segments(const TemporalConvolutionSizes& sizes) {
    // Fewer products than these are not worth another thread.
    constexpr double kProductsOfAThread = 1 << 18;
    const double products = static_cast<double>(sizes.streams) * static_cast<double>(sizes.values()) *
                            static_cast<double>(sizes.out_channels * sizes.in_channels * sizes.taps);
    const int64_t sequences = sizes.streams * sizes.sequences;
    const int64_t threads = std::clamp<int64_t>(static_cast<int64_t>(std::min(products / kProductsOfAThread, 1e6)), 1,
                                                std::min<int64_t>(at::get_num_threads(), sequences));
    for (int64_t thread = 0; thread < threads; ++thread) {
      first_of_thread.push_back(static_cast<int64_t>(all.size()));
      const int64_t end = sequences * (thread + 1) / threads;
      for (int64_t sequence = sequences * thread / threads; sequence < end;) {
        const int64_t stream = sequence / sizes.sequences, begin = stream * sizes.sequences;
        const int64_t last = std::min(end, begin + sizes.sequences);
        all.push_back({stream, sequence - begin, last - begin});
        sequence = last;
      }
    }
    first_of_thread.push_back(static_cast<int64_t>(all.size()));
  }

  // Calls work(number of the segment) for all of them.
  template <typename Work>
  void run(const Work& work) const {
    at::parallel_for(0, static_cast<int64_t>(first_of_thread.size()) - 1, 1, [&](int64_t first, int64_t last) {
      for (int64_t segment = first_of_thread[first]; segment < first_of_thread[last]; ++segment) {
        work(segment);
      }
    });
  }

  std::vector<Segment> all;
  std::vector<int64_t> first_of_thread;
};

// One number a channel, from double.
void write_row(const at::Tensor& to, int64_t row, const double* values) {
  const int64_t size = to.size(1);
  if (to.scalar_type() == at::kDouble) {
    std::copy_n(values, size, to.mutable_data_ptr<double>() + row * size);
  } else {
    std::transform(values, values + size, to.mutable_data_ptr<float>() + row * size,
                   [](double value) { return static_cast<float>(value); });
  }
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
  arguments.output_scale =
      dense_argument("output_scale", "(S, C_out)", output_scale, sizes.of_out_channels(), computed);
  arguments.output_shift =
      dense_argument("output_shift", "(S, C_out)", output_shift, sizes.of_out_channels(), computed);
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

std::tuple<at::Tensor, at::Tensor, at::Tensor> temporal_convolution_direct(const TemporalConvolution& arguments) {
  const auto& sizes = arguments.sizes;
  const auto computed = arguments.weight.options();
  const at::Tensor y = at::empty(sizes.of_y(), arguments.x.options());
  const at::Tensor mean = at::zeros(arguments.statistics ? sizes.of_out_channels() : std::vector<int64_t>{0}, computed);
  const at::Tensor variance = at::zeros_like(mean);
  if (y.numel() == 0) return {y, mean, variance};

  cpu::FrameConvolutionForward parameters;
  set_inputs(parameters, arguments);
  parameters.bias = arguments.bias.const_data_ptr();
  parameters.output_scale = data_or_null(arguments.output_scale);
  parameters.output_shift = data_or_null(arguments.output_shift);
  parameters.residual = data_or_null(arguments.residual);
  parameters.y = y.mutable_data_ptr();
  parameters.statistics = arguments.statistics;
  const at::Tensor packed = pack_weights(parameters, false);

  const Segments segments(sizes);
  const int64_t channels = sizes.out_channels;
  std::vector<cpu::Moments> moments(arguments.statistics ? segments.all.size() * channels : 0);
  const auto convolve = IKEM_DISPATCH_CPU(convolve_frames);
  segments.run([&](int64_t segment) {
    const auto& [stream, first, last] = segments.all[segment];
    convolve(parameters, stream, first, last, moments.data() + (arguments.statistics ? segment * channels : 0));
  });
  if (!arguments.statistics) return {y, mean, variance};

  std::vector<cpu::Moments> sums(sizes.streams * channels);
  for (size_t i = 0; i < moments.size(); ++i) {
    sums[segments.all[i / channels].stream * channels + i % channels].add(moments[i]);
  }
  std::vector<double> means, variances;
  for (const cpu::Moments& sum : sums) {
    means.push_back(sum.mean);
    variances.push_back(sum.squares / sum.count);
  }
  for (int64_t stream = 0; stream < sizes.streams; ++stream) {
    write_row(mean, stream, means.data() + stream * channels);
    write_row(variance, stream, variances.data() + stream * channels);
  }
  return {y, mean, variance};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> temporal_convolution_direct_backward(
    const TemporalConvolutionBackward& arguments) {
  const TemporalConvolution& forward = arguments.forward;
  const auto& sizes = forward.sizes;
  const auto computed = forward.weight.options();
  const bool has_scale = forward.scale.defined();
  const at::Tensor of_x =
      at::empty(arguments.with_x_gradient ? sizes.of_x() : std::vector<int64_t>{0}, forward.x.options());
  const at::Tensor of_scale = at::zeros(has_scale ? sizes.of_in_channels() : std::vector<int64_t>{0}, computed);
  const at::Tensor of_shift = at::zeros_like(of_scale);
  const at::Tensor of_weight = at::zeros(sizes.of_weight(), computed);
  const at::Tensor of_bias = at::zeros(sizes.of_out_channels(), computed);
  if (sizes.values() == 0) return {of_x, of_scale, of_shift, of_weight, of_bias};

  cpu::FrameConvolutionBackward parameters;
  set_inputs(parameters, forward);
  parameters.y = arguments.y.const_data_ptr();
  parameters.mean = data_or_null(arguments.mean);
  parameters.y_gradient = arguments.y_gradient.const_data_ptr();
  parameters.mean_gradient = data_or_null(arguments.mean_gradient);
  parameters.variance_gradient = data_or_null(arguments.variance_gradient);
  parameters.x_gradient = arguments.with_x_gradient ? of_x.mutable_data_ptr() : nullptr;
  const at::Tensor packed = pack_weights(parameters, true);

  const Segments segments(sizes);
  const int64_t num_segments = static_cast<int64_t>(segments.all.size());
  const at::Tensor weight_sums =
      at::empty({num_segments, IKEM_DISPATCH_CPU(frame_weight_sums)(parameters)}, computed);
  const auto weight_sum = [&](int64_t segment) {
    const int64_t bytes = weight_sums.size(1) * static_cast<int64_t>(weight_sums.element_size());
    return static_cast<char*>(weight_sums.mutable_data_ptr()) + segment * bytes;
  };
  const int64_t in = sizes.in_channels, out = sizes.out_channels, size = out + 2 * in;
  std::vector<double> channel_sums(num_segments * size, 0.0);
  const auto convolve = IKEM_DISPATCH_CPU(convolve_frames_backward);
  segments.run([&](int64_t segment) {
    const auto& [stream, first, last] = segments.all[segment];
    std::fill_n(weight_sum(segment), weight_sums.size(1) * weight_sums.element_size(), char(0));
    double* channels = channel_sums.data() + segment * size;
    convolve(parameters, stream, first, last, {weight_sum(segment), channels, channels + out, channels + out + in});
  });

  const auto finish_weight = IKEM_DISPATCH_CPU(finish_frame_weight_gradient);
  at::parallel_for(0, sizes.streams, 1, [&](int64_t first_stream, int64_t last_stream) {
    for (int64_t stream = first_stream; stream < last_stream; ++stream) {
      std::vector<void*> of_stream;
      std::vector<double> sums(size, 0.0);
      for (int64_t segment = 0; segment < num_segments; ++segment) {
        if (segments.all[segment].stream != stream) continue;
        of_stream.push_back(weight_sum(segment));
        for (int64_t i = 0; i < size; ++i) sums[i] += channel_sums[segment * size + i];
      }
      finish_weight(parameters, of_stream.data(), static_cast<int64_t>(of_stream.size()),
                    of_weight.select(0, stream).mutable_data_ptr());
      write_row(of_bias, stream, sums.data());
      if (has_scale) {
        write_row(of_scale, stream, sums.data() + out);
        write_row(of_shift, stream, sums.data() + out + in);
      }
    }
  });
  return {of_x, of_scale, of_shift, of_weight, of_bias};
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> temporal_convolution(
    const at::Tensor& x, const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift,
    const at::Tensor& weight, const at::Tensor& bias, int64_t stride, bool statistics,
    const std::optional<at::Tensor>& output_scale, const std::optional<at::Tensor>& output_shift,
    const std::optional<at::Tensor>& residual) {
  const TemporalConvolution arguments = check_temporal_convolution(x, scale, shift, weight, bias, stride, statistics,
                                                                   output_scale, output_shift, residual);
  return prefers_spectral(arguments.sizes) ? temporal_convolution_spectral(arguments)
                                           : temporal_convolution_direct(arguments);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> temporal_convolution_backward(
    const at::Tensor& x, const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift,
    const at::Tensor& weight, int64_t stride, const at::Tensor& y, const at::Tensor& mean, const at::Tensor& y_gradient,
    const std::optional<at::Tensor>& mean_gradient, const std::optional<at::Tensor>& variance_gradient,
    bool with_x_gradient) {
  const TemporalConvolutionBackward arguments = check_temporal_convolution_backward(
      x, scale, shift, weight, stride, y, mean, y_gradient, mean_gradient, variance_gradient, with_x_gradient);
  return prefers_spectral(arguments.forward.sizes) ? temporal_convolution_spectral_backward(arguments)
                                                   : temporal_convolution_direct_backward(arguments);
}

}  // namespace

TORCH_LIBRARY_IMPL(ikem_fast, CPU, m) {
  m.impl("temporal_convolution", &temporal_convolution);
  m.impl("temporal_convolution_backward", &temporal_convolution_backward);
}

}  // namespace ikem_fast
