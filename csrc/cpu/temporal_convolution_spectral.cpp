#include "cpu/temporal_convolution_spectral.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/matrix_product.h"
#include "cpu/workspace.h"

namespace ikem_fast::cpu::CPU_CAPABILITY {

namespace {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kMostOfBlock = 4;  // frequencies, or pairs of frames, of which sums fill the registers
#else
constexpr int kMostOfBlock = 2;
#endif
constexpr int64_t kPanel = 64;            // columns of a right factor that lie together
constexpr int64_t kColumnsAtATime = 256;  // channels of a row whose frames are in the first-level cache

template <typename A>
using Vec = at::vec::Vectorized<A>;

// Channels of a slot: pairs of registers.
template <typename A>
constexpr int64_t padded(int64_t channels) {
  constexpr int64_t kStep = 2 * Vec<A>::size();
  return (channels + kStep - 1) / kStep * kStep;
}

// Memory that is read at steps of a power of 2 meets in few sets of a cache: rows are longer than their channels, ...
template <typename A>
constexpr int64_t row_stride(int64_t channels) {
  return padded<A>(channels) + 2 * Vec<A>::size();
}

// ... and slots an odd number of cache lines.
template <typename X>
constexpr int64_t odd_lines(int64_t numbers) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(X));
  return ((numbers + kLine - 1) / kLine | 1) * kLine;
}

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Numbers side by side in two registers.
template <typename A>
struct Two {
  Vec<A> first, second;
};

template <typename A, typename X>
inline Two<A> load_two(const X* from) {
  if constexpr (std::is_same_v<X, at::BFloat16>) {
    const auto [first, second] = at::vec::convert_to_float<at::BFloat16>(Vec<at::BFloat16>::loadu(from));
    return {first, second};
  } else {
    return {Vec<A>::loadu(from), Vec<A>::loadu(from + Vec<A>::size())};
  }
}

template <typename A, typename X>
inline Two<A> load_part(const X* from, int64_t count) {
  alignas(64) X values[2 * Vec<A>::size()];
  std::fill(std::copy_n(from, count, values), values + 2 * Vec<A>::size(), X(0.0f));
  return load_two<A>(values);
}

// The first of `count` numbers, zeros beyond them.
template <typename A, typename X>
inline Two<A> load(const X* from, int64_t count) {
  return count >= 2 * Vec<A>::size() ? load_two<A>(from) : load_part<A>(from, count);
}

// The rows of a chunk go through many frames at once, too many places for the hardware to notice.
template <typename A, typename X>
inline void fetch_ahead(const X* from) {
  constexpr int64_t kAhead = 512, kLine = 64 / static_cast<int64_t>(sizeof(X));
  for (int64_t i = 0; i < 2 * Vec<A>::size(); i += kLine) {
    __builtin_prefetch(from + kAhead + i);
  }
}

template <typename A>
inline void store(const Two<A>& values, A* to) {
  values.first.store(to);
  values.second.store(to + Vec<A>::size());
}

template <typename A>
inline void store_numbers(int64_t count, const A* from, A* to) {
  std::memcpy(to, from, count * sizeof(A));
}

inline void store_numbers(int64_t count, const float* from, at::BFloat16* to) { round_numbers(count, from, to); }

// Sequences of a given number of points around the circle's zero, in tables of cosines and sines.
//
// "Folded" values are those at the middle (row 0; zeros if there is none), then the sums of pairs at opposite points
// from the inner to the outer, then their differences (later - earlier).
template <typename A>
class Points {
 public:
  Points(int64_t count, int64_t length)
      : count_(count), pairs_(count / 2), frequencies_((length - 1) / 2), inverse_length_(A(1.0 / length)) {
    frequency_block_ = block_of(frequencies_);
    pair_block_ = block_of(pairs_);
    const int64_t frequency_blocks = divide_up(frequencies_, frequency_block_);
    const int64_t pair_blocks = divide_up(pairs_, pair_block_);
    evaluation_.resize(frequency_blocks * pairs_ * 2 * frequency_block_);
    interpolation_.resize(pair_blocks * frequencies_ * 2 * pair_block_);
    for (int64_t f = 0; f < frequencies_; ++f) {
      for (int64_t j = 0; j < pairs_; ++j) {
        const double angle = math::spectral_angle(length, f + 1, count, j);
        A* of_frequencies = evaluation_.data() + (f / frequency_block_ * pairs_ + j) * 2 * frequency_block_;
        of_frequencies[f % frequency_block_] = static_cast<A>(std::cos(angle));
        of_frequencies[frequency_block_ + f % frequency_block_] = static_cast<A>(std::sin(angle));
        A* of_pairs = interpolation_.data() + (j / pair_block_ * frequencies_ + f) * 2 * pair_block_;
        of_pairs[j % pair_block_] = static_cast<A>(2 * std::cos(angle) / length);
        of_pairs[pair_block_ + j % pair_block_] = static_cast<A>(2 * std::sin(angle) / length);
      }
    }
  }

  int64_t count() const { return count_; }
  int64_t pairs() const { return pairs_; }
  bool has_middle() const { return count_ % 2 == 1; }
  int64_t folded_rows() const { return 1 + 2 * pairs_; }
  int64_t earlier(int64_t pair) const { return pairs_ - 1 - pair; }
  int64_t later(int64_t pair) const { return count_ - pairs_ + pair; }
  int64_t middle() const { return pairs_; }

  // store(slot, column, first, second) for all slots and columns 0, step, ..., of which first and second are the
  // registers that the folded values at first + column and second + column, `stride` apart, give.
  template <typename Store>
  inline __attribute__((always_inline)) void evaluate(int64_t columns, int64_t step, const A* first, const A* second,
                                                      int64_t stride, const Store& store) const {
    for (int64_t column = 0; column < columns; column += step) {
      const A *one = first + column, *other = second + column;
      Vec<A> sums[2] = {Vec<A>::loadu(one), Vec<A>::loadu(other)};
      for (int64_t j = 1; j <= pairs_; ++j) {
        sums[0] = sums[0] + Vec<A>::loadu(one + j * stride);
        sums[1] = sums[1] + Vec<A>::loadu(other + j * stride);
      }
      store(0, column, sums[0], sums[1]);
    }
    const auto all_blocks = [&](auto block) __attribute__((always_inline)) {
      constexpr int kBlock = decltype(block)::value;
      const A* table = evaluation_.data();
      for (int64_t f = 0; f < frequencies_; f += kBlock, table += pairs_ * 2 * kBlock) {
        for (int64_t column = 0; column < columns; column += step) {
          evaluate_block<kBlock>(table, first + column, second + column, stride, f, column, store);
        }
      }
    };
    with_block(frequency_block_, all_blocks);
  }

