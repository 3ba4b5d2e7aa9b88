#include "ops/temporal_convolution_spectral.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/temporal_convolution_spectral.h"
#include "math/spectral_convolution.h"
#include "ops/numbers.h"

namespace ikem_fast {

namespace {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

math::ConvolutionCosts costs_of(const TemporalConvolutionSizes& sizes) {
  return {sizes.frames, sizes.taps, sizes.in_channels, sizes.out_channels,
          static_cast<double>(std::max<int64_t>(sizes.sequences * sizes.joints, 1))};
}

void set_parameters(const TemporalConvolution& arguments, cpu::SpectralConvolution& parameters) {
  const TemporalConvolutionSizes& sizes = arguments.sizes;
  TORCH_CHECK_VALUE(sizes.stride == 1, "stride must be 1 in the spectral form, got ", sizes.stride);
  parameters.numbers = find_numbers(arguments.x);
  parameters.plan = math::choose_spectral_plan(costs_of(sizes));
  parameters.sequences = sizes.sequences;
  parameters.frames = sizes.frames;
  parameters.joints = sizes.joints;
  parameters.in_channels = sizes.in_channels;
  parameters.out_channels = sizes.out_channels;
  parameters.taps = sizes.taps;
  parameters.rows = sizes.sequences * parameters.plan.tiles(sizes.frames) * sizes.joints;
  parameters.x = arguments.x.const_data_ptr();
  parameters.scale = data_or_null(arguments.scale);
  parameters.shift = data_or_null(arguments.shift);
  parameters.weight = arguments.weight.const_data_ptr();
}

// Chunks of equal size whose slots take a few MB at most, and enough of them for all threads.
void cut_into_chunks(int64_t streams, int64_t channels, cpu::SpectralConvolution& parameters) {
  constexpr int64_t kMostNumbers = 3 << 18, kMostRows = 60, kFewestRows = 24, kRowBlock = 6;
  const int64_t numbers_of_row = parameters.plan.products() * channels;
  const int64_t most = std::clamp(kMostNumbers / numbers_of_row, kFewestRows, kMostRows);
  const int64_t for_threads = divide_up(streams * parameters.rows, 2 * at::get_num_threads());
  const int64_t chunks = divide_up(parameters.rows, std::min(most, std::max(for_threads, kFewestRows)));
  const int64_t even = divide_up(parameters.rows, std::max<int64_t>(chunks, 1));
  parameters.chunk_rows = std::max<int64_t>(std::min(divide_up(even, kRowBlock) * kRowBlock, parameters.rows), 1);
  parameters.chunks = divide_up(parameters.rows, parameters.chunk_rows);
}

// Calls work(first stream, streams) for groups of streams of which all weights are packed.
template <typename Work>
void for_packed_streams(int64_t streams, bool backward, cpu::SpectralConvolution& parameters, const Work& work) {
  const int64_t bytes = IKEM_DISPATCH_CPU(spectral_packed_size)(parameters);
  const int64_t parts = IKEM_DISPATCH_CPU(spectral_pack_parts)(parameters, backward);
  constexpr int64_t kMostBytes = 8 << 20;  // of a thread
  const int64_t threads = at::get_num_threads();
  const int64_t group = std::clamp<int64_t>(threads * kMostBytes / bytes, 1, streams);
  const at::Tensor packed = at::empty({group * bytes}, at::kByte);
  parameters.packed = packed.mutable_data_ptr();
  const auto pack = IKEM_DISPATCH_CPU(spectral_pack);
  for (int64_t first = 0; first < streams; first += group) {
    const int64_t count = std::min(group, streams - first);
    parameters.first_stream = first;
    at::parallel_for(0, count * parts, 1, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t last = std::min(end, (begin / parts + 1) * parts);
        pack(parameters, backward, first + begin / parts, begin % parts, last - begin / parts * parts);
        begin = last;
      }
    });
    work(first, count);
  }
}

// Calls work(worker, begin, end) for contiguous shares of the items, as many as there are threads.
template <typename Work>
void share(int64_t items, int64_t workers, const Work& work) {
  at::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      work(worker, items * worker / workers, items * (worker + 1) / workers);
    }
  });
}

