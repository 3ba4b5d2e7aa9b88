#include "cuda/spectral_transform.h"

#include "cuda/convolution_values.h"
#include "cuda/kernel.h"
#include "cuda/real_types.h"

namespace ikem_fast::cuda {

namespace {

struct Traits {
  static constexpr int kMaxThreads = 320;
  static constexpr int kWide = 2;        // channels of a thread
  static constexpr int kMaxLanes = 128;  // threads that share a row
  // The last block's size, of 13 frames and 9 taps, for which loops are unrolled.
  static constexpr int kFrames = 13;
  static constexpr int kFrequencies = 8;
  static constexpr int kWeightThreads = 256;
  static constexpr int kTile = 32;  // output channels that a block of the weights' kernels takes
  static constexpr int kInTile = kWeightThreads / kTile;
  static constexpr int kTapsAtOnce = 9;
};

__host__ __device__ constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

// A block takes a sequence of a stream and up to kWide times `lanes` channels, in each of `groups` groups of threads one
// row at a time.
struct Split {
  int lanes, groups, chunks;
  int threads() const { return lanes * groups; }
};

Split split(const SpectralShape& shape) {
  Split split{};
  const int vectors = shape.channels / Traits::kWide, rows = shape.num_tiles() * shape.joints;
  split.lanes = vectors < Traits::kMaxLanes ? vectors : Traits::kMaxLanes;
  split.chunks = divide_up(vectors, split.lanes);
  // As many groups as leave the fewest without a row in the end.
  const int most = Traits::kMaxThreads / split.lanes;
  double best = 0;
  for (int groups = (most + 1) / 2; groups <= most; ++groups) {
    const double used = static_cast<double>(rows) / (static_cast<double>(divide_up(rows, groups)) * groups);
    if (used >= best) {
      best = used;
      split.groups = groups;
    }
  }
  return split;
}

// What a thread of the transforms' kernels works on.
struct Place {
  int64_t stream, sequence;
  int lane, group, channel;  // the first of kWide channels
  bool is_inside;
};

__device__ __forceinline__ Place find_place(const SpectralShape& shape, const Split& split) {
  Place place;
  const unsigned of_sequence = blockIdx.x / split.chunks;
  place.stream = of_sequence / shape.sequences;
  place.sequence = of_sequence % shape.sequences;
  place.lane = threadIdx.x % split.lanes;
  place.group = threadIdx.x / split.lanes;
  place.channel = Traits::kWide * (static_cast<int>(blockIdx.x % split.chunks) * split.lanes + place.lane);
  place.is_inside = place.channel < shape.channels;
  return place;
}

// Where the sequence begins in a tensor of frames.
__device__ __forceinline__ int64_t sequence_at(const SpectralShape& shape, const Place& place) {
  return (place.stream * shape.stream_sequences + place.sequence) * shape.frames * shape.joints *
         shape.channels;
}

// Where the numbers of slot 0 and of frequency `f` are for a row of the sequence.
__device__ __forceinline__ int64_t single_at(const SpectralShape& shape, const Place& place, int row) {
  const int64_t in_stream = place.sequence * shape.num_tiles() * shape.joints + row;
  return (place.stream * shape.rows() + in_stream) * shape.channels + place.channel;
}
__device__ __forceinline__ int64_t pair_at(const SpectralShape& shape, const Place& place, int row, int f) {
  const int64_t in_stream = place.sequence * shape.num_tiles() * shape.joints + row;
  return ((place.stream * shape.frequencies + f) * shape.rows() + in_stream) * 2 * shape.channels + place.channel;
}

// Goes to kernels by value, from where multiply-adds take its numbers without a load. In rows of kPoints, zeros past
// the points.
template <int kPoints>
struct Basis {
  float values[(1 + 2 * kMaxSpectralFrequencies) * kPoints];
};

template <int kPoints>
Basis<kPoints> pad_basis(const double* basis, int num_slots, int num_points) {
  Basis<kPoints> result{};
  for (int slot = 0; slot < num_slots; ++slot) {
    for (int point = 0; point < num_points; ++point) {
      result.values[slot * kPoints + point] = static_cast<float>(basis[slot * num_points + point]);
    }
  }
  return result;
}

template <typename T>
struct alignas(Traits::kWide * sizeof(T)) Vector {
  T values[Traits::kWide];
};

template <typename T>
__device__ __forceinline__ void load(float (&values)[Traits::kWide], const T* from) {
  const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(from);
#pragma unroll
  for (int k = 0; k < Traits::kWide; ++k) values[k] = widen(vector.values[k]);
}

template <typename T>
__device__ __forceinline__ void store(T* to, const float (&values)[Traits::kWide]) {
  Vector<T> vector;
#pragma unroll
  for (int k = 0; k < Traits::kWide; ++k) vector.values[k] = narrow<T>(values[k]);
  *reinterpret_cast<Vector<T>*>(to) = vector;
}

// A sum of each of a thread's channels over the block's groups, in their order; group 0 gets it. `shared` holds kWide
// numbers for each thread.
__device__ __forceinline__ void add_groups(float (&sums)[Traits::kWide], float* shared, const Place& place,
                                           const Split& split) {
  __syncthreads();
  store(shared + Traits::kWide * threadIdx.x, sums);
  __syncthreads();
  if (place.group > 0) return;
  for (int group = 1; group < split.groups; ++group) {
    float others[Traits::kWide];
    load(others, shared + Traits::kWide * (group * split.lanes + place.lane));
#pragma unroll
    for (int k = 0; k < Traits::kWide; ++k) sums[k] += others[k];
  }
}

// kFrequencies is their number or, where it is 0, the shape says it.
template <typename T, bool kGradient, int kWindow, int kFrequencies>
__global__ void __launch_bounds__(Traits::kMaxThreads, kWindow <= 16 ? 2 : 1)
    spectral_slots_kernel(SpectralSlots slots, Basis<kWindow> basis, const T* __restrict__ x,
                          ActivationInput activation, GradientInput gradient, float* __restrict__ sums,
                          SpectralShape shape, Split split) {
  IKEM_SHARED(alignas(16) float, group_sums, [Traits::kWide * Traits::kMaxThreads]);
  const int window = shape.tile_frames + 2 * shape.lead;
  const int num_frequencies = kFrequencies ? kFrequencies : shape.frequencies;
  const Place place = find_place(shape, split);
  const int64_t start = sequence_at(shape, place);
  const T* __restrict__ y = static_cast<const T*>(gradient.y) + start;
  T* __restrict__ single = static_cast<T*>(slots.single);
  T* __restrict__ pairs = static_cast<T*>(slots.pairs);
  const bool has_activation = !kGradient && activation.scale, reads_y = kGradient && gradient.variance_gradient;
  ActivationOfChannel activate[Traits::kWide];
  GradientOfChannel total[Traits::kWide];
#pragma unroll
  for (int k = 0; k < Traits::kWide; ++k) {
    const int64_t channel = place.stream * shape.channels + place.channel + k;
    if (place.is_inside && has_activation) activate[k] = of_channel(activation, channel);
    if (place.is_inside && kGradient) total[k] = of_channel(gradient, channel);
  }
  float own_sums[Traits::kWide] = {};
  const int num_rows = place.is_inside ? shape.num_tiles() * shape.joints : 0;
  for (int row = place.group; row < num_rows; row += split.groups) {
    const int tile = row / shape.joints, joint = row % shape.joints;
    const int first = tile * shape.tile_frames - shape.lead;
    float h[kWindow][Traits::kWide];
#pragma unroll
    for (int j = 0; j < kWindow; ++j) {
      const int frame = first + j, at = (frame * shape.joints + joint) * shape.channels + place.channel;
      const bool is_frame = j < window && frame >= 0 && frame < shape.frames;
      if (is_frame) {
        load(h[j], x + start + at);
        if (has_activation) {
#pragma unroll
          for (int k = 0; k < Traits::kWide; ++k) h[j][k] = widen(narrow<T>(activate[k](h[j][k])));
        } else if (reads_y) {
          float made[Traits::kWide];
          load(made, y + at);
#pragma unroll
          for (int k = 0; k < Traits::kWide; ++k) h[j][k] = total[k](h[j][k], made[k]);
        } else if (kGradient) {
#pragma unroll
          for (int k = 0; k < Traits::kWide; ++k) h[j][k] = total[k](h[j][k]);
        }
      } else {
#pragma unroll
        for (int k = 0; k < Traits::kWide; ++k) h[j][k] = 0.0f;
      }
    }
    if (kGradient && sums) {
#pragma unroll
      for (int j = 0; j < kWindow; ++j) {
        if (j < shape.lead || j >= shape.lead + shape.tile_frames) continue;
#pragma unroll
        for (int k = 0; k < Traits::kWide; ++k) own_sums[k] += h[j][k];
      }
    }
    const auto project = [&](float(&out)[Traits::kWide], int slot) {
#pragma unroll
      for (int k = 0; k < Traits::kWide; ++k) out[k] = 0.0f;
#pragma unroll
      for (int j = 0; j < kWindow; ++j) {
#pragma unroll
        for (int k = 0; k < Traits::kWide; ++k) out[k] = fmaf(basis.values[slot * kWindow + j], h[j][k], out[k]);
      }
    };
    float out[Traits::kWide];
    project(out, 0);
    store(single + single_at(shape, place, row), out);
    T* to = pairs + pair_at(shape, place, row, 0);
#pragma unroll(kFrequencies ? kFrequencies : 1)
    for (int f = 0; f < num_frequencies; ++f, to += shape.rows() * 2 * shape.channels) {
      float other[Traits::kWide];
      project(out, 1 + 2 * f);
      project(other, 2 + 2 * f);
      store(to, out);
      store(to + shape.channels, other);
    }
  }
  if (!kGradient || !sums) return;
  add_groups(own_sums, group_sums, place, split);
  if (place.is_inside && place.group == 0) {
    const int64_t of_sequence = place.stream * shape.stream_sequences + place.sequence;
    store(sums + of_sequence * shape.channels + place.channel, own_sums);
  }
}

// Frames of one row, kTile at most: basis^T slots.
template <typename T, int kTile, int kFrequencies>
__device__ __forceinline__ void project_back(float (&frames)[kTile][Traits::kWide], const SpectralSlots& slots,
                                             const Basis<kTile>& basis, const SpectralShape& shape, const Place& place,
                                             int row) {
  const auto add = [&](const Vector<T>& vector, int slot) {
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
#pragma unroll
      for (int k = 0; k < Traits::kWide; ++k) {
        frames[j][k] = fmaf(basis.values[slot * kTile + j], widen(vector.values[k]), frames[j][k]);
      }
    }
  };
#pragma unroll
  for (int j = 0; j < kTile; ++j) {
#pragma unroll
    for (int k = 0; k < Traits::kWide; ++k) frames[j][k] = 0.0f;
  }
  // Loads of several frequencies are under way at once.
  constexpr int kAtOnce = 16 / sizeof(T);
  const int num_frequencies = kFrequencies ? kFrequencies : shape.frequencies;
  const int64_t pitch = shape.rows() * 2 * shape.channels;
  const T* from = static_cast<const T*>(slots.pairs) + pair_at(shape, place, row, 0);
  const Vector<T> constant = *reinterpret_cast<const Vector<T>*>(static_cast<const T*>(slots.single) +
                                                                 single_at(shape, place, row));
#pragma unroll(kFrequencies ? kFrequencies : 1)
  for (int first = 0; first < num_frequencies; first += kAtOnce) {
    Vector<T> loaded[kAtOnce][2];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= num_frequencies) continue;
      loaded[i][0] = *reinterpret_cast<const Vector<T>*>(from);
      loaded[i][1] = *reinterpret_cast<const Vector<T>*>(from + shape.channels);
      from += pitch;
    }
    if (first == 0) add(constant, 0);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= num_frequencies) continue;
      add(loaded[i][0], 1 + 2 * (first + i));
      add(loaded[i][1], 2 + 2 * (first + i));
    }
  }
  if (num_frequencies == 0) add(constant, 0);
}

