#include "cpu/temporal_convolution.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/matrix_product.h"
#include "cpu/workspace.h"

// The convolution is a product of matrices whose left factor has a row per (frame, joint): for every tap the rows of h
// some frames further. The frames of a sequence that a result needs lie in a window with zeros beyond the first and the
// last; with a stride, frames of the same remainder lie together, so that the rows of a tap are always contiguous.
//
// Factors are kept in groups of 16 words of a row: (group, row, word). A word is a number, or two bfloat16 that are
// next to each other along the inner dimension of a product.
namespace ikem_fast::cpu::CPU_CAPABILITY {

namespace {

constexpr int64_t kGroup = 16;

template <typename T>
using Vec = at::vec::Vectorized<T>;

// Two numbers of bfloat16 whose products the CPU sums by itself.
using Pair = uint32_t;

template <typename W>
struct WordOf {
  using Real = W;
  using Left = Vec<W>;
  using Right = Vec<W>;
  static constexpr int kNumbers = 1;

  static Left broadcast(const W* word) { return Left(*word); }
  static Right load(const W* words) { return Right::loadu(words); }
  static void multiply_add(const Left& left, const Right& right, Vec<W>& sum) {
    sum = at::vec::fmadd(left, right, sum);
  }
};

#ifdef CPU_CAPABILITY_AVX512
// The instructions are written out, as this file is compiled for CPUs without them too.
template <>
struct WordOf<Pair> {
  using Real = float;
  using Left = __m512i;
  using Right = __m512i;
  static constexpr int kNumbers = 2;

  static Left broadcast(const Pair* word) { return _mm512_set1_epi32(static_cast<int>(*word)); }
  static Right load(const Pair* words) { return _mm512_loadu_si512(words); }
  static void multiply_add(const Left& left, const Right& right, Vec<float>& sum) {
    __m512 sums = sum;
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(right), "v"(left));
    sum = sums;
  }
};

__m256i round_to_bfloat16(const Vec<float>& values) {
  __m256i rounded;
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(static_cast<__m512>(values)));
  return rounded;
}
#endif

template <typename W>
using RealOf = typename WordOf<W>::Real;

template <typename R>
constexpr int kLanes = static_cast<int>(Vec<R>::size());

// Sums of a block of rows and columns that stay in registers.
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
constexpr int kSums = 24;
#else
constexpr int kSums = 12;
#endif

#ifdef CPU_CAPABILITY_AVX512
constexpr bool kHasWidePanels = true;
#else
constexpr bool kHasWidePanels = false;
#endif

template <typename W, int kPanel>
constexpr int kVectorsOf = kPanel / kLanes<RealOf<W>>;
template <typename W, int kPanel>
constexpr int kRowsOf = kSums / kVectorsOf<W, kPanel> > 0 ? kSums / kVectorsOf<W, kPanel> : 1;
template <typename W, int kPanel>
constexpr int kFewRowsOf = kRowsOf<W, kPanel> % 4 == 0 ? kRowsOf<W, kPanel> / 4 : 1;

// Right factors come in panels of 16 or 32 columns.
template <typename W>
int64_t panel_width(int64_t columns) {
  return kHasWidePanels && kLanes<RealOf<W>> == kGroup && columns > kGroup ? 2 * kGroup : kGroup;
}

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
// The largest whole number that is not above a / b.
constexpr int64_t divide_down(int64_t a, int64_t b) { return a >= 0 ? a / b : -divide_up(-a, b); }

// ---- products

// One tap as rows see it: row r meets the factor's row r + offset, which is not zero for r in [begin, end).
struct Tap {
  int64_t number = 0, offset = 0, begin = 0, end = 0;
};

// How a left factor lies in memory.
template <typename W>
struct Groups {
  W* data = nullptr;
  int64_t stride = 0;  // from one group to the next
};

// Memory that the next sequence is loaded from, fetched bit by bit between the products for this one.
class Ahead {
 public:
  void add(const void* from, int64_t bytes) {
    constexpr int64_t kMostBytes = 256 << 10;  // more would push out of the second-level cache what is in use
    if (bytes > 0 && bytes <= kMostBytes) {
      const auto* begin = static_cast<const char*>(from);
      parts_[num_parts_++] = {begin, begin + bytes};
      bytes_ += bytes;
    }
  }

  // All of it in so many calls of fetch().
  void spread(int64_t calls) { step_ = round_up(divide_up(bytes_, std::max<int64_t>(calls, 1)), kLine); }

  void fetch() {
    for (int64_t left = step_; left > 0 && num_parts_ > 0; left -= kLine) {
      Part& part = parts_[num_parts_ - 1];
      __builtin_prefetch(part.from, 0, 2);
      part.from += kLine;
      if (part.from >= part.end) {
        --num_parts_;
      }
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Part {
    const char *from, *end;
  };
  Part parts_[3] = {};
  int num_parts_ = 0;
  int64_t bytes_ = 0, step_ = 0;
};

// c (kRows, kPanel) = before + the sum over taps of left (rows from `row` + offset on, depth) right (tap, depth,
// kPanel); rows of `before` are before_stride apart.
template <typename W, int kPanel, int kRows, int kWords>
__attribute__((noinline)) void multiply_block(const Tap* taps, int64_t num_taps, int64_t row,
                                              const Groups<const W>& left, const W* right, int64_t right_stride,
                                              int64_t depth, const RealOf<W>* before, int64_t before_stride,
                                              RealOf<W>* c) {
  using Word = WordOf<W>;
  using V = Vec<RealOf<W>>;
  constexpr int kVectors = kVectorsOf<W, kPanel>;
  V sums[kRows][kVectors];
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[i][v] = V::loadu(before + i * before_stride + v * V::size());
    }
  }
  const auto add = [&](const W* a, const W* b) __attribute__((always_inline)) {
    typename Word::Right columns[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      columns[v] = Word::load(b + v * V::size());
    }
#pragma GCC unroll 32
    for (int i = 0; i < kRows; ++i) {
      const auto factor = Word::broadcast(a + i * kWords);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        Word::multiply_add(factor, columns[v], sums[i][v]);
      }
    }
  };
  for (const Tap* tap = taps; tap < taps + num_taps; ++tap) {
    if (row >= tap->end || row + kRows <= tap->begin) {
      continue;
    }
    const W* a = left.data + (row + tap->offset) * kWords;
    const W* b = right + tap->number * right_stride;
    for (int64_t first = 0; first < depth; first += kWords, a += left.stride) {
      const int64_t words = std::min<int64_t>(kWords, depth - first);
      if (words == kWords) {
#pragma GCC unroll 4
        for (int word = 0; word < kWords; ++word, b += kPanel) {
          add(a + word, b);
        }
      } else {
        for (int64_t word = 0; word < words; ++word, b += kPanel) {
          add(a + word, b);
        }
      }
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[i][v].store(c + i * kPanel + v * V::size());
    }
  }
}

