// graph_convolution on CUDA: the launchers, on raw pointers. Tensors are dense, in the order of the comments.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "cuda/element_type.h"

namespace ikem_fast::cuda {

constexpr int kMaxGraphJoints = 128;
constexpr int kMaxGraphPartitions = 12;

struct GraphConvolutionShape {
  int64_t streams;    // S
  int64_t sequences;  // B
  int frames;         // T
  int stride;
  int joints;        // V, at most kMaxGraphJoints
  int partitions;    // P, at most kMaxGraphPartitions
  int in_channels;   // C_in
  int out_channels;  // C_out
  int edges;         // E

  int64_t out_frames() const { return (static_cast<int64_t>(frames) + stride - 1) / stride; }  // T'
  int64_t values_per_channel() const { return sequences * out_frames() * joints; }
};

struct GraphConvolutionInput {
  GraphConvolutionShape shape;
  ElementType type;         // of x, y and their gradients: kFloat or kBFloat16
  const void* x;            // (S, B, T, V, C_in)
  const float* weight;      // (S, P, C_out, C_in)
  const float* bias;        // (S, P, C_out)
  const float* importance;  // (S, P, V, V)
  const float* adjacency;   // (P, V, V)
  const int32_t* edges;     // (E, 3) of partition, from joint, to joint, sorted by (to, partition, from)
};

// What a plan depends on.
struct GraphConvolutionDevice {
  int multiprocessors;
  int shared_bytes;  // that a block can have
};

struct GraphConvolutionOutput {
  void* y;             // (S, B, T', V, C_out)
  float* moments;      // (S, slots, 3, C_out) for combine_channel_statistics, or null
  const float* scale;  // (S, C_out) with shift, or null: y becomes scale * y + shift
  const float* shift;
  bool activation;  // ReLU after that
};

// How many parts the moments come in; 0 where the output is empty.
int graph_convolution_slots(const GraphConvolutionShape& shape, ElementType type, const GraphConvolutionDevice& device);

cudaError_t graph_convolution(const GraphConvolutionOutput& output, const GraphConvolutionInput& input,
                              const GraphConvolutionDevice& device, cudaStream_t stream);

struct GraphConvolutionGradients {
  const void* y;                   // read where there is a gradient of mean or variance
  const void* y_gradient;          // (S, B, T', V, C_out)
  const float* mean;               // (S, C_out)
  const float* mean_gradient;      // (S, C_out) or null
  const float* variance_gradient;  // (S, C_out) or null
  void* x_gradient;                // (S, B, T, V, C_in) or null
  float* weight_gradient;          // (S, P, C_out, C_in)
  float* bias_gradient;            // (S, P, C_out)
  float* importance_gradient;      // (S, P, V, V)
  float* workspace;                // of graph_convolution_backward_workspace() values
};

int64_t graph_convolution_backward_workspace(const GraphConvolutionShape& shape, ElementType type,
                                             const GraphConvolutionDevice& device);

cudaError_t graph_convolution_backward(const GraphConvolutionGradients& gradients, const GraphConvolutionInput& input,
                                       const GraphConvolutionDevice& device, cudaStream_t stream);

}  // namespace ikem_fast::cuda