// Mean and sum of squared differences from it of `count` values, joined as they come.
struct ChannelMoments {
  float mean[Traits::kWide], deviation[Traits::kWide];
  float count;

  __device__ __forceinline__ void clear() {
    count = 0.0f;
#pragma unroll
    for (int k = 0; k < Traits::kWide; ++k) mean[k] = deviation[k] = 0.0f;
  }
  __device__ __forceinline__ void join(const float (&other_mean)[Traits::kWide],
                                       const float (&other_deviation)[Traits::kWide], float other_count) {
    const float share = other_count / (count + other_count), weight = count * share;
#pragma unroll
    for (int k = 0; k < Traits::kWide; ++k) {
      const float difference = other_mean[k] - mean[k];
      mean[k] = fmaf(difference, share, mean[k]);
      deviation[k] += fmaf(difference * difference, weight, other_deviation[k]);
    }
    count += other_count;
  }
};

template <typename T, int kTile, int kFrequencies>
__global__ void __launch_bounds__(Traits::kMaxThreads, 2)
    spectral_frames_kernel(SpectralResult result, SpectralSlots slots, Basis<kTile> basis, SpectralShape shape,
                           Split split) {
  IKEM_SHARED(alignas(16) float, group_means, [Traits::kWide * Traits::kMaxThreads]);
  IKEM_SHARED(alignas(16) float, group_deviations, [Traits::kWide * Traits::kMaxThreads]);
  IKEM_SHARED(float, group_counts, [Traits::kMaxThreads]);
  const Place place = find_place(shape, split);
  const int64_t start = sequence_at(shape, place);
  T* __restrict__ y = static_cast<T*>(result.y) + start;
  const T* __restrict__ residual = static_cast<const T*>(result.residual) + start;
  const bool is_inference = result.output_scale != nullptr;
  float bias[Traits::kWide], scale[Traits::kWide], shift[Traits::kWide];
#pragma unroll
  for (int k = 0; k < Traits::kWide; ++k) {
    const int64_t channel = place.stream * shape.channels + place.channel + k;
    bias[k] = place.is_inside ? result.bias[channel] : 0.0f;
    scale[k] = place.is_inside && is_inference ? result.output_scale[channel] : 1.0f;
    shift[k] = place.is_inside && is_inference ? result.output_shift[channel] : 0.0f;
  }
  ChannelMoments moments;
  moments.clear();
  const int num_rows = place.is_inside ? shape.num_tiles() * shape.joints : 0;
  for (int row = place.group; row < num_rows; row += split.groups) {
    const int tile = row / shape.joints, joint = row % shape.joints;
    const int left = shape.frames - tile * shape.tile_frames;
    const int count = left < shape.tile_frames ? left : shape.tile_frames;
    float frames[kTile][Traits::kWide];
    project_back<T, kTile, kFrequencies>(frames, slots, basis, shape, place, row);
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
#pragma unroll
      for (int k = 0; k < Traits::kWide; ++k) frames[j][k] += bias[k];
    }
    if (result.moments) {
      float mean[Traits::kWide] = {}, deviation[Traits::kWide] = {};
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
#pragma unroll
        for (int k = 0; k < Traits::kWide; ++k) mean[k] += j < count ? frames[j][k] : 0.0f;
      }
      const float part = 1.0f / static_cast<float>(count);
#pragma unroll
      for (int k = 0; k < Traits::kWide; ++k) mean[k] *= part;
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
#pragma unroll
        for (int k = 0; k < Traits::kWide; ++k) {
          const float difference = j < count ? frames[j][k] - mean[k] : 0.0f;
          deviation[k] = fmaf(difference, difference, deviation[k]);
        }
      }
      moments.join(mean, deviation, static_cast<float>(count));
    }
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      if (j >= count) continue;
      const int at = ((tile * shape.tile_frames + j) * shape.joints + joint) * shape.channels + place.channel;
      if (is_inference) {
        float added[Traits::kWide] = {};
        if (result.residual) load(added, residual + at);
#pragma unroll
        for (int k = 0; k < Traits::kWide; ++k) {
          frames[j][k] = relu(fmaf(scale[k], frames[j][k], shift[k]) + added[k]);
        }
      }
      store(y + at, frames[j]);
    }
  }
  if (!result.moments) return;
  store(group_means + Traits::kWide * threadIdx.x, moments.mean);
  store(group_deviations + Traits::kWide * threadIdx.x, moments.deviation);
  group_counts[threadIdx.x] = moments.count;
  __syncthreads();
  if (!place.is_inside || place.group > 0) return;
  for (int group = 1; group < split.groups; ++group) {
    const int other = group * split.lanes + place.lane;
    if (group_counts[other] == 0.0f) continue;
    float mean[Traits::kWide], deviation[Traits::kWide];
    load(mean, group_means + Traits::kWide * other);
    load(deviation, group_deviations + Traits::kWide * other);
    moments.join(mean, deviation, group_counts[other]);
  }
  const int64_t of_sequence = place.stream * shape.stream_sequences + place.sequence;
  float* to = result.moments + of_sequence * 3 * shape.channels + place.channel;
  float counts[Traits::kWide];
