// Convolution over frames on CUDA, tap by tap of the kernel as products of tiles in shared memory: the launchers, on
// raw pointers.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "cuda/convolution_input.h"
#include "cuda/element_type.h"

namespace ikem_fast::cuda {

struct TemporalConvolutionShape {
  int64_t streams;    // S
  int64_t sequences;  // B, of each stream
  int frames;         // T
  int joints;         // V
  int in_channels;
  int out_channels;
  int taps;    // K, odd
  int stride;  // T' = ceil(T / stride)
  int shared_bytes = 227 * 1024;  // of a block at most, on the device

  __host__ __device__ int out_frames() const { return (frames + stride - 1) / stride; }
};

// Scratch memory that the launchers take for a shape.
struct TemporalConvolutionScratch {
  int64_t packed_weights;    // elements, of x's type
  int64_t moments;           // floats
  int64_t coefficient_sums;  // floats
  int64_t weight_sums;       // floats
};

// False for a shape that does not fit into shared memory or counters. The element type is float or bfloat16.
bool find_scratch(TemporalConvolutionScratch& scratch, const TemporalConvolutionShape& shape, ElementType type);

// packed: weight (S, C_out, C_in, K), tap by tap, as x's type, for all launchers below.
cudaError_t pack_temporal_weights(void* packed, ElementType type, const float* weight,
                                  const TemporalConvolutionShape& shape, cudaStream_t stream);

struct TemporalConvolutionResult {
  void* y;            // (S, B, T', V, C_out)
  const float* bias;  // (S, C_out)
  bool with_statistics;
  float* moments;  // scratch memory; this and the two below only with statistics
  float* mean;     // (S, C_out)
  float* variance;
  const float* output_scale;  // (S, C_out) or null: y = relu(output_scale y + output_shift + residual)
  const float* output_shift;
  const void* residual;  // like y, or null
};

// x (S, B, T, V, C_in).
cudaError_t temporal_convolution(const TemporalConvolutionResult& result, const void* x, ElementType type,
                                 const ActivationInput& activation, const void* packed_weights,
                                 const TemporalConvolutionShape& shape, cudaStream_t stream);

// The gradients of x, scaled where the activation has a scale, and of scale and shift.
struct TemporalXGradient {
  void* x_gradient;         // (S, B, T, V, C_in), or null
  float* coefficient_sums;  // scratch memory; read with the two below, like them only where there is a scale
  float* scale_gradient;    // (S, C_in)
  float* shift_gradient;
};

// y_gradient (S, B, T', V, C_out).
cudaError_t temporal_convolution_x_gradient(const TemporalXGradient& result, const void* x, ElementType type,
                                            const ActivationInput& activation, const void* y_gradient,
                                            const GradientInput& gradient, const void* packed_weights,
                                            const TemporalConvolutionShape& shape, cudaStream_t stream);

struct TemporalWeightGradient {
  float* weight_gradient;  // (S, C_out, C_in, K)
  float* bias_gradient;    // (S, C_out)
  float* weight_sums;      // scratch memory
};

cudaError_t temporal_convolution_weight_gradient(const TemporalWeightGradient& result, const void* x, ElementType type,
                                                 const ActivationInput& activation, const void* y_gradient,
                                                 const GradientInput& gradient, const TemporalConvolutionShape& shape,
                                                 cudaStream_t stream);

}  // namespace ikem_fast::cuda
