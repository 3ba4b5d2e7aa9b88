// The steps of a convolution over frames in the frequency domain on CUDA, around products that a library makes: the
// launchers, on raw pointers.
//
// Sequences are cut into tiles of `tile_frames` frames; a tile is looked at through a window of its own frames and
// `lead` frames before and after them, frames beyond the sequence being zero. A real basis of N = 1 + 2 F vectors over
// the window, a constant and for each of F frequencies a cosine and a sine, turns the window's frames into a number of
// one slot and F pairs of numbers. With R = sequences * tiles * V rows they lie as the factors of a product:
//
//   single (S, R, C), pairs (S, F, R, 2, C)
//
// so that the convolution is a product of `single` with one matrix (C, C_out), and of each frequency's pairs, as rows
// of 2 C numbers, with one of (2 C, 2 C_out).
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "cuda/convolution_input.h"
#include "cuda/element_type.h"

namespace ikem_fast::cuda {

constexpr int kMaxSpectralWindow = 24;
constexpr int kMaxSpectralTile = 16;
constexpr int kMaxSpectralFrequencies = 16;
constexpr int kMaxSpectralTaps = 27;

struct SpectralShape {
  int64_t streams;           // S
  int64_t sequences;         // of each stream, side by side
  int64_t stream_sequences;  // of tensors of frames and of what is kept for each sequence: the others are left alone
  int frames;         // T
  int joints;         // V
  int channels;       // C, even
  int tile_frames;    // at most kMaxSpectralTile
  int lead;           // tile_frames + 2 lead is at most kMaxSpectralWindow
  int frequencies;    // F, at most kMaxSpectralFrequencies

  __host__ __device__ int num_tiles() const { return (frames + tile_frames - 1) / tile_frames; }
  __host__ __device__ int num_slots() const { return 1 + 2 * frequencies; }
  __host__ __device__ int64_t rows() const { return sequences * num_tiles() * joints; }
};

// Of all tensors of frames and slots, float or bfloat16.
struct SpectralSlots {
  void* single;  // (S, R, C)
  void* pairs;   // (S, F, R, 2, C)
};

// All bases are in host memory, and read before the launchers return.

// Frames to slots, with a basis (N, window). x (S, sequences, T, V, C) goes through `activation` if that has a scale,
// else through `gradient` if that is not null. Then sums (S, sequences, C), unless null, is that gradient added up over
// each sequence.
cudaError_t spectral_slots(const SpectralSlots& slots, const double* basis, const void* x, ElementType type,
                           const ActivationInput& activation, const GradientInput* gradient, float* sums,
                           const SpectralShape& shape, cudaStream_t stream);

// What becomes of the frames of a forward pass.
struct SpectralResult {
  void* y;                    // (S, sequences, T, V, C)
  const float* bias;          // (S, C)
  float* moments;             // (S, sequences, 3, C), or null: PartialStatistics, a slot for each sequence
  const float* output_scale;  // (S, C) or null: y = relu(output_scale y + output_shift + residual)
  const float* output_shift;
  const void* residual;       // like y, or null
};

// Slots to frames, with a basis (N, tile).
cudaError_t spectral_frames(const SpectralResult& result, const SpectralSlots& slots, const double* basis,
                            ElementType type, const SpectralShape& shape, cudaStream_t stream);

// What becomes of the frames of a backward pass, the gradient of the activation: without a scale it is x's gradient,
// else x's gradient is scale * gradient where scale x + shift > 0, and 0 elsewhere.
struct SpectralGradient {
  void* x_gradient;  // (S, sequences, T, V, C), or null
  const void* x;     // likewise; read beside a scale
  ActivationInput activation;
  float* scale_sums;  // (S, sequences, C): each sequence's parts of the gradients of scale and shift; beside a scale
  float* shift_sums;
};

cudaError_t spectral_x_gradient(const SpectralGradient& gradient, const SpectralSlots& slots, const double* basis,
                                ElementType type, const SpectralShape& shape, cudaStream_t stream);

// The weights' slots. basis (N, K): the constant, and a cosine and a sine of every frequency. With U the spectrum of
// weight (S, C_out, C_in, K), single (S, C_in, C_out) is its constant and pairs (S, F, 2 C_in, 2 C_out) are the
// matrices (Re U, Im U; -Im U, Re U), as float or bfloat16.
struct SpectralWeights {
  int64_t streams;
  int in_channels;
  int out_channels;
  int taps;  // K, at most kMaxSpectralTaps
  int frequencies;
};

cudaError_t spectral_weights(void* single, void* pairs, ElementType type, const float* weight, const double* basis,
                             const SpectralWeights& weights, cudaStream_t stream);

// The transpose of spectral_weights: the gradient (S, C_out, C_in, K) from those of single (S, single_parts, C_in,
// C_out) and pairs (S, F, pair_parts, 2 C_in, 2 C_out), which count with the sum of their parts.
cudaError_t spectral_weight_gradient(float* weight_gradient, const float* single, int single_parts, const float* pairs,
                                     int pair_parts, const double* basis, const SpectralWeights& weights,
                                     cudaStream_t stream);

}  // namespace ikem_fast::cuda