#pragma unroll
  for (int k = 0; k < Traits::kWide; ++k) counts[k] = moments.count;
  store(to, counts);
  store(to + shape.channels, moments.mean);
  store(to + 2 * shape.channels, moments.deviation);
}

template <typename T, int kTile, int kFrequencies>
__global__ void __launch_bounds__(Traits::kMaxThreads, 2)
    spectral_x_gradient_kernel(SpectralGradient gradient, SpectralSlots slots, Basis<kTile> basis, SpectralShape shape,
                           Split split) {
  IKEM_SHARED(alignas(16) float, group_sums, [Traits::kWide * Traits::kMaxThreads]);
  const Place place = find_place(shape, split);
  const int64_t start = sequence_at(shape, place);
  const T* __restrict__ x = static_cast<const T*>(gradient.x) + start;
  T* __restrict__ x_gradient = static_cast<T*>(gradient.x_gradient) + start;
  const bool has_activation = gradient.activation.scale != nullptr;
  ActivationOfChannel activate[Traits::kWide];
#pragma unroll
  for (int k = 0; k < Traits::kWide; ++k) {
    const int64_t channel = place.stream * shape.channels + place.channel + k;
    if (place.is_inside && has_activation) activate[k] = of_channel(gradient.activation, channel);
  }
  float scale_sums[Traits::kWide] = {}, shift_sums[Traits::kWide] = {};
  const int num_rows = place.is_inside ? shape.num_tiles() * shape.joints : 0;
  for (int row = place.group; row < num_rows; row += split.groups) {
    const int tile = row / shape.joints, joint = row % shape.joints;
    const int left = shape.frames - tile * shape.tile_frames;
    float frames[kTile][Traits::kWide];
    project_back<T, kTile, kFrequencies>(frames, slots, basis, shape, place, row);
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      if (j >= shape.tile_frames || j >= left) continue;
      const int at = ((tile * shape.tile_frames + j) * shape.joints + joint) * shape.channels + place.channel;
      if (has_activation) {
        float values[Traits::kWide];
        load(values, x + at);
#pragma unroll
        for (int k = 0; k < Traits::kWide; ++k) {
          const float passed = activate[k].before(values[k]) > 0.0f ? frames[j][k] : 0.0f;
          shift_sums[k] += passed;
          scale_sums[k] = fmaf(passed, values[k], scale_sums[k]);
          frames[j][k] = activate[k].scale * passed;
        }
      }
      if (gradient.x_gradient) store(x_gradient + at, frames[j]);
    }
  }
  if (!has_activation) return;
  add_groups(scale_sums, group_sums, place, split);
  add_groups(shift_sums, group_sums, place, split);
  if (place.is_inside && place.group == 0) {
    const int64_t of_sequence = place.stream * shape.stream_sequences + place.sequence;
    store(gradient.scale_sums + of_sequence * shape.channels + place.channel, scale_sums);
    store(gradient.shift_sums + of_sequence * shape.channels + place.channel, shift_sums);
  }
}

