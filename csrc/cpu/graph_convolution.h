// Graph convolution on the CPU, see csrc/ops/graph_convolution.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/capability.h"
#include "cpu/numbers.h"

namespace ikem_fast::cpu {

// The graph as the kernels walk along it. Partitions are in an order in which those with fewer joints come later, and
// joints with the same number of partitions from the first one to the last that leads to them stand together: for each
// such group of joints a product has no more rows and inner numbers than it needs.
struct GraphPlan {
  struct Group {
    int64_t first = 0, count = 0;  // positions of its joints
    int64_t depth = 0;             // leading partitions
    int64_t first_slot = 0;        // of position `first`; a position has `depth` of them, one per partition
  };
  struct Arrival {  // an edge that leads to a joint
    int32_t edge, from;
  };
  struct Departure {  // an edge that leads away from a joint
    int32_t edge, group, place, rank;  // place: of the joint that it leads to, in the group
  };
  std::vector<int32_t> partitions;         // in their order; the rank of one is its place here
  std::vector<int32_t> joints;             // at each position
  std::vector<Group> groups;
  std::vector<int32_t> first_arrival;      // of each slot, and the end
  std::vector<Arrival> arrivals;
  std::vector<int32_t> first_departure;    // of each joint, and the end
  std::vector<Departure> departures;
};

struct GraphConvolution {
  Numbers numbers{};
  const GraphPlan* plan = nullptr;
  const int32_t* edges = nullptr;      // (E, 3): partition, from, to
  const void* x = nullptr;             // (S, B, T, V, C_in)
  const void* weight = nullptr;        // (S, P, C_out, C_in), computed
  const void* bias = nullptr;          // (S, P, C_out), computed
  const void* importance = nullptr;    // (S, P, V, V), computed
  const void* adjacency = nullptr;     // (P, V, V), computed
  const void* output_scale = nullptr;  // (S, C_out), computed, or nothing
  const void* output_shift = nullptr;
  bool output_activation = false;
  void* y = nullptr;  // (S, B, T', V, C_out); the result, or for the gradients what it was
  int64_t batch = 0, frames = 0, out_frames = 0, joints = 0, in_channels = 0, out_channels = 0, partitions = 0;
  int64_t num_edges = 0, stride = 1;
  int64_t tile = 1;  // output frames looked at at a time

  // For the gradients.
  const void* y_gradient = nullptr;         // (S, B, T', V, C_out), of x's numbers
  const void* mean = nullptr;               // (S, C_out), computed; used with the gradient of the variance
  const void* mean_gradient = nullptr;      // (S, C_out), computed, or nothing
  const void* variance_gradient = nullptr;  // likewise
  void* x_gradient = nullptr;               // (S, B, T, V, C_in), of x's numbers, or nothing
};

// Statistics of some output frames of a stream: mean and sum of squared differences from it, (C_out) each.
struct GraphStatistics {
  double* mean = nullptr;
  double* squares = nullptr;
};

// Sums over some output frames of a stream. `total` is the gradient of y with those of the statistics.
struct GraphGradientSums {
  void* weight = nullptr;    // (P in the plan's order, C_in, C_out), computed: gathered x times total
  double* joints = nullptr;  // (V, C_out): total of each joint
  double* edges = nullptr;   // (E): x at the start times the gradient of what is gathered at the end
};

// A stream's output frames are those of all sequences, one after another. y and, if asked for, the statistics of
// [first, last).
IKEM_DECLARE_CPU(void, convolve_graph, const GraphConvolution& parameters, int64_t stream, int64_t first, int64_t last,
                 const GraphStatistics* statistics)

// The gradient of x for the output frames [first, last), and their sums.
IKEM_DECLARE_CPU(void, convolve_graph_backward, const GraphConvolution& parameters, int64_t stream, int64_t first,
                 int64_t last, const GraphGradientSums& sums)

}  // namespace ikem_fast::cpu
