#include "cuda/temporal_convolution.h"

#include <initializer_list>
#include <type_traits>

#include "cuda/channel_statistics.h"
#include "cuda/convolution_values.h"
#include "cuda/kernel.h"
#include "cuda/partial_sums.h"
#include "cuda/real_types.h"
#include "cuda/tile_product.h"

namespace ikem_fast::cuda {

namespace {

struct Traits {
  static constexpr int kRowBytes = 128;              // of channels that are in shared memory at a time
  static constexpr int kKeptBytes = 24 * 1024;       // of a pass's weights, at most, that are there at a time
  static constexpr int kStageBytes = 10 * 1024;      // of weights in stages, at most, if more than one tap
  static constexpr int kReservedBytes = 1024;        // of shared memory, of each block
  static constexpr int kMostSlots = 128;             // of a stream's statistics, unless there is more to do
  static constexpr int kWantedBlocks = 264;          // that sum up the weights' gradient
  static constexpr int kMostWarps = 8;               // of a block that makes products
  static constexpr int kSumWarps = 8;
  static constexpr int kSumTaps = 9;                 // of a warp that sums up the weights' gradient
  static constexpr int kSimpleThreads = 256;
};

constexpr int kWarpSize = 32;

// What a warp and a block make at most, by the fragments of 8 columns.
template <int kN>
struct Product {
  static constexpr int kM = 3;  // fragments of 16 rows of a warp
  static constexpr int kRows = 16 * kM;
  static constexpr int kColumns = 8 * kN;
  static constexpr int kBlocks = kN == 2 ? 3 : 2;  // that have registers on a multiprocessor
  // Results go through shared memory by so many fragments at a time.
  static constexpr int kGroup = 2;
  static constexpr int kGroupColumns = 8 * kGroup;
};

__host__ __device__ constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int b) { return divide_up(a, b) * b; }
__host__ __device__ constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }

// Numbers of weights in packed form, zeros past the channels: (S, K, C_out, C_in), both up to whole fragments.
__host__ __device__ inline int packed_in(const TemporalConvolutionShape& shape) {
  return round_up(shape.in_channels, 16);
}
__host__ __device__ inline int packed_out(const TemporalConvolutionShape& shape) {
  return round_up(shape.out_channels, 16);
}

// Which frames of a tensor lie in shared memory, frame by frame and in each joint by joint: `phases` groups of
// `phase_frames`, the i-th of group p being frame first + i * step + p. What lies beyond the tensor's frames is zero.
struct FrameTile {
  int first, step, phases, phase_frames;
};

// Results are cut into tiles of frames and joints of one sequence; a block makes a column tile of some of them, one
// after another. A tile takes `passes`: in pass p its frames first + p + passes * u, as rows (u, joint) of a product
// for each of some taps, whose left factor begins at some row of the source tile.
struct Tiling {
  int frames, joints;  // of a tile
  int frame_parts, joint_parts, column_tiles;
  int items_per_block, blocks_per_stream;
  int passes;
  int tap_step;         // between the taps of a pass
  FrameTile source;     // first is that of the tile at frame 0
  int source_rows;      // in shared memory
  int depth, chunk;     // source channels: all and at a time
  int taps_per_stage, stages, stage_size;  // of weights; stage_size in elements
  int warps;
  int shared_bytes;

  __host__ __device__ int parts() const { return frame_parts * joint_parts; }
  // Tap number m of a pass is the kernel's tap first_tap(p) + m * tap_step.
  __host__ __device__ int first_tap(int pass, int taps) const {
    return tap_step > 1 ? (pass + taps / 2) % tap_step : 0;
  }
  __host__ __device__ int taps_of_pass(int pass, int taps) const {
    const int first = first_tap(pass, taps);
    return first < taps ? (taps - 1 - first) / tap_step + 1 : 0;
  }
  __host__ __device__ int stages_of_pass(int pass, int taps) const {
    return divide_up(taps_of_pass(pass, taps), taps_per_stage) * divide_up(depth, chunk);
  }
  // Few stages stay in shared memory.
  __host__ __device__ bool keeps_weights() const { return stages <= 2; }
};

// One of a block's tiles.
struct Item {
  int64_t stream;
  int64_t sequence;  // of all streams
  int first_frame, frames, first_joint, joints;
};

__device__ __forceinline__ Item find_item(int64_t number, int64_t stream, int64_t sequences, int frames, int joints,
                                          int tile_frames, int tile_joints, int frame_parts, int joint_parts) {
  Item item;
  const int part = static_cast<int>(number % (frame_parts * joint_parts));
  item.sequence = stream * sequences + number / (frame_parts * joint_parts);
  item.stream = stream;
  item.first_frame = part / joint_parts * tile_frames;
  item.frames = smaller(tile_frames, frames - item.first_frame);
  item.first_joint = part % joint_parts * tile_joints;
  item.joints = smaller(tile_joints, joints - item.first_joint);
  return item;
}

// 16 bytes of elements; channels are whole numbers of them.
template <typename T>
constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));
template <typename T>
struct alignas(16) Vector {
  T values[kPerVector<T>];
};

template <typename T>
__device__ __forceinline__ Vector<T> zero_vector() {
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) vector.values[i] = narrow<T>(0.0f);
  return vector;
}

// A tensor (S, B, frames, joints, channels) that is formed as it is loaded.
struct Source {
  const void* values;
  int frames, joints, channels;
};

// What is done to a source's values is linear in them, with two coefficients of each channel, which a block keeps in
// shared memory: first all factors, then all summands.
template <int kCount>
struct LinearInput {
  float factors[kCount], summands[kCount];

  __device__ __forceinline__ void load(const float* coefficients, int pitch) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 factor = *reinterpret_cast<const float4*>(coefficients + i);
      const float4 summand = *reinterpret_cast<const float4*>(coefficients + pitch + i);
      factors[i] = factor.x;
      factors[i + 1] = factor.y;
      factors[i + 2] = factor.z;
      factors[i + 3] = factor.w;
      summands[i] = summand.x;
      summands[i + 1] = summand.y;
      summands[i + 2] = summand.z;
      summands[i + 3] = summand.w;
    }
  }
};

// x through its activation, if there is one.
template <typename T>
struct ActivationLoader {
  static constexpr int kCount = kPerVector<T>;
  const ActivationInput& input;

  __device__ __forceinline__ explicit ActivationLoader(const ActivationInput& given) : input(given) {}
  __device__ __forceinline__ void find(float& factor, float& summand, int64_t channel) const {
    if (!input.scale) return;
    const ActivationOfChannel activation = of_channel(input, channel);
    factor = activation.scale;
    summand = activation.shift;
  }
  __device__ __forceinline__ const void* other() const { return nullptr; }
  __device__ __forceinline__ Vector<T> form(const LinearInput<kCount>& linear, const Vector<T>& x, const Vector<T>&) {
    if (!input.scale) return x;
    Vector<T> result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const ActivationOfChannel activation{linear.factors[i], linear.summands[i]};
      result.values[i] = narrow<T>(activation(widen(x.values[i])));
    }
    return result;
  }
};

// The gradient that reaches y; kSums: adds up what it forms.
template <typename T, bool kSums>
struct GradientLoader {
  static constexpr int kCount = kPerVector<T>;
  const GradientInput& input;
  float sums[kSums ? kCount : 1] = {};

  __device__ __forceinline__ explicit GradientLoader(const GradientInput& given) : input(given) {}
  __device__ __forceinline__ void find(float& factor, float& summand, int64_t channel) const {
    const GradientOfChannel gradient = of_channel(input, channel);
    factor = gradient.slope;
    summand = gradient.constant;
  }
  __device__ __forceinline__ const void* other() const { return input.variance_gradient ? input.y : nullptr; }
  // Without variance_gradient y is zero.
  __device__ __forceinline__ Vector<T> form(const LinearInput<kCount>& linear, const Vector<T>& gradient,
                                            const Vector<T>& y) {
    Vector<T> result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const GradientOfChannel of_channel{linear.factors[i], linear.summands[i]};
      const float total = of_channel(widen(gradient.values[i]), widen(y.values[i]));
      if constexpr (kSums) sums[i] += total;
      result.values[i] = narrow<T>(total);
    }
    return result;
  }
};