// The same for rows [first_row, last_row); c begins with first_row and has room for kSums more: some are made too many.
template <typename W, int kPanel, int kWords>
void multiply_rows(const Tap* taps, int64_t num_taps, int64_t first_row, int64_t last_row,
                   const Groups<const W>& left, const W* right, int64_t right_stride, int64_t depth,
                   const RealOf<W>* before, int64_t before_stride, RealOf<W>* c, Ahead& ahead) {
  constexpr int kRows = kRowsOf<W, kPanel>, kFewRows = kFewRowsOf<W, kPanel>;
  int64_t row = first_row;
  const auto run = [&](auto rows) {
    constexpr int kCount = decltype(rows)::value;
    ahead.fetch();
    multiply_block<W, kPanel, kCount, kWords>(taps, num_taps, row, left, right, right_stride, depth, before,
                                              before_stride, c);
    row += kCount;
    before += kCount * before_stride;
    c += kCount * kPanel;
  };
  while (row + kRows <= last_row) {
    run(std::integral_constant<int, kRows>{});
  }
  while (row < last_row) {
    run(std::integral_constant<int, kFewRows>{});
  }
}

// c (kRows, kPanel) += left^T right over `inner` rows of both.
template <typename W, int kPanel, int kRows>
__attribute__((noinline)) void multiply_transposed_block(int64_t inner, const W* left, const W* right,
                                                         int64_t right_group_stride, int64_t right_stride,
                                                         RealOf<W>* c) {
  using Word = WordOf<W>;
  using V = Vec<RealOf<W>>;
  constexpr int kVectors = kVectorsOf<W, kPanel>;
  constexpr int kVectorsOfGroup = static_cast<int>(kGroup) / kLanes<RealOf<W>>;
  V sums[kRows][kVectors];
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[i][v] = V::loadu(c + i * kPanel + v * V::size());
    }
  }
#pragma GCC unroll 1
  for (int64_t row = 0; row < inner; ++row, left += kGroup, right += right_stride) {
    typename Word::Right columns[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      columns[v] = Word::load(right + v / kVectorsOfGroup * right_group_stride + v % kVectorsOfGroup * V::size());
    }
#pragma GCC unroll 32
    for (int i = 0; i < kRows; ++i) {
      const auto factor = Word::broadcast(left + i);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        Word::multiply_add(factor, columns[v], sums[i][v]);
      }
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[i][v].store(c + i * kPanel + v * V::size());
    }
  }
}

// ---- loading and storing

template <typename T, typename R>
inline Vec<R> load_numbers(const T* from, int64_t count) {
  using V = Vec<R>;
  if constexpr (std::is_same_v<T, R>) {
    return count >= V::size() ? V::loadu(from) : count <= 0 ? V(R(0)) : V::loadu(from, count);
  } else {
    if (count >= V::size()) {
      V values;
      at::vec::load_fp32_from_bf16(from, values);
      return values;
    }
    alignas(64) R values[V::size()] = {};
    for (int64_t i = 0; i < count; ++i) {
      values[i] = static_cast<R>(from[i]);
    }
    return V::loadu(values);
  }
}

template <typename T, typename W>
inline void store_numbers(T* to, const Vec<RealOf<W>>& values, int64_t count) {
  using V = Vec<RealOf<W>>;
  if constexpr (std::is_same_v<T, RealOf<W>>) {
    if (count >= V::size()) {
      values.store(to);
    } else if (count > 0) {
      values.store(to, count);
    }
  } else {
    count = std::min<int64_t>(count, V::size());
#ifdef CPU_CAPABILITY_AVX512
    if constexpr (std::is_same_v<W, Pair>) {
      if (count == V::size()) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), round_to_bfloat16(values));
        return;
      }
    }
#endif
    if (count > 0) {
      at::vec::convert_from_float<at::BFloat16>(values, values).store(to, static_cast<int>(count));
    }
  }
}

// Values of a group of a row become words.
template <typename T, typename W, int kWords>
inline void store_words(W* to, const Vec<RealOf<W>>* values) {
  using R = RealOf<W>;
  constexpr int kCount = kWords * WordOf<W>::kNumbers / kLanes<R>;
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<W, Pair>) {
    for (int v = 0; v < kCount; ++v) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8 * v), round_to_bfloat16(values[v]));
    }
    return;
  }
#endif
  for (int v = 0; v < kCount; ++v) {
    if constexpr (std::is_same_v<T, at::BFloat16>) {
      const auto rounded = at::vec::convert_from_float<at::BFloat16>(values[v], values[v]);
      std::get<0>(at::vec::convert_to_float<at::BFloat16>(rounded)).store(to + v * kLanes<R>);
    } else {
      values[v].store(to + v * kLanes<R>);
    }
  }
}

// x as it is.
template <typename T, typename R>
struct PlainSource {
  static constexpr bool kSummed = false;
  const T* x;
  int64_t channels;

  Vec<R> operator()(int64_t row, int64_t channel, int64_t count) const {
    return load_numbers<T, R>(x + row * channels + channel, count);
  }
};

// relu(scale x + shift).
template <typename T, typename R>
struct ActivationSource {
  static constexpr bool kSummed = false;
  const T* x;
  int64_t channels;
  const R* scale;
  const R* shift;

  Vec<R> operator()(int64_t row, int64_t channel, int64_t count) const {
    const auto product =
        load_numbers<R, R>(scale + channel, count) * load_numbers<T, R>(x + row * channels + channel, count);
    return at::vec::maximum(product + load_numbers<R, R>(shift + channel, count), Vec<R>(R(0)));
  }
};

// The gradient that reaches y, summed over rows where sums is given.
template <typename T, typename R>
struct TotalSource {
  static constexpr bool kSummed = true;
  const T* gradient;
  const T* y;
  int64_t channels;
  const R* constant;  // mean_gradient / n
  const R* factor;    // variance_gradient 2 / n, or null where y is of no use
  const R* mean;
  R* sums;

  Vec<R> operator()(int64_t row, int64_t channel, int64_t count) const {
    const int64_t i = row * channels + channel;
    auto total = load_numbers<T, R>(gradient + i, count);
    if (constant) {
      total = total + load_numbers<R, R>(constant + channel, count);
    }
    if (factor) {
      const auto distance = load_numbers<T, R>(y + i, count) - load_numbers<R, R>(mean + channel, count);
      total = total + load_numbers<R, R>(factor + channel, count) * distance;
    }
    return total;
  }
};

