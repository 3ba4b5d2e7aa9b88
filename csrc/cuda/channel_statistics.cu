#include "cuda/channel_statistics.h"

namespace ikem_fast::cuda {

namespace {

struct StatisticsTraits {
  static constexpr int kChannels = 32;  // of a block
  static constexpr int kParts = 8;      // of the slots, that threads of a channel take
  static constexpr int kThreads = kChannels * kParts;
};

struct ExactMoments {
  double count, mean, m2;

  __device__ __forceinline__ void add(double other_count, double other_mean, double other_m2) {
    if (other_count == 0) return;
    const double sum = count + other_count, difference = other_mean - mean, share = other_count / sum;
    mean += difference * share;
    m2 += other_m2 + difference * difference * count * share;
    count = sum;
  }
};

__global__ void __launch_bounds__(StatisticsTraits::kThreads)
    combine_channel_statistics_kernel(float* __restrict__ means, float* __restrict__ variances,
                                      PartialStatistics partial, int blocks_of_stream) {
  IKEM_SHARED(double, parts, [StatisticsTraits::kParts][3][StatisticsTraits::kChannels]);
  const int64_t s = static_cast<int>(blockIdx.x) / blocks_of_stream;
  const int lane = threadIdx.x % StatisticsTraits::kChannels, part = threadIdx.x / StatisticsTraits::kChannels;
  const int64_t channel =
      static_cast<int64_t>(static_cast<int>(blockIdx.x) % blocks_of_stream) * StatisticsTraits::kChannels + lane;
  const bool is_inside = channel < partial.channels;
  ExactMoments sum{0, 0, 0};
  if (is_inside) {
#pragma unroll 4
    for (int slot = part; slot < partial.slots; slot += StatisticsTraits::kParts) {
      const float* moments = partial.moments + (s * partial.slots + slot) * 3 * partial.channels + channel;
      sum.add(moments[0], moments[partial.channels], moments[2 * partial.channels]);
    }
  }
  parts[part][0][lane] = sum.count;
  parts[part][1][lane] = sum.mean;
  parts[part][2][lane] = sum.m2;
  __syncthreads();
  if (part > 0 || !is_inside) return;
  for (int other = 1; other < StatisticsTraits::kParts; ++other) {
    sum.add(parts[other][0][lane], parts[other][1][lane], parts[other][2][lane]);
  }
  means[s * partial.channels + channel] = static_cast<float>(sum.mean);
  variances[s * partial.channels + channel] = sum.count > 0 ? static_cast<float>(sum.m2 / sum.count) : 0.0f;
}

}  // namespace

cudaError_t combine_channel_statistics(float* mean, float* variance, const PartialStatistics& partial,
                                       cudaStream_t stream) {
  const int64_t blocks_of_stream = (partial.channels + StatisticsTraits::kChannels - 1) / StatisticsTraits::kChannels;
  const int64_t blocks = partial.streams * blocks_of_stream;
  if (blocks > INT32_MAX || partial.slots < 0) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  return IKEM_LAUNCH(combine_channel_statistics_kernel, dim3(static_cast<unsigned>(blocks)),
                     dim3(StatisticsTraits::kThreads), 0, stream, mean, variance, partial,
                     static_cast<int>(blocks_of_stream));
}

}  // namespace ikem_fast::cuda
