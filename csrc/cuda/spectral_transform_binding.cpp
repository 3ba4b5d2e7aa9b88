// The operators _spectral_*_, steps of a temporal convolution in the frequency domain.
#include "cuda/spectral_transform.h"

#include <optional>
#include <vector>

#include "cuda/tile_arguments.h"

namespace ikem_fast::cuda {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Some sequences of each stream of a tensor (S, B, T, V, C), or what is kept for each of them: (S, B, ...), dense but
// for the first stride, which is a whole number of sequences.
void check_sequences(const char* name, const Tensor& tensor, const Tensor& reference, ScalarType type,
                     const std::vector<int64_t>& sizes, int64_t stream_sequences) {
  bool fits = tensor.scalar_type() == type && tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.is_cuda() &&
              tensor.get_device_index() == reference.get_device_index();
  int64_t stride = 1;
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 1; fits && i >= 1; --i) {
    fits = tensor.size(i) == sizes[i] && (tensor.size(i) == 1 || tensor.stride(i) == stride);
    stride *= sizes[i];
  }
  if (fits) {
    const int64_t of_sequence = sizes[1] > 0 ? stride / sizes[1] : 0;
    fits = tensor.size(0) == sizes[0] && (sizes[0] == 1 || sizes[1] == 0 ||
                                          tensor.stride(0) == stream_sequences * of_sequence);
  }
  STD_TORCH_CHECK(fits, name, " must be dense sequences like the other tensors, ", stream_sequences,
                  " in a stream, on CUDA ", reference.get_device_index(), ", got ", describe_sizes(tensor), " of dtype number ",
                  static_cast<int>(tensor.scalar_type()));
}

struct Step {
  SpectralShape shape;
  ElementType type;
};

// Of `frames` (S, B, T, V, C) and slots single (S, R, C), pairs (S, F, R, 2 C).
Step spectral_step(const Tensor& frames, const Tensor& single, const Tensor& pairs, int64_t tile_frames,
                   int64_t lead) {
  STD_TORCH_CHECK(frames.dim() == 5 && frames.size(2) >= 1 && frames.size(3) >= 1 && frames.size(4) >= 1,
                  "a tensor of frames must be (S, B, T, V, C), got ", describe_sizes(frames));
  STD_TORCH_CHECK(tile_frames >= 1 && tile_frames <= kMaxSpectralTile && lead >= 0 && lead <= kMaxSpectralWindow,
                  "tile_frames must be 1 ... ", static_cast<int>(kMaxSpectralTile), " and lead 0 ... ",
                  static_cast<int>(kMaxSpectralWindow), ", got ", tile_frames, " and ", lead);
  for (int64_t i = 2; i < 5; ++i) {
    STD_TORCH_CHECK(frames.size(i) <= INT32_MAX, "frames must have sizes below 2^31, got ", describe_sizes(frames));
  }
  const int64_t of_sequence = frames.size(2) * frames.size(3) * frames.size(4);
  const int64_t streams = frames.size(0), sequences = frames.size(1), channels = frames.size(4);
  const int64_t stream_sequences = streams > 1 && sequences > 0 ? frames.stride(0) / of_sequence : sequences;
  const ScalarType type = frames.scalar_type();
  check_sequences("frames", frames, single, type, {streams, sequences, frames.size(2), frames.size(3), channels},
                  stream_sequences);
  Step step{{streams, sequences, stream_sequences, static_cast<int>(frames.size(2)), static_cast<int>(frames.size(3)),
             static_cast<int>(channels), static_cast<int>(tile_frames), static_cast<int>(lead), 0},
            element_type("frames", frames)};
  check_dense("pairs", pairs, frames, type, {streams, -1, step.shape.rows(), 2 * channels});
  check_dense("single", single, frames, type, {streams, step.shape.rows(), channels});
  STD_TORCH_CHECK(pairs.size(1) <= kMaxSpectralFrequencies, "pairs must be of at most ",
                  static_cast<int>(kMaxSpectralFrequencies), " frequencies, got ", describe_sizes(pairs));
  step.shape.frequencies = static_cast<int>(pairs.size(1));
  return step;
}

void check_basis(const std::vector<double>& basis, int64_t num_slots, int64_t points) {
  STD_TORCH_CHECK(static_cast<int64_t>(basis.size()) == num_slots * points, "basis must have ", num_slots, " times ",
                  points, " numbers, got ", basis.size());
}

const float* of_channels(const char* name, const std::optional<Tensor>& tensor, const Tensor& frames) {
  if (!tensor) return nullptr;
  check_dense(name, *tensor, frames, ScalarType::Float, {frames.size(0), frames.size(4)});
  return static_cast<const float*>(tensor->const_data_ptr());
}

