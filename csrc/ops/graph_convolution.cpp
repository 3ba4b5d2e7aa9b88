#include "ops/graph_convolution.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "cpu/graph_convolution.h"
#include "ops/graph_convolution_checks.h"
#include "ops/numbers.h"

namespace ikem_fast {

namespace {

// The arguments, dense, with the plan of the graph.
class Arguments {
 public:
  Arguments(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& importance,
            const at::Tensor& adjacency, const at::Tensor& edges, int64_t stride) {
    const std::string problem = find_graph_convolution_problem(
        x.sizes(), weight.sizes(), bias.sizes(), importance.sizes(), adjacency.sizes(), edges.sizes(), stride, sizes);
    TORCH_CHECK_VALUE(problem.empty(), problem);
    parameters.numbers = find_numbers(x);
    computed = computed_type(x);
    options = x.options().dtype(computed);
    parameters.x = keep("x", x, x.scalar_type());
    parameters.weight = keep("weight", weight, computed);
    parameters.bias = keep("bias", bias, computed);
    parameters.importance = keep("importance", importance, computed);
    parameters.adjacency = keep("adjacency", adjacency, computed);
    parameters.edges = static_cast<const int32_t*>(keep("edges", edges, at::kInt));
    parameters.batch = sizes.batch;
    parameters.frames = sizes.frames;
    parameters.out_frames = sizes.out_frames;
    parameters.joints = sizes.joints;
    parameters.in_channels = sizes.in_channels;
    parameters.out_channels = sizes.out_channels;
    parameters.partitions = sizes.partitions;
    parameters.num_edges = sizes.edges;
    parameters.stride = sizes.stride;
    const std::string edge_problem = find_edge_problem(parameters.edges, sizes);
    TORCH_CHECK_VALUE(edge_problem.empty(), edge_problem);
    make_plan();
    parameters.plan = &plan_;
    parameters.tile = choose_tile();
  }
  Arguments(const Arguments&) = delete;

  // A dense tensor of the wanted type, kept as long as this is.
  const void* keep(const char* name, const at::Tensor& tensor, at::ScalarType type) {
    TORCH_CHECK_VALUE(tensor.scalar_type() == type, name, " must be ", type, ", got ", tensor.scalar_type());
    kept_.push_back(tensor.contiguous());
    return kept_.back().const_data_ptr();
  }

  const void* keep_sized(const char* name, const at::Tensor& tensor, at::IntArrayRef wanted, at::ScalarType type) {
    TORCH_CHECK_VALUE(tensor.sizes() == wanted, name, " must be ", wanted, ", got ", tensor.sizes());
    return keep(name, tensor, type);
  }

  std::vector<int64_t> y_sizes() const {
    return {sizes.streams, sizes.batch, sizes.out_frames, sizes.joints, sizes.out_channels};
  }
  int64_t stream_frames() const { return sizes.batch * sizes.out_frames; }
  bool has_values() const { return sizes.streams * stream_frames() * sizes.joints * sizes.out_channels > 0; }
  const cpu::GraphPlan& plan() const { return plan_; }

  GraphConvolutionSizes sizes;
  cpu::GraphConvolution parameters;
  at::ScalarType computed = at::kFloat;
  at::TensorOptions options;

