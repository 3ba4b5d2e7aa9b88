#include "cuda/residual_activation.h"

#include "cuda/kernel.h"
#include "cuda/real_types.h"
#include "math/dropout_mask.h"

namespace ikem_fast::cuda {

namespace {

struct Traits {
  static constexpr int kThreads = 256;
  static constexpr int kWidth = math::kValuesPerCall;  // channels of a thread: those of one Philox call
  static constexpr int kPooledChannels = 64;           // of a block that makes means: whole lines of memory
  // Some waves of blocks on the largest GPUs; a block loads coefficients and adds up sums once.
  static constexpr int kBlocks = 2112;
  static constexpr int kBlocksWithSums = 1056;
  static constexpr int kSumWarps = 16;
};

// Of what the residual is made; kAny looks when it runs.
enum class Residual { kNone, kPlain, kScaled, kAny };

// A block takes some rows of one piece of the channels. Its threads are `copies` rows of `groups` threads; each stays
// with its channels, whose coefficients are in its registers.
struct Plan {
  int groups;
  int copies;
  int pieces;
  int64_t rows_of_block;
  int64_t chunks;  // of rows
  int num_sums;
};

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Plan make_plan(const ResidualActivationInput& input, int width, bool with_sums) {
  const int64_t all_groups = input.channels / width;
  const int64_t most_groups = input.pool_rows ? Traits::kPooledChannels / width : Traits::kThreads;
  Plan plan{};
  plan.groups = static_cast<int>(all_groups < most_groups ? all_groups : most_groups);
  plan.copies = Traits::kThreads / plan.groups;
  plan.pieces = static_cast<int>(divide_up(all_groups, plan.groups));
  if (input.pool_rows) {
    plan.rows_of_block = input.pool_rows;
  } else {
    const int64_t blocks = with_sums ? Traits::kBlocksWithSums : Traits::kBlocks;
    const int64_t chunks = divide_up(blocks, static_cast<int64_t>(input.num_streams) * plan.pieces);
    plan.rows_of_block = divide_up(divide_up(input.rows, chunks), plan.copies) * plan.copies;
  }
  plan.chunks = divide_up(input.rows, plan.rows_of_block);
  plan.num_sums = width == 1 || input.residual_scale ? 4 : 2;
  return plan;
}

template <typename T>
struct alignas(16) Vector {
  static constexpr int kValues = 16 / sizeof(T);
  T values[kValues];
};

// kWidth values side by side: one, or as many as are aligned to 16 bytes.
template <int kWidth, typename T>
__device__ __forceinline__ void load(const T* from, float (&values)[kWidth]) {
  if constexpr (kWidth == 1) {
    values[0] = widen(*from);
  } else {
#pragma unroll
    for (int v = 0; v < kWidth / Vector<T>::kValues; ++v) {
      const Vector<T> vector = reinterpret_cast<const Vector<T>*>(from)[v];
#pragma unroll
      for (int k = 0; k < Vector<T>::kValues; ++k) values[v * Vector<T>::kValues + k] = widen(vector.values[k]);
    }
  }
}

template <int kWidth, typename T>
__device__ __forceinline__ void store(const float (&values)[kWidth], T* to) {
  if constexpr (kWidth == 1) {
    *to = narrow<T>(values[0]);
  } else {
#pragma unroll
    for (int v = 0; v < kWidth / Vector<T>::kValues; ++v) {
      Vector<T> vector;
#pragma unroll
      for (int k = 0; k < Vector<T>::kValues; ++k) {
        vector.values[k] = narrow<T>(values[v * Vector<T>::kValues + k]);
      }
      reinterpret_cast<Vector<T>*>(to)[v] = vector;
    }
  }
}

__device__ __forceinline__ float product(float a, float b) { return math::Real<float>::product(a, b); }

// What a thread knows of its channels, and its arithmetic, rounded after each operation as everywhere else.
template <typename T, int kWidth, Residual kResidual, bool kDropout>
struct Channels {
  const ResidualActivationInput& input;
  int stream;
  bool is_active;         // there may be more threads than rows and groups
  int copy;
  int64_t channel;        // the first
  int64_t first, last;    // rows of the block
  uint64_t seed;
  float factor;
  float scale[kWidth], shift[kWidth], residual_scale[kWidth], residual_shift[kWidth];