// Which weights a block takes: of one stream, kInTile input by kTile output channels.
struct WeightPlace {
  int64_t stream;
  int first_in, first_out;  // of the block
  int in, out;              // of the thread
  bool is_inside;
};

__device__ __forceinline__ WeightPlace find_place(const SpectralWeights& weights) {
  const int out_tiles = divide_up(weights.out_channels, Traits::kTile);
  const int in_tiles = divide_up(weights.in_channels, Traits::kInTile);
  WeightPlace place;
  place.first_out = static_cast<int>(blockIdx.x) % out_tiles * Traits::kTile;
  place.first_in = static_cast<int>(blockIdx.x) / out_tiles % in_tiles * Traits::kInTile;
  place.stream = blockIdx.x / out_tiles / in_tiles;
  place.out = place.first_out + threadIdx.x % Traits::kTile;
  place.in = place.first_in + threadIdx.x / Traits::kTile;
  place.is_inside = place.in < weights.in_channels && place.out < weights.out_channels;
  return place;
}

using TapBasis = Basis<kMaxSpectralTaps>;

// Shared memory of the kernels below: the block's weights, output channel by output channel.
__host__ __device__ constexpr int weight_stride(int taps) { return Traits::kInTile * taps + 1; }

// Calls visit(place in the block's weights, place in the tensor) for all of the block's weights, neighbours in the
// tensor by neighbouring threads.
template <typename Visit>
__device__ __forceinline__ void for_each_weight(const SpectralWeights& weights, const WeightPlace& place,
                                                Visit visit) {
  const int left = weights.in_channels - place.first_in;
  const int run = (left < Traits::kInTile ? left : Traits::kInTile) * weights.taps;
  for (int i = threadIdx.x; i < Traits::kTile * run; i += Traits::kWeightThreads) {
    const int out = i / run, in_run = i % run;
    if (place.first_out + out >= weights.out_channels) break;
    const int64_t row = place.stream * weights.out_channels + place.first_out + out;
    visit(out * weight_stride(weights.taps) + in_run,
          (row * weights.in_channels + place.first_in) * weights.taps + in_run);
  }
}

