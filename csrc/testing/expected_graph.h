// TEST-ONLY: random graphs and inputs of graph_convolution, and how its numbers are rounded; shared by the tests of its
// kernels.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <vector>

#include "cuda/graph_convolution.h"
#include "testing/device_buffer.h"
#include "testing/kernel_test.h"
#include "testing/values.h"

struct GraphCase {
  ikem_fast::cuda::GraphConvolutionShape shape;  // the number of edges comes from degree
  double degree;                                 // edges to a joint in a partition, on average; -1: the identity
  ikem_fast::cuda::GraphConvolutionDevice device;
  bool whole_numbers = false;  // small ones, for which all arithmetic is exact
};

// The tensors of a case on the host. Elements of x are such as T holds.
template <typename T>
struct GraphTensors {
  ikem_fast::cuda::GraphConvolutionShape shape;
  std::vector<T> x;
  std::vector<float> weight, bias, importance, adjacency;
  std::vector<int32_t> edges;
  std::mt19937 random;
  bool whole_numbers;

  explicit GraphTensors(const GraphCase& c)
      : shape(c.shape), random(static_cast<unsigned>(c.shape.in_channels * 1000 + c.shape.joints)),
        whole_numbers(c.whole_numbers) {
    const int64_t joints = shape.joints, partitions = shape.partitions;
    std::uniform_real_distribution<double> uniform;
    adjacency.assign(partitions * joints * joints, 0.0f);
    for (int w = 0; w < joints; ++w) {
      for (int p = 0; p < partitions; ++p) {
        for (int v = 0; v < joints; ++v) {
          if (c.degree < 0 ? v != w : uniform(random) * static_cast<double>(joints) >= c.degree) continue;
          adjacency[(p * joints + v) * joints + w] = c.degree < 0 ? 1.0f : static_cast<float>(number(0.5));
          for (int value : {p, v, w}) edges.push_back(value);
        }
      }
    }
    shape.edges = static_cast<int>(edges.size() / 3);
    fill(x, shape.streams * shape.sequences * shape.frames * joints * shape.in_channels, 1.0);
    fill(weight, shape.streams * partitions * shape.out_channels * shape.in_channels, 0.5);
    fill(bias, shape.streams * partitions * shape.out_channels, 1.0);
    fill(importance, shape.streams * partitions * joints * joints, 1.0);
  }

  // Whole numbers are -1 ... 1, and never 0 where `deviation` is 0.5.
  double number(double deviation) {
    if (whole_numbers) {
      const int value = static_cast<int>(random() % 3) - 1;
      return value == 0 && deviation == 0.5 ? 1 : value;
    }
    return deviation * std::normal_distribution<double>()(random);
  }
  template <typename Element>
  void fill(std::vector<Element>& values, int64_t size, double deviation) {
    values.resize(size);
    for (Element& value : values) value = rounded<Element>(number(deviation));
  }

  double x_at(int64_t s, int64_t frame, int v, int c) const {  // frame of (B, T)
    return exact(x[((s * shape.sequences * shape.frames + frame) * shape.joints + v) * shape.in_channels + c]);
  }
  // The input frame of output frame `frame` of (B, T').
  int64_t source(int64_t frame) const {
    const int64_t out = shape.out_frames();
    return frame / out * shape.frames + frame % out * shape.stride;
  }
  int64_t out_frames() const { return shape.sequences * shape.out_frames(); }
  float coefficient(int64_t s, int e) const {
    const int64_t joints = shape.joints;
    const int64_t place = (edges[3 * e] * joints + edges[3 * e + 1]) * joints + edges[3 * e + 2];
    return adjacency[place] * importance[s * shape.partitions * joints * joints + place];
  }
  double weight_at(int64_t s, int p, int n, int c) const {
    return exact(rounded<T>(weight[((s * shape.partitions + p) * shape.out_channels + n) * shape.in_channels + c]));
  }