  __device__ __forceinline__ Channels(const ResidualActivationInput& given, const Plan& plan)
      : input(given), stream(static_cast<int>(blockIdx.z)) {
    copy = static_cast<int>(threadIdx.x) / plan.groups;
    channel = (static_cast<int64_t>(blockIdx.y) * plan.groups + threadIdx.x % plan.groups) * kWidth;
    is_active = copy < plan.copies && channel < input.channels;
    first = blockIdx.x * plan.rows_of_block;
    last = first + plan.rows_of_block < input.rows ? first + plan.rows_of_block : input.rows;
    seed = 0;
    factor = 1.0f;
    if constexpr (kDropout) {
      factor = static_cast<float>(math::dropout_factor(input.threshold));
      if (input.threshold != 0) seed = static_cast<uint64_t>(*input.seed);
    }
    if (!is_active) return;
    const int64_t place = stream * input.channels + channel;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      scale[k] = input.scale[place + k];
      shift[k] = input.shift[place + k];
      residual_scale[k] = is_scaled() ? input.residual_scale[place + k] : 1.0f;
      residual_shift[k] = is_scaled() ? input.residual_shift[place + k] : 0.0f;
    }
  }

  __device__ __forceinline__ bool is_scaled() const {
    return kResidual == Residual::kScaled || (kResidual == Residual::kAny && input.residual_scale != nullptr);
  }
  __device__ __forceinline__ bool has_residual() const {
    return kResidual == Residual::kAny ? input.residual != nullptr : kResidual != Residual::kNone;
  }

  // Of the thread's first channel in a row, among all streams' values.
  __device__ __forceinline__ int64_t place(int64_t row) const {
    return (stream * input.rows + row) * input.channels + channel;
  }

  // Whether dropout keeps the values of a row.
  __device__ __forceinline__ void find_kept(int64_t row, bool (&kept)[kWidth]) const {
    const uint64_t element = static_cast<uint64_t>(row * input.channels + channel);
    const math::RandomWords random =
        math::dropout_words(seed, input.layer, static_cast<uint32_t>(stream), element / math::kValuesPerCall);
    if constexpr (kWidth == math::kValuesPerCall) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) kept[k] = math::is_kept(random, k, input.threshold);
    } else {
      kept[0] = false;
#pragma unroll
      for (int i = 0; i < math::kValuesPerCall; ++i) {
        if (static_cast<int>(element % math::kValuesPerCall) == i) kept[0] = math::is_kept(random, i, input.threshold);
      }
    }
  }

  // x, the residual and what goes into the ReLU.
  __device__ __forceinline__ void load_sum(int64_t row, const bool (&kept)[kWidth], float (&x)[kWidth],
                                           float (&residual)[kWidth], float (&sum)[kWidth]) const {
    load(static_cast<const T*>(input.x) + place(row), x);
    if (has_residual()) load(static_cast<const T*>(input.residual) + place(row), residual);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      sum[k] = product(scale[k], x[k]) + shift[k];
      if constexpr (kDropout) sum[k] = kept[k] ? product(sum[k], factor) : 0.0f;
      if (has_residual()) {
        sum[k] += kResidual == Residual::kPlain ? residual[k]
                                                : product(residual_scale[k], residual[k]) + residual_shift[k];
      } else {
        residual[k] = 0.0f;
      }
    }
  }
};

// Of kCount values of each thread the sums over the block's copies, in the first copy's threads. shared holds a value of
// each thread and is used once. Reached by all threads.
template <int kCount>
__device__ __forceinline__ void add_copies(float (&values)[kCount], float (*shared)[Traits::kThreads],
                                           const Plan& plan) {
  const int thread = threadIdx.x, copy = thread / plan.groups;
#pragma unroll
  for (int k = 0; k < kCount; ++k) shared[k][thread] = values[k];
  for (int count = plan.copies; count > 1;) {
    const int half = (count + 1) / 2;
    __syncthreads();
    if (copy < count - half) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        values[k] += shared[k][thread + half * plan.groups];
        shared[k][thread] = values[k];
      }
    }
    count = half;
  }
}