// The thread's weights among the block's.
__device__ __forceinline__ int own_weights(const SpectralWeights& weights, const WeightPlace& place) {
  return (place.out - place.first_out) * weight_stride(weights.taps) + (place.in - place.first_in) * weights.taps;
}

template <typename T>
__global__ void __launch_bounds__(Traits::kWeightThreads)
    spectral_weights_kernel(T* __restrict__ single, T* __restrict__ pairs, const float* __restrict__ weight,
                            TapBasis basis, SpectralWeights weights) {
  IKEM_DYNAMIC_SHARED(float, tile);
  const WeightPlace place = find_place(weights);
  for_each_weight(weights, place, [&](int at, int64_t from) { tile[at] = weight[from]; });
  __syncthreads();
  if (!place.is_inside) return;
  const float* own = tile + own_weights(weights, place);
  const int64_t width = weights.out_channels, height = weights.in_channels;
  float constant = 0.0f;
  for (int tap = 0; tap < weights.taps; ++tap) constant = fmaf(basis.values[tap], own[tap], constant);
  single[(place.stream * height + place.in) * width + place.out] = narrow<T>(constant);
  T* upper = pairs + (place.stream * weights.frequencies * 2 * height + place.in) * 2 * width + place.out;
  for (int f = 0; f < weights.frequencies; ++f, upper += 4 * height * width) {
    const float* cosines = basis.values + (1 + 2 * f) * kMaxSpectralTaps;
    float real = 0.0f, imaginary = 0.0f;
    for (int tap = 0; tap < weights.taps; ++tap) {
      real = fmaf(cosines[tap], own[tap], real);
      imaginary = fmaf(cosines[kMaxSpectralTaps + tap], own[tap], imaginary);
    }
    T* lower = upper + height * 2 * width;
    upper[0] = narrow<T>(real);
    upper[width] = narrow<T>(imaginary);
    lower[0] = narrow<T>(-imaginary);
    lower[width] = narrow<T>(real);
  }
}

