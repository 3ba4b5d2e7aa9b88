// Mean and biased variance of every channel of a tensor that a kernel makes tile by tile. Tiles' means and sums of squared
// differences from them are combined, never sums of squares, so that a mean far above the deviation costs no digits.
#pragma once

#include "cuda/block_reduce.h"
#include "cuda/partial_statistics.h"
#include "cuda/tile_product.h"

namespace ikem_fast::cuda {

// Of some values: how many, their mean, and the sum of squares of their differences from it.
struct Moments {
  float count = 0, mean = 0, m2 = 0;
};

// Of two sets of values together (Chan, Golub, LeVeque).
__device__ __forceinline__ Moments join(const Moments& a, const Moments& b) {
  const float count = a.count + b.count, share = count > 0 ? __fdividef(b.count, count) : 0.0f, difference = b.mean - a.mean;
  return {count, fmaf(difference, share, a.mean), fmaf(difference * difference, a.count * share, a.m2 + b.m2)};
}

// The moments of the columns of a warp's accumulators, added up over tiles. Each lane keeps few of the columns.
template <int kM, int kN>
class ColumnMoments {
 public:
  // The first `num_rows` of the 16 kM rows (0 and less: none) count. By all lanes of a warp.
  __device__ __forceinline__ void add(const Accumulators<kM, kN>& tile, int num_rows) {
    float count = 0;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) count += 16 * i + accumulator_row(2 * half) < num_rows ? 1.0f : 0.0f;
    }
    const float inverse = count > 0 ? __fdividef(1.0f, count) : 0.0f;
    float means[2 * kN], m2s[2 * kN];
#pragma unroll
    for (int column = 0; column < 2 * kN; ++column) {
      const auto sum_over_rows = [&](auto term) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kM; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float value = tile[i][column / 2][2 * half + column % 2];
            sum += 16 * i + accumulator_row(2 * half) < num_rows ? term(value) : 0.0f;
          }
        }
        return sum;
      };
      const float mean = sum_over_rows([](float value) { return value; }) * inverse;
      means[column] = mean;
      m2s[column] = sum_over_rows([mean](float value) { return (value - mean) * (value - mean); });
    }
    exchange<2 * kN, 16>(means, m2s, count);
  }

  // Writes the moments of the warp's column n to counts[n], means[n] and m2s[n], for n < num_columns.
  __device__ __forceinline__ void store(float* counts, float* means, float* m2s, int num_columns) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    int first = 0;
    bool is_first_copy = true;
#pragma unroll
    for (int bit = 16, columns = 2 * kN; bit >= 4; bit /= 2, columns = columns % 2 == 0 ? columns / 2 : columns) {
      if (columns % 2 == 0) {
        first += lane & bit ? columns / 2 : 0;
      } else {
        is_first_copy = is_first_copy && !(lane & bit);
      }
    }
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int column = 8 * ((first + k) / 2) + accumulator_column((first + k) % 2);
      if (!is_first_copy || column >= num_columns) continue;
      counts[column] = kept_[k].count;
      means[column] = kept_[k].mean;
      m2s[column] = kept_[k].m2;
    }
  }

 private:
  static constexpr int kept_columns() {
    int columns = 2 * kN;
    for (int bit = 16; bit >= 4; bit /= 2) columns = columns % 2 == 0 ? columns / 2 : columns;
    return columns;
  }
  static constexpr int kKept = kept_columns();

  // The lanes of equal columns share the rows. Two of them, whose numbers differ in kBit, join what they have: each of
  // them half of the columns while there are two halves, and both the same after that.
  template <int kColumns, int kBit>
  __device__ __forceinline__ void exchange(float (&means)[2 * kN], float (&m2s)[2 * kN], float count) {
    if constexpr (kBit < 4) {
#pragma unroll
      for (int k = 0; k < kKept; ++k) kept_[k] = join(kept_[k], {count, means[k], m2s[k]});
    } else {
      constexpr bool kSplits = kColumns % 2 == 0;
      constexpr int kLeft = kSplits ? kColumns / 2 : kColumns;
      const bool takes_second = kSplits && threadIdx.x % 32 & kBit;
      const float other_count = __shfl_xor_sync(kAllLanes, count, kBit);
      const float both = count + other_count, share = both > 0 ? __fdividef(other_count, both) : 0.0f, weight = count * share;
#pragma unroll
      for (int k = 0; k < kLeft; ++k) {
        const int second = kSplits ? k + kLeft : k;
        const float own_mean = takes_second ? means[second] : means[k], own_m2 = takes_second ? m2s[second] : m2s[k];
        const float given_mean = takes_second ? means[k] : means[second];
        const float given_m2 = takes_second ? m2s[k] : m2s[second];
        const float mean = __shfl_xor_sync(kAllLanes, given_mean, kBit);
        const float difference = mean - own_mean;
        m2s[k] = fmaf(difference * difference, weight, own_m2 + __shfl_xor_sync(kAllLanes, given_m2, kBit));
        means[k] = fmaf(difference, share, own_mean);
      }
      exchange<kLeft, kBit / 2>(means, m2s, both);
    }
  }

  Moments kept_[kKept];
};

}  // namespace ikem_fast::cuda