// The coefficients of `count` channels from first_channel on; barrier before use.
template <typename Loader>
__device__ __forceinline__ void load_coefficients(float* coefficients, int count, const Loader& loader,
                                                  const Source& source, int64_t stream, int first_channel) {
  for (int i = threadIdx.x; i < count; i += static_cast<int>(blockDim.x)) {
    float factor = 0.0f, summand = 0.0f;
    if (first_channel + i < source.channels) loader.find(factor, summand, stream * source.channels + first_channel + i);
    coefficients[i] = factor;
    coefficients[count + i] = summand;
  }
}

// Rows of `chunk` channels from first_channel on to shared memory, `num_rows` of them: the tile's, then zeros. By all
// threads of a block; a thread always has the same channels, and kAtOnce loads under way. coefficients: of the first of
// the channels, with their summands `pitch` further on.
template <int kAtOnce, typename T, typename Loader>
__device__ __forceinline__ void load_tile(T* shared, int stride, int num_rows, Loader& loader,
                                          const float* coefficients, int pitch, const Source& source,
                                          const FrameTile& tile, const Item& item, int first_channel, int chunk) {
  const int vectors = chunk / kPerVector<T>, rows_at_once = static_cast<int>(blockDim.x) / vectors;
  const int column = static_cast<int>(threadIdx.x) % vectors * kPerVector<T>;
  const int first_row = static_cast<int>(threadIdx.x) / vectors, channel = first_channel + column;
  if (first_row >= rows_at_once) return;
  const bool is_channel = channel < source.channels;
  // Offsets within a sequence fit 32 bits.
  const int64_t start = item.sequence * source.frames * source.joints * source.channels;
  const T* values = static_cast<const T*>(source.values) + start;
  const T* other = static_cast<const T*>(loader.other());
  if (other) other += start;
  const int tile_rows = tile.phases * tile.phase_frames * item.joints;
  for (int begin = first_row; begin < num_rows; begin += kAtOnce * rows_at_once) {
    Vector<T> loaded[kAtOnce], loaded_other[kAtOnce];
    bool is_there[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int row = begin + u * rows_at_once, slot = row / item.joints, joint = row - slot * item.joints;
      const int phase = slot / tile.phase_frames;
      const int frame = tile.first + (slot - phase * tile.phase_frames) * tile.step + phase;
      is_there[u] = is_channel && row < tile_rows && frame >= 0 && frame < source.frames;
      const int at = (frame * source.joints + item.first_joint + joint) * source.channels + channel;
      loaded[u] = loaded_other[u] = zero_vector<T>();
      if (is_there[u]) loaded[u] = *reinterpret_cast<const Vector<T>*>(values + at);
      if (is_there[u] && other) loaded_other[u] = *reinterpret_cast<const Vector<T>*>(other + at);
    }
    // In every round: the registers are needed in between.
    LinearInput<kPerVector<T>> linear;
    linear.load(coefficients + column, pitch);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int row = begin + u * rows_at_once;
      if (row >= num_rows) continue;
      Vector<T>& to = *reinterpret_cast<Vector<T>*>(shared + row * stride + column);
      to = is_there[u] ? loader.form(linear, loaded[u], loaded_other[u]) : zero_vector<T>();
    }
  }
}

template <int kNumber>
struct LoadsAtOnce {
  static constexpr int kCount = kNumber;
};

// Everything that the kernel of the convolution and that of x's gradient get.
struct ConvolutionArguments {
  TemporalConvolutionShape shape;
  Tiling tiling;
  Source source;
  ActivationInput activation;
  GradientInput gradient;
  const void* weights;
  TemporalConvolutionResult result;  // of the convolution
  TemporalXGradient x_result;        // of x's gradient
  const void* x;                     // likewise
};

// Stages of weights: (pass, chunk of channels, some taps of the pass).
struct Stage {
  int pass, chunk, first, count;
};

__device__ __forceinline__ Stage find_stage(const Tiling& tiling, int taps, int number) {
  Stage stage{0, 0, 0, 0};
  while (number >= tiling.stages_of_pass(stage.pass, taps)) number -= tiling.stages_of_pass(stage.pass++, taps);
  const int taps_of_pass = tiling.taps_of_pass(stage.pass, taps);
  const int groups = divide_up(taps_of_pass, tiling.taps_per_stage);
  stage.chunk = number / groups;
  stage.first = number % groups * tiling.taps_per_stage;
  stage.count = smaller(tiling.taps_per_stage, taps_of_pass - stage.first);
  return stage;
}

// A stage's weights to shared memory in the background, tap by tap: of output channels rows, of input channels columns.
// In the convolution the block's columns are output channels, in the gradient of x they are input channels.
template <typename T, int kColumns, bool kBackward>
__device__ __forceinline__ void load_stage(T* shared, const ConvolutionArguments& arguments, const Stage& stage,
                                           int64_t stream, int first_column) {
  const Tiling& tiling = arguments.tiling;
  const int num_rows = kBackward ? tiling.chunk : kColumns, num_columns = kBackward ? kColumns : tiling.chunk;
  const int first_row = kBackward ? stage.chunk * tiling.chunk : first_column;
  const int first_in = kBackward ? first_column : stage.chunk * tiling.chunk;
  const int height = packed_out(arguments.shape), width = packed_in(arguments.shape);
  const int stride = tile_stride<T>(num_columns), vectors = num_columns / kPerVector<T>;
  const int first_tap = tiling.first_tap(stage.pass, arguments.shape.taps) + stage.first * tiling.tap_step;
  const T* weights = static_cast<const T*>(arguments.weights);
  for (int i = static_cast<int>(threadIdx.x); i < stage.count * num_rows * vectors; i += static_cast<int>(blockDim.x)) {
    const int column = i % vectors * kPerVector<T>, row = i / vectors % num_rows, m = i / vectors / num_rows;
    const int64_t tap = stream * arguments.shape.taps + first_tap + m * tiling.tap_step;
    const bool is_there = first_row + row < height && first_in + column < width;
    cp_async16(shared + (m * num_rows + row) * stride + column,
               weights + (tap * height + first_row + row) * width + first_in + column, is_there);
  }
  cp_async_commit();
}

// Calls visit(values, offset in the tensor) for each vector of a group of kColumns results, of which `values` are a
// lane's own kPerVector channels, from `channel` on, of one row, for all num_rows rows of a pass that are the warp's. By
// way of 16 rows of staging. `sums` come back as they were.
template <typename T, int kColumns, int kM, int kN, typename Visit>
__device__ __forceinline__ void for_each_result(Accumulators<kM, kN>& sums, float* staging,
                                                const ConvolutionArguments& arguments, const Item& item, int pass,
                                                int frames, int channels, int channel, int warp_row, int num_rows,
                                                Visit visit) {
  constexpr int kVectors = kColumns / kPerVector<T>, kStride = tile_stride<float>(kColumns);
  const int lane = threadIdx.x % kWarpSize, column = lane % kVectors * kPerVector<T>;
#pragma unroll 1
  for (int first_row = warp_row; first_row < warp_row + 16 * kM; first_row += 16) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* place = staging + accumulator_row(2 * half) * kStride + 8 * j + accumulator_column(0);
        *reinterpret_cast<float2*>(place) = make_float2(sums[0][j][2 * half], sums[0][j][2 * half + 1]);
      }
    }
    // The next 16 rows' come first now: registers have no index that changes.
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float first = sums[0][j][q];
#pragma unroll
        for (int i = 0; i + 1 < kM; ++i) sums[i][j][q] = sums[i + 1][j][q];
        sums[kM - 1][j][q] = first;
      }
    }
    __syncwarp();
#pragma unroll
    for (int begin = 0; begin < 16; begin += kWarpSize / kVectors) {
      const int in_staging = begin + lane / kVectors, row = first_row + in_staging;
      if (row >= num_rows || channel >= channels) continue;
      const int u = row / item.joints, joint = row - u * item.joints;
      const int frame = item.first_frame + u * arguments.tiling.passes + pass;
      const int64_t in_tensor = (item.sequence * frames + frame) * arguments.shape.joints + item.first_joint + joint;
      float values[kPerVector<T>];
#pragma unroll
      for (int i = 0; i < kPerVector<T>; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(staging + in_staging * kStride + column + i);
        values[i] = four.x;
        values[i + 1] = four.y;
        values[i + 2] = four.z;
        values[i + 3] = four.w;
      }
      visit(values, in_tensor * channels + channel);
    }
    __syncwarp();
  }
}