  // The products of a row, (products, columns), become its spectrum: the constant, then real and (negated) imaginary
  // part of each frequency. Those `next` numbers on will be wanted soon.
  void combine(int64_t columns, const A* products, int64_t product_stride, int64_t next, A* spectrum,
               int64_t stride) const {
    for (int64_t column = 0; column < columns; column += Vec<A>::size()) {
      (Vec<A>::loadu(products + column) * Vec<A>(inverse_length_)).store(spectrum + column);
    }
    for (int64_t f = 0; f < frequencies_; ++f) {
      const A* of_frequency = products + (1 + 3 * f) * product_stride;
      A* out = spectrum + (1 + 2 * f) * stride;
      for (int64_t column = 0; column < columns; column += Vec<A>::size()) {
        for (int64_t i = 0; i < 3; ++i) {
          __builtin_prefetch(of_frequency + i * product_stride + next + column);
        }
        const Vec<A> real = Vec<A>::loadu(of_frequency + column);
        const Vec<A> imaginary = Vec<A>::loadu(of_frequency + product_stride + column);
        const Vec<A> both = Vec<A>::loadu(of_frequency + 2 * product_stride + column);
        (real - imaginary).store(out + column);
        (both - real - imaginary).store(out + stride + column);
      }
    }
  }
  int64_t spectrum_rows() const { return 1 + 2 * frequencies_; }

  // The values (count, columns) of a combined spectrum, in reversed order if asked for; columns are whole pairs of
  // registers.
  void interpolate(int64_t columns, const A* spectrum, int64_t stride, bool reversed, A* out,
                   int64_t out_stride) const {
    if (has_middle()) {
      for (int64_t column = 0; column < columns; column += Vec<A>::size()) {
        Vec<A> sum(A(0));
        for (int64_t f = 0; f < frequencies_; ++f) {
          sum = sum + Vec<A>::loadu(spectrum + (1 + 2 * f) * stride + column);
        }
        at::vec::fmadd(sum, Vec<A>(2 * inverse_length_), Vec<A>::loadu(spectrum + column))
            .store(out + middle() * out_stride + column);
      }
    }
    const auto all_blocks = [&](auto block) __attribute__((always_inline)) {
      constexpr int kBlock = decltype(block)::value;
      const A* table = interpolation_.data();
      for (int64_t j = 0; j < pairs_; j += kBlock, table += frequencies_ * 2 * kBlock) {
        for (int64_t column = 0; column < columns; column += 2 * Vec<A>::size()) {
          interpolate_block<kBlock>(table, spectrum + column, stride, j, reversed, out + column, out_stride);
        }
      }
    };
    with_block(pair_block_, all_blocks);
  }

 private:
  // Blocks of equal size, as few as can be.
  static int64_t block_of(int64_t count) {
    return std::max<int64_t>(divide_up(count, std::max<int64_t>(divide_up(count, kMostOfBlock), 1)), 1);
  }

  template <typename Function>
  static inline __attribute__((always_inline)) void with_block(int64_t block, const Function& function) {
    static_assert(kMostOfBlock <= 4);
    if constexpr (kMostOfBlock >= 4) {
      if (block == 4) return function(std::integral_constant<int, 4>{});
      if (block == 3) return function(std::integral_constant<int, 3>{});
    }
    if (block == 2) return function(std::integral_constant<int, 2>{});
    function(std::integral_constant<int, 1>{});
  }

  // As in matrix_product.h, loops over registers are unrolled by demand.
  template <int kBlock, typename Store>
  inline __attribute__((always_inline)) void evaluate_block(const A* table, const A* first, const A* second,
                                                            int64_t stride, int64_t frequency, int64_t column,
                                                            const Store& store) const {
    Vec<A> real[kBlock][2], imaginary[kBlock][2];
    const Vec<A> middle[2] = {Vec<A>::loadu(first), Vec<A>::loadu(second)};
#pragma GCC unroll 8
    for (int f = 0; f < kBlock; ++f) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        real[f][v] = middle[v];
        imaginary[f][v] = Vec<A>(A(0));
      }
    }
    const A *one = first + stride, *other = second + stride;
    for (int64_t j = 0; j < pairs_; ++j, one += stride, other += stride, table += 2 * kBlock) {
      const Vec<A> sum[2] = {Vec<A>::loadu(one), Vec<A>::loadu(other)};
      const Vec<A> difference[2] = {Vec<A>::loadu(one + pairs_ * stride), Vec<A>::loadu(other + pairs_ * stride)};
#pragma GCC unroll 8
      for (int f = 0; f < kBlock; ++f) {
        const Vec<A> cosine(table[f]), sine(table[kBlock + f]);
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          real[f][v] = at::vec::fmadd(cosine, sum[v], real[f][v]);
          imaginary[f][v] = at::vec::fmadd(sine, difference[v], imaginary[f][v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int f = 0; f < kBlock; ++f) {
      if (frequency + f < frequencies_) {
        const int64_t slot = 1 + 3 * (frequency + f);
        store(slot, column, real[f][0], real[f][1]);
        store(slot + 1, column, imaginary[f][0], imaginary[f][1]);
        store(slot + 2, column, real[f][0] + imaginary[f][0], real[f][1] + imaginary[f][1]);
      }
    }
  }

  template <int kBlock>
  inline __attribute__((always_inline)) void interpolate_block(const A* table, const A* spectrum, int64_t stride,
                                                               int64_t pair, bool reversed, A* out,
                                                               int64_t out_stride) const {
    Vec<A> even[kBlock][2], odd[kBlock][2];
    const Two<A> constant = load_two<A>(spectrum);
#pragma GCC unroll 8
    for (int j = 0; j < kBlock; ++j) {
      even[j][0] = constant.first;
      even[j][1] = constant.second;
      odd[j][0] = odd[j][1] = Vec<A>(A(0));
    }
    const A* from = spectrum + stride;
    for (int64_t f = 0; f < frequencies_; ++f, from += 2 * stride, table += 2 * kBlock) {
      const Two<A> real = load_two<A>(from), imaginary = load_two<A>(from + stride);
#pragma GCC unroll 8
      for (int j = 0; j < kBlock; ++j) {
        const Vec<A> cosine(table[j]), sine(table[kBlock + j]);
        even[j][0] = at::vec::fmadd(cosine, real.first, even[j][0]);
        even[j][1] = at::vec::fmadd(cosine, real.second, even[j][1]);
        odd[j][0] = at::vec::fmadd(sine, imaginary.first, odd[j][0]);
        odd[j][1] = at::vec::fmadd(sine, imaginary.second, odd[j][1]);
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kBlock; ++j) {
      if (pair + j < pairs_) {
        const int64_t after = reversed ? earlier(pair + j) : later(pair + j);
        const int64_t before = reversed ? later(pair + j) : earlier(pair + j);
        store(Two<A>{even[j][0] + odd[j][0], even[j][1] + odd[j][1]}, out + after * out_stride);
        store(Two<A>{even[j][0] - odd[j][0], even[j][1] - odd[j][1]}, out + before * out_stride);
      }
    }
  }

  int64_t count_, pairs_, frequencies_, frequency_block_ = 1, pair_block_ = 1;
  A inverse_length_;
  std::vector<A> evaluation_;     // (blocks of frequencies, pairs, [cosines, sines], frequencies of a block)
  std::vector<A> interpolation_;  // (blocks of pairs, frequencies, [cosines, sines], pairs of a block); * 2 / length
};

// Two registers rounded to bfloat16, those of the first before those of the second. ByHardware is std::true_type on
// CPUs with bfloat16 arithmetic, where it takes one instruction.
template <typename ByHardware>
inline Vec<at::BFloat16> round_two(const Vec<float>& first, const Vec<float>& second) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (ByHardware::value) {
    // Its intrinsic could not be inlined into functions that are compiled for every CPU with AVX-512.
    __m512i rounded;
    const __m512 low = first, high = second;
    asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(rounded) : "v"(high), "v"(low));
    return rounded;
  }
#endif
  return at::vec::convert_from_float<at::BFloat16>(first, second);
}