__global__ void __launch_bounds__(Traits::kWeightThreads)
    spectral_weight_gradient_kernel(float* __restrict__ weight_gradient, const float* __restrict__ single,
                                    int single_parts, const float* __restrict__ pairs, int pair_parts,
                                    TapBasis basis, SpectralWeights weights) {
  IKEM_DYNAMIC_SHARED(float, tile);
  const WeightPlace place = find_place(weights);
  const int64_t width = weights.out_channels, height = weights.in_channels;
  if (place.is_inside) {
    float constant = 0.0f;
    for (int part = 0; part < single_parts; ++part) {
      constant += single[((place.stream * single_parts + part) * height + place.in) * width + place.out];
    }
    float* own = tile + own_weights(weights, place);
    for (int first = 0; first < weights.taps; first += Traits::kTapsAtOnce) {
      float taps[Traits::kTapsAtOnce];
#pragma unroll
      for (int i = 0; i < Traits::kTapsAtOnce; ++i) taps[i] = constant * basis.values[first + i];
#pragma unroll 2
      for (int f = 0; f < weights.frequencies; ++f) {
        float real = 0.0f, imaginary = 0.0f;
        for (int part = 0; part < pair_parts; ++part) {
          const int64_t matrix = (place.stream * weights.frequencies + f) * pair_parts + part;
          const float* upper = pairs + (matrix * 2 * height + place.in) * 2 * width + place.out;
          const float* lower = upper + height * 2 * width;
          real += upper[0] + lower[width];
          imaginary += upper[width] - lower[0];
        }
        const float* cosines = basis.values + (1 + 2 * f) * kMaxSpectralTaps + first;
#pragma unroll
        for (int i = 0; i < Traits::kTapsAtOnce; ++i) {
          taps[i] = fmaf(real, cosines[i], fmaf(imaginary, cosines[kMaxSpectralTaps + i], taps[i]));
        }
      }
#pragma unroll
      for (int i = 0; i < Traits::kTapsAtOnce; ++i) {
        if (first + i < weights.taps) own[first + i] = taps[i];
      }
    }
  }
  __syncthreads();
  for_each_weight(weights, place, [&](int at, int64_t to) { weight_gradient[to] = tile[at]; });
}