// The columns after the first kColumns come first.
template <int kColumns, int kM, int kN>
__device__ __forceinline__ void rotate_columns(Accumulators<kM, kN>& sums) {
#pragma unroll
  for (int j = 0; j + kColumns / 8 < kN; ++j) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int q = 0; q < 4; ++q) sums[i][j][q] = sums[i][j + kColumns / 8][q];
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_vector(void* tensor, int64_t at, const float (&values)[kPerVector<T>]) {
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) vector.values[i] = narrow<T>(values[i]);
  *reinterpret_cast<Vector<T>*>(static_cast<T*>(tensor) + at) = vector;
}

// Moments of a lane's channels over the same number of values of each.
template <int kCount>
struct LaneMoments {
  float count = 0.0f, mean[kCount] = {}, m2[kCount] = {};

  __device__ __forceinline__ void add(const float (&values)[kCount]) {
    count += 1.0f;
    const float share = __fdividef(1.0f, count);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float difference = values[i] - mean[i];
      mean[i] = fmaf(difference, share, mean[i]);
      m2[i] = fmaf(difference, values[i] - mean[i], m2[i]);
    }
  }
  __device__ __forceinline__ void join(float other_count, const float (&other_mean)[kCount],
                                       const float (&other_m2)[kCount]) {
    const float both = count + other_count, share = both > 0.0f ? __fdividef(other_count, both) : 0.0f;
    const float weight = count * share;
    count = both;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float difference = other_mean[i] - mean[i];
      mean[i] = fmaf(difference, share, mean[i]);
      m2[i] += fmaf(difference * difference, weight, other_m2[i]);
    }
  }
};

// The convolution's results, and their moments, joined to `kept` (3, columns), which is the warp's own.
template <typename T, int kN>
__device__ __forceinline__ void finish_convolution(Accumulators<Product<kN>::kM, kN>& sums, float* kept, float* staging,
                                                   const ConvolutionArguments& arguments, const Item& item,
                                                   int first_column, int warp_row, int num_rows) {
  using P = Product<kN>;
  constexpr int kCount = kPerVector<T>, kVectors = P::kGroupColumns / kCount;
  const TemporalConvolutionResult& result = arguments.result;
  const int channels = arguments.shape.out_channels;
#pragma unroll 1
  for (int group = 0; group < kN; group += P::kGroup) {
    const int column = 8 * group + static_cast<int>(threadIdx.x) % kVectors * kCount, channel = first_column + column;
    float bias[kCount];
    LaneMoments<kCount> moments;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      bias[i] = channel < channels ? result.bias[item.stream * channels + channel + i] : 0.0f;
    }
    for_each_result<T, P::kGroupColumns>(
        sums, staging, arguments, item, 0, arguments.shape.out_frames(), channels, channel, warp_row, num_rows,
        [&](float(&values)[kCount], int64_t at) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) values[i] += bias[i];
          if (result.with_statistics) moments.add(values);
          if (result.output_scale) {
            Vector<T> residual = zero_vector<T>();
            if (result.residual) {
              residual = *reinterpret_cast<const Vector<T>*>(static_cast<const T*>(result.residual) + at);
            }
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
              const int64_t place = item.stream * channels + channel + i;
              const float scaled = fmaf(result.output_scale[place], values[i], result.output_shift[place]);
              values[i] = relu(scaled + widen(residual.values[i]));
            }
          }
          store_vector<T>(result.y, at, values);
        });
    rotate_columns<P::kGroupColumns>(sums);
    if (!result.with_statistics) continue;
#pragma unroll
    for (int offset = kVectors; offset < kWarpSize; offset *= 2) {
      float mean[kCount], m2[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        mean[i] = __shfl_xor_sync(kAllLanes, moments.mean[i], offset);
        m2[i] = __shfl_xor_sync(kAllLanes, moments.m2[i], offset);
      }
      moments.join(__shfl_xor_sync(kAllLanes, moments.count, offset), mean, m2);
    }
    if (threadIdx.x % kWarpSize >= kVectors) continue;
    float* own = kept + column;
    float mean[kCount], m2[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      mean[i] = own[P::kColumns + i];
      m2[i] = own[2 * P::kColumns + i];
    }
    moments.join(own[0], mean, m2);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      own[i] = moments.count;
      own[P::kColumns + i] = moments.mean[i];
      own[2 * P::kColumns + i] = moments.m2[i];
    }
  }
}

// The gradient of x, and the sums that those of scale and shift are made of, added to `kept` (2, columns), which is the
// warp's own.
template <typename T, int kN>
__device__ __forceinline__ void finish_x_gradient(Accumulators<Product<kN>::kM, kN>& sums, float* kept, float* staging,
                                                  const ConvolutionArguments& arguments, const Item& item,
                                                  int first_column, int pass, int warp_row, int num_rows) {
  using P = Product<kN>;
  constexpr int kCount = kPerVector<T>, kVectors = P::kGroupColumns / kCount;
  const bool has_activation = arguments.activation.scale != nullptr;
  const int channels = arguments.shape.in_channels;
#pragma unroll 1
  for (int group = 0; group < kN; group += P::kGroup) {
    const int column = 8 * group + static_cast<int>(threadIdx.x) % kVectors * kCount, channel = first_column + column;
    ActivationOfChannel activate[kCount];
    float of_scale[kCount], of_shift[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      activate[i] = has_activation && channel < channels
                        ? of_channel(arguments.activation, item.stream * channels + channel + i)
                        : ActivationOfChannel{0.0f, 0.0f};
      of_scale[i] = of_shift[i] = 0.0f;
    }
    for_each_result<T, P::kGroupColumns>(
        sums, staging, arguments, item, pass, arguments.shape.frames, channels, channel, warp_row, num_rows,
        [&](float(&values)[kCount], int64_t at) {
          if (has_activation) {
            const Vector<T> x = *reinterpret_cast<const Vector<T>*>(static_cast<const T*>(arguments.x) + at);
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
              const float before = widen(x.values[i]);
              const float passed = activate[i].before(before) > 0.0f ? values[i] : 0.0f;
              of_shift[i] += passed;
              of_scale[i] = fmaf(passed, before, of_scale[i]);
              values[i] = activate[i].scale * passed;
            }
          }
          if (arguments.x_result.x_gradient) store_vector<T>(arguments.x_result.x_gradient, at, values);
        });
    rotate_columns<P::kGroupColumns>(sums);
    if (!has_activation) continue;
#pragma unroll
    for (int offset = kVectors; offset < kWarpSize; offset *= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        of_scale[i] += __shfl_xor_sync(kAllLanes, of_scale[i], offset);
        of_shift[i] += __shfl_xor_sync(kAllLanes, of_shift[i], offset);
      }
    }
    if (threadIdx.x % kWarpSize >= kVectors) continue;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      kept[column + i] += of_scale[i];
      kept[P::kColumns + column + i] += of_shift[i];
    }
  }
}

