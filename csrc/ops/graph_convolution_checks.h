// What may go wrong with the shapes of graph_convolution; no torch, so that any device's operator can share it.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

namespace ikem_fast {

// Sizes of graph_convolution, from those of x (S, B, T, V, C_in) and weight (S, P, C_out, C_in).
struct GraphConvolutionSizes {
  int64_t streams = 0, batch = 0, frames = 0, joints = 0, in_channels = 0, partitions = 0, out_channels = 0, edges = 0;
  int64_t stride = 1, out_frames = 0;
};

template <typename Sizes>
std::string write_sizes(const Sizes& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + ")";
}

// The first problem in one sentence, or nothing and the sizes.
template <typename Sizes>
std::string find_graph_convolution_problem(const Sizes& x, const Sizes& weight, const Sizes& bias,
                                           const Sizes& importance, const Sizes& adjacency, const Sizes& edges,
                                           int64_t stride, GraphConvolutionSizes& found) {
  const auto differ = [](const Sizes& sizes, std::initializer_list<int64_t> wanted) {
    if (sizes.size() != wanted.size()) return true;
    size_t i = 0;
    for (int64_t size : wanted) {
      if (sizes[i++] != size) return true;
    }
    return false;
  };
  const auto complain = [&](const char* name, const char* shape, std::initializer_list<int64_t> wanted,
                            const Sizes& sizes) {
    std::string text = std::string(name) + " must be " + shape + " = (";
    size_t i = 0;
    for (int64_t size : wanted) text += (i++ ? ", " : "") + std::to_string(size);
    return text + "), got " + write_sizes(sizes);
  };
  if (x.size() != 5) return "x must be (S, B, T, V, C), got " + write_sizes(x);
  const int64_t streams = x[0], joints = x[3], channels = x[4];
  if (weight.size() != 4 || weight[0] != streams || weight[1] < 1 || weight[3] != channels) {
    return "weight must be (S, P, C_out, C_in) = (" + std::to_string(streams) + ", 1 or more, any, " +
           std::to_string(channels) + "), got " + write_sizes(weight);
  }
  const int64_t partitions = weight[1], out_channels = weight[2];
  if (differ(bias, {streams, partitions, out_channels})) {
    return complain("bias", "(S, P, C_out)", {streams, partitions, out_channels}, bias);
  }
  if (differ(importance, {streams, partitions, joints, joints})) {
    return complain("importance", "(S, P, V, V)", {streams, partitions, joints, joints}, importance);
  }
  if (differ(adjacency, {partitions, joints, joints})) {
    return complain("adjacency", "(P, V, V)", {partitions, joints, joints}, adjacency);
  }
  if (edges.size() != 2 || edges[1] != 3) return "edges must be (E, 3), got " + write_sizes(edges);
  if (stride < 1) return "stride must be at least 1, got " + std::to_string(stride);
  found = {streams, x[1], x[2], joints, channels, partitions, out_channels, edges[0], stride, 0};
  found.out_frames = x[2] / stride + (x[2] % stride != 0);
  return "";
}

// The first problem of edges (E, 3) that can be read, in one sentence, or nothing.
inline std::string find_edge_problem(const int32_t* edges, const GraphConvolutionSizes& sizes) {
  for (int64_t e = 0; e < sizes.edges; ++e) {
    const int32_t *edge = edges + 3 * e, partition = edge[0], from = edge[1], to = edge[2];
    const std::string got = "got (" + std::to_string(partition) + ", " + std::to_string(from) + ", " +
                            std::to_string(to) + ") as edge " + std::to_string(e);
    if (partition < 0 || partition >= sizes.partitions || from < 0 || from >= sizes.joints || to < 0 ||
        to >= sizes.joints) {
      return "edges must be (partition, from, to) below (" + std::to_string(sizes.partitions) + ", " +
             std::to_string(sizes.joints) + ", " + std::to_string(sizes.joints) + "), " + got;
    }
    if (e > 0) {
      const int32_t* before = edge - 3;
      const bool ascends = before[2] != to          ? before[2] < to
                           : before[0] != partition ? before[0] < partition
                                                    : before[1] < from;
      if (!ascends) return "edges must be sorted by (to, partition, from), each once, " + got;
    }
  }
  return "";
}

}  // namespace ikem_fast