// The rows of a source as groups of words, of which `to` is the first row of the first group.
template <typename T, typename W, int kWords, bool kWhole, typename Source>
void load_rows_of(int64_t rows, int64_t channels, const Source& source, W* to, int64_t group_stride) {
  using R = RealOf<W>;
  using V = Vec<R>;
  constexpr int64_t kChannels = kWords * WordOf<W>::kNumbers;
  constexpr int kVectors = static_cast<int>(kChannels) / kLanes<R>;
  constexpr int64_t kRows = 8;
  for (int64_t first_row = 0; first_row < rows; first_row += kRows) {
    const int64_t last_row = std::min(rows, first_row + kRows);
    for (int64_t first = 0; first < channels; first += kChannels) {
      W* group = to + first / kChannels * group_stride;
      V sums[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        sums[v] = V(R(0));
      }
      for (int64_t row = first_row; row < last_row; ++row) {
        V values[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          const int64_t channel = first + v * V::size();
          values[v] = source(row, channel, kWhole ? V::size() : channels - channel);
          if constexpr (Source::kSummed) {
            sums[v] = sums[v] + values[v];
          }
        }
        store_words<T, W, kWords>(group + row * kWords, values);
      }
      if constexpr (Source::kSummed) {
        for (int v = 0; source.sums && v < kVectors; ++v) {
          R* sum = source.sums + first + v * V::size();
          (V::loadu(sum) + sums[v]).store(sum);
        }
      }
    }
  }
}

template <typename T, typename W, int kWords, typename Source>
void load_rows(int64_t rows, int64_t channels, const Source& source, W* to, int64_t group_stride) {
  if (channels % (kWords * WordOf<W>::kNumbers) == 0) {
    load_rows_of<T, W, kWords, true>(rows, channels, source, to, group_stride);
  } else {
    load_rows_of<T, W, kWords, false>(rows, channels, source, to, group_stride);
  }
}

// ---- sizes

// What follows from the sizes alone: how much is looked at at a time.
template <typename W>
struct Layout {
  // inner, outer: channels that a product sums over, channels that it makes.
  Layout(int64_t inner, int64_t outer) : inner(inner), outer(outer), width(panel_width<W>(outer)) {
    constexpr int64_t kNumbers = WordOf<W>::kNumbers;
    words = kNumbers == 2 && inner <= kGroup ? kGroup / 2 : kGroup;
    depth = divide_up(inner, kNumbers);
    groups = divide_up(depth, words);
    panels = divide_up(outer, width);
  }

  int64_t inner, outer, width;
  int64_t words = 0;   // of a row in a group
  int64_t depth = 0;   // words of a row that are used
  int64_t groups = 0;  // of the left factor
  int64_t panels = 0;  // of the right factor
  int64_t tap_words() const { return depth * width; }
};

// Calls run(the words of a row in a group, as a constant).
template <typename W, typename Run>
void with_words(const Layout<W>& layout, const Run& run) {
  if constexpr (WordOf<W>::kNumbers == 2) {
    if (layout.words == kGroup / 2) {
      return run(std::integral_constant<int, kGroup / 2>{});
    }
  }
  run(std::integral_constant<int, kGroup>{});
}

// As many output frames as are looked at at a time: their input frames take up to a MB.
int64_t chunk_frames(const TemporalConvolutionSizes& sizes, int64_t bytes_of_number) {
  constexpr int64_t kBytes = 1 << 20;
  const int64_t bytes = sizes.joints * std::max(sizes.in_channels, sizes.out_channels) * bytes_of_number;
  const int64_t frames = (kBytes / bytes - sizes.taps) / sizes.stride;
  const int64_t chunks = divide_up(sizes.out_frames(), std::max({frames, sizes.taps, int64_t{8}}));
  return divide_up(sizes.out_frames(), chunks);
}

// The input frames that output frames [first, last) of a sequence need, and where taps find them: with a stride s, the
// frames of each remainder modulo s lie together.
class InputWindow {
 public:
  explicit InputWindow(const TemporalConvolutionSizes& sizes, int64_t most_frames)
      : sizes_(sizes), remainders_(std::min(sizes.stride, sizes.taps)) {
    place(0, most_frames);
    most_rows_ = rows();
  }

  void place(int64_t first, int64_t last) {
    first_ = first * sizes_.stride - sizes_.taps / 2;
    frames_ = (last - first - 1) * sizes_.stride + sizes_.taps;
    places_ = divide_up(frames_, sizes_.stride);
  }

  int64_t rows() const { return remainders_ * places_ * sizes_.joints; }
  int64_t most_rows() const { return most_rows_; }

  // Calls use(first row, number of frames, first frame or -1 for zeros) for all rows.
  template <typename Use>
  void for_spans(const Use& use) const {
    for (int64_t remainder = 0; remainder < remainders_; ++remainder) {
      for (int64_t place = 0; place < places_;) {
        const int64_t row = (remainder * places_ + place) * sizes_.joints;
        const int64_t frame = frame_at(remainder, place);
        int64_t next = place + 1;
        while (next < places_ && (frame < 0 ? frame_at(remainder, next) < 0
                                            : sizes_.stride == 1 && frame_at(remainder, next) >= 0)) {
          ++next;
        }
        use(row, next - place, frame);
        place = next;
      }
    }
  }

  Tap tap(int64_t number, int64_t num_outputs) const {
    const int64_t stride = sizes_.stride, joints = sizes_.joints, frame = first_ + number;
    const int64_t begin = std::clamp<int64_t>(-divide_down(frame, stride), 0, num_outputs);
    const int64_t end = std::clamp<int64_t>(divide_down(sizes_.frames - 1 - frame, stride) + 1, begin, num_outputs);
    return {number, (number % stride * places_ + number / stride) * joints, begin * joints, end * joints};
  }

 private:
  int64_t frame_at(int64_t remainder, int64_t place) const {
    const int64_t offset = place * sizes_.stride + remainder, frame = first_ + offset;
    return offset < frames_ && frame >= 0 && frame < sizes_.frames ? frame : -1;
  }

  const TemporalConvolutionSizes& sizes_;
  int64_t remainders_, first_ = 0, frames_ = 0, places_ = 0, most_rows_ = 0;
};

template <typename W>
Groups<W> groups_of(const Workspace<W>& workspace, int64_t rows, int64_t words) {
  return {workspace.data(), rows * words};
}

template <typename W>
void clear_rows(const Groups<W>& to, int64_t groups, int64_t words, int64_t row, int64_t rows) {
  for (int64_t group = 0; group < groups; ++group) {
    std::memset(static_cast<void*>(to.data + group * to.stride + row * words), 0, rows * words * sizeof(W));
  }
}

