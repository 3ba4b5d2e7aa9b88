// Convolution over frames on the CPU, the direct way, see csrc/ops/temporal_convolution.h.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/numbers.h"
#include "ops/temporal_convolution_checks.h"

namespace ikem_fast::cpu {

struct FrameConvolution {
  Numbers numbers{};
  TemporalConvolutionSizes sizes;
  const void* x = nullptr;
  const void* scale = nullptr;  // of h = relu(scale x + shift), or null
  const void* shift = nullptr;
  const void* weight = nullptr;
  const void* packed = nullptr;  // the weights of every stream as pack_frame_weight writes them
};

struct FrameConvolutionForward : FrameConvolution {
  const void* bias = nullptr;
  const void* output_scale = nullptr;  // or null
  const void* output_shift = nullptr;
  const void* residual = nullptr;  // or null
  void* y = nullptr;
  bool statistics = false;
};

struct FrameConvolutionBackward : FrameConvolution {
  const void* y = nullptr;
  const void* mean = nullptr;
  const void* y_gradient = nullptr;
  const void* mean_gradient = nullptr;      // or null
  const void* variance_gradient = nullptr;  // or null
  void* x_gradient = nullptr;               // or null: not wanted
};

// What one thread finds out about a channel of y over its sequences.
struct Moments {
  double count = 0, mean = 0, squares = 0;  // squares: sum of squared distances from the mean

  void add(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, distance = other.mean - mean;
    mean += distance * (other.count / total);
    squares += other.squares + distance * distance * (count * other.count / total);
    count = total;
  }
};

// Sums of one thread over its sequences; bias, scale and shift with one number per channel.
struct FrameGradients {
  void* weight = nullptr;  // frame_weight_sums numbers
  double* bias = nullptr;
  double* scale = nullptr;
  double* shift = nullptr;
};

// The bytes of a stream's packed weights. Backward, input and output channels change their places.
IKEM_DECLARE_CPU(int64_t, packed_frame_weight_bytes, const FrameConvolution& parameters, bool backward)
IKEM_DECLARE_CPU(void, pack_frame_weight, const FrameConvolution& parameters, bool backward, int64_t stream,
                 void* packed)

// Sequences [first, last) of a stream; their moments (C_out) are added to the given ones.
IKEM_DECLARE_CPU(void, convolve_frames, const FrameConvolutionForward& parameters, int64_t stream, int64_t first,
                 int64_t last, Moments* moments)

// How many numbers the sums of the gradient of a stream's weights take.
IKEM_DECLARE_CPU(int64_t, frame_weight_sums, const FrameConvolution& parameters)

// Gradients from the sequences [first, last) of a stream, added to the given sums.
IKEM_DECLARE_CPU(void, convolve_frames_backward, const FrameConvolutionBackward& parameters, int64_t stream,
                 int64_t first, int64_t last, const FrameGradients& sums)

// The gradient (C_out, C_in, K) of a stream's weights from the sums of the threads in turn, of which the first is
// written to.
IKEM_DECLARE_CPU(void, finish_frame_weight_gradient, const FrameConvolution& parameters, void* const* sums,
                 int64_t count, void* gradient)

}  // namespace ikem_fast::cpu