// The convolution, or backward the gradient of x: the same with taps and channels transposed. kWide: the source's
// channels do not fit into shared memory at a time.
template <typename T, int kN, bool kBackward, bool kWide>
__global__ void __launch_bounds__(kWarpSize * Traits::kMostWarps, Product<kN>::kBlocks)
    temporal_product_kernel(ConvolutionArguments arguments) {
  using P = Product<kN>;
  constexpr TileOrder kRight = kBackward ? TileOrder::kDepthFirst : TileOrder::kDepthLast;
  constexpr int kChunk = smaller(P::kColumns, Traits::kRowBytes / static_cast<int>(sizeof(T)));
  IKEM_DYNAMIC_SHARED(T, source);
  const TemporalConvolutionShape& shape = arguments.shape;
  const Tiling& tiling = arguments.tiling;
  const int warp = threadIdx.x / kWarpSize, warp_row = warp * P::kRows;
  const int source_stride = tile_stride<T>(tiling.chunk);
  const int weight_rows = kBackward ? tiling.chunk : P::kColumns;
  const int weight_stride = tile_stride<T>(kBackward ? P::kColumns : tiling.chunk);
  T* stages = source + tiling.source_rows * source_stride;
  float* all_staging = reinterpret_cast<float*>(stages + smaller(tiling.stages, 2) * tiling.stage_size);
  constexpr int kStaging = 16 * tile_stride<float>(P::kGroupColumns), kKept = (kBackward ? 2 : 3) * P::kColumns;
  float* staging = all_staging + warp * kStaging;
  // What a warp keeps of its results: sums for scale and shift, or moments.
  float* all_kept = all_staging + tiling.warps * kStaging;
  float* kept = all_kept + warp * kKept;
  float* coefficients = all_kept + tiling.warps * kKept;

  const int column_tile = static_cast<int>(blockIdx.x) % tiling.column_tiles;
  const int block = static_cast<int>(blockIdx.x) / tiling.column_tiles % tiling.blocks_per_stream;
  const int64_t stream = static_cast<int>(blockIdx.x) / tiling.column_tiles / tiling.blocks_per_stream;
  const int first_column = column_tile * P::kColumns;
  const int64_t first_item = static_cast<int64_t>(block) * tiling.items_per_block;
  const int num_items =
      static_cast<int>(smaller(static_cast<int64_t>(tiling.items_per_block),
                               shape.sequences * tiling.parts() - first_item));
  const int result_frames = kBackward ? shape.frames : shape.out_frames(), middle = shape.taps / 2;
  const int num_chunks = kWide ? divide_up(tiling.depth, tiling.chunk) : 1;
  const int stages_to_load = tiling.keeps_weights() ? tiling.stages : tiling.stages * num_items;
  const auto stage_at = [&](int number) { return stages + (tiling.stages > 1 ? number % 2 : 0) * tiling.stage_size; };
  int stage_number = 0;
  const auto load_next_stage = [&](int number) {
    if (number >= stages_to_load) return;
    load_stage<T, P::kColumns, kBackward>(
        stage_at(number), arguments, find_stage(tiling, shape.taps, number % tiling.stages), stream, first_column);
  };

  for (int i = threadIdx.x % kWarpSize; i < kKept; i += kWarpSize) kept[i] = 0.0f;
  __syncwarp();
  using Loader = std::conditional_t<kBackward, GradientLoader<T, false>, ActivationLoader<T>>;
  const auto& input = [&]() -> const auto& {
    if constexpr (kBackward) {
      return arguments.gradient;
    } else {
      return arguments.activation;
    }
  }();
  Loader loader(input);
  load_coefficients(coefficients, tiling.depth, loader, arguments.source, stream, 0);
  load_next_stage(0);
  for (int number = 0; number < num_items; ++number) {
    const Item item = find_item(first_item + number, stream, shape.sequences, result_frames, shape.joints,
                                tiling.frames, tiling.joints, tiling.frame_parts, tiling.joint_parts);
    FrameTile tile = tiling.source;
    tile.first += kBackward ? item.first_frame / shape.stride : item.first_frame * shape.stride;
    const auto load_source = [&](auto at_once, int chunk) {
      const int first_channel = chunk * tiling.chunk;
      load_tile<decltype(at_once)::kCount>(source, source_stride, tiling.source_rows, loader,
                                           coefficients + first_channel, tiling.depth, arguments.source, tile, item,
                                           first_channel, tiling.chunk);
    };
    for (int pass = 0; pass < tiling.passes; ++pass) {
      const int num_rows = (item.frames - pass + tiling.passes - 1) / tiling.passes * item.joints;
      const int first_tap = tiling.first_tap(pass, shape.taps), num_taps = tiling.taps_of_pass(pass, shape.taps);
      // The frames of the warp's rows, as far as they are there.
      const int first_u = warp_row / item.joints, last_u = (smaller(warp_row + P::kRows, num_rows) - 1) / item.joints;
      if (!kWide && pass == 0) {
        __syncthreads();
        load_source(LoadsAtOnce<4>{}, 0);
      }
      Accumulators<P::kM, kN> sums;
#pragma unroll
      for (int i = 0; i < P::kM; ++i) {
#pragma unroll
        for (int j = 0; j < kN; ++j) {
#pragma unroll
          for (int q = 0; q < 4; ++q) sums[i][j][q] = 0.0f;
        }
      }
      for (int chunk = 0; chunk < num_chunks; ++chunk) {
        if (kWide) {
          __syncthreads();
          load_source(LoadsAtOnce<1>{}, chunk);
        }
        for (int first = 0; first < num_taps; first += tiling.taps_per_stage, ++stage_number) {
          cp_async_wait<0>();
          __syncthreads();
          load_next_stage(stage_number + 1);
          if (warp_row >= num_rows) continue;
          const T* weights = stage_at(stage_number);
          const int count = smaller(tiling.taps_per_stage, num_taps - first);
          for (int m = 0; m < count; ++m, weights += weight_rows * weight_stride) {
            const int tap = first_tap + (first + m) * tiling.tap_step;
            // Row (u, joint) meets source frame tile.first + u * step + from, which is row begin + (u, joint).
            const int shift = kBackward ? (pass + middle - tap) / shape.stride : tap;
            const int from = kBackward ? shift + item.first_frame / shape.stride - tile.first : tap;
            const int step = kBackward ? 1 : shape.stride;
            if (tile.first + last_u * step + from < 0 ||
                tile.first + first_u * step + from >= arguments.source.frames) {
              continue;
            }
            const int begin = (kBackward ? from : tap % shape.stride * tile.phase_frames + tap / shape.stride) *
                              item.joints;
            const T* left = source + (begin + warp_row) * source_stride;
            if (tiling.chunk == kChunk) {
              add_tile_product<TileOrder::kDepthLast, kRight>(sums, left, source_stride, weights, weight_stride,
                                                              kChunk);
            } else {
              add_tile_product<TileOrder::kDepthLast, kRight>(sums, left, source_stride, weights, weight_stride,
                                                              tiling.chunk);
            }
          }
        }
      }
      if (warp_row >= num_rows) continue;
      if constexpr (kBackward) {
        finish_x_gradient<T, kN>(sums, kept, staging, arguments, item, first_column, pass, warp_row, num_rows);
      } else {
        finish_convolution<T, kN>(sums, kept, staging, arguments, item, first_column, warp_row, num_rows);
      }
    }
  }

  if (kBackward ? !arguments.activation.scale : !arguments.result.with_statistics) return;
  __syncthreads();
  const int channels = kBackward ? shape.in_channels : shape.out_channels;
  const int num_columns = smaller(P::kColumns, channels - first_column);
  const int64_t slot = stream * tiling.blocks_per_stream + block;
  for (int column = threadIdx.x; column < num_columns; column += static_cast<int>(blockDim.x)) {
    if constexpr (kBackward) {
      float of_scale = 0.0f, of_shift = 0.0f;
      for (int other = 0; other < tiling.warps; ++other) {
        of_scale += all_kept[other * kKept + column];
        of_shift += all_kept[other * kKept + P::kColumns + column];
      }
      float* to = arguments.x_result.coefficient_sums + slot * 2 * channels + first_column + column;
      to[0] = of_scale;
      to[channels] = of_shift;
    } else {
      Moments moments;
      for (int other = 0; other < tiling.warps; ++other) {
        const float* of_warp = all_kept + other * kKept + column;
        moments = join(moments, {of_warp[0], of_warp[P::kColumns], of_warp[2 * P::kColumns]});
      }
      float* to = arguments.result.moments + slot * 3 * channels + first_column + column;
      to[0] = moments.count;
      to[channels] = moments.mean;
      to[2 * channels] = moments.m2;
    }
  }
}

// The weights' gradient: a block goes through a share of the tiles of a stream with its sums in registers. A warp has
// those of 16 output and 16 input channels and kSumTaps taps, over its share of a tile's rows.
struct SumTiling {
  int frames, joints, frame_parts, joint_parts;
  int shares;  // of the tiles of a stream
  int out_tiles, in_tiles, tap_blocks;       // that blocks divide between them
  int out_groups, in_groups, row_groups;     // that the warps of a block do
  FrameTile source;
  int source_rows, gradient_rows;  // in shared memory
  int shared_bytes;

  __host__ __device__ int parts() const { return frame_parts * joint_parts; }
  __host__ __device__ int warps() const { return out_groups * in_groups * row_groups; }
  __host__ __device__ int tile_out() const { return 16 * out_groups; }
  __host__ __device__ int tile_in() const { return 16 * in_groups; }
};

