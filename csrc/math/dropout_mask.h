// Which values dropout keeps: a function of seed, layer, stream and place, for host and device, so that backward and
// every device make the same mask again.
//
// A Philox call decides on eight values of a stream that follow each other: its key is the seed, its counter (q low,
// q high, stream, layer) with q the number of the eight; the halves of its four words, low half first, belong to the
// values in their order. A value is dropped where its half is below the threshold.
#pragma once

#include <cstdint>

#include "math/philox.h"

namespace ikem_fast::math {
#ifdef CPU_CAPABILITY
inline namespace CPU_CAPABILITY {
#endif

constexpr int kValuesPerCall = 8;
constexpr uint32_t kWholeThreshold = 65536;

// Of 65536; 0 drops nothing.
IKEM_HOST_DEVICE uint32_t dropout_threshold(double dropout) {
  const uint32_t threshold = static_cast<uint32_t>(dropout * kWholeThreshold + 0.5);
  return threshold < kWholeThreshold ? threshold : kWholeThreshold - 1;
}

// What the values that are kept are multiplied by.
IKEM_HOST_DEVICE double dropout_factor(uint32_t threshold) {
  return static_cast<double>(kWholeThreshold) / (kWholeThreshold - threshold);
}

IKEM_HOST_DEVICE RandomWords dropout_words(uint64_t seed, uint32_t layer, uint32_t stream, uint64_t call) {
  return philox(RandomWords{{static_cast<uint32_t>(call), static_cast<uint32_t>(call >> 32), stream, layer}}, seed);
}

// Whether value i of a call's eight is kept.
IKEM_HOST_DEVICE bool is_kept(const RandomWords& random, int i, uint32_t threshold) {
  return (random.words[i / 2] >> (16 * (i % 2)) & 0xffff) >= threshold;
}

#ifdef CPU_CAPABILITY
}  // namespace CPU_CAPABILITY
#endif
}  // namespace ikem_fast::math