 private:
  void make_plan() {
    const int64_t joints = sizes.joints, partitions = sizes.partitions;
    const auto edge = [&](int64_t e) { return parameters.edges + 3 * e; };
    // How many joints each partition leads to.
    std::vector<std::vector<bool>> leads(partitions, std::vector<bool>(joints, false));
    for (int64_t e = 0; e < sizes.edges; ++e) leads[edge(e)[0]][edge(e)[2]] = true;
    plan_.partitions.resize(partitions);
    std::iota(plan_.partitions.begin(), plan_.partitions.end(), 0);
    const auto reach = [&](int32_t p) { return std::count(leads[p].begin(), leads[p].end(), true); };
    std::stable_sort(plan_.partitions.begin(), plan_.partitions.end(),
                     [&](int32_t a, int32_t b) { return reach(a) > reach(b); });
    std::vector<int64_t> rank_of(partitions), depth_of(joints, 1);
    for (int64_t r = 0; r < partitions; ++r) {
      rank_of[plan_.partitions[r]] = r;
      for (int64_t w = 0; w < joints; ++w) {
        if (leads[plan_.partitions[r]][w]) depth_of[w] = r + 1;
      }
    }
    // A product of few rows is not worth its own group.
    constexpr int64_t kFewestJoints = 4;
    for (int64_t depth = 1; depth < partitions; ++depth) {
      if (std::count(depth_of.begin(), depth_of.end(), depth) < kFewestJoints) {
        std::replace(depth_of.begin(), depth_of.end(), depth, depth + 1);
      }
    }
    plan_.joints.resize(joints);
    std::iota(plan_.joints.begin(), plan_.joints.end(), 0);
    std::stable_sort(plan_.joints.begin(), plan_.joints.end(),
                     [&](int32_t a, int32_t b) { return depth_of[a] > depth_of[b]; });
    std::vector<int64_t> first_edge(joints + 1, 0);
    for (int64_t e = 0; e < sizes.edges; ++e) ++first_edge[edge(e)[2] + 1];
    std::partial_sum(first_edge.begin(), first_edge.end(), first_edge.begin());
    std::vector<std::vector<cpu::GraphPlan::Departure>> departures(joints);
    for (int64_t position = 0; position < joints; ++position) {
      const int32_t joint = plan_.joints[position];
      const int64_t depth = depth_of[joint];
      if (plan_.groups.empty() || plan_.groups.back().depth != depth) {
        plan_.groups.push_back({position, 0, depth, static_cast<int64_t>(plan_.first_arrival.size())});
      }
      auto& group = plan_.groups.back();
      for (int64_t r = 0; r < depth; ++r) {
        plan_.first_arrival.push_back(static_cast<int32_t>(plan_.arrivals.size()));
        for (int64_t e = first_edge[joint]; e < first_edge[joint + 1]; ++e) {
          if (edge(e)[0] != plan_.partitions[r]) continue;
          plan_.arrivals.push_back({static_cast<int32_t>(e), edge(e)[1]});
          departures[edge(e)[1]].push_back({static_cast<int32_t>(e), static_cast<int32_t>(plan_.groups.size() - 1),
                                            static_cast<int32_t>(group.count), static_cast<int32_t>(r)});
        }
      }
      ++group.count;
    }
    plan_.first_arrival.push_back(static_cast<int32_t>(plan_.arrivals.size()));
    for (const auto& of_joint : departures) {
      plan_.first_departure.push_back(static_cast<int32_t>(plan_.departures.size()));
      plan_.departures.insert(plan_.departures.end(), of_joint.begin(), of_joint.end());
    }
    plan_.first_departure.push_back(static_cast<int32_t>(plan_.departures.size()));
  }

  // So many frames that a tile's rows stay in the caches, and products have enough of them.
  int64_t choose_tile() const {
    const int64_t rows_of_frame = std::max<int64_t>(sizes.joints, 1);
    const int64_t numbers = rows_of_frame * (sizes.partitions * sizes.in_channels + sizes.out_channels);
    constexpr int64_t kNumbers = 1 << 16;
    const int64_t frames = kNumbers / std::max<int64_t>(numbers, 1);
    return frames < 4 ? std::max<int64_t>(frames, 1) : std::min<int64_t>(frames / 4 * 4, 16);
  }

  cpu::GraphPlan plan_;
  std::vector<at::Tensor> kept_;
};

// A worker's part of a stream.
struct Segment {
  int64_t stream, first, last;  // output frames
};

// The output frames of all streams, shared out evenly among workers; their segments in order.
class Work {
 public:
  explicit Work(const Arguments& arguments) {
    const auto& sizes = arguments.sizes;
    // Fewer products than these are not worth another thread.
    constexpr double kProductsOfAWorker = 1 << 18;
    const double products = static_cast<double>(sizes.streams) * arguments.stream_frames() * sizes.joints *
                            std::max<int64_t>(sizes.partitions * sizes.in_channels, 1) * sizes.out_channels;
    const int64_t tiles = (arguments.stream_frames() + arguments.parameters.tile - 1) / arguments.parameters.tile;
    const int64_t all = sizes.streams * tiles;
    num_workers = std::min<int64_t>(
        std::clamp<int64_t>(static_cast<int64_t>(std::min(products / kProductsOfAWorker, 1e6)), 1,
                            at::get_num_threads()),
        std::max<int64_t>(all, 1));
    for (int64_t worker = 0; worker < num_workers; ++worker) {
      first_segment.push_back(segments.size());
      const int64_t end = all * (worker + 1) / num_workers;
      for (int64_t item = all * worker / num_workers; item < end;) {
        const int64_t stream = item / tiles, tile = item % tiles;
        const int64_t last_tile = std::min(tiles, tile + end - item);
        segments.push_back({stream, tile * arguments.parameters.tile,
                            std::min(last_tile * arguments.parameters.tile, arguments.stream_frames())});
        item += last_tile - tile;
      }
    }
    first_segment.push_back(segments.size());
  }