  // What is multiplied by the weights: one frame, by (joint, partition, channel), rounded as T.
  std::vector<double> gathered(int64_t s, int64_t frame) const {
    std::vector<float> sums(static_cast<size_t>(shape.joints) * shape.partitions * shape.in_channels);
    for (int e = 0; e < shape.edges; ++e) {
      for (int c = 0; c < shape.in_channels; ++c) {
        float& sum = sums[(edges[3 * e + 2] * shape.partitions + edges[3 * e]) * shape.in_channels + c];
        sum = fmaf(coefficient(s, e), static_cast<float>(x_at(s, source(frame), edges[3 * e + 1], c)), sum);
      }
    }
    std::vector<double> result;
    for (float sum : sums) result.push_back(exact(rounded<T>(sum)));
    return result;
  }

  // One frame of y before it is rounded, (joint, channel), and the sums of its terms' magnitudes.
  std::array<std::vector<double>, 2> convolved(int64_t s, int64_t frame) const {
    const std::vector<double> u = gathered(s, frame);
    std::vector<double> sums(static_cast<size_t>(shape.joints) * shape.out_channels), magnitudes(sums.size(), 1e-30);
    const auto add = [&](int w, int n, double term) {
      sums[w * shape.out_channels + n] += term;
      magnitudes[w * shape.out_channels + n] += std::abs(term);
    };
    for (int w = 0; w < shape.joints; ++w) {
      for (int n = 0; n < shape.out_channels; ++n) {
        for (int p = 0; p < shape.partitions; ++p) {
          for (int c = 0; c < shape.in_channels; ++c) {
            add(w, n, u[(w * shape.partitions + p) * shape.in_channels + c] * weight_at(s, p, n, c));
          }
        }
      }
    }
    for (int e = 0; e < shape.edges; ++e) {
      for (int n = 0; n < shape.out_channels; ++n) {
        add(edges[3 * e + 2], n,
            double(coefficient(s, e)) * bias[(s * shape.partitions + edges[3 * e]) * shape.out_channels + n]);
      }
    }
    return {sums, magnitudes};
  }
};

// The tensors of a case on the device.
template <typename T>
struct GraphBuffers {
  DeviceBuffer<T> x;
  DeviceBuffer<float> weight, bias, importance, adjacency;
  DeviceBuffer<int32_t> edges;
  ikem_fast::cuda::GraphConvolutionInput input;

  explicit GraphBuffers(const GraphTensors<T>& tensors)
      : x(tensors.x), weight(tensors.weight), bias(tensors.bias), importance(tensors.importance),
        adjacency(tensors.adjacency), edges(tensors.edges),
        input{tensors.shape,
              sizeof(T) == 4 ? ikem_fast::cuda::ElementType::kFloat : ikem_fast::cuda::ElementType::kBFloat16,
              x.data(),
              weight.data(),
              bias.data(),
              importance.data(),
              adjacency.data(),
              edges.data()} {}
};

// The largest of the differences that are given to it, in units of what they may be.
class Worst {
 public:
  void add(double got, double wanted, double allowed) {
    const double difference = std::abs(got - wanted) / allowed;
    if (!(difference <= worst_)) worst_ = difference;
  }
  bool check(const char* what) const {
    if (worst_ <= 1) return true;
    printf("FAILED %s differs by %g times what it may\n", what, worst_);
    return false;
  }

 private:
  double worst_ = 0;
};

inline void report_case(const GraphCase& c, int edges, size_t element) {
  ++failures;
  const ikem_fast::cuda::GraphConvolutionShape& s = c.shape;
  printf("FAILED %zu-byte S %d B %d T %d stride %d V %d P %d C %d to %d, %d edges, %d processors with %d bytes\n", element,
         int(s.streams), int(s.sequences), s.frames, s.stride, s.joints, s.partitions, s.in_channels, s.out_channels,
         edges, c.device.multiprocessors, c.device.shared_bytes);
}
