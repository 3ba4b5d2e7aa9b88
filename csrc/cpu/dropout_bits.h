// The mask of dropout as bits, made for a whole tile of values at once. Include it only in sources of csrc/cpu.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>

#include "math/dropout_mask.h"

namespace ikem_fast::cpu::CPU_CAPABILITY {

struct Dropout {
  static constexpr int kRounds = 10;

  Dropout(uint64_t seed, uint32_t layer, uint32_t stream, uint32_t threshold)
      : seed(seed), layer(layer), stream(stream), threshold(threshold) {
    uint32_t first_key = static_cast<uint32_t>(seed), second_key = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; ++round) {
      first_keys[round] = first_key;
      second_keys[round] = second_key;
      first_key += 0x9E3779B9u;
      second_key += 0xBB67AE85u;
    }
  }

  uint64_t seed;
  uint32_t layer, stream;
  uint32_t threshold;  // math::dropout_threshold
  // Of Philox' rounds, each where a load finds it for all lanes of a register.
  uint64_t first_keys[kRounds], second_keys[kRounds];
};

namespace dropout_detail {

#if defined(CPU_CAPABILITY_AVX512)

constexpr int64_t kCallsAtATime = 32;

struct Philox512 {
  __m512i c0, c1, c2, c3;  // counters, later words, each in the lower half of a 64-bit lane; the rest is anything

  Philox512(const Dropout& dropout, int64_t first_call, __m512i lanes) {
    c0 = _mm512_add_epi64(_mm512_set1_epi64(first_call), lanes);
    c1 = _mm512_srli_epi64(c0, 32);
    c2 = _mm512_set1_epi64(dropout.stream);
    c3 = _mm512_set1_epi64(dropout.layer);
  }
  inline __attribute__((always_inline)) void round(__m512i first_key, __m512i second_key) {
    const __m512i first = _mm512_mul_epu32(c0, _mm512_set1_epi64(0xD2511F53));
    const __m512i second = _mm512_mul_epu32(c2, _mm512_set1_epi64(0xCD9E8D57));
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(second, 32), c1, first_key, 0x96);
    c1 = second;
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(first, 32), c3, second_key, 0x96);
    c3 = first;
  }
  // The eight calls of lanes 0 2 4 6 1 3 5 7 in this order, a bit a half.
  void store(__m512i threshold, uint8_t* bits) const {
    const __m512i low = _mm512_mask_shuffle_epi32(c0, 0xAAAA, c1, _MM_PERM_CCAA);
    const __m512i high = _mm512_mask_shuffle_epi32(c2, 0xAAAA, c3, _MM_PERM_CCAA);
    const uint32_t words[] = {_mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(low, high), threshold),
                              _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(low, high), threshold)};
    std::memcpy(bits, words, sizeof(words));
  }
};

// Several registers at once, since each round waits for the one before.
inline void write_some_bits(const Dropout& dropout, int64_t first_call, uint8_t* bits) {
  const __m512i lanes = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i threshold = _mm512_set1_epi16(static_cast<int16_t>(dropout.threshold));
  Philox512 a(dropout, first_call, lanes), b(dropout, first_call + 8, lanes), c(dropout, first_call + 16, lanes),
      d(dropout, first_call + 24, lanes);
#pragma GCC unroll 10
  for (int round = 0; round < Dropout::kRounds; ++round) {
    const __m512i first = _mm512_set1_epi64(static_cast<int64_t>(dropout.first_keys[round]));
    const __m512i second = _mm512_set1_epi64(static_cast<int64_t>(dropout.second_keys[round]));
    a.round(first, second);
    b.round(first, second);
    c.round(first, second);
    d.round(first, second);
  }
  a.store(threshold, bits);
  b.store(threshold, bits + 8);
  c.store(threshold, bits + 16);
  d.store(threshold, bits + 24);
}

#elif defined(CPU_CAPABILITY_AVX2)

constexpr int64_t kCallsAtATime = 12;

struct Philox256 {
  __m256i c0, c1, c2, c3;  // counters, later words, each in the lower half of a 64-bit lane; the rest is anything