// h of the frames of a window; `spare` rows of zeros follow.
template <typename T, typename W>
void load_window(const FrameConvolution& p, int64_t stream, int64_t sequence, const InputWindow& window,
                 const Layout<W>& layout, int64_t spare, const Groups<W>& to) {
  using R = RealOf<W>;
  const int64_t channels = p.sizes.in_channels, joints = p.sizes.joints;
  const int64_t row_of_x = (stream * p.sizes.sequences + sequence) * p.sizes.frames * joints;
  const auto load = [&](auto words, int64_t row, int64_t rows, int64_t frame) {
    constexpr int kWords = decltype(words)::value;
    const T* x = static_cast<const T*>(p.x) + (row_of_x + frame * joints) * channels;
    W* target = to.data + row * kWords;
    if (p.scale) {
      const ActivationSource<T, R> source{x, channels, static_cast<const R*>(p.scale) + stream * channels,
                                          static_cast<const R*>(p.shift) + stream * channels};
      load_rows<T, W, kWords>(rows, channels, source, target, to.stride);
    } else {
      load_rows<T, W, kWords>(rows, channels, PlainSource<T, R>{x, channels}, target, to.stride);
    }
  };
  window.for_spans([&](int64_t row, int64_t frames, int64_t frame) {
    if (frame < 0) {
      clear_rows(to, layout.groups, layout.words, row, frames * joints);
    } else {
      with_words(layout, [&](auto words) { load(words, row, frames * joints, frame); });
    }
  });
  clear_rows(to, layout.groups, layout.words, window.rows(), spare);
}

// How many taps' weights of a panel stay in a first-level cache together, and how many rows meet them at a time.
template <typename W>
struct Blocking {
  Blocking(const Layout<W>& layout, int64_t num_taps, int64_t rows) {
    constexpr int64_t kBytes = 36 << 10, kRowsTogether = 240;
    taps = std::clamp<int64_t>(kBytes / (layout.tap_words() * static_cast<int64_t>(sizeof(W))), 1,
                               std::max<int64_t>(num_taps, 1));
    row_tile = taps >= num_taps ? std::min(rows, kRowsTogether) : rows;
  }
  int64_t taps, row_tile;
};

// Calls finish(panel, first row, last row, c) for tiles of the rows [0, rows) of the product of a left factor, moved by
// the taps, and packed weights; it is added to `before`, a number for each column of the panels.
template <typename W, typename Finish>
void multiply_taps(const std::vector<Tap>& taps, int64_t rows, const Groups<const W>& left, const Layout<W>& layout,
                   const W* weight, int64_t all_taps, const RealOf<W>* before, RealOf<W>* c, Ahead ahead,
                   const Finish& finish) {
  const auto run = [&](auto panel_constant, auto words_constant) {
    constexpr int kPanel = decltype(panel_constant)::value, kWords = decltype(words_constant)::value;
    const int64_t num_taps = static_cast<int64_t>(taps.size());
    const Blocking<W> blocking(layout, num_taps, rows);
    const int64_t blocks = divide_up(rows, kRowsOf<W, kPanel>) * layout.panels * divide_up(num_taps, blocking.taps);
    ahead.spread(blocks);
    for (int64_t panel = 0; panel < layout.panels; ++panel) {
      const W* right = weight + panel * all_taps * layout.tap_words();
      for (int64_t row = 0; row < rows; row += blocking.row_tile) {
        const int64_t last = std::min(rows, row + blocking.row_tile);
        int64_t tap = 0;
        do {  // also without any tap
          multiply_rows<W, kPanel, kWords>(taps.data() + tap, std::min(blocking.taps, num_taps - tap), row, last, left,
                                           right, layout.tap_words(), layout.depth,
                                           tap == 0 ? before + panel * kPanel : c, tap == 0 ? 0 : kPanel, c, ahead);
          tap += blocking.taps;
        } while (tap < num_taps);
        finish(panel, row, last, c);
      }
    }
  };
  if constexpr (kHasWidePanels && kLanes<RealOf<W>> == kGroup) {
    if (layout.width == 2 * kGroup) {
      return with_words(layout, [&](auto words) { run(std::integral_constant<int, 2 * kGroup>{}, words); });
    }
  }
  with_words(layout, [&](auto words) { run(std::integral_constant<int, kGroup>{}, words); });
}

// ---- packed weights

// (panel, tap, word of the inner channels, column of the panel), zeros where there is no channel.
template <typename T, typename W>
void pack(const FrameConvolution& p, bool backward, int64_t stream, W* packed) {
  using R = RealOf<W>;
  const auto& s = p.sizes;
  const Layout<W> layout(backward ? s.out_channels : s.in_channels, backward ? s.in_channels : s.out_channels);
  const R* weight = static_cast<const R*>(p.weight) + stream * s.out_channels * s.in_channels * s.taps;
  const int64_t inner_stride = backward ? s.in_channels * s.taps : s.taps;
  const int64_t outer_stride = backward ? s.taps : s.in_channels * s.taps;
  constexpr int64_t kNumbers = WordOf<W>::kNumbers;
  const auto value = [&](int64_t tap, int64_t inner, int64_t outer) {
    return inner < layout.inner && outer < layout.outer
               ? weight[inner * inner_stride + outer * outer_stride + tap]
               : R(0);
  };
  for (int64_t panel = 0; panel < layout.panels; ++panel) {
    for (int64_t word = 0; word < layout.depth; ++word) {
      for (int64_t tap = 0; tap < s.taps; ++tap) {
        W* row = packed + ((panel * s.taps + tap) * layout.depth + word) * layout.width;
        for (int64_t column = 0; column < layout.width; ++column) {
          const int64_t outer = panel * layout.width + column;
          if constexpr (kNumbers == 2) {
            row[column] = at::BFloat16(value(tap, 2 * word, outer)).x |
                          static_cast<uint32_t>(at::BFloat16(value(tap, 2 * word + 1, outer)).x) << 16;
          } else if constexpr (std::is_same_v<T, at::BFloat16>) {
            row[column] = static_cast<R>(at::BFloat16(value(tap, word, outer)));
          } else {
            row[column] = value(tap, word, outer);
          }
        }
      }
    }
  }
}

template <typename W>
int64_t packed_words(const FrameConvolution& p, bool backward) {
  const auto& s = p.sizes;
  const Layout<W> layout(backward ? s.out_channels : s.in_channels, backward ? s.in_channels : s.out_channels);
  return layout.panels * s.taps * layout.tap_words();
}

// ---- forward

template <typename T, typename W>
class Forward {
  using R = RealOf<W>;
  using V = Vec<R>;

 public:
  Forward(const FrameConvolutionForward& p, int64_t stream, Moments* moments)
      : p_(p),
        stream_(stream),
        moments_(moments),
        layout_(p.sizes.in_channels, p.sizes.out_channels),
        chunk_(chunk_frames(p.sizes, sizeof(R))),
        window_(p.sizes, chunk_),
        h_(layout_.groups * (window_.most_rows() + kSums) * layout_.words),
        c_((chunk_ * p.sizes.joints + kSums) * layout_.width),
        bias_(layout_.panels * layout_.width) {
    const R* bias = static_cast<const R*>(p.bias) + stream * p.sizes.out_channels;
    std::fill(std::copy_n(bias, p.sizes.out_channels, bias_.data()), bias_.data() + layout_.panels * layout_.width,
              R(0));
  }

