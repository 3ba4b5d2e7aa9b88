// Derivation of modalities on CUDA and its gradient: the launchers, on raw pointers.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "cuda/skeleton.h"

namespace ikem_fast::cuda {

struct ClipShape {
  int num_clips;    // N
  int num_frames;   // T
  int num_joints;   // V
  int num_persons;  // M
};

// clips (N, 3, T, V, M), num_frames (N,), output (S, N, 3, T, V, M), all contiguous on the stream's device; T is float
// or double. cudaErrorInvalidValue for a shape with more than 2^31 - 1 values in a clip or tiles in the batch, or more
// joints than Skeleton holds.
template <typename T>
cudaError_t derive_modalities(T* output, const T* clips, const int64_t* num_frames, const ClipShape& shape,
                              const Skeleton& skeleton, const OutputRows& rows, cudaStream_t stream);

// gradient (S, N, 3, T, V, M) of the modalities, output (N, 3, T, V, M) of the clips; everything else as above.
template <typename T>
cudaError_t derive_modalities_backward(T* output, const T* gradient, const T* clips, const int64_t* num_frames,
                                       const ClipShape& shape, const Skeleton& skeleton, const OutputRows& rows,
                                       cudaStream_t stream);

}  // namespace ikem_fast::cuda