#ifdef CPU_CAPABILITY_AVX512
// Numbers of the first half and the second half in turns.
inline Vec<at::BFloat16> interleave_halves(const Vec<at::BFloat16>& values) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, values);
}
#else
inline Vec<at::BFloat16> interleave_halves(const Vec<at::BFloat16>& values) {
#ifdef CPU_CAPABILITY_AVX2
  const __m256i by_lanes = _mm256_permute4x64_epi64(values, 0xd8);
  return _mm256_unpacklo_epi16(by_lanes, _mm256_srli_si256(by_lanes, 8));
#else
  constexpr int64_t kHalf = Vec<at::BFloat16>::size() / 2;
  at::BFloat16 numbers[2 * kHalf], out[2 * kHalf];
  values.store(numbers);
  for (int64_t i = 0; i < kHalf; ++i) {
    out[2 * i] = numbers[i];
    out[2 * i + 1] = numbers[kHalf + i];
  }
  return Vec<at::BFloat16>::loadu(out);
#endif
}
#endif

// What evaluate() calls to put two registers away: one after the other into a row of each slot, ...
template <typename X, typename A, typename ByHardware>
struct ToRow {
  X* slots;
  int64_t slot_size;
  void operator()(int64_t slot, int64_t column, const Vec<A>& first, const Vec<A>& second) const {
    X* to = slots + slot * slot_size + column;
    if constexpr (std::is_same_v<X, at::BFloat16>) {
      round_two<ByHardware>(first, second).store(to);
    } else {
      store(Two<A>{first, second}, to);
    }
  }
};

// ... or into two rows of a right factor (for bfloat16: in pairs), ...
template <typename X, typename A, typename ByHardware>
struct ToRowPair {
  X* slots;
  int64_t slot_size;
  int64_t stride;  // between rows
  void operator()(int64_t slot, int64_t column, const Vec<A>& first, const Vec<A>& second) const {
    if constexpr (std::is_same_v<X, at::BFloat16>) {
      interleave_halves(round_two<ByHardware>(first, second)).store(slots + slot * slot_size + 2 * column);
    } else {
      first.store(slots + slot * slot_size + column);
      second.store(slots + slot * slot_size + stride + column);
    }
  }
};

// ... or, bfloat16, into two rows of a right factor and two of a left one.
template <typename ByHardware>
struct ToRowPairAndRows {
  at::BFloat16* pairs;
  at::BFloat16* rows;
  int64_t slot_size;  // of both
  int64_t stride;
  void operator()(int64_t slot, int64_t column, const Vec<float>& first, const Vec<float>& second) const {
    const Vec<at::BFloat16> rounded = round_two<ByHardware>(first, second);
    interleave_halves(rounded).store(pairs + slot * slot_size + 2 * column);
    at::BFloat16* to = rows + slot * slot_size + column;
#if defined(CPU_CAPABILITY_AVX512)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(rounded));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + stride), _mm512_extracti64x4_epi64(rounded, 1));
#else
    constexpr int64_t kHalf = Vec<float>::size();
    at::BFloat16 numbers[2 * kHalf];
    rounded.store(numbers);
    std::memcpy(to, numbers, kHalf * sizeof(at::BFloat16));
    std::memcpy(to + stride, numbers + kHalf, kHalf * sizeof(at::BFloat16));
#endif
  }
};

// points.evaluate(..., store_of(by_hardware)), by hardware where values are rounded and the CPU can.
template <typename X, typename A, typename StoreOf>
void evaluate(const Points<A>& points, int64_t columns, int64_t step, const A* first, const A* second, int64_t stride,
              const StoreOf& store_of) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<X, at::BFloat16>) {
    if (matrix_product_detail::has_bfloat16_arithmetic()) {
      return points.evaluate(columns, step, first, second, stride, store_of(std::true_type{}));
    }
  }
#endif
  points.evaluate(columns, step, first, second, stride, store_of(std::false_type{}));
}

// Coefficients of channels with zeros up to whole pairs of registers; all 0 where there are none.
template <typename A>
class Coefficients {
 public:
  explicit Coefficients(int64_t channels) : channels_(channels), values_(padded<A>(channels), A(0)) {}
  void load(const void* all, int64_t stream) {
    if (all != nullptr) {
      std::copy_n(static_cast<const A*>(all) + stream * channels_, channels_, values_.data());
    }
  }
  A& operator[](int64_t channel) { return values_[channel]; }
  const A* data() const { return values_.data(); }
  int64_t size() const { return static_cast<int64_t>(values_.size()); }

 private:
  int64_t channels_;
  std::vector<A> values_;
};

// A frame of h = relu(scale x + shift), or of x.
template <typename X, typename A, bool kActivated>
struct SignalFrame {
  const X* x;
  const A* scale;
  const A* shift;
  Two<A> at(int64_t column, int64_t count) const {
    fetch_ahead<A>(x + column);
    const Two<A> values = load<A>(x + column, count);
    if constexpr (!kActivated) {
      return values;
    } else {
      const Two<A> factor = load_two<A>(scale + column), summand = load_two<A>(shift + column);
      const Vec<A> zero(A(0));
      return {at::vec::clamp_min(at::vec::fmadd(factor.first, values.first, summand.first), zero),
              at::vec::clamp_min(at::vec::fmadd(factor.second, values.second, summand.second), zero)};
    }
  }
};