  void convolve(int64_t sequence) {
    const auto& s = p_.sizes;
    for (int64_t first = 0; first < s.out_frames(); first += chunk_) {
      const int64_t last = std::min(s.out_frames(), first + chunk_);
      window_.place(first, last);
      const Groups<W> h = groups_of(h_, window_.rows() + kSums, layout_.words);
      load_window<T>(p_, stream_, sequence, window_, layout_, kSums, h);
      taps_.clear();
      for (int64_t number = 0; number < s.taps; ++number) {
        taps_.push_back(window_.tap(number, last - first));
      }
      const int64_t first_row = ((stream_ * s.sequences + sequence) * s.out_frames() + first) * s.joints;
      Ahead ahead;
      if (last == s.out_frames() && sequence + 1 < s.sequences) {
        const int64_t size = s.frames * s.joints * s.in_channels;
        ahead.add(static_cast<const T*>(p_.x) + (stream_ * s.sequences + sequence + 1) * size, size * sizeof(T));
      }
      multiply_taps<W>(
          taps_, (last - first) * s.joints, {h.data, h.stride}, layout_, packed(), s.taps, bias_.data(), c_.data(),
          ahead,
          [this, first_row](int64_t panel, int64_t begin, int64_t end, const R* c) {
            finish(panel, first_row + begin, end - begin, c);
          });
    }
  }

 private:
  const W* packed() const { return static_cast<const W*>(p_.packed) + stream_ * packed_words<W>(p_, false); }

  void finish(int64_t panel, int64_t first_row, int64_t rows, const R* c) {
    const int64_t channels = p_.sizes.out_channels;
    for (int64_t column = 0; column < layout_.width; column += V::size()) {
      const int64_t channel = panel * layout_.width + column, count = channels - channel;
      if (count <= 0) {
        return;
      }
      T* y = static_cast<T*>(p_.y) + first_row * channels + channel;
      if (p_.output_scale) {
        activate(rows, c + column, channel, count, first_row, y);
      } else if (p_.statistics) {
        store_with_statistics(rows, c + column, channel, count, y);
      } else {
        for (int64_t row = 0; row < rows; ++row) {
          store_numbers<T, W>(y + row * channels, V::loadu(c + column + row * layout_.width), count);
        }
      }
    }
  }

  void activate(int64_t rows, const R* c, int64_t channel, int64_t count, int64_t first_row, T* y) {
    const int64_t channels = p_.sizes.out_channels, offset = stream_ * channels + channel;
    const V scale = load_numbers<R, R>(static_cast<const R*>(p_.output_scale) + offset, count);
    const V shift = load_numbers<R, R>(static_cast<const R*>(p_.output_shift) + offset, count);
    const T* residual = p_.residual ? static_cast<const T*>(p_.residual) + first_row * channels + channel : nullptr;
    for (int64_t row = 0; row < rows; ++row) {
      V value = scale * V::loadu(c + row * layout_.width) + shift;
      if (residual) {
        value = value + load_numbers<T, R>(residual + row * channels, count);
      }
      store_numbers<T, W>(y + row * channels, at::vec::maximum(value, V(R(0))), count);
    }
  }

  // Distances are taken from the tile's own mean, so that nothing cancels where the mean is large.
  void store_with_statistics(int64_t rows, const R* c, int64_t channel, int64_t count, T* y) {
    constexpr int kChains = 4;  // additions that need not wait for each other
    const int64_t channels = p_.sizes.out_channels, width = layout_.width;
    V sums[kChains];
    for (V& sum : sums) {
      sum = V(R(0));
    }
    int64_t row = 0;
    for (; row + kChains <= rows; row += kChains) {
      for (int i = 0; i < kChains; ++i) {
        sums[i] = sums[i] + V::loadu(c + (row + i) * width);
      }
    }
    for (; row < rows; ++row) {
      sums[0] = sums[0] + V::loadu(c + row * width);
    }
    const V mean = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * V(R(1) / static_cast<R>(rows));
    V rests[kChains], squares[kChains];
    for (int i = 0; i < kChains; ++i) {
      rests[i] = squares[i] = V(R(0));
    }
    const auto add = [&](int i, int64_t at) __attribute__((always_inline)) {
      const V value = V::loadu(c + at * width), distance = value - mean;
      rests[i] = rests[i] + distance;
      squares[i] = at::vec::fmadd(distance, distance, squares[i]);
      store_numbers<T, W>(y + at * channels, value, count);
    };
    for (row = 0; row + kChains <= rows; row += kChains) {
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) {
        add(i, row + i);
      }
    }
    for (; row < rows; ++row) {
      add(0, row);
    }
    alignas(64) R of_mean[V::size()], of_rest[V::size()], of_squares[V::size()];
    mean.store(of_mean);
    ((rests[0] + rests[1]) + (rests[2] + rests[3])).store(of_rest);
    ((squares[0] + squares[1]) + (squares[2] + squares[3])).store(of_squares);
    for (int64_t i = 0; i < std::min<int64_t>(count, V::size()); ++i) {
      const double number = static_cast<double>(rows), rest = of_rest[i];
      moments_[channel + i].add(
          {number, of_mean[i] + rest / number, std::max(of_squares[i] - rest * rest / number, 0.0)});
    }
  }

  const FrameConvolutionForward& p_;
  const int64_t stream_;
  Moments* moments_;
  const Layout<W> layout_;
  const int64_t chunk_;
  InputWindow window_;
  std::vector<Tap> taps_;
  Workspace<W> h_;
  Workspace<R> c_;
  Workspace<R> bias_;  // and zeros to whole panels
};

// ---- backward

#ifdef CPU_CAPABILITY_AVX512
// Of rows in groups of pairs of channels: the numbers of rows 2 i and 2 i + 1 beside each other, for 16 channels.
void pair_rows_of_group(const Pair* from, int64_t words, int64_t pairs, Pair* to, int64_t to_stride) {
  const auto load = [](const Pair* row) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
  };
  for (int64_t pair = 0; pair < pairs; ++pair, from += 2 * words, to += to_stride) {
    _mm512_storeu_si512(to, _mm512_or_si512(load(from), _mm512_slli_epi32(load(from + words), 16)));
  }
}
#endif

// Sums of the gradient of the weights are (tap, panel of C_out, input channel, column), of whole groups and panels.
template <typename W>
struct WeightSums {
  explicit WeightSums(const TemporalConvolutionSizes& s)
      : width(panel_width<W>(s.out_channels)),
        panels(divide_up(s.out_channels, width)),
        channels(round_up(s.in_channels, kGroup)),
        size(s.taps * panels * channels * width) {}

  int64_t at(int64_t tap, int64_t panel, int64_t channel) const {
    return ((tap * panels + panel) * channels + channel) * width;
  }
  int64_t width, panels, channels, size;
};