  // Calls run(segment's index) for all segments, those of a worker in one thread.
  template <typename Run>
  void for_segments(const Run& run) const {
    at::parallel_for(0, num_workers, 1, [&](int64_t first, int64_t last) {
      for (size_t i = first_segment[first]; i < first_segment[last]; ++i) run(i);
    });
  }

  int64_t num_workers = 1;
  std::vector<Segment> segments;
  std::vector<size_t> first_segment;  // of each worker, and the end
};

// Calls run(a number of the computed type).
template <typename Run>
void with_computed(at::ScalarType type, const Run& run) {
  if (type == at::kDouble) {
    run(double{});
  } else {
    run(float{});
  }
}

// Mean and variance of each stream, from means and sums of squared differences of the segments.
template <typename Number>
void join_statistics(const Arguments& arguments, const Work& work, const std::vector<double>& values, Number* mean,
                     Number* variance) {
  const int64_t channels = arguments.sizes.out_channels;
  const auto joints = static_cast<double>(arguments.sizes.joints);
  std::vector<double> of_mean(channels), of_squares(channels);
  double frames = 0;
  for (size_t i = 0; i < work.segments.size(); ++i) {
    const auto& [stream, first, last] = work.segments[i];
    if (first == 0) {
      frames = 0;
      std::fill(of_mean.begin(), of_mean.end(), 0.0);
      std::fill(of_squares.begin(), of_squares.end(), 0.0);
    }
    const auto count = static_cast<double>(last - first);
    const double share = count / (frames + count);
    const double* segment = values.data() + 2 * i * channels;
    for (int64_t o = 0; o < channels; ++o) {
      const double difference = segment[o] - of_mean[o];
      of_mean[o] += difference * share;
      of_squares[o] += segment[channels + o] + difference * difference * (joints * frames * share);
    }
    frames += count;
    if (last < arguments.stream_frames()) continue;
    for (int64_t o = 0; o < channels; ++o) {
      mean[stream * channels + o] = static_cast<Number>(of_mean[o]);
      variance[stream * channels + o] = static_cast<Number>(std::max(of_squares[o], 0.0) / (frames * joints));
    }
  }
}

// The gradients of a stream's parameters from the sums of its segments, in order.
template <typename Number>
class ParameterGradients {
 public:
  ParameterGradients(const Arguments& arguments, const Work& work, const at::Tensor& weight_sums,
                     const std::vector<double>& joint_sums, const std::vector<double>& edge_sums,
                     const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& importance)
      : arguments_(arguments),
        sizes_(arguments.sizes),
        work_(work),
        weight_sums_(weight_sums.const_data_ptr<Number>()),
        joint_sums_(joint_sums),
        edge_sums_(edge_sums),
        weight_(weight.mutable_data_ptr<Number>()),
        bias_(bias.mutable_data_ptr<Number>()),
        importance_(importance.mutable_data_ptr<Number>()) {}