// Of each sequence, (S, B, C) or (S, B, 3, C).
float* of_sequences(const char* name, std::optional<Tensor>& tensor, const Tensor& frames, const SpectralShape& shape,
                    bool moments = false) {
  if (!tensor) return nullptr;
  std::vector<int64_t> sizes{shape.streams, shape.sequences, shape.channels};
  if (moments) sizes.insert(sizes.end() - 1, 3);
  check_sequences(name, *tensor, frames, ScalarType::Float, sizes, shape.stream_sequences);
  return static_cast<float*>(tensor->mutable_data_ptr());
}

const void* like_frames(const char* name, const std::optional<Tensor>& tensor, const Tensor& frames,
                        const SpectralShape& shape) {
  if (!tensor) return nullptr;
  check_sequences(name, *tensor, frames, frames.scalar_type(),
                  {shape.streams, shape.sequences, shape.frames, shape.joints, shape.channels}, shape.stream_sequences);
  return tensor->const_data_ptr();
}

void slots_op(Tensor single, Tensor pairs, Tensor x, std::optional<Tensor> scale, std::optional<Tensor> shift,
              std::vector<double> basis, int64_t tile_frames, int64_t lead) {
  const Step step = spectral_step(x, single, pairs, tile_frames, lead);
  check_basis(basis, step.shape.num_slots(), tile_frames + 2 * lead);
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "scale and shift must be given together");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch("_spectral_slots_", x,
               spectral_slots({single.mutable_data_ptr(), pairs.mutable_data_ptr()}, basis.data(), x.const_data_ptr(),
                              step.type, {of_channels("scale", scale, x), of_channels("shift", shift, x)}, nullptr,
                              nullptr, step.shape, current_stream(x)));
}

void gradient_slots_op(Tensor single, Tensor pairs, std::optional<Tensor> sums, Tensor y_gradient,
                       std::optional<Tensor> y, std::optional<Tensor> mean, std::optional<Tensor> mean_gradient,
                       std::optional<Tensor> variance_gradient, int64_t count, std::vector<double> basis,
                       int64_t tile_frames, int64_t lead) {
  const Step step = spectral_step(y_gradient, single, pairs, tile_frames, lead);
  check_basis(basis, step.shape.num_slots(), tile_frames + 2 * lead);
  STD_TORCH_CHECK(!variance_gradient || (y && mean), "y and mean must be given with variance_gradient");
  const GradientInput gradient{like_frames("y", y, y_gradient, step.shape),
                               of_channels("mean", mean, y_gradient),
                               of_channels("mean_gradient", mean_gradient, y_gradient),
                               of_channels("variance_gradient", variance_gradient, y_gradient),
                               count > 0 ? static_cast<float>(1.0 / static_cast<double>(count)) : 0.0f};
  const torch::stable::accelerator::DeviceGuard guard(y_gradient.get_device_index());
  check_launch("_spectral_gradient_slots_", y_gradient,
               spectral_slots({single.mutable_data_ptr(), pairs.mutable_data_ptr()}, basis.data(),
                              y_gradient.const_data_ptr(), step.type, {}, &gradient,
                              of_sequences("sums", sums, y_gradient, step.shape), step.shape,
                              current_stream(y_gradient)));
}

void frames_op(Tensor y, std::optional<Tensor> moments, Tensor single, Tensor pairs, Tensor bias,
               std::optional<Tensor> output_scale, std::optional<Tensor> output_shift, std::optional<Tensor> residual,
               std::vector<double> basis, int64_t tile_frames) {
  const Step step = spectral_step(y, single, pairs, tile_frames, 0);
  check_basis(basis, step.shape.num_slots(), tile_frames);
  STD_TORCH_CHECK(output_scale.has_value() == output_shift.has_value(),
                  "output_scale and output_shift must be given together");
  const SpectralResult result{y.mutable_data_ptr(),
                              of_channels("bias", bias, y),
                              of_sequences("moments", moments, y, step.shape, true),
                              of_channels("output_scale", output_scale, y),
                              of_channels("output_shift", output_shift, y),
                              like_frames("residual", residual, y, step.shape)};
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  check_launch("_spectral_frames_", y,
               spectral_frames(result, {single.mutable_data_ptr(), pairs.mutable_data_ptr()}, basis.data(), step.type,
                               step.shape, current_stream(y)));
}