// A frame of the gradient that reaches y: y_gradient + constant + factor (y - mean).
template <typename X, typename A, bool kWithY>
struct TotalFrame {
  const X* y_gradient;
  const X* y;
  const A* constant;
  const A* factor;
  const A* mean;
  Two<A> at(int64_t column, int64_t count) const {
    fetch_ahead<A>(y_gradient + column);
    const Two<A> gradient = load<A>(y_gradient + column, count), summand = load_two<A>(constant + column);
    Two<A> sum{gradient.first + summand.first, gradient.second + summand.second};
    if constexpr (kWithY) {
      fetch_ahead<A>(y + column);
      const Two<A> values = load<A>(y + column, count), centre = load_two<A>(mean + column),
                   slope = load_two<A>(factor + column);
      sum.first = at::vec::fmadd(slope.first, values.first - centre.first, sum.first);
      sum.second = at::vec::fmadd(slope.second, values.second - centre.second, sum.second);
    }
    return sum;
  }
};

// The frames of a row, given by frame_of(point) and there if is_there(point), folded as Points wants them; reversed in
// time if asked for.
template <typename A, typename FrameOf, typename IsThere>
inline void fold(const Points<A>& points, int64_t columns, bool reversed, const FrameOf& frame_of,
                 const IsThere& is_there, A* out, int64_t stride) {
  const Two<A> zeros{Vec<A>(A(0)), Vec<A>(A(0))};
  constexpr int64_t kStep = 2 * Vec<A>::size();
  if (points.has_middle() && is_there(points.middle())) {
    const auto frame = frame_of(points.middle());
    for (int64_t column = 0; column < columns; column += kStep) {
      store(frame.at(column, columns - column), out + column);
    }
  } else {
    std::fill_n(out, padded<A>(columns), A(0));
  }
  for (int64_t j = 0; j < points.pairs(); ++j) {
    const int64_t first = reversed ? points.later(j) : points.earlier(j);
    const int64_t second = reversed ? points.earlier(j) : points.later(j);
    A* sums = out + (1 + j) * stride;
    A* differences = out + (1 + points.pairs() + j) * stride;
    const auto write = [&](auto has_first, auto has_second) __attribute__((always_inline)) {
      const auto one = frame_of(decltype(has_first)::value ? first : second);
      const auto other = frame_of(decltype(has_second)::value ? second : first);
      for (int64_t column = 0; column < columns; column += kStep) {
        Two<A> a = zeros, b = zeros;
        if constexpr (decltype(has_first)::value) a = one.at(column, columns - column);
        if constexpr (decltype(has_second)::value) b = other.at(column, columns - column);
        store(Two<A>{a.first + b.first, a.second + b.second}, sums + column);
        store(Two<A>{b.first - a.first, b.second - a.second}, differences + column);
      }
    };
    if (is_there(first)) {
      is_there(second) ? write(std::true_type{}, std::true_type{}) : write(std::true_type{}, std::false_type{});
    } else if (is_there(second)) {
      write(std::false_type{}, std::true_type{});
    } else {
      std::fill_n(sums, padded<A>(columns), A(0));
      std::fill_n(differences, padded<A>(columns), A(0));
    }
  }
}

// Where the right factors of a stream's products are: slot after slot of panels of columns, each (inner, width).
template <typename X, typename A>
struct PackedWeights {
  PackedWeights(const SpectralConvolution& p, bool backward)
      : inner(backward ? p.out_channels : p.in_channels),
        rows(paired_rows(inner)),
        columns(backward ? p.in_channels : p.out_channels),
        width(padded<A>(columns)),
        slot_size(odd_lines<X>(rows * width)) {}

  int64_t panel_width(int64_t column) const { return std::min(kPanel, width - column); }
  // slots (rows, stride) = left (rows, inner) times a slot's right factor.
  void multiply_left(int64_t num_rows, const X* left, int64_t lda, const X* slot, A* out, int64_t ldc) const {
    for (int64_t column = 0; column < width; column += kPanel) {
      multiply(num_rows, panel_width(column), inner, left, lda, slot + column * rows, panel_width(column),
               out + column, ldc, false);
    }
  }

  int64_t inner, rows, columns, width, slot_size;
};

template <typename X, typename A>
void pack(const SpectralConvolution& p, bool backward, int64_t stream, int64_t first_part, int64_t last_part) {
  constexpr int64_t kLanes = Vec<A>::size();
  constexpr int64_t kNumbers = std::is_same_v<X, at::BFloat16> ? 2 : 1;  // of a column that lie together
  const PackedWeights<X, A> layout(p, backward);
  const Points<A> taps(p.taps, p.plan.length);
  const A* weight = static_cast<const A*>(p.weight) + stream * p.out_channels * p.in_channels * p.taps;
  X* slots = static_cast<X*>(p.packed) + (stream - p.first_stream) * p.plan.products() * layout.slot_size;
  const int64_t fold_size = taps.folded_rows() * kLanes, row_size = p.taps * kLanes;
  // The taps of a block of rows and columns, as vectors of columns (rows, taps, kLanes).
  std::vector<A> by_inputs(kLanes * row_size), by_outputs(backward ? kLanes * row_size : 0), folded(2 * fold_size);
  for (int64_t part = first_part; part < last_part; ++part) {
    const int64_t column = part * kLanes, panel = column / kPanel * kPanel;
    const int64_t width = layout.panel_width(panel);
    for (int64_t block = 0; block < layout.rows; block += kLanes) {
      const int64_t input = backward ? column : block, output = backward ? block : column;
      const int64_t inputs = std::clamp<int64_t>(p.in_channels - input, 0, kLanes);
      const int64_t outputs = std::clamp<int64_t>(p.out_channels - output, 0, kLanes);
      if (inputs < kLanes || outputs < kLanes) {
        std::fill(by_inputs.begin(), by_inputs.end(), A(0));
      }
      transpose_words<sizeof(A)>(outputs, inputs * p.taps, weight + (output * p.in_channels + input) * p.taps,
                                 p.in_channels * p.taps, by_inputs.data(), kLanes);
      for (int64_t k = 0; backward && k < p.taps; ++k) {
        transpose_words<sizeof(A)>(kLanes, kLanes, by_inputs.data() + k * kLanes, row_size,
                                   by_outputs.data() + k * kLanes, row_size);
      }
      const A* vectors = backward ? by_outputs.data() : by_inputs.data();
      for (int64_t row = 0; row < std::min(kLanes, layout.rows - block); row += 2) {
        for (int64_t r = 0; r < 2; ++r) {
          const A* numbers = vectors + (row + r) * row_size;
          A* out = folded.data() + r * fold_size;
          // The taps come in the other order.
          Vec<A>::loadu(numbers + taps.middle() * kLanes).store(out);
          for (int64_t j = 0; j < taps.pairs(); ++j) {
            const Vec<A> earlier = Vec<A>::loadu(numbers + taps.earlier(j) * kLanes);
            const Vec<A> later = Vec<A>::loadu(numbers + taps.later(j) * kLanes);
            (earlier + later).store(out + (1 + j) * kLanes);
            (earlier - later).store(out + (1 + taps.pairs() + j) * kLanes);
          }
        }
        X* to = slots + panel * layout.rows + (block + row) * width + kNumbers * (column - panel);
        evaluate<X>(taps, kLanes, kLanes, folded.data(), folded.data() + fold_size, kLanes, [&](auto by_hardware) {
          return ToRowPair<X, A, decltype(by_hardware)>{to, layout.slot_size, width};
        });
      }
    }
  }
}