bool fits(const SpectralShape& shape, ElementType type) {
  const int64_t blocks = shape.streams * shape.sequences * divide_up(shape.channels, Traits::kWide);
  return type != ElementType::kDouble && shape.channels > 0 && shape.channels % Traits::kWide == 0 &&
         shape.tile_frames > 0 &&
         shape.tile_frames <= kMaxSpectralTile && shape.lead >= 0 &&
         shape.tile_frames + 2 * shape.lead <= kMaxSpectralWindow && shape.frequencies >= 0 &&
         shape.frequencies <= kMaxSpectralFrequencies && shape.frames > 0 && shape.joints > 0 && blocks <= INT32_MAX &&
         (static_cast<int64_t>(shape.frames) + 2 * kMaxSpectralWindow) * shape.joints * shape.channels <= INT32_MAX;
}

// Calls run with an example of the type of elements.
template <typename Run>
cudaError_t with_type(ElementType type, Run run) {
  return type == ElementType::kFloat ? run(float{}) : run(__nv_bfloat16{});
}

unsigned num_blocks(const SpectralShape& shape, const Split& split) {
  return static_cast<unsigned>(shape.streams * shape.sequences * split.chunks);
}

}  // namespace

namespace {

template <bool kGradient>
cudaError_t launch_slots(const SpectralSlots& slots, const double* basis, const void* x, ElementType type,
                         const ActivationInput& activation, const GradientInput& gradient, float* sums,
                         const SpectralShape& shape, cudaStream_t stream) {
  const Split of_blocks = split(shape);
  const dim3 grid(num_blocks(shape, of_blocks)), block(of_blocks.threads());
  const int window = shape.tile_frames + 2 * shape.lead, num_slots = shape.num_slots();
  return with_type(type, [&](auto example) {
    using T = decltype(example);
    const T* values = static_cast<const T*>(x);
    if (window <= Traits::kFrames && shape.frequencies == Traits::kFrequencies) {
      return IKEM_LAUNCH((spectral_slots_kernel<T, kGradient, Traits::kFrames, Traits::kFrequencies>), grid, block, 0,
                         stream, slots, pad_basis<Traits::kFrames>(basis, num_slots, window), values, activation,
                         gradient, sums, shape, of_blocks);
    }
    if (window <= 16) {
      return IKEM_LAUNCH((spectral_slots_kernel<T, kGradient, 16, 0>), grid, block, 0, stream, slots,
                         pad_basis<16>(basis, num_slots, window), values, activation, gradient, sums, shape, of_blocks);
    }
    return IKEM_LAUNCH((spectral_slots_kernel<T, kGradient, kMaxSpectralWindow, 0>), grid, block, 0, stream, slots,
                       pad_basis<kMaxSpectralWindow>(basis, num_slots, window), values, activation, gradient, sums,
                       shape, of_blocks);
  });
}

}  // namespace

cudaError_t spectral_slots(const SpectralSlots& slots, const double* basis, const void* x, ElementType type,
                           const ActivationInput& activation, const GradientInput* gradient, float* sums,
                           const SpectralShape& shape, cudaStream_t stream) {
  if (!fits(shape, type)) return cudaErrorInvalidValue;
  if (shape.streams * shape.sequences == 0) return cudaSuccess;
  return gradient ? launch_slots<true>(slots, basis, x, type, activation, *gradient, sums, shape, stream)
                  : launch_slots<false>(slots, basis, x, type, activation, {}, nullptr, shape, stream);
}

