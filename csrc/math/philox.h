// Philox4x32-10: random numbers as a function of a counter and a key (Salmon, Moraes, Dror and Shaw, "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011), for host and device. Nothing is kept between calls, so that any number of a
// run can be had at any time, on any device, in any order.
#pragma once

#include <cstdint>

#include "math/vector3.h"

namespace ikem_fast::math {
#ifdef CPU_CAPABILITY
inline namespace CPU_CAPABILITY {
#endif

struct RandomWords {
  uint32_t words[4];
};

IKEM_HOST_DEVICE RandomWords philox(RandomWords counter, uint64_t seed) {
  uint32_t first_key = static_cast<uint32_t>(seed);
  uint32_t second_key = static_cast<uint32_t>(seed >> 32);
  uint32_t* c = counter.words;
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53u} * c[0];
    const uint64_t second = uint64_t{0xCD9E8D57u} * c[2];
    c[0] = static_cast<uint32_t>(second >> 32) ^ c[1] ^ first_key;
    c[1] = static_cast<uint32_t>(second);
    c[2] = static_cast<uint32_t>(first >> 32) ^ c[3] ^ second_key;
    c[3] = static_cast<uint32_t>(first);
    first_key += 0x9E3779B9u;
    second_key += 0xBB67AE85u;
  }
  return counter;
}

// The random words of one view of one sample in one epoch: four for each draw. Draws of augmentation are 0, 1, 2;
// whatever else wants random numbers of a sample takes draws from 16 on.
IKEM_HOST_DEVICE RandomWords random_words(uint64_t seed, uint32_t epoch, uint32_t sample, uint32_t view, uint32_t draw) {
  return philox(RandomWords{{draw, view, sample, epoch}}, seed);
}

// Uniform in low + width [0, 1), in steps of width / 2^24. Rounded after each operation, so that all devices agree.
IKEM_HOST_DEVICE float uniform(uint32_t word, float low, float width) {
  const float fraction = static_cast<float>(word >> 8) * 5.9604644775390625e-8f;  // 2^-24, exact
  return Real<float>::product(fraction, width) + low;
}

// Uniform in 0 ... count - 1; no value is likelier than another by more than count / 2^32 of itself.
IKEM_HOST_DEVICE uint32_t uniform_below(uint32_t word, uint32_t count) {
  return static_cast<uint32_t>((uint64_t{word} * count) >> 32);
}

#ifdef CPU_CAPABILITY
}  // namespace CPU_CAPABILITY
#endif
}  // namespace ikem_fast::math