template <typename T, int kWidth, Residual kResidual, bool kDropout>
__global__ void __launch_bounds__(Traits::kThreads)
    residual_activation_kernel(ResidualActivationInput input, Plan plan, T* __restrict__ out) {
  const Channels<T, kWidth, kResidual, kDropout> channels(input, plan);
  if (!channels.is_active) return;
  for (int64_t row = channels.first + channels.copy; row < channels.last; row += plan.copies) {
    bool kept[kWidth];
    float x[kWidth], residual[kWidth], values[kWidth];
    if constexpr (kDropout) channels.find_kept(row, kept);
    channels.load_sum(row, kept, x, residual, values);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) values[k] = values[k] <= 0.0f ? 0.0f : values[k];  // NaN stays
    store(values, out + channels.place(row));
  }
}

// The mean of pool_rows rows, one block for each piece of its channels.
template <typename T, int kWidth, Residual kResidual, bool kDropout>
__global__ void __launch_bounds__(Traits::kThreads)
    residual_activation_mean_kernel(ResidualActivationInput input, Plan plan, float* __restrict__ out) {
  IKEM_SHARED(float, shared, [kWidth][Traits::kThreads]);
  const Channels<T, kWidth, kResidual, kDropout> channels(input, plan);
  float total[kWidth] = {};
  if (channels.is_active) {
    for (int64_t row = channels.first + channels.copy; row < channels.last; row += plan.copies) {
      bool kept[kWidth];
      float x[kWidth], residual[kWidth], values[kWidth];
      if constexpr (kDropout) channels.find_kept(row, kept);
      channels.load_sum(row, kept, x, residual, values);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) total[k] += values[k] <= 0.0f ? 0.0f : values[k];
    }
  }
  add_copies(total, shared, plan);
  if (!channels.is_active || channels.copy != 0) return;
  float* const to = out + (channels.stream * plan.chunks + blockIdx.x) * input.channels + channels.channel;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) to[k] = total[k] / static_cast<float>(input.pool_rows);
}

template <typename T, int kWidth, Residual kResidual, bool kDropout, bool kPooled>
__global__ void __launch_bounds__(Traits::kThreads)
    residual_activation_backward_kernel(ResidualActivationInput input, Plan plan,
                                        ResidualActivationGradients gradients) {
  constexpr bool kResidualSums = kResidual == Residual::kScaled || kResidual == Residual::kAny;
  constexpr int kSums = kResidualSums ? 4 : 2;
  IKEM_SHARED(float, shared, [kSums * kWidth][Traits::kThreads]);
  const Channels<T, kWidth, kResidual, kDropout> channels(input, plan);
  float sums[kSums * kWidth] = {};
  if (channels.is_active) {
    float gradient[kWidth];
    if constexpr (kPooled) {
      const float* const of_mean = static_cast<const float*>(gradients.out) +
                                   (channels.stream * plan.chunks + blockIdx.x) * input.channels + channels.channel;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) gradient[k] = of_mean[k] / static_cast<float>(input.pool_rows);
    }
    for (int64_t row = channels.first + channels.copy; row < channels.last; row += plan.copies) {
      bool kept[kWidth];
      float x[kWidth], residual[kWidth], values[kWidth], of_x[kWidth], of_residual[kWidth];
      if constexpr (kDropout) channels.find_kept(row, kept);
      channels.load_sum(row, kept, x, residual, values);
      if constexpr (!kPooled) load(static_cast<const T*>(gradients.out) + channels.place(row), gradient);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        float slope = values[k] <= 0.0f ? 0.0f : gradient[k];
        of_residual[k] = kResidual == Residual::kPlain ? slope : product(slope, channels.residual_scale[k]);
        if constexpr (kResidualSums) {
          sums[2 * kWidth + k] += product(slope, residual[k]);
          sums[3 * kWidth + k] += slope;
        }
        if constexpr (kDropout) slope = kept[k] ? product(slope, channels.factor) : 0.0f;
        of_x[k] = product(slope, channels.scale[k]);
        sums[k] += product(slope, x[k]);
        sums[kWidth + k] += slope;
      }
      store(of_x, static_cast<T*>(gradients.x) + channels.place(row));
      if (channels.has_residual()) store(of_residual, static_cast<T*>(gradients.residual) + channels.place(row));
    }
  }
  add_copies(sums, shared, plan);
  if (!channels.is_active || channels.copy != 0) return;
  float* const to =
      gradients.scratch + (channels.stream * plan.chunks + blockIdx.x) * kSums * input.channels + channels.channel;