cudaError_t spectral_frames(const SpectralResult& result, const SpectralSlots& slots, const double* basis,
                            ElementType type, const SpectralShape& shape, cudaStream_t stream) {
  if (!fits(shape, type)) return cudaErrorInvalidValue;
  if (shape.streams * shape.sequences == 0) return cudaSuccess;
  const Split of_blocks = split(shape);
  const dim3 grid(num_blocks(shape, of_blocks)), block(of_blocks.threads());
  return with_type(type, [&](auto example) {
    using T = decltype(example);
    if (shape.tile_frames <= Traits::kFrames && shape.frequencies == Traits::kFrequencies) {
      return IKEM_LAUNCH((spectral_frames_kernel<T, Traits::kFrames, Traits::kFrequencies>), grid, block, 0, stream,
                         result, slots, pad_basis<Traits::kFrames>(basis, shape.num_slots(), shape.tile_frames), shape,
                         of_blocks);
    }
    return IKEM_LAUNCH((spectral_frames_kernel<T, kMaxSpectralTile, 0>), grid, block, 0, stream, result, slots,
                       pad_basis<kMaxSpectralTile>(basis, shape.num_slots(), shape.tile_frames), shape, of_blocks);
  });
}

cudaError_t spectral_x_gradient(const SpectralGradient& gradient, const SpectralSlots& slots, const double* basis,
                                ElementType type, const SpectralShape& shape, cudaStream_t stream) {
  if (!fits(shape, type)) return cudaErrorInvalidValue;
  if (shape.streams * shape.sequences == 0) return cudaSuccess;
  const Split of_blocks = split(shape);
  const dim3 grid(num_blocks(shape, of_blocks)), block(of_blocks.threads());
  return with_type(type, [&](auto example) {
    using T = decltype(example);
    if (shape.tile_frames <= Traits::kFrames && shape.frequencies == Traits::kFrequencies) {
      return IKEM_LAUNCH((spectral_x_gradient_kernel<T, Traits::kFrames, Traits::kFrequencies>), grid, block, 0,
                         stream, gradient, slots,
                         pad_basis<Traits::kFrames>(basis, shape.num_slots(), shape.tile_frames), shape, of_blocks);
    }
    return IKEM_LAUNCH((spectral_x_gradient_kernel<T, kMaxSpectralTile, 0>), grid, block, 0, stream, gradient, slots,
                       pad_basis<kMaxSpectralTile>(basis, shape.num_slots(), shape.tile_frames), shape, of_blocks);
  });
}

namespace {

// Blocks of the weights' kernels, 0 for sizes that do not fit.
unsigned num_blocks(const SpectralWeights& weights) {
  if (weights.frequencies < 0 || weights.frequencies > kMaxSpectralFrequencies || weights.taps < 1 ||
      weights.taps > kMaxSpectralTaps || weights.in_channels < 1 || weights.out_channels < 1) {
    return 0;
  }
  const int64_t blocks = weights.streams * divide_up(weights.out_channels, Traits::kTile) *
                         divide_up(weights.in_channels, Traits::kInTile);
  return blocks <= INT32_MAX ? static_cast<unsigned>(blocks) : 0;
}

size_t tile_bytes(const SpectralWeights& weights) {
  return sizeof(float) * Traits::kTile * weight_stride(weights.taps);
}

}  // namespace

cudaError_t spectral_weights(void* single, void* pairs, ElementType type, const float* weight, const double* basis,
                             const SpectralWeights& weights, cudaStream_t stream) {
  const unsigned blocks = num_blocks(weights);
  if (blocks == 0 || type == ElementType::kDouble) return cudaErrorInvalidValue;
  return with_type(type, [&](auto example) {
    using T = decltype(example);
    return IKEM_LAUNCH((spectral_weights_kernel<T>), dim3(blocks), dim3(Traits::kWeightThreads),
                       tile_bytes(weights), stream, static_cast<T*>(single), static_cast<T*>(pairs), weight,
                       pad_basis<kMaxSpectralTaps>(basis, 1 + 2 * weights.frequencies, weights.taps), weights);
  });
}

cudaError_t spectral_weight_gradient(float* weight_gradient, const float* single, int single_parts, const float* pairs,
                                     int pair_parts, const double* basis, const SpectralWeights& weights,
                                     cudaStream_t stream) {
  const unsigned blocks = num_blocks(weights);
  if (blocks == 0) return cudaErrorInvalidValue;
  return IKEM_LAUNCH(spectral_weight_gradient_kernel, dim3(blocks), dim3(Traits::kWeightThreads),
                     tile_bytes(weights), stream, weight_gradient, single, single_parts, pairs, pair_parts,
                     pad_basis<kMaxSpectralTaps>(basis, 1 + 2 * weights.frequencies, weights.taps), weights);
}

}  // namespace ikem_fast::cuda
