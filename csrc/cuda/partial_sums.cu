#include "cuda/partial_sums.h"

#include "cuda/kernel.h"

namespace ikem_fast::cuda {

namespace {

struct PartialSumsTraits {
  static constexpr int kColumns = 32;  // of a block
  static constexpr int kShares = 8;    // of the parts, that threads of a column take
  static constexpr int kThreads = kColumns * kShares;
};

__global__ void __launch_bounds__(PartialSumsTraits::kThreads)
    add_partial_sums_kernel(float* __restrict__ sums, PartialSums parts, int64_t blocks_of_stream) {
  IKEM_SHARED(double, shares, [PartialSumsTraits::kShares][PartialSumsTraits::kColumns]);
  const int lane = threadIdx.x % PartialSumsTraits::kColumns, share = threadIdx.x / PartialSumsTraits::kColumns;
  const int64_t stream = blockIdx.x / blocks_of_stream;
  const int64_t column = blockIdx.x % blocks_of_stream * PartialSumsTraits::kColumns + lane;
  const bool is_inside = column < parts.size;
  double sum = 0;
  if (is_inside) {
#pragma unroll 4
    for (int part = share; part < parts.count; part += PartialSumsTraits::kShares) {
      sum += parts.parts[(stream * parts.count + part) * parts.pitch + column];
    }
  }
  shares[share][lane] = sum;
  __syncthreads();
  if (share > 0 || !is_inside) return;
  for (int other = 1; other < PartialSumsTraits::kShares; ++other) sum += shares[other][lane];
  sums[stream * parts.size + column] = static_cast<float>(sum);
}

}  // namespace

cudaError_t add_partial_sums(float* sums, const PartialSums& parts, cudaStream_t stream) {
  const int64_t blocks_of_stream = (parts.size + PartialSumsTraits::kColumns - 1) / PartialSumsTraits::kColumns;
  const int64_t blocks = parts.streams * blocks_of_stream;
  if (blocks > INT32_MAX || parts.count < 0 || parts.pitch < parts.size) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  return IKEM_LAUNCH(add_partial_sums_kernel, dim3(static_cast<unsigned>(blocks)), dim3(PartialSumsTraits::kThreads), 0,
                     stream, sums, parts, blocks_of_stream);
}

}  // namespace ikem_fast::cuda