// Whether products are the library's (matrix_product.h).
template <typename X>
bool has_matrix_tiles() {
  return std::is_same_v<X, at::BFloat16> && at::native::cpublas::could_pack(at::kBFloat16);
}

template <typename X>
void release_matrix_tiles() {
  if (has_matrix_tiles<X>()) {
    at::native::cpublas::brgemm_release(/*is_vnni=*/true);
  }
}

// ---- the passes

// What both passes share: where the rows of a chunk are.
template <typename X, typename A>
class Chunks {
 public:
  explicit Chunks(const SpectralConvolution& p)
      : c_(p),
        tiles_(p.plan.tiles(p.frames)),
        in_stride_(row_stride<A>(p.in_channels)),
        out_stride_(row_stride<A>(p.out_channels)) {}

 protected:
  struct Row {
    int64_t sequence, joint;
    int64_t frame;  // the tile's first
  };
  Row find_row(int64_t row) const {
    return {row / c_.joints / tiles_, row % c_.joints, row / c_.joints % tiles_ * c_.plan.tile};
  }
  int64_t rows_of(int64_t chunk) const { return std::min(c_.chunk_rows, c_.rows - chunk * c_.chunk_rows); }
  // Where the channels of a row's frame begin; frames are counted from the sequence's first.
  int64_t offset(int64_t stream, const Row& row, int64_t frame, int64_t channels) const {
    return (((stream * c_.sequences + row.sequence) * c_.frames + frame) * c_.joints + row.joint) * channels;
  }
  bool is_there(int64_t frame) const { return frame >= 0 && frame < c_.frames; }
  int64_t frames_of(const Row& row) const { return std::min(c_.plan.tile, c_.frames - row.frame); }

  // h of `points` frames from first_frame on.
  void fold_signal(const Points<A>& points, int64_t stream, const Row& row, int64_t first_frame, int64_t column,
                   int64_t columns, const A* scale, const A* shift, A* out) const {
    const X* x = static_cast<const X*>(c_.x) + column;
    const auto there = [&](int64_t point) { return is_there(first_frame + point); };
    const auto at = [&](int64_t point) { return x + offset(stream, row, first_frame + point, c_.in_channels); };
    if (c_.scale != nullptr) {
      fold(
          points, columns, false,
          [&](int64_t point) { return SignalFrame<X, A, true>{at(point), scale + column, shift + column}; }, there, out,
          kColumnsAtATime);
    } else {
      fold(
          points, columns, false,
          [&](int64_t point) { return SignalFrame<X, A, false>{at(point), nullptr, nullptr}; }, there, out,
          kColumnsAtATime);
    }
  }

  const SpectralConvolution& c_;
  const int64_t tiles_, in_stride_, out_stride_;
};

template <typename X, typename A>
class Forward : Chunks<X, A> {
  using Base = Chunks<X, A>;
  using typename Base::Row;
  using Base::in_stride_, Base::out_stride_;

 public:
  explicit Forward(const SpectralForward& p)
      : Base(p),
        p_(p),
        window_(p.plan.window, p.plan.length),
        tile_(p.plan.tile, p.plan.length),
        weights_(p, false),
        in_slot_(odd_lines<X>(p.chunk_rows * in_stride_)),
        out_slot_(odd_lines<A>(p.chunk_rows * out_stride_)),
        scale_(p.in_channels),
        shift_(p.in_channels),
        bias_(p.out_channels),
        output_scale_(p.out_channels),
        output_shift_(p.out_channels),
        pivot_(p.out_channels),
        sum_(p.out_channels),
        square_sum_(p.out_channels),
        signal_(p.plan.products() * in_slot_),
        results_(p.plan.products() * out_slot_),
        folded_(window_.folded_rows() * kColumnsAtATime),
        spectrum_(tile_.spectrum_rows() * kColumnsAtATime),
        values_(p.plan.tile * kColumnsAtATime) {}

  void load_stream(int64_t stream) {
    stream_ = stream;
    scale_.load(p_.scale, stream);
    shift_.load(p_.shift, stream);
    bias_.load(p_.bias, stream);
    output_scale_.load(p_.output_scale, stream);
    output_shift_.load(p_.output_shift, stream);
  }

  void run(int64_t chunk) {
    const int64_t rows = this->rows_of(chunk), first = chunk * p_.chunk_rows;
    for (int64_t row = 0; row < rows; ++row) {
      transform(this->find_row(first + row), row);
    }
    const X* packed = static_cast<const X*>(p_.packed) +
                      (stream_ - p_.first_stream) * p_.plan.products() * weights_.slot_size;
    for (int64_t slot = 0; slot < p_.plan.products(); ++slot) {
      weights_.multiply_left(rows, signal_.data() + slot * in_slot_, in_stride_, packed + slot * weights_.slot_size,
                             results_.data() + slot * out_slot_, out_stride_);
    }
    for (int64_t row = 0; row < rows; ++row) {
      transform_back(this->find_row(first + row), row);
    }
    if (p_.mean != nullptr) {
      finish_statistics(chunk);
    }
  }

 private:
  void transform(const Row& row, int64_t index) {
    for (int64_t column = 0; column < p_.in_channels; column += kColumnsAtATime) {
      const int64_t columns = std::min(kColumnsAtATime, p_.in_channels - column);
      this->fold_signal(window_, stream_, row, row.frame - p_.plan.before(), column, columns, scale_.data(),
                        shift_.data(), folded_.data());
      X* to = signal_.data() + index * in_stride_ + column;
      evaluate<X>(window_, padded<A>(columns), 2 * Vec<A>::size(), folded_.data(), folded_.data() + Vec<A>::size(),
                  kColumnsAtATime,
                  [&](auto by_hardware) { return ToRow<X, A, decltype(by_hardware)>{to, in_slot_}; });
    }
  }

  void transform_back(const Row& row, int64_t index) {
    for (int64_t column = 0; column < p_.out_channels; column += kColumnsAtATime) {
      const int64_t columns = std::min(kColumnsAtATime, p_.out_channels - column);
      const int64_t width = padded<A>(columns);
      tile_.combine(width, results_.data() + index * out_stride_ + column, out_slot_, out_stride_,
                    spectrum_.data(), kColumnsAtATime);
      tile_.interpolate(width, spectrum_.data(), kColumnsAtATime, false, values_.data(), kColumnsAtATime);
      const int64_t frames = this->frames_of(row);
      if (p_.mean != nullptr) {
        add_bias<true>(frames, column, width, index == 0);
      } else {
        add_bias<false>(frames, column, width, false);
      }
      for (int64_t frame = 0; frame < frames; ++frame) {
        const int64_t at = this->offset(stream_, row, row.frame + frame, p_.out_channels) + column;
        A* values = values_.data() + frame * kColumnsAtATime;
        if (p_.output_scale != nullptr) {
          activate(columns, column, values, p_.residual ? static_cast<const X*>(p_.residual) + at : nullptr);
        }
        store_numbers(columns, values, static_cast<X*>(p_.y) + at);
      }
    }
  }