// Mean and variance of all values from those of chunks (streams, chunks, channels), by Chan, Golub and LeVeque.
template <typename A>
void combine_statistics(const cpu::SpectralForward& parameters, int64_t streams, A* mean, A* variance) {
  const int64_t channels = parameters.out_channels;
  for (int64_t stream = 0; stream < streams; ++stream) {
    std::vector<double> means(channels, 0.0), deviations(channels, 0.0);
    double count = 0;
    for (int64_t chunk = 0; chunk < parameters.chunks; ++chunk) {
      const double more = static_cast<double>(cpu::spectral_chunk_values(parameters, chunk));
      const int64_t at = (stream * parameters.chunks + chunk) * channels;
      const double all = count + more;
      for (int64_t channel = 0; channel < channels; ++channel) {
        const double difference = parameters.mean[at + channel] - means[channel];
        means[channel] += difference * (more / all);
        deviations[channel] += parameters.deviation[at + channel] + difference * difference * (count * more / all);
      }
      count = all;
    }
    for (int64_t channel = 0; channel < channels; ++channel) {
      mean[stream * channels + channel] = static_cast<A>(means[channel]);
      variance[stream * channels + channel] = static_cast<A>(std::max(deviations[channel], 0.0) / count);
    }
  }
}

// sums (streams, chunks, channels) over chunks.
at::Tensor add_chunks(const std::vector<double>& sums, int64_t streams, int64_t chunks, int64_t channels,
                      const at::TensorOptions& options) {
  const at::Tensor result = at::zeros({streams, channels}, options.dtype(at::kDouble));
  double* out = result.mutable_data_ptr<double>();
  for (int64_t stream = 0; stream < streams; ++stream) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int64_t channel = 0; channel < channels; ++channel) {
        out[stream * channels + channel] += sums[(stream * chunks + chunk) * channels + channel];
      }
    }
  }
  return result.to(options.dtype());
}

}  // namespace