  void find(int64_t stream) const {
    std::vector<int64_t> segments;
    for (size_t i = 0; i < work_.segments.size(); ++i) {
      if (work_.segments[i].stream == stream) segments.push_back(static_cast<int64_t>(i));
    }
    const auto sum = [&](const std::vector<double>& values, int64_t size) {
      std::vector<double> sums(size);
      for (int64_t i : segments) {
        for (int64_t k = 0; k < size; ++k) sums[k] += values[i * size + k];
      }
      return sums;
    };
    find_of_weight(stream, segments);
    const std::vector<double> of_joints = sum(joint_sums_, sizes_.joints * sizes_.out_channels);
    const std::vector<double> of_edges = sum(edge_sums_, sizes_.edges);
    const int64_t joints = sizes_.joints, out = sizes_.out_channels, partitions = sizes_.partitions;
    const auto& parameters = arguments_.parameters;
    const Number* bias = static_cast<const Number*>(parameters.bias) + stream * partitions * out;
    std::vector<double> arrivals(partitions * joints);  // factors of the edges that lead to a joint
    for (int64_t e = 0; e < sizes_.edges; ++e) {
      const int32_t* edge = parameters.edges + 3 * e;
      const int64_t at = (edge[0] * joints + edge[1]) * joints + edge[2];
      const int64_t of_stream = stream * partitions * joints * joints + at;
      const double weight_of_edge = static_cast<const Number*>(parameters.adjacency)[at];
      arrivals[edge[0] * joints + edge[2]] +=
          weight_of_edge * static_cast<const Number*>(parameters.importance)[of_stream];
      double value = of_edges[e];
      for (int64_t o = 0; o < out; ++o) value += bias[edge[0] * out + o] * of_joints[edge[2] * out + o];
      importance_[of_stream] = static_cast<Number>(weight_of_edge * value);
    }
    for (int64_t p = 0; p < partitions; ++p) {
      for (int64_t o = 0; o < out; ++o) {
        double value = 0;
        for (int64_t w = 0; w < joints; ++w) value += arrivals[p * joints + w] * of_joints[w * out + o];
        bias_[(stream * partitions + p) * out + o] = static_cast<Number>(value);
      }
    }
  }

 private:
  void find_of_weight(int64_t stream, const std::vector<int64_t>& segments) const {
    const int64_t in = sizes_.in_channels, out = sizes_.out_channels, partitions = sizes_.partitions;
    for (int64_t r = 0; r < partitions; ++r) {
      Number* to = weight_ + (stream * partitions + arguments_.plan().partitions[r]) * out * in;
      for (int64_t o = 0; o < out; ++o) {
        for (int64_t c = 0; c < in; ++c) {
          double value = 0;
          for (int64_t i : segments) value += weight_sums_[((i * partitions + r) * in + c) * out + o];
          to[o * in + c] = static_cast<Number>(value);
        }
      }
    }
  }