template <typename T, typename W>
class Backward {
  using R = RealOf<W>;
  using V = Vec<R>;
  static constexpr int64_t kNumbers = WordOf<W>::kNumbers;
  static constexpr bool kPaired = kNumbers == 2;
  static constexpr int64_t kSpare = kSums + 2;

 public:
  Backward(const FrameConvolutionBackward& p, int64_t stream, const FrameGradients& sums)
      : p_(p),
        stream_(stream),
        gradients_(sums),
        weight_sums_(p.sizes),
        h_layout_(p.sizes.in_channels, p.sizes.out_channels),
        total_layout_(p.sizes.out_channels, p.sizes.in_channels),
        chunk_(chunk_frames(p.sizes, sizeof(R))),
        window_(p.sizes, chunk_),
        before_(p.sizes.taps / 2 / p.sizes.stride),
        after_((p.sizes.stride - 1 + p.sizes.taps / 2) / p.sizes.stride),
        h_(h_layout_.groups * (window_.most_rows() + kSpare) * h_layout_.words),
        // Also of the last panel's columns for which there is no channel.
        total_(std::max(total_layout_.groups, weight_sums_.panels * weight_sums_.width / kGroup) *
               (total_rows(chunk_) + kSpare) * total_layout_.words),
        h_pairs_(kPaired ? 2 * weight_sums_.channels * most_pairs(window_.most_rows()) : 0),
        total_pairs_(kPaired ? weight_sums_.panels * weight_sums_.width * (chunk_ * p.sizes.joints / 2 + 1) : 0),
        c_((chunk_ * p.sizes.joints + kSums) * total_layout_.width),
        coefficients_(2 * p.sizes.out_channels),
        bias_(round_up(p.sizes.out_channels, 2 * kGroup)),
        zeros_(total_layout_.panels * total_layout_.width) {
    std::fill_n(zeros_.data(), total_layout_.panels * total_layout_.width, R(0));
    const int64_t channels = p.sizes.out_channels, offset = stream * channels;
    const double count = static_cast<double>(p.sizes.values());
    for (int64_t channel = 0; channel < channels; ++channel) {
      const auto coefficient = [&](const void* values, double factor) {
        return values ? static_cast<R>(factor * static_cast<const R*>(values)[offset + channel]) : R(0);
      };
      coefficients_.data()[channel] = coefficient(p.mean_gradient, 1 / count);
      coefficients_.data()[channels + channel] = coefficient(p.variance_gradient, 2 / count);
    }
    if constexpr (kPaired) {
      std::memset(static_cast<void*>(total_pairs_.data()), 0,
                  weight_sums_.panels * weight_sums_.width * (chunk_ * p.sizes.joints / 2 + 1) * sizeof(W));
    }
  }

  void convolve(int64_t sequence) {
    const auto& s = p_.sizes;
    for (int64_t first = 0; first < s.out_frames(); first += chunk_) {
      const int64_t last = std::min(s.out_frames(), first + chunk_);
      load_totals(sequence, first, last);
      window_.place(first, last);
      const Groups<W> h = groups_of(h_, window_.rows() + kSpare, h_layout_.words);
      load_window<T>(p_, stream_, sequence, window_, h_layout_, kSpare, h);
      Ahead ahead;
      if (last == s.out_frames() && sequence + 1 < s.sequences) {
        const int64_t next = stream_ * s.sequences + sequence + 1;
        const int64_t size_of_x = s.frames * s.joints * s.in_channels;
        const int64_t size_of_y = s.out_frames() * s.joints * s.out_channels;
        ahead.add(static_cast<const T*>(p_.x) + next * size_of_x, size_of_x * sizeof(T));
        ahead.add(static_cast<const T*>(p_.y) + next * size_of_y, p_.variance_gradient ? size_of_y * sizeof(T) : 0);
        ahead.add(static_cast<const T*>(p_.y_gradient) + next * size_of_y, size_of_y * sizeof(T));
      }
      add_weight_gradient(h, last - first, ahead);
      if (p_.x_gradient || p_.scale) {
        for (int64_t remainder = 0; remainder < s.stride; ++remainder) {
          add_input_gradient(sequence, first, last, remainder);
        }
      }
    }
  }

 private:
  int64_t total_rows(int64_t frames) const { return (frames + before_ + after_) * p_.sizes.joints; }

  // The output frames [first - before, last + after) and zeros for those that there are not.
  void load_totals(int64_t sequence, int64_t first, int64_t last) {
    const auto& s = p_.sizes;
    const int64_t joints = s.joints, channels = s.out_channels, rows = total_rows(last - first);
    const Groups<W> to = groups_of(total_, rows + kSpare, total_layout_.words);
    const int64_t begin = std::max<int64_t>(first - before_, 0), end = std::min(s.out_frames(), last + after_);
    const int64_t rows_before = (begin - (first - before_)) * joints, rows_end = (end - (first - before_)) * joints;
    clear_rows(to, total_layout_.groups, total_layout_.words, 0, rows_before);
    clear_rows(to, total_layout_.groups, total_layout_.words, rows_end, rows + kSpare - rows_end);
    const int64_t frames_of_sequence = (stream_ * s.sequences + sequence) * s.out_frames();
    // Of a chunk's own frames the sums over at most so many rows are made before they are added to those of all.
    constexpr int64_t kRows = 256;
    const auto load = [&](auto words, int64_t from, int64_t until, bool own) {
      constexpr int kWords = decltype(words)::value;
      for (int64_t row = from * joints; row < until * joints; row += kRows) {
        const int64_t count = std::min(kRows, until * joints - row), place = row - (first - before_) * joints;
        const int64_t offset = (frames_of_sequence * joints + row) * channels;
        std::fill_n(bias_.data(), round_up(channels, 2 * kGroup), R(0));
        const TotalSource<T, R> source{
            static_cast<const T*>(p_.y_gradient) + offset,
            static_cast<const T*>(p_.y) + offset,
            channels,
            p_.mean_gradient ? coefficients_.data() : nullptr,
            p_.variance_gradient ? coefficients_.data() + channels : nullptr,
            p_.variance_gradient ? static_cast<const R*>(p_.mean) + stream_ * channels : nullptr,
            own ? bias_.data() : nullptr};
        load_rows<T, W, kWords>(count, channels, source, to.data + place * kWords, to.stride);
        for (int64_t channel = 0; own && channel < channels; ++channel) {
          gradients_.bias[channel] += bias_.data()[channel];
        }
      }
    };
    with_words(total_layout_, [&](auto words) {
      load(words, begin, first, false);
      load(words, first, last, true);
      load(words, last, end, false);
    });
  }