  // Sums of deviations from the mean of the chunk's first row, so that a large mean takes no digits.
  template <bool kStatistics>
  void add_bias(int64_t frames, int64_t first_column, int64_t width, bool is_first) {
    const Vec<A> zero(A(0));
    for (int64_t column = 0; column < width; column += Vec<A>::size()) {
      const int64_t channel = first_column + column;
      const Vec<A> bias = Vec<A>::loadu(bias_.data() + channel);
      A* values = values_.data() + column;
      if constexpr (kStatistics) {
        if (is_first) {
          Vec<A> sum = zero;
          for (int64_t frame = 0; frame < frames; ++frame) {
            sum = sum + Vec<A>::loadu(values + frame * kColumnsAtATime);
          }
          at::vec::fmadd(sum, Vec<A>(A(1) / static_cast<A>(frames)), bias).store(&pivot_[channel]);
          zero.store(&sum_[channel]);
          zero.store(&square_sum_[channel]);
        }
        const Vec<A> pivot = Vec<A>::loadu(&pivot_[channel]);
        Vec<A> sum = zero, squares = zero;
        for (int64_t frame = 0; frame < frames; ++frame, values += kColumnsAtATime) {
          const Vec<A> value = Vec<A>::loadu(values) + bias;
          value.store(values);
          const Vec<A> deviation = value - pivot;
          sum = sum + deviation;
          squares = at::vec::fmadd(deviation, deviation, squares);
        }
        (Vec<A>::loadu(&sum_[channel]) + sum).store(&sum_[channel]);
        (Vec<A>::loadu(&square_sum_[channel]) + squares).store(&square_sum_[channel]);
      } else {
        for (int64_t frame = 0; frame < frames; ++frame, values += kColumnsAtATime) {
          (Vec<A>::loadu(values) + bias).store(values);
        }
      }
    }
  }

  void activate(int64_t columns, int64_t first_column, A* values, const X* residual) {
    const Vec<A> zero(A(0));
    for (int64_t column = 0; column < columns; column += 2 * Vec<A>::size()) {
      const Two<A> y = load_two<A>(values + column);
      const Two<A> factor = load_two<A>(output_scale_.data() + first_column + column);
      Two<A> summand = load_two<A>(output_shift_.data() + first_column + column);
      if (residual != nullptr) {
        const Two<A> more = load<A>(residual + column, columns - column);
        summand = {summand.first + more.first, summand.second + more.second};
      }
      store(Two<A>{at::vec::clamp_min(at::vec::fmadd(factor.first, y.first, summand.first), zero),
                   at::vec::clamp_min(at::vec::fmadd(factor.second, y.second, summand.second), zero)},
            values + column);
    }
  }

  void finish_statistics(int64_t chunk) {
    const double count = static_cast<double>(spectral_chunk_values(p_, chunk));
    const int64_t at = ((stream_ * p_.chunks) + chunk) * p_.out_channels;
    for (int64_t channel = 0; channel < p_.out_channels; ++channel) {
      const double sum = sum_[channel];
      p_.mean[at + channel] = pivot_[channel] + sum / count;
      p_.deviation[at + channel] = square_sum_[channel] - sum * sum / count;
    }
  }

  const SpectralForward& p_;
  const Points<A> window_, tile_;
  const PackedWeights<X, A> weights_;
  const int64_t in_slot_, out_slot_;
  int64_t stream_ = 0;
  Coefficients<A> scale_, shift_, bias_, output_scale_, output_shift_, pivot_, sum_, square_sum_;
  Workspace<X> signal_;                      // (products, rows, channels)
  Workspace<A> results_;                     // likewise
  Workspace<A> folded_, spectrum_, values_;  // of one row
};

template <typename X, typename A>
class Backward : Chunks<X, A> {
  using Base = Chunks<X, A>;
  using typename Base::Row;
  using Base::in_stride_, Base::out_stride_;
  static constexpr bool kPaired = std::is_same_v<X, at::BFloat16>;
  static constexpr int64_t kNumbers = kPaired ? 2 : 1;  // of a column that lie together

 public:
  explicit Backward(const SpectralBackward& p)
      : Base(p),
        p_(p),
        window_(p.plan.window, p.plan.length),
        tile_(p.plan.tile, p.plan.length),
        taps_(p.taps, p.plan.length),
        weights_(p, true),
        rows_(paired_rows(p.chunk_rows)),
        in_slot_(odd_lines<A>(rows_ * in_stride_)),
        out_slot_(odd_lines<X>(rows_ * out_stride_)),
        weight_slot_(odd_lines<A>(p.in_channels * padded<A>(p.out_channels))),
        with_signal_gradient_(p.x_gradient != nullptr || p.scale_sums != nullptr),
        scale_(p.in_channels),
        shift_(p.in_channels),
        constant_(p.out_channels),
        factor_(p.out_channels),
        mean_(p.out_channels),
        bias_sum_(p.out_channels),
        scale_sum_(p.in_channels),
        shift_sum_(p.in_channels),
        memory_(p.plan.products() * in_slot_),
        total_(kPaired ? p.plan.products() * out_slot_ : 0),
        total_as_right_(p.plan.products() * out_slot_),
        weight_sums_(p.plan.products() * weight_slot_),
        folded_(2 * std::max(window_.folded_rows(), tile_.folded_rows()) * kColumnsAtATime),
        spectrum_(tile_.spectrum_rows() * kColumnsAtATime),
        values_(p.plan.tile * kColumnsAtATime) {}

  void load_stream(int64_t stream) {
    stream_ = stream;
    is_first_chunk_ = true;
    scale_.load(p_.scale, stream);
    shift_.load(p_.shift, stream);
    mean_.load(p_.mean, stream);
    constant_.load(p_.mean_gradient, stream);
    factor_.load(p_.variance_gradient, stream);
    const A count = static_cast<A>(p_.sequences * p_.frames * p_.joints);
    for (int64_t channel = 0; channel < p_.out_channels; ++channel) {
      constant_[channel] /= count;
      factor_[channel] *= 2 / count;
    }
  }