struct SumArguments {
  TemporalConvolutionShape shape;
  SumTiling tiling;
  Source x, y_gradient;
  ActivationInput activation;
  GradientInput gradient;
  float* sums;  // (S, shares, part): weights (K, height, width), then biases (height)
  int height, width;  // output and input channels up to whole tiles
  int64_t part_size;
};

using WarpSums = Accumulators<1, 2>[Traits::kSumTaps];

// sums[t] += left^T right over 16 rows, for the right factors that begin `offsets[t]` elements on.
__device__ __forceinline__ void add_tap_products(WarpSums& sums, const __nv_bfloat16* left, int left_stride,
                                                 const __nv_bfloat16* right, int right_stride,
                                                 const int (&offsets)[Traits::kSumTaps], int num_taps) {
  namespace detail = tile_product_detail;
  uint32_t a[4];
  detail::load_left<TileOrder::kDepthFirst>(a, left, left_stride);
#pragma unroll
  for (int t = 0; t < Traits::kSumTaps; ++t) {
    if (t >= num_taps) continue;
    uint32_t b[4];
    detail::load_right<TileOrder::kDepthFirst>(b, right + offsets[t], right_stride);
    const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
    mma_m16n8k16_bf16(sums[t][0][0], a, first);
    mma_m16n8k16_bf16(sums[t][0][1], a, second);
  }
}

__device__ __forceinline__ void add_tap_products(WarpSums& sums, const float* left, int left_stride, const float* right,
                                                 int right_stride, const int (&offsets)[Traits::kSumTaps],
                                                 int num_taps) {
#pragma unroll
  for (int t = 0; t < Traits::kSumTaps; ++t) {
    if (t >= num_taps) continue;
    add_tile_product<TileOrder::kDepthFirst, TileOrder::kDepthFirst>(sums[t], left, left_stride, right + offsets[t],
                                                                     right_stride, 16);
  }
}

// visit(tap, fragment, q) for all of a warp's sums.
template <typename Visit>
__device__ __forceinline__ void for_each_sum(Visit visit) {
#pragma unroll
  for (int t = 0; t < Traits::kSumTaps; ++t) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int q = 0; q < 4; ++q) visit(t, j, q);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kWarpSize * Traits::kSumWarps, 2) weight_sums_kernel(SumArguments arguments) {
  IKEM_DYNAMIC_SHARED(T, source);
  const TemporalConvolutionShape& shape = arguments.shape;
  const SumTiling& tiling = arguments.tiling;
  const int source_stride = tile_stride<T>(tiling.tile_in()), gradient_stride = tile_stride<T>(tiling.tile_out());
  T* gradient = source + tiling.source_rows * source_stride;
  const int warp = threadIdx.x / kWarpSize, units = tiling.out_groups * tiling.in_groups;
  const int unit = warp % units, row_group = warp / units;
  const int out_group = unit / tiling.in_groups, in_group = unit % tiling.in_groups;
  int block = blockIdx.x;
  const int first_in = block % tiling.in_tiles * tiling.tile_in();
  block /= tiling.in_tiles;
  const int first_out = block % tiling.out_tiles * tiling.tile_out();
  block /= tiling.out_tiles;
  const int tap_block = block % tiling.tap_blocks;
  block /= tiling.tap_blocks;
  const int share = block % tiling.shares;
  const int64_t stream = block / tiling.shares;
  const int first_tap = tap_block * Traits::kSumTaps;
  const int num_taps = smaller(Traits::kSumTaps, shape.taps - first_tap);
  const int64_t items = shape.sequences * tiling.parts();

  WarpSums sums;
  for_each_sum([&](int t, int j, int q) { sums[t][0][j][q] = 0.0f; });
  ActivationLoader<T> source_loader(arguments.activation);
  GradientLoader<T, true> gradient_loader(arguments.gradient);
  float* source_coefficients = reinterpret_cast<float*>(gradient + tiling.gradient_rows * gradient_stride);
  float* gradient_coefficients = source_coefficients + 2 * tiling.tile_in();
  load_coefficients(source_coefficients, tiling.tile_in(), source_loader, arguments.x, stream, first_in);
  load_coefficients(gradient_coefficients, tiling.tile_out(), gradient_loader, arguments.y_gradient, stream, first_out);
  const int64_t end = items * (share + 1) / tiling.shares;
  for (int64_t number = items * share / tiling.shares; number < end; ++number) {
    const Item item = find_item(number, stream, shape.sequences, shape.out_frames(), shape.joints, tiling.frames,
                                tiling.joints, tiling.frame_parts, tiling.joint_parts);
    FrameTile tile = tiling.source;
    tile.first += item.first_frame * shape.stride;
    const int num_rows = item.frames * item.joints, steps = divide_up(num_rows, 16);
    __syncthreads();
    load_tile<2>(source, source_stride, tiling.source_rows, source_loader, source_coefficients, tiling.tile_in(),
                 arguments.x, tile, item, first_in, tiling.tile_in());
    load_tile<2>(gradient, gradient_stride, 16 * steps, gradient_loader, gradient_coefficients, tiling.tile_out(),
                 arguments.y_gradient, {item.first_frame, 1, 1, item.frames}, item, first_out, tiling.tile_out());
    __syncthreads();
    int offsets[Traits::kSumTaps];
#pragma unroll
    for (int t = 0; t < Traits::kSumTaps; ++t) {
      const int tap = first_tap + t;
      offsets[t] = (tap % shape.stride * tile.phase_frames + tap / shape.stride) * item.joints * source_stride;
    }
    const int last_step = steps * (row_group + 1) / tiling.row_groups;
    for (int step = steps * row_group / tiling.row_groups; step < last_step; ++step) {
      add_tap_products(sums, gradient + 16 * step * gradient_stride + 16 * out_group, gradient_stride,
                       source + 16 * step * source_stride + 16 * in_group, source_stride, offsets, num_taps);
    }
  }

  // The row groups' sums in their order, through shared memory, to the first of them.
  float* exchange = reinterpret_cast<float*>(source) + unit * sizeof(WarpSums) / sizeof(float) * kWarpSize +
                    threadIdx.x % kWarpSize;
  for (int group = 1; group < tiling.row_groups; ++group) {
    __syncthreads();
    if (row_group == group) {
      for_each_sum([&](int t, int j, int q) { exchange[((t * 2 + j) * 4 + q) * kWarpSize] = sums[t][0][j][q]; });
    }
    __syncthreads();
    if (row_group == 0) {
      for_each_sum([&](int t, int j, int q) { sums[t][0][j][q] += exchange[((t * 2 + j) * 4 + q) * kWarpSize]; });
    }
  }
  float* part = arguments.sums + (stream * tiling.shares + share) * arguments.part_size;
  if (row_group == 0) {
    for_each_sum([&](int t, int j, int q) {
      if (t >= num_taps || q % 2 == 1) return;
      const int64_t row =
          static_cast<int64_t>(first_tap + t) * arguments.height + first_out + 16 * out_group + accumulator_row(q);
      const int column = first_in + 16 * in_group + 8 * j + accumulator_column(q);
      float* to = part + row * arguments.width + column;
      to[0] = sums[t][0][j][q];
      to[1] = sums[t][0][j][q + 1];
    });
  }
  if (first_in > 0 || tap_block > 0) return;
  const int vectors = tiling.tile_out() / kPerVector<T>, threads_of_column = static_cast<int>(blockDim.x) / vectors;
  float* of_threads = reinterpret_cast<float*>(source);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) of_threads[threadIdx.x * kPerVector<T> + i] = gradient_loader.sums[i];
  __syncthreads();
  const int column = threadIdx.x;
  if (column >= tiling.tile_out()) return;
  float bias = 0.0f;
  for (int other = 0; other < threads_of_column; ++other) bias += of_threads[other * tiling.tile_out() + column];
  part[static_cast<int64_t>(shape.taps) * arguments.height * arguments.width + first_out + column] = bias;
}