  // For every tap h^T total, over the rows of a chunk's own frames.
  void add_weight_gradient(const Groups<W>& h, int64_t frames, Ahead& ahead) {
    const int64_t width = weight_sums_.width;
    const Groups<W> total = groups_of(total_, total_rows(frames) + kSpare, total_layout_.words);
    const W* own_total = total.data + before_ * p_.sizes.joints * total_layout_.words;
    if constexpr (kPaired) {
#ifdef CPU_CAPABILITY_AVX512
      // A tap begins at an even or an odd row of h: there are pairs of both kinds.
      const int64_t h_pairs = most_pairs(window_.rows());
      for_groups({h.data, h.stride}, h_layout_, p_.sizes.in_channels, [&](int64_t group, const W* source) {
        W* target = h_pairs_.data() + 2 * group * h_pairs * kGroup;
        pair_rows_of_group(source, h_layout_.words, h_pairs, target, kGroup);
        pair_rows_of_group(source + h_layout_.words, h_layout_.words, h_pairs, target + h_pairs * kGroup, kGroup);
      });
      const int64_t rows = frames * p_.sizes.joints, pairs = divide_up(rows, 2), groups_of_panel = width / kGroup;
      for_groups({own_total, total.stride}, total_layout_, p_.sizes.out_channels, [&](int64_t group, const W* source) {
        W* target = total_pairs_.data() + group / groups_of_panel * pairs * width + group % groups_of_panel * kGroup;
        pair_rows_of_group(source, total_layout_.words, pairs, target, width);
        // What follows an odd last row is of another chunk.
        for (int64_t i = 0; rows % 2 && i < kGroup; ++i) {
          target[(pairs - 1) * width + i] &= 0xffff;
        }
      });
      multiply_transposed({h_pairs_.data(), 2 * h_pairs * kGroup}, h_pairs * kGroup,
                          {total_pairs_.data(), pairs * width}, kGroup, width, frames, ahead);
#endif
    } else {
      multiply_transposed({h.data, h.stride}, 0, {own_total, width / kGroup * total.stride}, total.stride, kGroup,
                          frames, ahead);
    }
  }

  static int64_t most_pairs(int64_t rows) { return rows / 2 + 2; }

  // Calls use(group of 16 channels, its first row) for a factor in groups of pairs of channels.
  template <typename Use>
  static void for_groups(const Groups<const W>& from, const Layout<W>& layout, int64_t channels, const Use& use) {
    const int64_t halves = layout.words / (kGroup / 2);
    for (int64_t group = 0; group < divide_up(channels, kGroup); ++group) {
      use(group, from.data + group / halves * from.stride + group % halves * (kGroup / 2));
    }
  }

  // left: groups of 16 channels, pairs that begin at odd rows left_odd further; right: panels of rows that are
  // right_stride apart, with a stride from 16 columns to the next.
  void multiply_transposed(const Groups<const W>& left, int64_t left_odd, const Groups<const W>& right,
                           int64_t right_group_stride, int64_t right_stride, int64_t frames, Ahead& ahead) {
    if constexpr (kHasWidePanels && kLanes<R> == kGroup) {
      if (weight_sums_.width == 2 * kGroup) {
        return multiply_transposed_panels<2 * kGroup>(left, left_odd, right, right_group_stride, right_stride, frames,
                                                      ahead);
      }
    }
    multiply_transposed_panels<kGroup>(left, left_odd, right, right_group_stride, right_stride, frames, ahead);
  }

  template <int kPanel>
  void multiply_transposed_panels(const Groups<const W>& left, int64_t left_odd, const Groups<const W>& right,
                                  int64_t right_group_stride, int64_t right_stride, int64_t frames,
                                  Ahead& ahead) {
    constexpr int kRows = std::max(kSums * 2 / 3 / kVectorsOf<W, kPanel>, 1);
    static_assert(kGroup % kRows == 0);
    constexpr int64_t kMostRows = 352;  // so many rows of both factors stay in a first-level cache
    const int64_t rows = frames * p_.sizes.joints;
    const int64_t tile = round_up(divide_up(rows, divide_up(rows, kMostRows)), 2);
    R* sums = static_cast<R*>(gradients_.weight);
    ahead.spread(divide_up(rows, tile) * weight_sums_.panels * p_.sizes.taps * weight_sums_.channels / kRows);
    for (int64_t row = 0; row < rows; row += tile) {
      for (int64_t panel = 0; panel < weight_sums_.panels; ++panel) {
        for (int64_t number = 0; number < p_.sizes.taps; ++number) {
          const Tap tap = window_.tap(number, frames);
          const int64_t begin = std::max(tap.begin, row) / kNumbers * kNumbers, end = std::min(tap.end, row + tile);
          if (begin >= end) {
            continue;
          }
          const W* b = right.data + panel * right.stride + begin / kNumbers * right_stride;
          const int64_t first_row = tap.offset + begin;
          const W* rows_of_a = left.data + first_row % kNumbers * left_odd + first_row / kNumbers * kGroup;
          for (int64_t channel = 0; channel < weight_sums_.channels; channel += kRows) {
            ahead.fetch();
            const W* a = rows_of_a + channel / kGroup * left.stride + channel % kGroup;
            multiply_transposed_block<W, kPanel, kRows>(divide_up(end - begin, kNumbers), a, b, right_group_stride,
                                                        right_stride, sums + weight_sums_.at(number, panel, channel));
          }
        }
      }
    }
  }

  // The input frames of one remainder modulo the stride that belong to the output frames [first, last).
  void add_input_gradient(int64_t sequence, int64_t first, int64_t last, int64_t remainder) {
    const auto& s = p_.sizes;
    const int64_t end_frame = std::min(s.frames, last * s.stride);
    const int64_t frames = divide_up(end_frame - first * s.stride - remainder, s.stride);
    if (frames <= 0) {
      return;
    }
    taps_.clear();
    for (int64_t number = 0; number < s.taps; ++number) {
      const int64_t distance = remainder + s.taps / 2 - number;
      if (distance % s.stride != 0) {
        continue;
      }
      const int64_t later = distance / s.stride;
      const int64_t begin = std::clamp<int64_t>(-(first + later), 0, frames);
      const int64_t end = std::clamp<int64_t>(s.out_frames() - first - later, begin, frames);
      taps_.push_back({number, (later + before_) * s.joints, begin * s.joints, end * s.joints});
    }
    const Groups<W> total = groups_of(total_, total_rows(last - first) + kSpare, total_layout_.words);
    const W* packed = static_cast<const W*>(p_.packed) + stream_ * packed_words<W>(p_, true);
    const int64_t first_row_of_x =
        ((stream_ * s.sequences + sequence) * s.frames + first * s.stride + remainder) * s.joints;
    multiply_taps<W>(
        taps_, frames * s.joints, {total.data, total.stride}, total_layout_, packed, s.taps, zeros_.data(), c_.data(),
        Ahead(),
        [this, first_row_of_x](int64_t panel, int64_t begin, int64_t end, const R* c) {
          finish(panel, first_row_of_x, begin, end, c);
        });
  }