  void run(int64_t chunk) {
    const int64_t rows = this->rows_of(chunk), first = chunk * p_.chunk_rows;
    clear(bias_sum_);
    clear(scale_sum_);
    clear(shift_sum_);
    for (int64_t row = 0; row < rows; row += 2) {
      transform(first + row, row, std::min<int64_t>(rows - row, 2));
    }
    const X* packed = static_cast<const X*>(p_.packed) +
                      (stream_ - p_.first_stream) * p_.plan.products() * weights_.slot_size;
    for (int64_t slot = 0; slot < p_.plan.products(); ++slot) {
      multiply_slot(rows, slot, packed + slot * weights_.slot_size);
    }
    is_first_chunk_ = false;
    if (with_signal_gradient_) {
      for (int64_t row = 0; row < rows; ++row) {
        transform_back(this->find_row(first + row), row);
      }
    }
    put(bias_sum_, p_.bias_sums, chunk, p_.out_channels);
    put(scale_sum_, p_.scale_sums, chunk, p_.in_channels);
    put(shift_sum_, p_.shift_sums, chunk, p_.in_channels);
  }

  // Of the chunks since load_stream.
  void finish_weights(A* gradient) {
    constexpr int64_t kColumns = 2 * Vec<A>::size();
    std::vector<A> spectrum(taps_.spectrum_rows() * kColumns), values(p_.taps * kColumns);
    for (int64_t column = 0; column < p_.out_channels; column += kColumns) {
      const int64_t count = std::min(kColumns, p_.out_channels - column);
      for (int64_t row = 0; row < p_.in_channels; ++row) {
        taps_.combine(kColumns, weight_sums_.data() + weight_offset(row, column), weight_slot_, panel_width(column),
                      spectrum.data(), kColumns);
        taps_.interpolate(kColumns, spectrum.data(), kColumns, false, values.data(), kColumns);
        for (int64_t lane = 0; lane < count; ++lane) {
          A* out = gradient + ((column + lane) * p_.in_channels + row) * p_.taps;
          for (int64_t k = 0; k < p_.taps; ++k) {
            out[k] = values[k * kColumns + lane];
          }
        }
      }
    }
  }

 private:
  // Sums for the weights are in panels of columns, too, (in_channels, width) each.
  int64_t panel_width(int64_t column) const {
    return std::min(kPanel, padded<A>(p_.out_channels) - column / kPanel * kPanel);
  }
  int64_t weight_offset(int64_t row, int64_t column) const {
    return column / kPanel * kPanel * p_.in_channels + row * panel_width(column) + column % kPanel;
  }

  static void clear(Coefficients<A>& values) {
    for (int64_t i = 0; i < values.size(); ++i) {
      values[i] = A(0);
    }
  }
  void put(Coefficients<A>& sums, double* to, int64_t chunk, int64_t channels) const {
    for (int64_t channel = 0; to != nullptr && channel < channels; ++channel) {
      to[(stream_ * p_.chunks + chunk) * channels + channel] = sums[channel];
    }
  }

  void fold_total(const Row& row, int64_t column, int64_t columns, A* out) {
    const int64_t first_frame = row.frame - p_.plan.before();
    const X* y_gradient = static_cast<const X*>(p_.y_gradient) + column;
    const X* y = static_cast<const X*>(p_.y) + column;
    const auto there = [&](int64_t point) { return this->is_there(first_frame + point); };
    const auto at = [&](int64_t point) { return this->offset(stream_, row, first_frame + point, p_.out_channels); };
    const auto run = [&](auto with_y) {
      fold(
          window_, columns, true,
          [&](int64_t point) {
            return TotalFrame<X, A, decltype(with_y)::value>{y_gradient + at(point), y + at(point),
                                                             constant_.data() + column, factor_.data() + column,
                                                             mean_.data() + column};
          },
          there, out, kColumnsAtATime);
    };
    p_.variance_gradient != nullptr ? run(std::true_type{}) : run(std::false_type{});
    // The tile's frames are the innermost pairs.
    for (int64_t i = 0; i < padded<A>(columns); i += Vec<A>::size()) {
      Vec<A> sum = Vec<A>::loadu(out + i);
      for (int64_t j = 1; j <= p_.plan.tile / 2; ++j) {
        sum = sum + Vec<A>::loadu(out + j * kColumnsAtATime + i);
      }
      A* total = &bias_sum_[column + i];
      (Vec<A>::loadu(total) + sum).store(total);
    }
  }

  // Two rows, or one with zeros in place of the second.
  void transform(int64_t row, int64_t index, int64_t count) {
    const int64_t fold_size = std::max(window_.folded_rows(), tile_.folded_rows()) * kColumnsAtATime;
    A* second = folded_.data() + fold_size;
    if (count < 2) {
      std::fill_n(second, fold_size, A(0));
    }
    for (int64_t column = 0; column < p_.in_channels; column += kColumnsAtATime) {
      const int64_t columns = std::min(kColumnsAtATime, p_.in_channels - column);
      for (int64_t i = 0; i < count; ++i) {
        const Row at = this->find_row(row + i);
        this->fold_signal(tile_, stream_, at, at.frame, column, columns, scale_.data(), shift_.data(),
                          folded_.data() + i * fold_size);
      }
      X* to = signal(0) + index * in_stride_ + kNumbers * column;
      evaluate<X>(tile_, padded<A>(columns), Vec<A>::size(), folded_.data(), second, kColumnsAtATime,
                  [&](auto by_hardware) {
                    return ToRowPair<X, A, decltype(by_hardware)>{to, signal(1) - signal(0), in_stride_};
                  });
    }
    for (int64_t column = 0; column < p_.out_channels; column += kColumnsAtATime) {
      const int64_t columns = std::min(kColumnsAtATime, p_.out_channels - column);
      for (int64_t i = 0; i < count; ++i) {
        fold_total(this->find_row(row + i), column, columns, folded_.data() + i * fold_size);
      }
      X* right = total_as_right_.data() + index * out_stride_ + kNumbers * column;
      X* left = total_.data() + index * out_stride_ + column;
      evaluate<X>(window_, padded<A>(columns), Vec<A>::size(), folded_.data(), second, kColumnsAtATime,
                  [&](auto by_hardware) {
                    if constexpr (kPaired) {
                      return ToRowPairAndRows<decltype(by_hardware)>{right, left, out_slot_, out_stride_};
                    } else {
                      return ToRowPair<X, A, decltype(by_hardware)>{right, out_slot_, out_stride_};
                    }
                  });
    }
  }

  // Adds signal^T total to the sums for the weights, and puts total weight^T where the signal was.
  void multiply_slot(int64_t rows, int64_t slot, const X* packed) {
    const X* right = total_as_right_.data() + slot * out_slot_;
    for (int64_t column = 0; column < padded<A>(p_.out_channels); column += kPanel) {
      const int64_t width = panel_width(column);
      multiply_transposed(
          p_.in_channels, width, rows, signal(slot), in_stride_, right + kNumbers * column, out_stride_,
          weight_sums_.data() + slot * weight_slot_ + column * p_.in_channels, width, !is_first_chunk_);
    }
    if (with_signal_gradient_) {
      weights_.multiply_left(rows, kPaired ? total_.data() + slot * out_slot_ : right, out_stride_, packed,
                             gradients(slot), in_stride_);
    }
  }