// A thread per weight.
__global__ void __launch_bounds__(Traits::kSimpleThreads)
    add_weight_sums_kernel(float* __restrict__ weight_gradient, SumArguments arguments) {
  const TemporalConvolutionShape& shape = arguments.shape;
  const int64_t weights = static_cast<int64_t>(shape.taps) * shape.out_channels * shape.in_channels;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * Traits::kSimpleThreads + threadIdx.x;
  if (number >= shape.streams * weights) return;
  const int64_t stream = number / weights, in_stream = number % weights;
  const int64_t in = in_stream % shape.in_channels, out = in_stream / shape.in_channels % shape.out_channels;
  const int64_t tap = in_stream / shape.in_channels / shape.out_channels;
  const int shares = arguments.tiling.shares;
  const float* part = arguments.sums + stream * shares * arguments.part_size +
                      (tap * arguments.height + out) * arguments.width + in;
  double sum = 0;
#pragma unroll 4
  for (int share = 0; share < shares; ++share) sum += part[share * arguments.part_size];
  weight_gradient[((stream * shape.out_channels + out) * shape.in_channels + in) * shape.taps + tap] =
      static_cast<float>(sum);
}

// A thread per packed number.
template <typename T>
__global__ void __launch_bounds__(Traits::kSimpleThreads)
    pack_weights_kernel(T* __restrict__ packed, const float* __restrict__ weight, TemporalConvolutionShape shape) {
  const int height = packed_out(shape), width = packed_in(shape);
  const int64_t number = static_cast<int64_t>(blockIdx.x) * Traits::kSimpleThreads + threadIdx.x;
  if (number >= shape.streams * shape.taps * height * width) return;
  const int in = static_cast<int>(number % width), out = static_cast<int>(number / width % height);
  const int64_t tap_of_stream = number / width / height;
  const int64_t stream = tap_of_stream / shape.taps, tap = tap_of_stream % shape.taps;
  const bool is_there = in < shape.in_channels && out < shape.out_channels;
  packed[number] = narrow<T>(
      is_there ? weight[((stream * shape.out_channels + out) * shape.in_channels + in) * shape.taps + tap] : 0.0f);
}

bool fits(const TemporalConvolutionShape& shape) {
  constexpr int kMost = 1 << 24;
  const int64_t channels = shape.in_channels > shape.out_channels ? shape.in_channels : shape.out_channels;
  return (shape.frames + int64_t{2} * shape.taps) * shape.joints * channels <= INT32_MAX && shape.streams >= 0 &&
         shape.sequences >= 0 && shape.frames > 0 && shape.frames < kMost && shape.joints > 0 &&
         shape.joints <= 1024 && shape.in_channels > 0 && shape.in_channels < kMost && shape.out_channels > 0 &&
         shape.out_channels < kMost && shape.taps > 0 && shape.taps < 1024 && shape.taps % 2 == 1 && shape.stride > 0 &&
         shape.stride < kMost;
}

// How a block finds the frames that its results are made of.
FrameTile source_of(const TemporalConvolutionShape& shape, int frames) {
  const int phases = smaller(shape.stride, shape.taps), seen = (frames - 1) * shape.stride + shape.taps;
  return {-(shape.taps / 2), shape.stride, phases, divide_up(seen, shape.stride)};
}
FrameTile gradient_source_of(const TemporalConvolutionShape& shape, int frames) {
  const int middle = shape.taps / 2;
  const int lowest = -(shape.taps - 1 - middle) / shape.stride, highest = (shape.stride - 1 + middle) / shape.stride;
  return {lowest, 1, 1, frames / shape.stride + highest - lowest};
}

// Rows of a tile in shared memory, of which its products read whole numbers of `step` rows from where they begin.
int rows_with_tail(const FrameTile& source, int passes, int all_frames, int all_joints, int frames, int joints,
                   int step) {
  int most = 0;
  for (int of_frames : {frames, all_frames - (divide_up(all_frames, frames) - 1) * frames}) {
    for (int of_joints : {joints, all_joints - (divide_up(all_joints, joints) - 1) * joints}) {
      for (int pass = 0; pass < passes; ++pass) {
        const int rows = (of_frames - pass + passes - 1) / passes * of_joints;
        const int with_tail = source.phases * source.phase_frames * of_joints + round_up(rows, step) - rows;
        if (with_tail > most) most = with_tail;
      }
    }
  }
  return most;
}

// The tile of results, of `frame_step` times some frames, that costs least; false if none is allowed. try_tile(frames,
// joints, cost) says what a tile costs and whether it is allowed.
template <typename TryTile>
bool find_tile(int& frames, int& joints, int all_frames, int all_joints, int frame_step, TryTile try_tile) {
  constexpr int kMoreTries = 4;
  double least = 0;
  bool found = false;
  for (int joint_parts = 1, last_joints = 0; joint_parts <= all_joints; ++joint_parts) {
    const int of_joints = divide_up(all_joints, joint_parts);
    if (of_joints == last_joints) continue;
    last_joints = of_joints;
    int tries = kMoreTries;
    for (int frame_parts = 1, last_frames = 0; frame_parts <= all_frames && tries > 0; ++frame_parts) {
      const int of_frames = round_up(divide_up(all_frames, frame_parts), frame_step);
      if (of_frames == last_frames) continue;
      last_frames = of_frames;
      double cost = 0;
      if (!try_tile(of_frames, of_joints, cost)) continue;
      --tries;
      if (!found || cost < least) {
        found = true;
        least = cost;
        frames = of_frames;
        joints = of_joints;
      }
    }
  }
  return found;
}

// Clock ticks of a multiprocessor, roughly.
double load_ticks(double bytes) { return bytes / 32; }
double product_ticks(double products, int element_size) { return products / (element_size == 2 ? 1024 : 128); }
constexpr double kItemTicks = 700;
// The share of that speed that blocks of so many warps and bytes reach, as many as there are on a multiprocessor.
double speed(const TemporalConvolutionShape& shape, int warps, int most_warps, int shared_bytes) {
  constexpr int kEnough = 12;
  const int blocks = smaller((shape.shared_bytes + Traits::kReservedBytes) / (shared_bytes + Traits::kReservedBytes),
                             most_warps / warps);
  return smaller((blocks > 0 ? blocks : 1) * warps, kEnough) / static_cast<double>(kEnough);
}

// What lets two blocks share a multiprocessor.
int half_of_shared(const TemporalConvolutionShape& shape) {
  return (shape.shared_bytes + Traits::kReservedBytes) / 2 - Traits::kReservedBytes;
}

int row_stride(int size, int element_size) {
  return element_size == 2 ? tile_stride<__nv_bfloat16>(size) : tile_stride<float>(size);
}

