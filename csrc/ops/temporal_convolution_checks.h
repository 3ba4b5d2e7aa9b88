// What may go wrong with the sizes that temporal_convolution gets. Shared by the operators of both devices: no torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ikem_fast {

struct TemporalConvolutionSizes {
  int64_t streams = 0;       // S
  int64_t sequences = 0;     // B, of each stream
  int64_t frames = 0;        // T
  int64_t joints = 0;        // V
  int64_t in_channels = 0;   // C_in
  int64_t out_channels = 0;  // C_out
  int64_t taps = 0;          // K, odd
  int64_t stride = 1;

  int64_t out_frames() const { return (frames + stride - 1) / stride; }
  // Values of a channel of a stream of y: what its mean and variance are over.
  int64_t values() const { return sequences * out_frames() * joints; }

  std::vector<int64_t> of_x() const { return {streams, sequences, frames, joints, in_channels}; }
  std::vector<int64_t> of_y() const { return {streams, sequences, out_frames(), joints, out_channels}; }
  std::vector<int64_t> of_in_channels() const { return {streams, in_channels}; }
  std::vector<int64_t> of_out_channels() const { return {streams, out_channels}; }
  std::vector<int64_t> of_weight() const { return {streams, out_channels, in_channels, taps}; }
};

inline std::string describe_shape(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(shape[i]);
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

// The first problem in one sentence, or nothing.
inline std::string find_temporal_convolution_problem(const std::vector<int64_t>& x, const std::vector<int64_t>& weight,
                                                     int64_t stride) {
  if (x.size() != 5 || x[0] < 1 || x[2] < 1 || x[3] < 1 || x[4] < 1) {
    return "x must be (S, B, T, V, C_in), none but B 0, got " + describe_shape(x);
  }
  if (weight.size() != 4 || weight[0] != x[0] || weight[1] < 1 || weight[2] != x[4] || weight[3] % 2 != 1) {
    return "weight must be (S, C_out, C_in, K) = (" + std::to_string(x[0]) + ", any, " + std::to_string(x[4]) +
           ", odd), C_out not 0, got " + describe_shape(weight);
  }
  if (stride < 1) return "stride must be at least 1, got " + std::to_string(stride);
  return "";
}

inline TemporalConvolutionSizes temporal_convolution_sizes(const std::vector<int64_t>& x,
                                                           const std::vector<int64_t>& weight, int64_t stride) {
  return {x[0], x[1], x[2], x[3], x[4], weight[1], weight[3], stride};
}

// What is wrong with the shape of an argument that must have a given one; `letters` is how the message names its sizes.
inline std::string find_shape_problem(const char* name, const char* letters, const std::vector<int64_t>& shape,
                                      const std::vector<int64_t>& wanted) {
  if (shape == wanted) return "";
  return std::string(name) + " must be " + letters + " = " + describe_shape(wanted) + ", got " + describe_shape(shape);
}

}  // namespace ikem_fast