void x_gradient_op(std::optional<Tensor> x_gradient, std::optional<Tensor> scale_sums, std::optional<Tensor> shift_sums,
                   Tensor single, Tensor pairs, Tensor x, std::optional<Tensor> scale, std::optional<Tensor> shift,
                   std::vector<double> basis, int64_t tile_frames) {
  const Step step = spectral_step(x, single, pairs, tile_frames, 0);
  check_basis(basis, step.shape.num_slots(), tile_frames);
  STD_TORCH_CHECK(scale.has_value() == shift.has_value() && scale.has_value() == scale_sums.has_value() &&
                      scale.has_value() == shift_sums.has_value(),
                  "scale, shift and their sums must be given together");
  const SpectralGradient gradient{const_cast<void*>(like_frames("x_gradient", x_gradient, x, step.shape)),
                                  x.const_data_ptr(),
                                  {of_channels("scale", scale, x), of_channels("shift", shift, x)},
                                  of_sequences("scale_sums", scale_sums, x, step.shape),
                                  of_sequences("shift_sums", shift_sums, x, step.shape)};
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch("_spectral_x_gradient_", x,
               spectral_x_gradient(gradient, {single.mutable_data_ptr(), pairs.mutable_data_ptr()}, basis.data(),
                                   step.type, step.shape, current_stream(x)));
}

// The sizes of weight (S, C_out, C_in, K) with some frequencies, and its basis.
SpectralWeights spectral_weight_sizes(const Tensor& weight, int64_t frequencies, const std::vector<double>& basis) {
  check_dense("weight", weight, weight, ScalarType::Float, {-1, -1, -1, -1});
  STD_TORCH_CHECK(weight.size(3) <= kMaxSpectralTaps && weight.size(1) <= INT32_MAX / 4 &&
                      weight.size(2) <= INT32_MAX / 4 && frequencies <= kMaxSpectralFrequencies,
                  "weight must have at most ", static_cast<int>(kMaxSpectralTaps), " taps and ",
                  static_cast<int>(kMaxSpectralFrequencies), " frequencies, got ", describe_sizes(weight), " and ",
                  frequencies);
  check_basis(basis, 1 + 2 * frequencies, weight.size(3));
  return {weight.size(0), static_cast<int>(weight.size(2)), static_cast<int>(weight.size(1)),
          static_cast<int>(weight.size(3)), static_cast<int>(frequencies)};
}

void weights_op(Tensor single, Tensor pairs, Tensor weight, std::vector<double> basis) {
  STD_TORCH_CHECK(pairs.dim() == 4, "pairs must be (S, F, 2 C_in, 2 C_out), got ", describe_sizes(pairs));
  const SpectralWeights sizes = spectral_weight_sizes(weight, pairs.size(1), basis);
  const ScalarType type = single.scalar_type();
  check_dense("single", single, weight, type, {sizes.streams, sizes.in_channels, sizes.out_channels});
  check_dense("pairs", pairs, weight, type,
              {sizes.streams, sizes.frequencies, 2 * sizes.in_channels, 2 * sizes.out_channels});
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  check_launch("_spectral_weights_", weight,
               spectral_weights(single.mutable_data_ptr(), pairs.mutable_data_ptr(), element_type("single", single),
                                static_cast<const float*>(weight.const_data_ptr()), basis.data(), sizes,
                                current_stream(weight)));
}

void weight_gradient_op(Tensor weight_gradient, Tensor single, Tensor pairs, std::vector<double> basis) {
  STD_TORCH_CHECK(pairs.dim() == 5, "pairs must be (S, F, parts, 2 C_in, 2 C_out), got ", describe_sizes(pairs));
  const SpectralWeights sizes = spectral_weight_sizes(weight_gradient, pairs.size(1), basis);
  check_dense("single", single, weight_gradient, ScalarType::Float,
              {sizes.streams, -1, sizes.in_channels, sizes.out_channels});
  check_dense("pairs", pairs, weight_gradient, ScalarType::Float,
              {sizes.streams, sizes.frequencies, -1, 2 * sizes.in_channels, 2 * sizes.out_channels});
  const torch::stable::accelerator::DeviceGuard guard(weight_gradient.get_device_index());
  check_launch("_spectral_weight_gradient_", weight_gradient,
               spectral_weight_gradient(static_cast<float*>(weight_gradient.mutable_data_ptr()),
                                        static_cast<const float*>(single.const_data_ptr()),
                                        static_cast<int>(single.size(1)),
                                        static_cast<const float*>(pairs.const_data_ptr()),
                                        static_cast<int>(pairs.size(2)), basis.data(), sizes,
                                        current_stream(weight_gradient)));
}

}  // namespace

}  // namespace ikem_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ikem_fast, CUDA, m) {
  m.impl("_spectral_slots_", TORCH_BOX(&ikem_fast::cuda::slots_op));
  m.impl("_spectral_gradient_slots_", TORCH_BOX(&ikem_fast::cuda::gradient_slots_op));
  m.impl("_spectral_frames_", TORCH_BOX(&ikem_fast::cuda::frames_op));
  m.impl("_spectral_x_gradient_", TORCH_BOX(&ikem_fast::cuda::x_gradient_op));
  m.impl("_spectral_weights_", TORCH_BOX(&ikem_fast::cuda::weights_op));
  m.impl("_spectral_weight_gradient_", TORCH_BOX(&ikem_fast::cuda::weight_gradient_op));
}