template <int kN>
bool plan_product(Tiling& tiling, const TemporalConvolutionShape& shape, int element_size, bool backward) {
  using P = Product<kN>;
  const int columns = backward ? shape.in_channels : shape.out_channels;
  const int depth = backward ? shape.out_channels : shape.in_channels;
  const int result_frames = backward ? shape.frames : shape.out_frames();
  const auto stride_of = [&](int size) { return row_stride(size, element_size); };
  tiling = {};
  tiling.passes = tiling.tap_step = backward ? shape.stride : 1;
  tiling.column_tiles = divide_up(columns, P::kColumns);
  tiling.depth = round_up(depth, 16);
  tiling.chunk = smaller(tiling.depth, Traits::kRowBytes / element_size);
  tiling.depth = round_up(tiling.depth, tiling.chunk);
  const int weight_rows = backward ? tiling.chunk : P::kColumns, weight_columns = backward ? P::kColumns : tiling.chunk;
  const int tap_size = weight_rows * stride_of(weight_columns);
  const int most_taps = divide_up(shape.taps, tiling.tap_step);
  const int taps_of_stage = Traits::kStageBytes / (tap_size * element_size);
  const bool fit_at_once = most_taps * tap_size * element_size <= Traits::kKeptBytes;
  tiling.taps_per_stage = fit_at_once ? most_taps : taps_of_stage < 1 ? 1 : smaller(most_taps, taps_of_stage);
  tiling.stage_size = tiling.taps_per_stage * tap_size;
  for (int pass = 0; pass < tiling.passes; ++pass) tiling.stages += tiling.stages_of_pass(pass, shape.taps);

  const auto set_tile = [&](int frames, int joints) {
    tiling.frames = frames;
    tiling.joints = joints;
    tiling.frame_parts = divide_up(result_frames, frames);
    tiling.joint_parts = divide_up(shape.joints, joints);
    tiling.source = backward ? gradient_source_of(shape, frames) : source_of(shape, frames);
    tiling.source_rows =
        rows_with_tail(tiling.source, tiling.passes, result_frames, shape.joints, frames, joints, P::kRows);
    tiling.warps = divide_up(frames / tiling.passes * joints, P::kRows);
    const int floats =
        tiling.warps * (16 * tile_stride<float>(P::kGroupColumns) + (backward ? 2 : 3) * P::kColumns) +
        2 * tiling.depth;
    tiling.shared_bytes =
        (tiling.source_rows * stride_of(tiling.chunk) + smaller(tiling.stages, 2) * tiling.stage_size) * element_size +
        floats * static_cast<int>(sizeof(float));
  };
  int frames = 0, joints = 0;
  for (int most_bytes : {half_of_shared(shape), shape.shared_bytes}) {
    const auto try_tile = [&](int f, int v, double& cost) {
      if (static_cast<int64_t>(f / tiling.passes) * v > P::kRows * Traits::kMostWarps) return false;
      if (static_cast<int64_t>(f) * shape.stride * v > 1 << 20) return false;
      set_tile(f, v);
      const double rows = static_cast<double>(tiling.passes) * tiling.warps * P::kRows;
      cost = load_ticks(static_cast<double>(tiling.source.phases) * tiling.source.phase_frames * v * depth *
                        element_size * (backward ? 2 : 1)) +
             product_ticks(rows * P::kColumns * tiling.depth * shape.taps / tiling.tap_step, element_size) + kItemTicks;
      cost *= tiling.parts() / speed(shape, tiling.warps, P::kBlocks * Traits::kMostWarps, tiling.shared_bytes);
      return tiling.shared_bytes <= most_bytes;
    };
    if (!find_tile(frames, joints, result_frames, shape.joints, tiling.passes, try_tile)) continue;
    set_tile(frames, joints);
    const int64_t items = shape.sequences * tiling.parts();
    int64_t slots = shape.streams > 0 ? 4 * Traits::kWantedBlocks / shape.streams : 0;
    slots = slots < Traits::kMostSlots ? Traits::kMostSlots : smaller(slots, int64_t{4 * Traits::kMostSlots});
    const int64_t items_per_block = (items + slots - 1) / slots;
    if (items_per_block * tiling.stages > INT32_MAX) return false;
    tiling.items_per_block = items_per_block > 0 ? static_cast<int>(items_per_block) : 1;
    tiling.blocks_per_stream = static_cast<int>((items + tiling.items_per_block - 1) / tiling.items_per_block);
    return shape.streams * tiling.blocks_per_stream * tiling.column_tiles <= INT32_MAX;
  }
  return false;
}

bool plan_sums(SumArguments& arguments, const TemporalConvolutionShape& shape, int element_size) {
  const auto stride_of = [&](int size) { return row_stride(size, element_size); };
  SumTiling& tiling = arguments.tiling;
  tiling = {};
  tiling.out_groups = smaller(divide_up(shape.out_channels, 16), 2);
  tiling.in_groups = smaller(divide_up(shape.in_channels, 16), Traits::kRowBytes / element_size / 16);
  tiling.row_groups = Traits::kSumWarps / (tiling.out_groups * tiling.in_groups);
  tiling.out_tiles = divide_up(shape.out_channels, tiling.tile_out());
  tiling.in_tiles = divide_up(shape.in_channels, tiling.tile_in());
  tiling.tap_blocks = divide_up(shape.taps, Traits::kSumTaps);
  arguments.height = tiling.out_tiles * tiling.tile_out();
  arguments.width = tiling.in_tiles * tiling.tile_in();
  arguments.part_size = static_cast<int64_t>(shape.taps) * arguments.height * arguments.width + arguments.height;
  const auto set_tile = [&](int frames, int joints) {
    tiling.frames = frames;
    tiling.joints = joints;
    tiling.frame_parts = divide_up(shape.out_frames(), frames);
    tiling.joint_parts = divide_up(shape.joints, joints);
    tiling.source = source_of(shape, frames);
    tiling.source_rows = rows_with_tail(tiling.source, 1, shape.out_frames(), shape.joints, frames, joints, 16);
    tiling.gradient_rows = round_up(frames * joints, 16);
    const int tiles = (tiling.source_rows * stride_of(tiling.tile_in()) +
                       tiling.gradient_rows * stride_of(tiling.tile_out())) *
                          element_size +
                      2 * (tiling.tile_in() + tiling.tile_out()) * static_cast<int>(sizeof(float));
    const int exchanged_units = tiling.row_groups > 1 ? tiling.out_groups * tiling.in_groups : 0;
    const int exchange = static_cast<int>(sizeof(WarpSums)) * kWarpSize * exchanged_units;
    const int of_threads = tiling.warps() * kWarpSize * 16 / element_size * 4;
    tiling.shared_bytes = tiles > exchange ? tiles : exchange;
    if (of_threads > tiling.shared_bytes) tiling.shared_bytes = of_threads;
  };
  int frames = 0, joints = 0;
  for (int most_bytes : {half_of_shared(shape), shape.shared_bytes}) {
    const bool found = find_tile(frames, joints, shape.out_frames(), shape.joints, 1, [&](int f, int v, double& cost) {
      if (static_cast<int64_t>(f) * shape.stride * v > 1 << 20) return false;
      set_tile(f, v);
      cost = load_ticks((static_cast<double>(tiling.source.phases) * tiling.source.phase_frames * v *
                             tiling.tile_in() +
                         2.0 * f * v * tiling.tile_out()) * element_size) +
             product_ticks(
                 static_cast<double>(tiling.gradient_rows) * tiling.tile_out() * tiling.tile_in() * shape.taps,
                 element_size) +
             kItemTicks;
      cost *= tiling.parts() / speed(shape, tiling.warps(), 2 * Traits::kSumWarps, tiling.shared_bytes);
      return tiling.shared_bytes <= most_bytes;
    });
    if (!found) continue;
    set_tile(frames, joints);
    const int64_t items = shape.sequences * tiling.parts();
    const int64_t blocks = shape.streams * tiling.out_tiles * tiling.in_tiles * tiling.tap_blocks;
    int64_t shares = blocks > 0 ? smaller((Traits::kWantedBlocks + blocks - 1) / blocks, items) : 0;
    tiling.shares = static_cast<int>(shares);
    return blocks * shares <= INT32_MAX;
  }
  return false;
}

int size_of(ElementType type) { return type == ElementType::kFloat ? 4 : 2; }

// Calls run with how many fragments of 8 columns a block makes, and whether it takes the source's channels in parts.
template <int kN, bool kWide>
struct Fragments {
  static constexpr int kCount = kN;
  static constexpr bool kIsWide = kWide;
};
template <typename Run>
auto with_fragments(const TemporalConvolutionShape& shape, ElementType type, bool backward, Run run) {
  const int columns = backward ? shape.in_channels : shape.out_channels;
  const int depth = backward ? shape.out_channels : shape.in_channels;
  if (round_up(depth, 16) * size_of(type) > Traits::kRowBytes) return run(Fragments<8, true>{});
  return columns <= 16   ? run(Fragments<2, false>{})
         : columns <= 32 ? run(Fragments<4, false>{})
                         : run(Fragments<8, false>{});
}

bool plan_product(Tiling& tiling, const TemporalConvolutionShape& shape, ElementType type, bool backward) {
  return with_fragments(shape, type, backward, [&](auto fragments) {
    return plan_product<decltype(fragments)::kCount>(tiling, shape, size_of(type), backward);
  });
}
bool plan_sums(SumArguments& arguments, const TemporalConvolutionShape& shape, ElementType type) {
  return plan_sums(arguments, shape, size_of(type));
}

int64_t packed_size(const TemporalConvolutionShape& shape) {
  return shape.streams * shape.taps * packed_out(shape) * packed_in(shape);
}

// Whether rows of `channels` elements and all of `tensors` are multiples of 16 bytes; null counts.
bool is_aligned(int channels, ElementType type, std::initializer_list<const void*> tensors) {
  bool aligned = channels * size_of(type) % 16 == 0;
  for (const void* tensor : tensors) aligned = aligned && reinterpret_cast<uintptr_t>(tensor) % 16 == 0;
  return aligned;
}