#pragma unroll
  for (int sum = 0; sum < kSums; ++sum) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) to[sum * input.channels + k] = sums[sum * kWidth + k];
  }
}

// The sums of the blocks' sums: a thread for each column of (num_sums, channels) and each sixteenth of the chunks.
__global__ void __launch_bounds__(32 * Traits::kSumWarps)
    add_chunks_kernel(ResidualActivationGradients gradients, Plan plan, int64_t channels) {
  IKEM_SHARED(double, shared, [Traits::kSumWarps][32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t columns = plan.num_sums * channels;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  const float* const from = gradients.scratch + blockIdx.y * plan.chunks * columns + column;
  double total = 0.0;
  if (column < columns) {
    for (int64_t chunk = warp; chunk < plan.chunks; chunk += Traits::kSumWarps) total += from[chunk * columns];
  }
  shared[warp][lane] = total;
  __syncthreads();
  if (warp != 0 || column >= columns) return;
  for (int w = 1; w < Traits::kSumWarps; ++w) total += shared[w][lane];
  float* const to = gradients.sums[column / channels];
  if (to != nullptr) to[blockIdx.y * channels + column % channels] = static_cast<float>(total);
}

bool fits_grid(const ResidualActivationInput& input, const Plan& plan) {
  return input.num_streams <= 65535 && plan.pieces <= 65535 && plan.chunks <= INT32_MAX;
}

dim3 grid_of(const ResidualActivationInput& input, const Plan& plan) {
  return dim3(static_cast<unsigned>(plan.chunks), static_cast<unsigned>(plan.pieces),
              static_cast<unsigned>(input.num_streams));
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool has_whole_vectors(const ResidualActivationInput& input) {
  return input.channels % Traits::kWidth == 0 && is_aligned(input.x) && is_aligned(input.residual);
}

template <typename T, int kWidth, Residual kResidual, bool kDropout>
cudaError_t launch_forward(void* out, const ResidualActivationInput& input, cudaStream_t stream) {
  const Plan plan = make_plan(input, kWidth, false);
  if (!fits_grid(input, plan)) return cudaErrorInvalidValue;
  if (input.pool_rows) {
    return IKEM_LAUNCH((residual_activation_mean_kernel<T, kWidth, kResidual, kDropout>), grid_of(input, plan),
                       dim3(Traits::kThreads), 0, stream, input, plan, static_cast<float*>(out));
  }
  return IKEM_LAUNCH((residual_activation_kernel<T, kWidth, kResidual, kDropout>), grid_of(input, plan),
                     dim3(Traits::kThreads), 0, stream, input, plan, static_cast<T*>(out));
}

template <typename T, int kWidth, Residual kResidual, bool kDropout>
cudaError_t launch_backward(const ResidualActivationGradients& gradients, const ResidualActivationInput& input,
                            cudaStream_t stream) {
  const Plan plan = make_plan(input, kWidth, true);
  if (!fits_grid(input, plan)) return cudaErrorInvalidValue;
  const dim3 grid = grid_of(input, plan), block(Traits::kThreads);
  const cudaError_t error =
      input.pool_rows ? IKEM_LAUNCH((residual_activation_backward_kernel<T, kWidth, kResidual, kDropout, true>), grid,
                                    block, 0, stream, input, plan, gradients)
                      : IKEM_LAUNCH((residual_activation_backward_kernel<T, kWidth, kResidual, kDropout, false>), grid,
                                    block, 0, stream, input, plan, gradients);
  if (error != cudaSuccess) return error;
  const int64_t columns = plan.num_sums * input.channels;
  return IKEM_LAUNCH(add_chunks_kernel,
                     dim3(static_cast<unsigned>(divide_up(columns, 32)), static_cast<unsigned>(input.num_streams)),
                     dim3(32 * Traits::kSumWarps), 0, stream, gradients, plan, input.channels);
}

template <Residual kValue>
struct ResidualConstant {
  static constexpr Residual value = kValue;
};
template <int kValue>
struct IntConstant {
  static constexpr int value = kValue;
};

// run(width, residual, has dropout) with constants; the one for values that do not come in whole vectors decides all
// else as it runs.
template <typename Run>
cudaError_t with_kind(const ResidualActivationInput& input, bool whole_vectors, Run run) {
  const auto with_dropout = [&](auto residual) {
    return input.threshold ? run(IntConstant<Traits::kWidth>(), residual, std::true_type())
                           : run(IntConstant<Traits::kWidth>(), residual, std::false_type());
  };
  if (!whole_vectors) return run(IntConstant<1>(), ResidualConstant<Residual::kAny>(), std::true_type());
  if (input.residual == nullptr) return with_dropout(ResidualConstant<Residual::kNone>());
  if (input.residual_scale == nullptr) return with_dropout(ResidualConstant<Residual::kPlain>());
  return with_dropout(ResidualConstant<Residual::kScaled>());
}

bool is_empty(const ResidualActivationInput& input) {
  return input.num_streams == 0 || input.rows == 0 || input.channels == 0;
}

}  // namespace

cudaError_t residual_activation(void* out, const ResidualActivationInput& input, cudaStream_t stream) {
  if (input.type == ElementType::kDouble) return cudaErrorInvalidValue;
  if (is_empty(input)) return cudaSuccess;
  const bool whole_vectors = has_whole_vectors(input) && (input.pool_rows != 0 || is_aligned(out));
  return with_kind(input, whole_vectors, [&](auto width, auto residual, auto dropout) {
    constexpr int kWidth = decltype(width)::value;
    constexpr Residual kResidual = decltype(residual)::value;
    constexpr bool kDropout = decltype(dropout)::value;
    return input.type == ElementType::kFloat
               ? launch_forward<float, kWidth, kResidual, kDropout>(out, input, stream)
               : launch_forward<__nv_bfloat16, kWidth, kResidual, kDropout>(out, input, stream);
  });
}

cudaError_t residual_activation_backward(const ResidualActivationGradients& gradients,
                                         const ResidualActivationInput& input, cudaStream_t stream) {
  if (input.type == ElementType::kDouble) return cudaErrorInvalidValue;
  if (is_empty(input)) return cudaSuccess;
  const bool whole_vectors = has_whole_vectors(input) && (input.pool_rows != 0 || is_aligned(gradients.out)) &&
                             is_aligned(gradients.x) && is_aligned(gradients.residual);
  return with_kind(input, whole_vectors, [&](auto width, auto residual, auto dropout) {
    constexpr int kWidth = decltype(width)::value;
    constexpr Residual kResidual = decltype(residual)::value;
    constexpr bool kDropout = decltype(dropout)::value;
    return input.type == ElementType::kFloat
               ? launch_backward<float, kWidth, kResidual, kDropout>(gradients, input, stream)
               : launch_backward<__nv_bfloat16, kWidth, kResidual, kDropout>(gradients, input, stream);
  });
}

int64_t residual_activation_scratch_size(const ResidualActivationInput& input) {
  if (is_empty(input)) return 0;
  int64_t most = 0;  // whichever way the pointers of the gradients let it take
  for (const int width : {1, Traits::kWidth}) {
    if (input.channels % width != 0) continue;
    const Plan plan = make_plan(input, width, true);
    const int64_t size = input.num_streams * plan.chunks * plan.num_sums * input.channels;
    most = size > most ? size : most;
  }
  return most;
}

}  // namespace ikem_fast::cuda