bool prefers_spectral(const TemporalConvolutionSizes& sizes) {
  if (sizes.stride != 1) return false;
  constexpr double kMargin = 1.2;  // for what the costs do not see
  const math::ConvolutionCosts costs = costs_of(sizes);
  return kMargin * costs.spectral(math::choose_spectral_plan(costs)) < costs.direct();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> temporal_convolution_spectral(const TemporalConvolution& arguments) {
  const TemporalConvolutionSizes& sizes = arguments.sizes;
  cpu::SpectralForward parameters;
  set_parameters(arguments, parameters);
  cut_into_chunks(sizes.streams, sizes.in_channels + sizes.out_channels, parameters);
  const auto options = arguments.weight.options();
  const at::Tensor y = at::empty(sizes.of_y(), arguments.x.options());
  const auto shape = arguments.statistics ? sizes.of_out_channels() : std::vector<int64_t>{0};
  const at::Tensor mean = at::zeros(shape, options), variance = at::zeros(shape, options);
  if (y.numel() == 0) return {y, mean, variance};

  parameters.bias = arguments.bias.const_data_ptr();
  parameters.output_scale = data_or_null(arguments.output_scale);
  parameters.output_shift = data_or_null(arguments.output_shift);
  parameters.residual = data_or_null(arguments.residual);
  parameters.y = y.mutable_data_ptr();
  std::vector<double> means, deviations;
  if (arguments.statistics) {
    means.resize(sizes.streams * parameters.chunks * sizes.out_channels);
    deviations.resize(means.size());
    parameters.mean = means.data();
    parameters.deviation = deviations.data();
  }
  const auto run = IKEM_DISPATCH_CPU(spectral_forward);
  for_packed_streams(sizes.streams, false, parameters, [&](int64_t, int64_t streams) {
    const int64_t items = streams * parameters.chunks;
    share(items, std::min<int64_t>(items, at::get_num_threads()),
          [&](int64_t, int64_t begin, int64_t end) { run(parameters, begin, end); });
  });
  if (!arguments.statistics) return {y, mean, variance};
  if (options.dtype() == at::kDouble) {
    combine_statistics(parameters, sizes.streams, mean.mutable_data_ptr<double>(), variance.mutable_data_ptr<double>());
  } else {
    combine_statistics(parameters, sizes.streams, mean.mutable_data_ptr<float>(), variance.mutable_data_ptr<float>());
  }
  return {y, mean, variance};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> temporal_convolution_spectral_backward(
    const TemporalConvolutionBackward& arguments) {
  const TemporalConvolution& forward = arguments.forward;
  const TemporalConvolutionSizes& sizes = forward.sizes;
  cpu::SpectralBackward parameters;
  set_parameters(forward, parameters);
  cut_into_chunks(sizes.streams, sizes.in_channels + sizes.out_channels, parameters);
  const auto options = forward.weight.options();
  const at::Tensor x_gradient =
      arguments.with_x_gradient ? at::empty(sizes.of_x(), forward.x.options()) : at::empty({0}, forward.x.options());
  const int64_t streams = sizes.streams, chunks = parameters.chunks;
  std::vector<double> bias_sums(streams * chunks * sizes.out_channels), scale_sums, shift_sums;
  if (forward.scale.defined()) {
    scale_sums.resize(streams * chunks * sizes.in_channels);
    shift_sums.resize(scale_sums.size());
  }
  const bool is_empty = sizes.sequences == 0;
  const at::Tensor weight_gradient = is_empty ? at::zeros(sizes.of_weight(), options)
                                              : at::empty(sizes.of_weight(), options);
  if (!is_empty) {
    parameters.y = arguments.y.const_data_ptr();
    parameters.y_gradient = arguments.y_gradient.const_data_ptr();
    parameters.mean = data_or_null(arguments.mean);
    parameters.mean_gradient = data_or_null(arguments.mean_gradient);
    parameters.variance_gradient = data_or_null(arguments.variance_gradient);
    parameters.x_gradient = arguments.with_x_gradient ? x_gradient.mutable_data_ptr() : nullptr;
    parameters.bias_sums = bias_sums.data();
    parameters.scale_sums = forward.scale.defined() ? scale_sums.data() : nullptr;
    parameters.shift_sums = forward.scale.defined() ? shift_sums.data() : nullptr;
    const auto run = IKEM_DISPATCH_CPU(spectral_backward);
    for_packed_streams(streams, true, parameters, [&](int64_t first, int64_t count) {
      const int64_t items = count * chunks;
      const int64_t workers = std::min<int64_t>(items, at::get_num_threads());
      // A worker that begins inside a stream has memory of its own for that stream's gradient, added afterwards.
      const auto begins_inside = [&](int64_t worker) { return items * worker / workers % chunks != 0; };
      std::vector<at::Tensor> spare(workers);
      for (int64_t worker = 0; worker < workers; ++worker) {
        if (begins_inside(worker)) spare[worker] = at::empty(weight_gradient[0].sizes(), options);
      }
      share(items, workers, [&](int64_t worker, int64_t begin, int64_t end) {
        std::vector<void*> gradients(count);
        for (int64_t stream = 0; stream < count; ++stream) {
          gradients[stream] = static_cast<char*>(weight_gradient.mutable_data_ptr()) +
                              (first + stream) * weight_gradient[0].nbytes();
        }
        if (begins_inside(worker)) gradients[begin / chunks] = spare[worker].mutable_data_ptr();
        run(parameters, begin, end, gradients.data());
      });
      for (int64_t worker = 0; worker < workers; ++worker) {
        if (begins_inside(worker)) weight_gradient[first + items * worker / workers / chunks].add_(spare[worker]);
      }
    });
  }
  const at::Tensor none = at::empty({0}, options);
  const auto of_in_channels = [&](const std::vector<double>& sums) {
    return forward.scale.defined() ? add_chunks(sums, streams, chunks, sizes.in_channels, options) : none.clone();
  };
  return {x_gradient, of_in_channels(scale_sums), of_in_channels(shift_sums), weight_gradient,
          add_chunks(bias_sums, streams, chunks, sizes.out_channels, options)};
}

TORCH_LIBRARY_IMPL(ikem_fast, CPU, m) {
  m.impl("_temporal_convolution_spectral",
         [](const at::Tensor& x, const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift,
            const at::Tensor& weight, const at::Tensor& bias, int64_t stride, bool statistics,
            const std::optional<at::Tensor>& output_scale, const std::optional<at::Tensor>& output_shift,
            const std::optional<at::Tensor>& residual) {
           return temporal_convolution_spectral(check_temporal_convolution(
               x, scale, shift, weight, bias, stride, statistics, output_scale, output_shift, residual));
         });
  m.impl("_temporal_convolution_spectral_backward",
         [](const at::Tensor& x, const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift,
            const at::Tensor& weight, int64_t stride, const at::Tensor& y, const at::Tensor& mean,
            const at::Tensor& y_gradient, const std::optional<at::Tensor>& mean_gradient,
            const std::optional<at::Tensor>& variance_gradient, bool with_x_gradient) {
           return temporal_convolution_spectral_backward(
               check_temporal_convolution_backward(x, scale, shift, weight, stride, y, mean, y_gradient, mean_gradient,
                                                   variance_gradient, with_x_gradient));
         });
}

}  // namespace ikem_fast