  void transform_back(const Row& row, int64_t index) {
    for (int64_t column = 0; column < p_.in_channels; column += kColumnsAtATime) {
      const int64_t columns = std::min(kColumnsAtATime, p_.in_channels - column);
      const int64_t width = padded<A>(columns);
      tile_.combine(width, gradients(0) + index * in_stride_ + column, gradients(1) - gradients(0), in_stride_,
                    spectrum_.data(), kColumnsAtATime);
      tile_.interpolate(width, spectrum_.data(), kColumnsAtATime, true, values_.data(), kColumnsAtATime);
      const int64_t frames = this->frames_of(row);
      if (p_.scale != nullptr) {
        const X* x = static_cast<const X*>(p_.x) + this->offset(stream_, row, row.frame, p_.in_channels) + column;
        for (int64_t i = 0; i < columns; i += 2 * Vec<A>::size()) {
          mask(frames, x + i, columns - i, column + i, values_.data() + i);
        }
      }
      for (int64_t frame = 0; frame < frames && p_.x_gradient != nullptr; ++frame) {
        const int64_t at = this->offset(stream_, row, row.frame + frame, p_.in_channels) + column;
        store_numbers(columns, values_.data() + frame * kColumnsAtATime, static_cast<X*>(p_.x_gradient) + at);
      }
    }
  }

  // The gradient of h of some channels becomes that of x; its sums for scale and shift are added up.
  void mask(int64_t frames, const X* x, int64_t count, int64_t channel, A* values) {
    const Two<A> scale = load_two<A>(scale_.data() + channel), shift = load_two<A>(shift_.data() + channel);
    Two<A> scale_sum = load_two<A>(&scale_sum_[channel]), shift_sum = load_two<A>(&shift_sum_[channel]);
    const Vec<A> zero(A(0));
    const auto one = [&](const Vec<A>& x, const Vec<A>& scale, const Vec<A>& shift, Vec<A>& scale_sum,
                         Vec<A>& shift_sum, const Vec<A>& gradient) __attribute__((always_inline)) {
      const Vec<A> masked = Vec<A>::blendv(gradient, zero, at::vec::fmadd(scale, x, shift) <= zero);
      shift_sum = shift_sum + masked;
      scale_sum = at::vec::fmadd(masked, x, scale_sum);
      return scale * masked;
    };
    for (int64_t frame = 0; frame < frames; ++frame, x += p_.joints * p_.in_channels, values += kColumnsAtATime) {
      fetch_ahead<A>(x);
      const Two<A> given = load<A>(x, count), gradient = load_two<A>(values);
      store(Two<A>{one(given.first, scale.first, shift.first, scale_sum.first, shift_sum.first, gradient.first),
                   one(given.second, scale.second, shift.second, scale_sum.second, shift_sum.second, gradient.second)},
            values);
    }
    store(scale_sum, &scale_sum_[channel]);
    store(shift_sum, &shift_sum_[channel]);
  }

  // The signal's slot, in pairs of rows for bfloat16, makes room for the gradient's once it is transposed.
  X* signal(int64_t slot) { return reinterpret_cast<X*>(gradients(slot)); }
  A* gradients(int64_t slot) { return memory_.data() + slot * in_slot_; }

  const SpectralBackward& p_;
  const Points<A> window_, tile_, taps_;
  const PackedWeights<X, A> weights_;
  const int64_t rows_, in_slot_, out_slot_, weight_slot_;
  const bool with_signal_gradient_;
  int64_t stream_ = 0;
  bool is_first_chunk_ = true;
  Coefficients<A> scale_, shift_, constant_, factor_, mean_, bias_sum_, scale_sum_, shift_sum_;
  Workspace<A> memory_;          // (products, rows, channels)
  Workspace<X> total_;           // (products, rows, channels), for bfloat16 alone
  Workspace<X> total_as_right_;  // likewise, for bfloat16 in pairs of rows
  Workspace<A> weight_sums_;     // (products, in_channels, out_channels)
  Workspace<A> folded_, spectrum_, values_;  // of a row or two
};

// run(X, A) with a number of each of the types.
template <typename Run>
auto for_numbers(Numbers numbers, const Run& run) {
  switch (numbers) {
    case Numbers::kBFloat16:
      return run(at::BFloat16(0.0f), 0.0f);
    case Numbers::kDouble:
      return run(0.0, 0.0);
    default:
      return run(0.0f, 0.0f);
  }
}

}  // namespace

int64_t spectral_packed_size(const SpectralConvolution& parameters) {
  return for_numbers(parameters.numbers, [&]<typename X, typename A>(X, A) {
    const PackedWeights<X, A> forward(parameters, false), backward(parameters, true);
    return parameters.plan.products() * std::max(forward.slot_size, backward.slot_size) *
           static_cast<int64_t>(sizeof(X));
  });
}

int64_t spectral_pack_parts(const SpectralConvolution& parameters, bool backward) {
  return for_numbers(parameters.numbers, [&]<typename X, typename A>(X, A) {
    return PackedWeights<X, A>(parameters, backward).width / Vec<A>::size();
  });
}

void spectral_pack(const SpectralConvolution& parameters, bool backward, int64_t stream, int64_t first_part,
                   int64_t last_part) {
  for_numbers(parameters.numbers, [&]<typename X, typename A>(X, A) {
    pack<X, A>(parameters, backward, stream, first_part, last_part);
  });
}

void spectral_forward(const SpectralForward& parameters, int64_t begin, int64_t end) {
  for_numbers(parameters.numbers, [&]<typename X, typename A>(X, A) {
    Forward<X, A> forward(parameters);
    for (int64_t item = begin; item < end; ++item) {
      if (item == begin || item % parameters.chunks == 0) {
        forward.load_stream(parameters.first_stream + item / parameters.chunks);
      }
      forward.run(item % parameters.chunks);
    }
    release_matrix_tiles<X>();
  });
}

void spectral_backward(const SpectralBackward& parameters, int64_t begin, int64_t end, void* const* weight_gradients) {
  for_numbers(parameters.numbers, [&]<typename X, typename A>(X, A) {
    Backward<X, A> backward(parameters);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t stream = item / parameters.chunks;
      if (item == begin || item % parameters.chunks == 0) {
        backward.load_stream(parameters.first_stream + stream);
      }
      backward.run(item % parameters.chunks);
      if (item + 1 == end || (item + 1) % parameters.chunks == 0) {
        backward.finish_weights(static_cast<A*>(weight_gradients[stream]));
      }
    }
    release_matrix_tiles<X>();
  });
}

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