  Philox256(const Dropout& dropout, int64_t first_call) {
    c0 = _mm256_add_epi64(_mm256_set1_epi64x(first_call), _mm256_setr_epi64x(0, 1, 2, 3));
    c1 = _mm256_srli_epi64(c0, 32);
    c2 = _mm256_set1_epi64x(dropout.stream);
    c3 = _mm256_set1_epi64x(dropout.layer);
  }
  inline __attribute__((always_inline)) void round(__m256i first_key, __m256i second_key) {
    const __m256i first = _mm256_mul_epu32(c0, _mm256_set1_epi64x(0xD2511F53));
    const __m256i second = _mm256_mul_epu32(c2, _mm256_set1_epi64x(0xCD9E8D57));
    c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(second, 32), c1), first_key);
    c1 = second;
    c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(first, 32), c3), second_key);
    c3 = first;
  }
  // A byte a call.
  void store(__m256i threshold, uint8_t* bits) const {
    const __m256i low = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
    const __m256i high = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
    const auto kept = [threshold](__m256i halves) {
      return _mm256_cmpeq_epi16(_mm256_max_epu16(halves, threshold), halves);
    };
    // The calls 0 2 and 1 3; their bytes come together within lanes of 128 bits, as 0 1 2 3.
    const __m256i bytes =
        _mm256_packs_epi16(kept(_mm256_unpacklo_epi64(low, high)), kept(_mm256_unpackhi_epi64(low, high)));
    const int word = _mm256_movemask_epi8(bytes);
    std::memcpy(bits, &word, sizeof(word));
  }
};

// Several registers at once, since each round waits for the one before.
inline void write_some_bits(const Dropout& dropout, int64_t first_call, uint8_t* bits) {
  const __m256i threshold = _mm256_set1_epi16(static_cast<int16_t>(dropout.threshold));
  Philox256 a(dropout, first_call), b(dropout, first_call + 4), c(dropout, first_call + 8);
#pragma GCC unroll 10
  for (int round = 0; round < Dropout::kRounds; ++round) {
    const __m256i first = _mm256_set1_epi64x(static_cast<int64_t>(dropout.first_keys[round]));
    const __m256i second = _mm256_set1_epi64x(static_cast<int64_t>(dropout.second_keys[round]));
    a.round(first, second);
    b.round(first, second);
    c.round(first, second);
  }
  a.store(threshold, bits);
  b.store(threshold, bits + 4);
  c.store(threshold, bits + 8);
}

#else

constexpr int64_t kCallsAtATime = 1;

inline void write_some_bits(const Dropout& dropout, int64_t first_call, uint8_t* bits) {
  const math::RandomWords random =
      math::dropout_words(dropout.seed, dropout.layer, dropout.stream, static_cast<uint64_t>(first_call));
  int byte = 0;
  for (int i = 0; i < math::kValuesPerCall; ++i) byte |= math::is_kept(random, i, dropout.threshold) << i;
  *bits = static_cast<uint8_t>(byte);
}

#endif

}  // namespace dropout_detail

// Bytes that write_kept_bits may write for a number of values.
constexpr int64_t kept_bits_size(int64_t count) {
  return count / math::kValuesPerCall + 2 + dropout_detail::kCallsAtATime;
}

// Bit i % 8 of bits[i / 8] = whether value `first` + i of the stream is kept, for `count` values.
inline void write_kept_bits(const Dropout& dropout, int64_t first, int64_t count, uint8_t* bits) {
  const int64_t call = first / math::kValuesPerCall, shift = first % math::kValuesPerCall;
  const int64_t num_calls = (shift + count + math::kValuesPerCall - 1) / math::kValuesPerCall;
  for (int64_t i = 0; i < num_calls; i += dropout_detail::kCallsAtATime) {
    dropout_detail::write_some_bits(dropout, call + i, bits + i);
  }
  if (shift == 0) return;
  bits[num_calls] = 0;
  for (int64_t i = 0; i < num_calls; ++i) {
    bits[i] = static_cast<uint8_t>((bits[i] | bits[i + 1] << 8) >> shift);
  }
}

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
