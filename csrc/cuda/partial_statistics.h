// Brings parts of channels' statistics together: the launcher, on raw pointers. channel_statistics.h makes the parts.
#pragma once

#include <driver_types.h>

#include <cstdint>

namespace ikem_fast::cuda {

// Values of a channel in `slots` parts, of streams: count, mean and M2, (streams, slots, 3, channels).
struct PartialStatistics {
  const float* moments;
  int64_t streams;
  int slots;
  int64_t channels;
};

// mean and variance (streams, channels), combined in double; both 0 where there are no values.
cudaError_t combine_channel_statistics(float* mean, float* variance, const PartialStatistics& partial,
                                       cudaStream_t stream);

}  // namespace ikem_fast::cuda