// Whether the kernels can read and write a shape's tensors.
bool is_allowed(const TemporalConvolutionShape& shape, ElementType type, std::initializer_list<const void*> inputs,
                std::initializer_list<const void*> outputs) {
  return type != ElementType::kDouble && fits(shape) && is_aligned(shape.in_channels, type, inputs) &&
         is_aligned(shape.out_channels, type, outputs);
}

// Calls run with an example of the type of elements.
template <typename Run>
cudaError_t with_type(ElementType type, Run run) {
  return type == ElementType::kFloat ? run(float{}) : run(__nv_bfloat16{});
}

template <typename T, int kN, bool kBackward, bool kWide>
cudaError_t launch_product(const ConvolutionArguments& arguments, cudaStream_t stream) {
  const Tiling& tiling = arguments.tiling;
  const auto kernel = temporal_product_kernel<T, kN, kBackward, kWide>;
  const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, tiling.shared_bytes);
  if (allowed != cudaSuccess) return allowed;
  const int64_t blocks = arguments.shape.streams * tiling.blocks_per_stream * tiling.column_tiles;
  return IKEM_LAUNCH((temporal_product_kernel<T, kN, kBackward, kWide>), dim3(static_cast<unsigned>(blocks)),
                     dim3(kWarpSize * tiling.warps), tiling.shared_bytes, stream, arguments);
}

template <bool kBackward>
cudaError_t launch_product(const ConvolutionArguments& arguments, ElementType type, cudaStream_t stream) {
  return with_type(type, [&](auto example) {
    using T = decltype(example);
    return with_fragments(arguments.shape, type, kBackward, [&](auto fragments) {
      using Chosen = decltype(fragments);
      return launch_product<T, Chosen::kCount, kBackward, Chosen::kIsWide>(arguments, stream);
    });
  });
}

unsigned simple_blocks(int64_t threads) {
  return static_cast<unsigned>((threads + Traits::kSimpleThreads - 1) / Traits::kSimpleThreads);
}

}  // namespace

bool find_scratch(TemporalConvolutionScratch& scratch, const TemporalConvolutionShape& shape, ElementType type) {
  Tiling forward, backward;
  SumArguments sums{};
  if (type == ElementType::kDouble || !fits(shape) || packed_size(shape) > INT32_MAX ||
      !plan_product(forward, shape, type, false) || !plan_product(backward, shape, type, true) ||
      !plan_sums(sums, shape, type)) {
    return false;
  }
  scratch = {packed_size(shape), shape.streams * forward.blocks_per_stream * 3 * shape.out_channels,
             shape.streams * backward.blocks_per_stream * 2 * shape.in_channels,
             shape.streams * sums.tiling.shares * sums.part_size};
  return true;
}

cudaError_t pack_temporal_weights(void* packed, ElementType type, const float* weight,
                                  const TemporalConvolutionShape& shape, cudaStream_t stream) {
  if (type == ElementType::kDouble || !fits(shape) || packed_size(shape) > INT32_MAX) return cudaErrorInvalidValue;
  if (packed_size(shape) == 0) return cudaSuccess;
  return with_type(type, [&](auto example) {
    using T = decltype(example);
    return IKEM_LAUNCH((pack_weights_kernel<T>), dim3(simple_blocks(packed_size(shape))), dim3(Traits::kSimpleThreads),
                       0, stream, static_cast<T*>(packed), weight, shape);
  });
}

cudaError_t temporal_convolution(const TemporalConvolutionResult& result, const void* x, ElementType type,
                                 const ActivationInput& activation, const void* packed_weights,
                                 const TemporalConvolutionShape& shape, cudaStream_t stream) {
  ConvolutionArguments arguments{};
  if (!is_allowed(shape, type, {x}, {result.y, result.residual}) ||
      !plan_product(arguments.tiling, shape, type, false)) {
    return cudaErrorInvalidValue;
  }
  arguments.shape = shape;
  arguments.source = {x, shape.frames, shape.joints, shape.in_channels};
  arguments.activation = activation;
  arguments.weights = packed_weights;
  arguments.result = result;
  if (shape.streams * shape.sequences > 0) {
    const cudaError_t error = launch_product<false>(arguments, type, stream);
    if (error != cudaSuccess) return error;
  }
  if (!result.with_statistics) return cudaSuccess;
  return combine_channel_statistics(
      result.mean, result.variance,
      {result.moments, shape.streams, arguments.tiling.blocks_per_stream, shape.out_channels}, stream);
}

cudaError_t temporal_convolution_x_gradient(const TemporalXGradient& result, const void* x, ElementType type,
                                            const ActivationInput& activation, const void* y_gradient,
                                            const GradientInput& gradient, const void* packed_weights,
                                            const TemporalConvolutionShape& shape, cudaStream_t stream) {
  ConvolutionArguments arguments{};
  if (!is_allowed(shape, type, {x, result.x_gradient}, {y_gradient, gradient.y}) ||
      !plan_product(arguments.tiling, shape, type, true)) {
    return cudaErrorInvalidValue;
  }
  arguments.shape = shape;
  arguments.source = {y_gradient, shape.out_frames(), shape.joints, shape.out_channels};
  arguments.activation = activation;
  arguments.gradient = gradient;
  arguments.weights = packed_weights;
  arguments.x_result = result;
  arguments.x = x;
  if (shape.streams * shape.sequences > 0) {
    const cudaError_t error = launch_product<true>(arguments, type, stream);
    if (error != cudaSuccess) return error;
  }
  if (!activation.scale) return cudaSuccess;
  const int slots = arguments.tiling.blocks_per_stream, channels = shape.in_channels;
  const cudaError_t error = add_partial_sums(
      result.scale_gradient, {result.coefficient_sums, shape.streams, channels, 2 * channels, slots}, stream);
  if (error != cudaSuccess) return error;
  return add_partial_sums(result.shift_gradient,
                          {result.coefficient_sums + channels, shape.streams, channels, 2 * channels, slots}, stream);
}

cudaError_t temporal_convolution_weight_gradient(const TemporalWeightGradient& result, const void* x, ElementType type,
                                                 const ActivationInput& activation, const void* y_gradient,
                                                 const GradientInput& gradient, const TemporalConvolutionShape& shape,
                                                 cudaStream_t stream) {
  SumArguments arguments{};
  if (!is_allowed(shape, type, {x}, {y_gradient, gradient.y}) || !plan_sums(arguments, shape, type)) {
    return cudaErrorInvalidValue;
  }
  if (shape.streams == 0) return cudaSuccess;
  const SumTiling& tiling = arguments.tiling;
  arguments.shape = shape;
  arguments.x = {x, shape.frames, shape.joints, shape.in_channels};
  arguments.y_gradient = {y_gradient, shape.out_frames(), shape.joints, shape.out_channels};
  arguments.activation = activation;
  arguments.gradient = gradient;
  arguments.sums = result.weight_sums;
  if (tiling.shares > 0) {
    const int64_t blocks = shape.streams * tiling.shares * tiling.out_tiles * tiling.in_tiles * tiling.tap_blocks;
    const cudaError_t error = with_type(type, [&](auto example) {
      using T = decltype(example);
      const cudaError_t allowed = cudaFuncSetAttribute(
          weight_sums_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, tiling.shared_bytes);
      if (allowed != cudaSuccess) return allowed;
      return IKEM_LAUNCH((weight_sums_kernel<T>), dim3(static_cast<unsigned>(blocks)),
                         dim3(kWarpSize * tiling.warps()), tiling.shared_bytes, stream, arguments);
    });
    if (error != cudaSuccess) return error;
  }
  const int64_t weights = shape.streams * shape.taps * shape.out_channels * shape.in_channels;
  const cudaError_t error =
      IKEM_LAUNCH(add_weight_sums_kernel, dim3(simple_blocks(weights)), dim3(Traits::kSimpleThreads), 0, stream,
                  result.weight_gradient, arguments);
  if (error != cudaSuccess) return error;
  const float* biases = result.weight_sums + static_cast<int64_t>(shape.taps) * arguments.height * arguments.width;
  return add_partial_sums(result.bias_gradient,
                          {biases, shape.streams, shape.out_channels, arguments.part_size, tiling.shares}, stream);
}

}  // namespace ikem_fast::cuda