  void finish(int64_t panel, int64_t first_row_of_x, int64_t begin, int64_t end, const R* c) {
    const auto& s = p_.sizes;
    const int64_t channels = s.in_channels, width = total_layout_.width;
    for (int64_t column = 0; column < width; column += V::size()) {
      const int64_t channel = panel * width + column, count = channels - channel;
      if (count <= 0) {
        return;
      }
      V scale(R(1)), shift(R(0)), of_scale(R(0)), of_shift(R(0)), more_of_scale(R(0)), more_of_shift(R(0));
      if (p_.scale) {
        scale = load_numbers<R, R>(static_cast<const R*>(p_.scale) + stream_ * channels + channel, count);
        shift = load_numbers<R, R>(static_cast<const R*>(p_.shift) + stream_ * channels + channel, count);
      }
      for (int64_t row = begin; row < end;) {
        // Rows that are next to each other in x: all of them, with a stride those of a frame.
        const int64_t joint = row % s.joints;
        const int64_t rows = s.stride == 1 ? end - row : std::min(end - row, s.joints - joint);
        const int64_t row_of_x = s.stride == 1 ? row : row / s.joints * s.stride * s.joints + joint;
        const int64_t offset = (first_row_of_x + row_of_x) * channels + channel;
        const T* x = static_cast<const T*>(p_.x) + offset;
        T* x_gradient = p_.x_gradient ? static_cast<T*>(p_.x_gradient) + offset : nullptr;
        const R* of_h = c + (row - begin) * width + column;
        if (p_.scale) {
          const auto add = [&](int64_t i, V& to_scale, V& to_shift) __attribute__((always_inline)) {
            const V value = load_numbers<T, R>(x + i * channels, count);
            const V zero(R(0)), gradient = V::loadu(of_h + i * width);
            const V kept = V::blendv(gradient, zero, scale * value + shift <= zero);
            to_shift = to_shift + kept;
            to_scale = at::vec::fmadd(kept, value, to_scale);
            if (x_gradient) {
              store_numbers<T, W>(x_gradient + i * channels, kept * scale, count);
            }
          };
          int64_t i = 0;
          for (; i + 2 <= rows; i += 2) {
            add(i, of_scale, of_shift);
            add(i + 1, more_of_scale, more_of_shift);
          }
          if (i < rows) {
            add(i, of_scale, of_shift);
          }
        } else {
          for (int64_t i = 0; i < rows; ++i) {
            store_numbers<T, W>(x_gradient + i * channels, V::loadu(of_h + i * width), count);
          }
        }
        row += rows;
      }
      if (p_.scale) {
        alignas(64) R scale_sums[V::size()], shift_sums[V::size()];
        (of_scale + more_of_scale).store(scale_sums);
        (of_shift + more_of_shift).store(shift_sums);
        for (int64_t i = 0; i < std::min<int64_t>(count, V::size()); ++i) {
          gradients_.scale[channel + i] += scale_sums[i];
          gradients_.shift[channel + i] += shift_sums[i];
        }
      }
    }
  }

  const FrameConvolutionBackward& p_;
  const int64_t stream_;
  const FrameGradients& gradients_;
  const WeightSums<W> weight_sums_;
  const Layout<W> h_layout_, total_layout_;
  const int64_t chunk_;
  InputWindow window_;
  const int64_t before_, after_;  // output frames beside a chunk's own that its input frames reach
  std::vector<Tap> taps_;
  Workspace<W> h_, total_;
  Workspace<W> h_pairs_;      // of each row and the next: (group, from odd rows on, pair, channel)
  Workspace<W> total_pairs_;  // of every second row and the next: (panel, pair, column)
  Workspace<R> c_;
  Workspace<R> coefficients_;  // of the gradients of mean and variance
  Workspace<R> bias_;  // sums of a few rows
  Workspace<R> zeros_;
};

// Calls run(a number of x's type, a word) for the types in use.
template <typename Run>
auto with_types(const FrameConvolution& p, const Run& run) {
  switch (p.numbers) {
    case Numbers::kDouble:
      return run(double{}, double{});
    case Numbers::kBFloat16:
#ifdef CPU_CAPABILITY_AVX512
      if (matrix_product_detail::has_bfloat16_arithmetic()) {
        return run(at::BFloat16{}, Pair{});
      }
#endif
      return run(at::BFloat16{}, float{});
    default:
      return run(float{}, float{});
  }
}

}  // namespace

int64_t packed_frame_weight_bytes(const FrameConvolution& parameters, bool backward) {
  return with_types(parameters, [&](auto, auto word) {
    using W = decltype(word);
    return packed_words<W>(parameters, backward) * static_cast<int64_t>(sizeof(W));
  });
}

void pack_frame_weight(const FrameConvolution& parameters, bool backward, int64_t stream, void* packed) {
  with_types(parameters, [&](auto number, auto word) {
    pack<decltype(number)>(parameters, backward, stream, static_cast<decltype(word)*>(packed));
  });
}

void convolve_frames(const FrameConvolutionForward& parameters, int64_t stream, int64_t first, int64_t last,
                     Moments* moments) {
  with_types(parameters, [&](auto number, auto word) {
    Forward<decltype(number), decltype(word)> forward(parameters, stream, moments);
    for (int64_t sequence = first; sequence < last; ++sequence) {
      forward.convolve(sequence);
    }
  });
}

int64_t frame_weight_sums(const FrameConvolution& parameters) {
  return with_types(parameters, [&](auto, auto word) { return WeightSums<decltype(word)>(parameters.sizes).size; });
}

void convolve_frames_backward(const FrameConvolutionBackward& parameters, int64_t stream, int64_t first, int64_t last,
                              const FrameGradients& sums) {
  with_types(parameters, [&](auto number, auto word) {
    Backward<decltype(number), decltype(word)> backward(parameters, stream, sums);
    for (int64_t sequence = first; sequence < last; ++sequence) {
      backward.convolve(sequence);
    }
  });
}

void finish_frame_weight_gradient(const FrameConvolution& parameters, void* const* sums, int64_t count,
                                  void* gradient) {
  with_types(parameters, [&](auto, auto word) {
    using W = decltype(word);
    using R = RealOf<W>;
    const auto& s = parameters.sizes;
    const WeightSums<W> layout(s);
    R* sum = static_cast<R*>(sums[0]);
    for (int64_t thread = 1; thread < count; ++thread) {
      at::vec::map2<R>([](const Vec<R>& a, const Vec<R>& b) { return a + b; }, sum, sum,
                       static_cast<const R*>(sums[thread]), layout.size);
    }
    R* to = static_cast<R*>(gradient);
    for (int64_t out = 0; out < s.out_channels; ++out) {
      for (int64_t in = 0; in < s.in_channels; ++in) {
        for (int64_t tap = 0; tap < s.taps; ++tap) {
          *to++ = sum[layout.at(tap, out / layout.width, in) + out % layout.width];
        }
      }
    }
  });
}

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
