#include "cuda/momentum_update.h"

#include "cuda/kernel.h"

namespace ikem_fast::cuda {

namespace {

struct Traits {
  static constexpr int kThreads = 256;
  static constexpr int kVectors = 4;        // of 16 bytes, that a thread has under way at once
  static constexpr int kPairsPerLaunch = 128;
};

template <typename T>
constexpr int kValuesPerVector = 16 / sizeof(T);
template <typename T>
constexpr int kValuesPerBlock = Traits::kThreads * Traits::kVectors * kValuesPerVector<T>;

// Goes to the kernel by value, in the 4 KB that every driver takes, so that there is no copy to the device that a graph
// would have to capture.
template <typename T>
struct PairTable {
  MomentumPair<T> pairs[Traits::kPairsPerLaunch];
  int first_block[Traits::kPairsPerLaunch];
  int count;
};

template <typename T>
struct alignas(16) Vector {
  T values[kValuesPerVector<T>];
};

__device__ __forceinline__ float update(float key, float query, float kept, float taken) {
  return fmaf(query, taken, __fmul_rn(key, kept));
}
__device__ __forceinline__ double update(double key, double query, double kept, double taken) {
  return fma(query, taken, __dmul_rn(key, kept));
}

template <typename T>
__global__ void __launch_bounds__(Traits::kThreads) momentum_update_kernel(PairTable<T> table, T kept, T taken) {
  // The last pair whose first block is not after this one.
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_block[middle] <= static_cast<int>(blockIdx.x)) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int64_t first = static_cast<int64_t>(blockIdx.x - table.first_block[low]) * kValuesPerBlock<T>;
  const int64_t size = table.pairs[low].size - first;
  T* __restrict__ key = table.pairs[low].key + first;
  const T* __restrict__ query = table.pairs[low].query + first;
  const bool aligned = (reinterpret_cast<uintptr_t>(key) | reinterpret_cast<uintptr_t>(query)) % 16 == 0;
  if (aligned && size >= kValuesPerBlock<T>) {
    Vector<T> keys[Traits::kVectors], queries[Traits::kVectors];
#pragma unroll
    for (int v = 0; v < Traits::kVectors; ++v) {
      keys[v] = reinterpret_cast<const Vector<T>*>(key)[v * Traits::kThreads + threadIdx.x];
      queries[v] = reinterpret_cast<const Vector<T>*>(query)[v * Traits::kThreads + threadIdx.x];
    }
#pragma unroll
    for (int v = 0; v < Traits::kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kValuesPerVector<T>; ++i) {
        keys[v].values[i] = update(keys[v].values[i], queries[v].values[i], kept, taken);
      }
      reinterpret_cast<Vector<T>*>(key)[v * Traits::kThreads + threadIdx.x] = keys[v];
    }
    return;
  }
  for (int64_t i = threadIdx.x; i < kValuesPerBlock<T> && i < size; i += Traits::kThreads) {
    key[i] = update(key[i], query[i], kept, taken);
  }
}

template <typename T>
cudaError_t launch_table(PairTable<T>& table, int64_t& blocks, double momentum, cudaStream_t stream) {
  if (table.count == 0) return cudaSuccess;
  const cudaError_t error =
      IKEM_LAUNCH((momentum_update_kernel<T>), dim3(static_cast<unsigned>(blocks)), dim3(Traits::kThreads), 0, stream,
                  table, static_cast<T>(momentum), static_cast<T>(1.0 - momentum));
  table.count = 0;
  blocks = 0;
  return error;
}

}  // namespace

template <typename T>
cudaError_t momentum_update(const std::vector<MomentumPair<T>>& pairs, double momentum, cudaStream_t stream) {
  static_assert(sizeof(PairTable<T>) + 2 * sizeof(T) <= 4096);
  PairTable<T> table{};
  int64_t blocks = 0;
  for (const MomentumPair<T>& pair : pairs) {
    if (pair.size == 0) continue;
    const int64_t more = (pair.size + kValuesPerBlock<T> - 1) / kValuesPerBlock<T>;
    if (more > INT32_MAX) return cudaErrorInvalidValue;
    if (table.count == Traits::kPairsPerLaunch || blocks + more > INT32_MAX) {
      const cudaError_t error = launch_table(table, blocks, momentum, stream);
      if (error != cudaSuccess) return error;
    }
    table.pairs[table.count] = pair;
    table.first_block[table.count] = static_cast<int>(blocks);
    ++table.count;
    blocks += more;
  }
  return launch_table(table, blocks, momentum, stream);
}

template cudaError_t momentum_update<float>(const std::vector<MomentumPair<float>>&, double, cudaStream_t);
template cudaError_t momentum_update<double>(const std::vector<MomentumPair<double>>&, double, cudaStream_t);

}  // namespace ikem_fast::cuda
