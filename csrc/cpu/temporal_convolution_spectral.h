// Convolution over frames in the frequency domain on the CPU, see csrc/ops/temporal_convolution_spectral.cpp.
//
// A row is a (sequence, tile, joint): the frames of a tile with their channels. The rows of a stream are in chunks. For
// each of the plan's products a chunk has a slot, a matrix of its rows and channels, that is multiplied with this slot
// of the weights.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/numbers.h"
#include "math/spectral_convolution.h"

namespace ikem_fast::cpu {

struct SpectralConvolution {
  Numbers numbers{};
  math::SpectralPlan plan;
  int64_t sequences = 0, frames = 0, joints = 0, in_channels = 0, out_channels = 0, taps = 0;
  int64_t rows = 0;        // of a stream: sequences * tiles * joints
  int64_t chunk_rows = 0;  // of a chunk but the last
  int64_t chunks = 0;      // of a stream
  const void* x = nullptr;      // (streams, sequences, frames, joints, in_channels)
  const void* scale = nullptr;  // (streams, in_channels), or null like shift
  const void* shift = nullptr;
  const void* weight = nullptr;  // (streams, out_channels, in_channels, taps)
  int64_t first_stream = 0;      // of those whose weights are packed
  void* packed = nullptr;        // by spectral_pack
};

struct SpectralForward : SpectralConvolution {
  const void* bias = nullptr;          // (streams, out_channels)
  const void* output_scale = nullptr;  // likewise, or null like output_shift
  const void* output_shift = nullptr;
  const void* residual = nullptr;  // like y, or null
  void* y = nullptr;               // (streams, sequences, frames, joints, out_channels)
  double* mean = nullptr;          // (streams, chunks, out_channels) of each chunk, or null like the next
  double* deviation = nullptr;     // likewise, squared deviations from the mean, summed
};

struct SpectralBackward : SpectralConvolution {
  const void* y = nullptr;                  // (streams, sequences, frames, joints, out_channels)
  const void* y_gradient = nullptr;         // likewise
  const void* mean = nullptr;               // (streams, out_channels), or null without variance_gradient
  const void* mean_gradient = nullptr;      // likewise, or null
  const void* variance_gradient = nullptr;  // likewise, or null
  void* x_gradient = nullptr;               // like x, or null
  double* bias_sums = nullptr;              // (streams, chunks, out_channels) of each chunk
  double* scale_sums = nullptr;             // (streams, chunks, in_channels), or null like shift_sums
  double* shift_sums = nullptr;
};

// Bytes of the packed weights of a stream.
IKEM_DECLARE_CPU(int64_t, spectral_packed_size, const SpectralConvolution& parameters)

// Number of parts in which the weights of a stream may be packed.
IKEM_DECLARE_CPU(int64_t, spectral_pack_parts, const SpectralConvolution& parameters, bool backward)

// Packs the weights as the right factors of the forward pass or of the gradient of h.
IKEM_DECLARE_CPU(void, spectral_pack, const SpectralConvolution& parameters, bool backward, int64_t stream,
                 int64_t first_part, int64_t last_part)

// Chunks [begin, end), counted through the streams from first_stream on.
IKEM_DECLARE_CPU(void, spectral_forward, const SpectralForward& parameters, int64_t begin, int64_t end)

// Likewise. The gradient of the weights of stream s (out_channels, in_channels, taps) goes to weight_gradients[s -
// first_stream], where it is written, not added to what is there.
IKEM_DECLARE_CPU(void, spectral_backward, const SpectralBackward& parameters, int64_t begin, int64_t end,
                 void* const* weight_gradients)

// Values of a channel in a chunk.
inline int64_t spectral_chunk_values(const SpectralConvolution& p, int64_t chunk) {
  const int64_t tiles = p.plan.tiles(p.frames);
  const int64_t first = chunk * p.chunk_rows, last = p.rows < first + p.chunk_rows ? p.rows : first + p.chunk_rows;
  int64_t values = (last - first) * p.plan.tile;
  const int64_t beyond = tiles * p.plan.tile - p.frames;  // of the last tile of each sequence
  for (int64_t row = first; beyond > 0 && row < last; ++row) {
    values -= row / p.joints % tiles == tiles - 1 ? beyond : 0;
  }
  return values;
}

}  // namespace ikem_fast::cpu
