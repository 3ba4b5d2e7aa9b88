// Ring buffer of keys on CUDA: the launcher, on raw pointers.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "cuda/element_type.h"

namespace ikem_fast::cuda {

// Everything on the stream's device; strides in elements, of the dimensions in the order they are written in.
struct EnqueueInput {
  const void* keys;  // (S, N, D)
  ElementType key_type;
  int64_t key_strides[3];
  void* queue;  // (S, D, columns)
  ElementType queue_type;
  int64_t queue_strides[3];
  int64_t* pointer;  // column of the next key, taken modulo K
  int64_t num_streams;
  int64_t num_keys;
  int64_t size;
  int64_t columns;       // of the queue that are here
  int64_t first_column;  // of those, in the queue
  int64_t queue_size;    // K
};

// Writes those of the keys, of more than K the last K, that belong into the columns that are here, from the pointer on,
// and moves the pointer past all keys.
// cudaErrorInvalidValue for more than 2^31 - 1 tiles of 32 keys by 32 rows, or columns that are none or not in the queue.
cudaError_t enqueue(const EnqueueInput& input, cudaStream_t stream);

}  // namespace ikem_fast::cuda