  const Arguments& arguments_;
  const GraphConvolutionSizes& sizes_;
  const Work& work_;
  const Number* weight_sums_;
  const std::vector<double>&joint_sums_, &edge_sums_;
  Number *weight_, *bias_, *importance_;
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> graph_convolution(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& importance,
    const at::Tensor& adjacency, const at::Tensor& edges, int64_t stride, bool statistics,
    const std::optional<at::Tensor>& output_scale, const std::optional<at::Tensor>& output_shift,
    bool output_activation) {
  Arguments arguments(x, weight, bias, importance, adjacency, edges, stride);
  const auto& sizes = arguments.sizes;
  TORCH_CHECK_VALUE(output_scale.has_value() == output_shift.has_value(),
                    "output_scale and output_shift must be given together");
  if (output_scale) {
    TORCH_CHECK_VALUE(!statistics, "statistics must be False with output_scale, got True");
    arguments.parameters.output_scale =
        arguments.keep_sized("output_scale", *output_scale, {sizes.streams, sizes.out_channels}, arguments.computed);
    arguments.parameters.output_shift =
        arguments.keep_sized("output_shift", *output_shift, {sizes.streams, sizes.out_channels}, arguments.computed);
    arguments.parameters.output_activation = output_activation;
  }
  const at::Tensor y = at::empty(arguments.y_sizes(), x.options());
  const std::vector<int64_t> statistics_sizes =
      statistics ? std::vector<int64_t>{sizes.streams, sizes.out_channels} : std::vector<int64_t>{0};
  const at::Tensor mean = at::zeros(statistics_sizes, arguments.options);
  const at::Tensor variance = at::zeros(statistics_sizes, arguments.options);
  if (!arguments.has_values()) return {y, mean, variance};
  arguments.parameters.y = y.mutable_data_ptr();

  const Work work(arguments);
  const auto convolve = IKEM_DISPATCH_CPU(convolve_graph);
  std::vector<double> values(statistics ? 2 * work.segments.size() * sizes.out_channels : 0);
  const auto of_segment = [&](size_t i) {
    double* of_mean = values.data() + 2 * i * sizes.out_channels;
    return cpu::GraphStatistics{of_mean, of_mean + sizes.out_channels};
  };
  work.for_segments([&](size_t i) {
    const auto& [stream, first, last] = work.segments[i];
    const cpu::GraphStatistics segment = of_segment(i);
    convolve(arguments.parameters, stream, first, last, statistics ? &segment : nullptr);
  });
  if (!statistics) return {y, mean, variance};

  with_computed(arguments.computed, [&](auto number) {
    using Number = decltype(number);
    join_statistics<Number>(arguments, work, values, mean.mutable_data_ptr<Number>(),
                            variance.mutable_data_ptr<Number>());
  });
  return {y, mean, variance};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> graph_convolution_backward(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& importance,
    const at::Tensor& adjacency, const at::Tensor& edges, int64_t stride, const at::Tensor& y, const at::Tensor& mean,
    const at::Tensor& y_gradient, const std::optional<at::Tensor>& mean_gradient,
    const std::optional<at::Tensor>& variance_gradient, bool with_x_gradient) {
  Arguments arguments(x, weight, bias, importance, adjacency, edges, stride);
  const auto& sizes = arguments.sizes;
  auto& parameters = arguments.parameters;
  const std::vector<int64_t> of_statistics{sizes.streams, sizes.out_channels};
  parameters.y_gradient = arguments.keep_sized("y_gradient", y_gradient, arguments.y_sizes(), x.scalar_type());
  if (mean_gradient) {
    parameters.mean_gradient =
        arguments.keep_sized("mean_gradient", *mean_gradient, of_statistics, arguments.computed);
  }
  if (variance_gradient) {
    parameters.variance_gradient =
        arguments.keep_sized("variance_gradient", *variance_gradient, of_statistics, arguments.computed);
    parameters.mean = arguments.keep_sized("mean", mean, of_statistics, arguments.computed);
    parameters.y = const_cast<void*>(arguments.keep_sized("y", y, arguments.y_sizes(), x.scalar_type()));
  }
  const at::Tensor x_gradient = with_x_gradient ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  const at::Tensor weight_gradient = at::zeros(weight.sizes(), arguments.options);
  const at::Tensor bias_gradient = at::zeros(bias.sizes(), arguments.options);
  const at::Tensor importance_gradient = at::zeros(importance.sizes(), arguments.options);
  if (!arguments.has_values()) {
    return {x_gradient.zero_(), weight_gradient, bias_gradient, importance_gradient};
  }
  if (with_x_gradient) parameters.x_gradient = x_gradient.mutable_data_ptr();

  const Work work(arguments);
  const auto convolve_backward = IKEM_DISPATCH_CPU(convolve_graph_backward);
  const int64_t weight_size = sizes.partitions * sizes.in_channels * sizes.out_channels;
  const int64_t joints_size = sizes.joints * sizes.out_channels;
  const auto num_segments = static_cast<int64_t>(work.segments.size());
  const at::Tensor weight_sums = at::empty({num_segments, weight_size}, arguments.options);
  std::vector<double> joint_sums(num_segments * joints_size), edge_sums(num_segments * sizes.edges);
  work.for_segments([&](size_t i) {
    const auto& [stream, first, last] = work.segments[i];
    char* of_weight = static_cast<char*>(weight_sums.mutable_data_ptr()) + i * weight_size * weight_sums.element_size();
    convolve_backward(parameters, stream, first, last,
                      {of_weight, joint_sums.data() + i * joints_size, edge_sums.data() + i * sizes.edges});
  });

  with_computed(arguments.computed, [&](auto number) {
    const ParameterGradients<decltype(number)> gradients(arguments, work, weight_sums, joint_sums, edge_sums,
                                                         weight_gradient, bias_gradient, importance_gradient);
    at::parallel_for(0, sizes.streams, 1, [&](int64_t first, int64_t last) {
      for (int64_t stream = first; stream < last; ++stream) gradients.find(stream);
    });
  });
  return {x_gradient, weight_gradient, bias_gradient, importance_gradient};
}

TORCH_LIBRARY_IMPL(ikem_fast, CPU, m) {
  m.impl("graph_convolution", &graph_convolution);
  m.impl("graph_convolution_backward", &graph_convolution_backward);
}

}  // namespace ikem_fast
