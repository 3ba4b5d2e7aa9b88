#include "cuda/enqueue.h"

#include "cuda/kernel.h"
#include "cuda/real_types.h"

namespace ikem_fast::cuda {

namespace {

struct Traits {
  static constexpr int kTile = 32;  // keys and rows of a tile: a warp's width
  static constexpr int kWarps = 8;
};

__device__ __forceinline__ int64_t wrap(int64_t number, int64_t divisor) {
  const int64_t rest = number % divisor;
  return rest < 0 ? rest + divisor : rest;
}

// A block transposes one tile of a stream's keys: a warp reads along a key and writes along a row of the queue.
template <typename Key, typename Queue>
__global__ void __launch_bounds__(Traits::kTile * Traits::kWarps) enqueue_kernel(EnqueueInput input, int key_tiles,
                                                                                  int row_tiles) {
  using Value = Widened<Key>;
  IKEM_SHARED(Value, tile, [Traits::kTile][Traits::kTile + 1]);
  const int stream = blockIdx.x / (key_tiles * row_tiles);
  const int64_t first_key = static_cast<int64_t>(blockIdx.x % key_tiles) * Traits::kTile;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / key_tiles % row_tiles) * Traits::kTile;
  // The last K keys stay.
  const int64_t dropped = input.num_keys > input.queue_size ? input.num_keys - input.queue_size : 0;
  const int64_t num_keys = input.num_keys - dropped;
  const int lane = threadIdx.x % Traits::kTile, warp = threadIdx.x / Traits::kTile;

  const int64_t start = wrap(wrap(*input.pointer, input.queue_size) + dropped, input.queue_size);
  // Where a key comes to lie among the columns that are here; with N at most K it wraps around once at most.
  const auto column_of = [&](int64_t key) {
    const int64_t column = start + key;
    return (column < input.queue_size ? column : column - input.queue_size) - input.first_column;
  };
  const auto is_here = [&](int64_t key) {
    const int64_t column = column_of(key);
    return key < num_keys && column >= 0 && column < input.columns;
  };

  const Key* keys = static_cast<const Key*>(input.keys) + stream * input.key_strides[0];
  for (int i = warp; i < Traits::kTile; i += Traits::kWarps) {
    const int64_t key = first_key + i, row = first_row + lane;
    if (is_here(key) && row < input.size) {
      tile[i][lane] = widen(keys[(dropped + key) * input.key_strides[1] + row * input.key_strides[2]]);
    }
  }
  __syncthreads();

  const int64_t column = column_of(first_key + lane);
  const bool written = is_here(first_key + lane);
  Queue* queue = static_cast<Queue*>(input.queue) + stream * input.queue_strides[0];
  for (int i = warp; i < Traits::kTile; i += Traits::kWarps) {
    const int64_t row = first_row + i;
    if (written && row < input.size) {
      queue[row * input.queue_strides[1] + column * input.queue_strides[2]] = narrow<Queue>(tile[lane][i]);
    }
  }
}

// A launch of its own: all blocks that write keys must have read the pointer.
__global__ void move_pointer_kernel(int64_t* pointer, int64_t num_keys, int64_t queue_size) {
  *pointer = wrap(wrap(*pointer, queue_size) + num_keys, queue_size);
}

template <typename Key, typename Queue>
cudaError_t write_keys(const EnqueueInput& input, cudaStream_t stream) {
  const int64_t kept = input.num_keys < input.queue_size ? input.num_keys : input.queue_size;
  const int64_t key_tiles = (kept + Traits::kTile - 1) / Traits::kTile;
  const int64_t row_tiles = (input.size + Traits::kTile - 1) / Traits::kTile;
  const int64_t blocks = input.num_streams * key_tiles * row_tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return IKEM_LAUNCH((enqueue_kernel<Key, Queue>), dim3(static_cast<unsigned>(blocks)),
                     dim3(Traits::kTile * Traits::kWarps), 0, stream, input, static_cast<int>(key_tiles),
                     static_cast<int>(row_tiles));
}

template <typename Key>
cudaError_t write_keys_of(const EnqueueInput& input, cudaStream_t stream) {
  switch (input.queue_type) {
    case ElementType::kFloat:
      return write_keys<Key, float>(input, stream);
    case ElementType::kDouble:
      return write_keys<Key, double>(input, stream);
    case ElementType::kBFloat16:
      return write_keys<Key, __nv_bfloat16>(input, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t write_all_keys(const EnqueueInput& input, cudaStream_t stream) {
  switch (input.key_type) {
    case ElementType::kFloat:
      return write_keys_of<float>(input, stream);
    case ElementType::kDouble:
      return write_keys_of<double>(input, stream);
    case ElementType::kBFloat16:
      return write_keys_of<__nv_bfloat16>(input, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t enqueue(const EnqueueInput& input, cudaStream_t stream) {
  if (input.columns < 1 || input.first_column < 0 || input.first_column > input.queue_size - input.columns) {
    return cudaErrorInvalidValue;
  }
  const cudaError_t error = write_all_keys(input, stream);
  if (error != cudaSuccess) return error;
  return IKEM_LAUNCH(move_pointer_kernel, dim3(1), dim3(1), 0, stream, input.pointer, input.num_keys,
                     input.queue_size);
}

}  // namespace ikem_fast::cuda
