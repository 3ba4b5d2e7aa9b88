#include "cpu/graph_convolution.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/matrix_product.h"
#include "cpu/vector_register.h"
#include "cpu/widened_vector.h"
#include "cpu/workspace.h"

namespace ikem_fast::cpu::CPU_CAPABILITY {

namespace {

#ifdef CPU_CAPABILITY_AVX512
constexpr int kWide = 4;  // vectors of a row that are looked at together
#else
constexpr int kWide = 2;
#endif

constexpr int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Columns of a right factor that stand together.
constexpr int64_t kPanel = 64;

// A matrix (rows, columns) in panels of columns, each (rows, kPanel), padded with zeros: the right factor of products
// over its rows, bfloat16 in pairs of them.
template <typename Product>
class PackedMatrix {
 public:
  PackedMatrix(int64_t rows, int64_t columns)
      : rows_(paired_rows(rows)), columns_(columns), values_(rows_ * round_up(columns, kPanel)) {}

  // value(row, column)
  template <typename Value>
  void pack(int64_t rows, const Value& value) {
    constexpr bool kPaired = std::is_same_v<Product, at::BFloat16>;
    std::fill_n(values_.data(), rows_ * round_up(columns_, kPanel), Product(0.0f));
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns_; ++j) {
        Product* panel = values_.data() + j / kPanel * kPanel * rows_;
        panel[kPaired ? (i / 2 * kPanel + j % kPanel) * 2 + i % 2 : i * kPanel + j % kPanel] =
            static_cast<Product>(value(i, j));
      }
    }
  }

  const Product* panel(int64_t first_column) const { return values_.data() + first_column * rows_; }

 private:
  int64_t rows_, columns_;
  Workspace<Product> values_;
};

// A tile's numbers are used joint by joint, with a frame between one and the next, which no hardware foresees: they are
// brought to the caches before, in the order in which they stand.
template <typename T>
inline void read_ahead(const T* values, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) {
    asm volatile("" : : "r"(*reinterpret_cast<const volatile char*>(values + i)));
  }
}

template <typename T>
inline void write_ahead(const T* values, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(values + i, 1, 3);
}

// Calls run(number of frames as a constant, first frame) for frames that are looked at together.
template <typename Run>
inline __attribute__((always_inline)) void for_frames(int64_t count, const Run& run) {
  int64_t f = 0;
#ifdef CPU_CAPABILITY_AVX512
  for (; f + 8 <= count; f += 8) run(std::integral_constant<int, 8>{}, f);
#endif
  for (; f + 4 <= count; f += 4) run(std::integral_constant<int, 4>{}, f);
  for (; f < count; ++f) run(std::integral_constant<int, 1>{}, f);
}

// What a tile's rows are multiplied and added to, on the way out.
enum class Output { kPlain, kStatistics, kScaled, kActivated };

// X is what x and y hold, Product what is multiplied; sums and weights are Number.
template <typename X, typename Product>
class Tiles {
 protected:
  using Number = Widened<X>;
  using V = at::vec::Vectorized<Number>;
  using Register = typename VectorRegister<Number>::Type;
  static constexpr int64_t kSize = V::size();
  static constexpr bool kPaired = std::is_same_v<Product, at::BFloat16>;

  Tiles(const GraphConvolution& parameters, int64_t stream)
      : p_(parameters),
        plan_(*parameters.plan),
        stream_(stream),
        inner_(parameters.partitions * parameters.in_channels),
        in_stride_(round_up(parameters.in_channels, kSize)),
        out_stride_(round_up(parameters.out_channels, kSize)),
        is_ragged_(parameters.in_channels % kSize != 0),
        x_(static_cast<const X*>(parameters.x) +
           stream * parameters.batch * parameters.frames * parameters.joints * parameters.in_channels),
        bias_(of_stream(parameters.bias, parameters.partitions * parameters.out_channels)),
        weight_rows_(inner_),
        factors_(parameters.num_edges),
        gathered_(gathered_size()),
        padded_(is_ragged_ ? parameters.tile * parameters.joints * in_stride_ : 0),
        arrivals_(parameters.plan->arrivals.size()) {
    const Number* importance =
        of_stream(parameters.importance, parameters.partitions * parameters.joints * parameters.joints);
    for (int64_t e = 0; e < p_.num_edges; ++e) {
      const int32_t* edge = p_.edges + 3 * e;
      const int64_t at = (edge[0] * p_.joints + edge[1]) * p_.joints + edge[2];
      factors_.data()[e] = static_cast<const Number*>(p_.adjacency)[at] * importance[at];
    }
    const int64_t source_stride = is_ragged_ ? in_stride_ : p_.in_channels;
    for (size_t i = 0; i < plan_.arrivals.size(); ++i) {
      const auto [edge, from] = plan_.arrivals[i];
      arrivals_.data()[i] = {from * source_stride, factors_.data()[edge]};
    }
    const Number* weight = of_stream(parameters.weight, inner_ * parameters.out_channels);
    for (int64_t k = 0; k < inner_; ++k) {
      const int64_t partition = plan_.partitions[k / p_.in_channels];
      weight_rows_.data()[k] = weight + partition * p_.out_channels * p_.in_channels + k % p_.in_channels;
    }
    std::fill_n(gathered_.data(), gathered_size(), Product(0.0f));
  }

  const Number* of_stream(const void* values, int64_t size) const {
    return static_cast<const Number*>(values) + stream_ * size;
  }

  // Of the inner index k of what is gathered.
  Number weight(int64_t k, int64_t o) const { return weight_rows_.data()[k][o * p_.in_channels]; }

  int64_t depth_of(const GraphPlan::Group& group) const { return group.depth * p_.in_channels; }
  // Of rows of what is gathered, and of its gradient.
  int64_t row_stride(const GraphPlan::Group& group) const {
    return kPaired ? paired_rows(depth_of(group)) : depth_of(group);
  }

  int64_t input_frame(int64_t frame) const {
    return frame / p_.out_frames * p_.frames + frame % p_.out_frames * p_.stride;
  }
  const X* input(int64_t frame) const { return x_ + input_frame(frame) * p_.joints * p_.in_channels; }
  // Between the inputs of a tile's frames.
  int64_t input_stride() const { return p_.stride * p_.joints * p_.in_channels; }

  // How many output frames the tile that begins with one has. Their inputs are equally far apart.
  int64_t tile_size(int64_t frame, int64_t last) const {
    if (p_.stride == 1) return std::min(p_.tile, last - frame);
    const int64_t tiles = (p_.out_frames + p_.tile - 1) / p_.tile;
    const int64_t even = (p_.out_frames + tiles - 1) / tiles;
    return std::min({even, last - frame, p_.out_frames - frame % p_.out_frames});
  }

  // Joints are gathered for `count` output frames: for each group its rows (place, frame), each of the depth's
  // channels.
  void gather(int64_t first, int64_t count) {
    const X* x = input(first);
    if (!is_ragged_) {
      for (int64_t f = 0; f < count; ++f) read_ahead(x + f * input_stride(), p_.joints * p_.in_channels);
      gather_rows(x, count);
      return;
    }
    for (int64_t f = 0; f < count; ++f) {
      const X* from = x + f * input_stride();
      Number* to = padded_.data() + f * p_.joints * in_stride_;
      for (int64_t v = 0; v < p_.joints; ++v, from += p_.in_channels, to += in_stride_) {
        for (int64_t c = 0; c < p_.in_channels; ++c) to[c] = from[c];
        for (int64_t c = p_.in_channels; c < in_stride_; ++c) to[c] = Number(0);
      }
    }
    gather_rows(padded_.data(), count);
  }

  // Between frames of what is gathered from.
  template <typename Source>
  int64_t source_stride(const Source*) const {
    return std::is_same_v<Source, X> && !is_ragged_ ? input_stride() : p_.joints * in_stride_;
  }

  // Where the rows of a group begin in gathered_, for a tile of `count` frames.
  int64_t group_start(int64_t group, int64_t count) const {
    int64_t start = 0;
    for (int64_t g = 0; g < group; ++g) {
      start += paired_rows(plan_.groups[g].count * count) * row_stride(plan_.groups[g]);
    }
    return start;
  }

  const GraphConvolution& p_;
  const GraphPlan& plan_;
  const int64_t stream_, inner_, in_stride_, out_stride_;
  const bool is_ragged_;
  const X* const x_;
  const Number* const bias_;
  Workspace<const Number*> weight_rows_;
  Workspace<Number> factors_;
  Workspace<Product> gathered_;
  Workspace<Number> padded_;  // x with rows of whole vectors

 private:
  struct Arrival {
    int64_t offset;  // in a frame
    Number factor;
  };
  Workspace<Arrival> arrivals_;

  int64_t gathered_size() const { return group_start(plan_.groups.size(), p_.tile) + kSize; }

  template <typename Source>
  void gather_rows(const Source* source, int64_t count) {
    const int64_t frame_stride = source_stride(source);
    Product* to = gathered_.data();
    for (const auto& group : plan_.groups) {
      const int64_t stride = row_stride(group);
      Product* rows = to;
      for (int64_t place = 0; place < group.count; ++place, rows += count * stride) {
        const int32_t* slot = plan_.first_arrival.data() + group.first_slot + place * group.depth;
        if (is_ragged_) {
          // Vectors reach beyond what is theirs, with zeros: later ones must follow in memory.
          for (int64_t f = 0; f < count; ++f) {
            for (int64_t r = 0; r < group.depth; ++r) {
              for (int64_t c = 0; c < p_.in_channels; c += kSize) {
                gather_vectors<1>(slot[r], slot[r + 1], source + f * frame_stride + c, frame_stride,
                                  rows + f * stride + r * p_.in_channels + c, stride);
              }
            }
          }
          continue;
        }
        for (int64_t r = 0; r < group.depth; ++r) {
          for (int64_t c = 0; c < p_.in_channels; c += kSize) {
            for_frames(count, [&](auto frames, int64_t f) __attribute__((always_inline)) {
              gather_vectors<decltype(frames)::value>(slot[r], slot[r + 1], source + f * frame_stride + c,
                                                      frame_stride, rows + f * stride + r * p_.in_channels + c,
                                                      stride);
            });
          }
        }
      }
      to += paired_rows(group.count * count) * stride;
    }
  }

  template <int kFrames, typename Source>
  inline __attribute__((always_inline)) void gather_vectors(int32_t begin, int32_t end, const Source* source,
                                                            int64_t frame_stride, Product* to, int64_t stride) const {
    Register sums[kFrames];
#pragma GCC unroll 8
    for (int f = 0; f < kFrames; ++f) sums[f] = V(Number(0));
    for (const Arrival *arrival = arrivals_.data() + begin, *last = arrivals_.data() + end; arrival < last; ++arrival) {
      const V factor(arrival->factor);
      const Source* from = source + arrival->offset;
#pragma GCC unroll 8
      for (int f = 0; f < kFrames; ++f) {
        sums[f] = at::vec::fmadd(factor, load_widened(from + f * frame_stride), V(sums[f]));
      }
    }
#pragma GCC unroll 8
    for (int f = 0; f < kFrames; ++f) store_narrowed<Product, kPaired>(V(sums[f]), to + f * stride);
  }
};

template <typename X, typename Product>
class Forward : Tiles<X, Product> {
  using Base = Tiles<X, Product>;
  using typename Base::Number, typename Base::V, typename Base::Register;
  using Base::kSize, Base::kPaired, Base::p_, Base::plan_, Base::inner_, Base::out_stride_;

 public:
  Forward(const GraphConvolution& parameters, int64_t stream, const GraphStatistics* statistics)
      : Base(parameters, stream),
        statistics_(statistics),
        weights_(inner_, p_.out_channels),
        table_(p_.joints * out_stride_),
        scale_(out_stride_),
        products_(p_.tile * p_.joints * kPanel),
        is_plain_(find_plain()) {
    weights_.pack(inner_, [this](int64_t k, int64_t o) { return this->weight(k, o); });
    make_table();
    if (statistics_) {
      std::fill_n(statistics_->mean, p_.out_channels, 0.0);
      std::fill_n(statistics_->squares, p_.out_channels, 0.0);
    }
  }

  void run(int64_t first, int64_t last) {
    for (int64_t frame = first, count = 0; frame < last; frame += count) {
      count = this->tile_size(frame, last);
      if (!is_plain_) this->gather(frame, count);
      write_ahead(output(frame, 0), count * p_.joints * p_.out_channels);
      for (int64_t j = 0; j < p_.out_channels; j += kPanel) {
        multiply_panel(j, frame, count);
        if (statistics_) {
          write<Output::kStatistics>(j, frame, count);
        } else if (!p_.output_scale) {
          write<Output::kPlain>(j, frame, count);
        } else if (p_.output_activation) {
          write<Output::kActivated>(j, frame, count);
        } else {
          write<Output::kScaled>(j, frame, count);
        }
      }
      rows_before_ += count * p_.joints;
    }
  }

 private:
  X* output(int64_t frame, int64_t joint) const {
    return static_cast<X*>(p_.y) +
           ((this->stream_ * p_.batch * p_.out_frames + frame) * p_.joints + joint) * p_.out_channels;
  }

  // What is added to each joint's rows: the bias times what arrives there, then as scale and shift have it.
  void make_table() {
    std::fill_n(table_.data(), p_.joints * out_stride_, Number(0));
    std::fill_n(scale_.data(), out_stride_, Number(1));
    for (int64_t e = 0; e < p_.num_edges; ++e) {
      const int32_t* edge = p_.edges + 3 * e;
      for (int64_t o = 0; o < p_.out_channels; ++o) {
        table_.data()[edge[2] * out_stride_ + o] +=
            this->factors_.data()[e] * this->bias_[edge[0] * p_.out_channels + o];
      }
    }
    if (!p_.output_scale) return;
    const Number* scale = this->of_stream(p_.output_scale, p_.out_channels);
    const Number* shift = this->of_stream(p_.output_shift, p_.out_channels);
    std::copy_n(scale, p_.out_channels, scale_.data());
    for (int64_t w = 0; w < p_.joints; ++w) {
      for (int64_t o = 0; o < p_.out_channels; ++o) {
        Number& value = table_.data()[w * out_stride_ + o];
        value = value * scale[o] + shift[o];
      }
    }
  }

  // Whether each joint is gathered from itself alone and unchanged, so that x itself can be multiplied.
  bool find_plain() const {
    if (!std::is_same_v<X, Product> || this->is_ragged_) return false;
    if (p_.partitions != 1 || p_.num_edges != p_.joints) return false;
    for (int64_t e = 0; e < p_.num_edges; ++e) {
      if (p_.edges[3 * e + 1] != e || p_.edges[3 * e + 2] != e || this->factors_.data()[e] != Number(1)) return false;
    }
    return true;
  }

  // Rows (position, frame); of a plain projection (frame, joint), which then are the positions.
  void multiply_panel(int64_t j, int64_t frame, int64_t count) {
    const int64_t columns = std::min(kPanel, out_stride_ - j);
    if constexpr (std::is_same_v<X, Product>) {
      if (is_plain_) {
        const int64_t runs = p_.stride == 1 ? 1 : count, rows = p_.joints * count / runs;
        for (int64_t run = 0; run < runs; ++run) {
          multiply(rows, columns, p_.in_channels, this->input(frame + run), p_.in_channels, weights_.panel(j), kPanel,
                   products_.data() + run * rows * kPanel, kPanel, false);
        }
        return;
      }
    }
    int64_t start = 0;
    for (const auto& group : plan_.groups) {
      const int64_t rows = group.count * count, stride = this->row_stride(group);
      multiply(rows, columns, this->depth_of(group), this->gathered_.data() + start, stride, weights_.panel(j), kPanel,
               products_.data() + group.first * count * kPanel, kPanel, false);
      start += paired_rows(rows) * stride;
    }
  }

  template <Output kOutput>
  void write(int64_t j, int64_t frame, int64_t count) {
    const int64_t columns = std::min(kPanel, p_.out_channels - j);
    if (kOutput == Output::kStatistics) find_reference(j, columns, count);
    int64_t column = 0;
    for (; column + kWide * kSize <= columns; column += kWide * kSize) {
      write_columns<kOutput, kWide, 4 / kWide, true>(j, column, kSize, frame, count);
    }
    if constexpr (kWide > 2) {
      for (; column + 2 * kSize <= columns; column += 2 * kSize) {
        write_columns<kOutput, 2, 2, true>(j, column, kSize, frame, count);
      }
    }
    for (; column + kSize <= columns; column += kSize) {
      write_columns<kOutput, 1, 4, true>(j, column, kSize, frame, count);
    }
    if (column < columns) write_columns<kOutput, 1, 4, false>(j, column, columns - column, frame, count);
    if (kOutput == Output::kStatistics) add_statistics(j, columns, count);
  }

  // Squares are summed of differences from the mean of the tile's first few numbers. That mean is not far, in terms of
  // the tile's deviation, from the tile's own, so that nothing cancels.
  void find_reference(int64_t j, int64_t columns, int64_t count) {
    const int64_t rows = std::min<int64_t>(8, count);  // of one joint
    const int64_t row_stride = (is_plain_ ? p_.joints : 1) * kPanel;
    const Number* table = table_.data() + plan_.joints[0] * out_stride_ + j;
    for (int64_t c = 0; c < columns; ++c) {
      Number sum = 0;
      for (int64_t i = 0; i < rows; ++i) sum += products_.data()[i * row_stride + c];
      reference_[c] = sum / static_cast<Number>(rows) + table[c];
    }
  }

  template <Output kOutput, int kVectors, int kRows, bool kWhole>
  void write_columns(int64_t j, int64_t column, int64_t size, int64_t frame, int64_t count) {
    constexpr bool kWithStatistics = kOutput == Output::kStatistics;
    constexpr bool kWithScale = kOutput == Output::kScaled || kOutput == Output::kActivated;
    Register reference[kVectors], scale[kVectors], sums[kRows][kVectors], squares[kRows][kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (kWithStatistics) reference[v] = V::loadu(reference_ + column + v * kSize);
      if (kWithScale) scale[v] = V::loadu(scale_.data() + j + column + v * kSize);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[r][v] = squares[r][v] = V(Number(0));
    }
    X* const y = output(frame, 0) + j + column;
    const int64_t frame_size = p_.joints * p_.out_channels;
    const int64_t row_stride = (is_plain_ ? p_.joints : 1) * kPanel;
    for (int64_t position = 0; position < p_.joints; ++position) {
      const int64_t joint = plan_.joints[position];
      const Number* from = products_.data() + position * (is_plain_ ? 1 : count) * kPanel + column;
      X* to = y + joint * p_.out_channels;
      Register table[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        table[v] = V::loadu(table_.data() + joint * out_stride_ + j + column + v * kSize);
      }
      const auto write_row = [&](int r, const Number* row, X* out) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          V value = V::loadu(row + v * kSize);
          value = kWithScale ? at::vec::fmadd(value, V(scale[v]), V(table[v])) : value + V(table[v]);
          if (kOutput == Output::kActivated) value = at::vec::clamp_min(value, V(Number(0)));
          if (kWithStatistics) {
            const V difference = value - V(reference[v]);
            sums[r][v] = V(sums[r][v]) + difference;
            squares[r][v] = at::vec::fmadd(difference, difference, V(squares[r][v]));
          }
          if constexpr (kWhole) {
            store_narrowed<X, kPaired>(value, out + v * kSize);
          } else {
            store_narrowed<X, kPaired>(value, out, size);
          }
        }
      };
      int64_t f = 0;
      for (; f + kRows <= count; f += kRows) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) write_row(r, from + (f + r) * row_stride, to + (f + r) * frame_size);
      }
      for (; f < count; ++f) write_row(0, from + f * row_stride, to + f * frame_size);
    }
    if constexpr (kWithStatistics) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
        for (int r = 1; r < kRows; ++r) {
          sums[0][v] = V(sums[0][v]) + V(sums[r][v]);
          squares[0][v] = V(squares[0][v]) + V(squares[r][v]);
        }
        V(sums[0][v]).store(sum_ + column + v * kSize);
        V(squares[0][v]).store(square_ + column + v * kSize);
      }
    }
  }

  // The tile's mean and squares join those of the tiles before it.
  void add_statistics(int64_t j, int64_t columns, int64_t count) {
    const double rows = static_cast<double>(count * p_.joints);
    const double share = rows / (static_cast<double>(rows_before_) + rows);
    const double weight = static_cast<double>(rows_before_) * share;
    const double per_row = 1.0 / rows;
    for (int64_t c = 0; c < columns; ++c) {
      const double sum = sum_[c];
      const double from_reference = sum * per_row;
      double& mean = statistics_->mean[j + c];
      const double difference = static_cast<double>(reference_[c]) + from_reference - mean;
      statistics_->squares[j + c] += (square_[c] - sum * from_reference) + difference * difference * weight;
      mean += difference * share;
    }
  }

  const GraphStatistics* const statistics_;
  PackedMatrix<Product> weights_;
  Workspace<Number> table_, scale_, products_;
  const bool is_plain_;
  alignas(64) Number reference_[kPanel], sum_[kPanel], square_[kPanel];
  int64_t rows_before_ = 0;
};

template <typename X, typename Product>
class Backward : Tiles<X, Product> {
  using Base = Tiles<X, Product>;
  using typename Base::Number, typename Base::V, typename Base::Register;
  using Base::kSize, Base::kPaired, Base::p_, Base::plan_, Base::inner_, Base::in_stride_, Base::out_stride_;

 public:
  Backward(const GraphConvolution& parameters, int64_t stream, const GraphGradientSums& sums)
      : Base(parameters, stream),
        sums_(sums),
        total_stride_(kPaired ? paired_rows(p_.out_channels) : p_.out_channels),
        weights_(p_.out_channels, inner_),
        total_(total_size()),
        total_pairs_(kPaired ? total_size() : 0),
        gathered_pairs_(kPaired ? this->group_start(plan_.groups.size(), p_.tile) : 0),
        gathered_gradient_(gradient_start(plan_.groups.size(), p_.tile) + kSize),
        joint_sums_(p_.joints * out_stride_),
        edge_sums_(p_.num_edges * kSize),
        coefficients_(3 * out_stride_),
        departures_(plan_.departures.size()) {
    weights_.pack(p_.out_channels, [this](int64_t o, int64_t k) { return this->weight(k, o); });
    std::fill_n(static_cast<Number*>(sums_.weight), inner_ * p_.out_channels, Number(0));
    std::fill_n(sums_.joints, p_.joints * p_.out_channels, 0.0);
    std::fill_n(sums_.edges, p_.num_edges, 0.0);
    std::fill_n(joint_sums_.data(), p_.joints * out_stride_, Number(0));
    std::fill_n(edge_sums_.data(), p_.num_edges * kSize, Number(0));
    std::fill_n(total_.data(), total_size(), Product(0.0f));
    std::fill_n(gathered_gradient_.data(), gradient_start(plan_.groups.size(), p_.tile) + kSize, Number(0));
    make_coefficients();
  }

  void run(int64_t first, int64_t last) {
    constexpr int64_t kTilesOfASum = 32;  // then the sums join those in double
    int64_t tiles = 0;
    for (int64_t frame = first, count = 0; frame < last; frame += count) {
      count = this->tile_size(frame, last);
      make_total(frame, count);
      this->gather(frame, count);
      multiply_all(count);
      if (this->is_ragged_) {
        scatter(this->padded_.data(), in_stride_, frame, count);
      } else {
        scatter(this->input(frame), p_.in_channels, frame, count);
      }
      if (++tiles % kTilesOfASum == 0) flush();
    }
    flush();
  }

 private:
  int64_t total_size() const {
    int64_t rows = 0;
    for (const auto& group : plan_.groups) rows += paired_rows(group.count * p_.tile);
    return rows * total_stride_ + kSize;
  }

  int64_t gradient_stride(const GraphPlan::Group& group) const { return round_up(this->depth_of(group), kSize); }
  int64_t gradient_start(int64_t group, int64_t count) const {
    int64_t start = 0;
    for (int64_t g = 0; g < group; ++g) start += plan_.groups[g].count * count * gradient_stride(plan_.groups[g]);
    return start;
  }

  const X* of_output(const void* values, int64_t frame, int64_t joint) const {
    return static_cast<const X*>(values) +
           ((this->stream_ * p_.batch * p_.out_frames + frame) * p_.joints + joint) * p_.out_channels;
  }

  // total = y_gradient + constant + slope * (y - mean)
  void make_coefficients() {
    Number *mean = coefficients_.data(), *constant = mean + out_stride_, *slope = constant + out_stride_;
    std::fill_n(mean, 3 * out_stride_, Number(0));
    const auto count = static_cast<Number>(p_.batch * p_.out_frames * p_.joints);
    for (int64_t o = 0; o < p_.out_channels; ++o) {
      if (p_.mean_gradient) constant[o] = this->of_stream(p_.mean_gradient, p_.out_channels)[o] / count;
      if (p_.variance_gradient) {
        mean[o] = this->of_stream(p_.mean, p_.out_channels)[o];
        slope[o] = 2 * this->of_stream(p_.variance_gradient, p_.out_channels)[o] / count;
      }
    }
  }

  // Rows in the order of what is gathered; bfloat16 also in pairs of rows.
  void make_total(int64_t frame, int64_t count) {
    if (p_.variance_gradient) {
      make_total<true>(frame, count);
    } else {
      make_total<false>(frame, count);
    }
  }

  template <bool kWithVariance>
  void make_total(int64_t frame, int64_t count) {
    const X* const gradient = of_output(p_.y_gradient, frame, 0);
    const X* const y = of_output(p_.y, frame, 0);
    read_ahead(gradient, count * p_.joints * p_.out_channels);
    if (kWithVariance) read_ahead(y, count * p_.joints * p_.out_channels);
    int64_t start = 0;
    for (const auto& group : plan_.groups) {
      for (int64_t place = 0; place < group.count; ++place) {
        const int64_t joint = plan_.joints[group.first + place];
        Product* rows = total_.data() + start + place * count * total_stride_;
        int64_t j = 0;
        for (; j + kSize <= p_.out_channels; j += kSize) {
          make_total_vectors<kWithVariance, true>(gradient, y, joint, j, kSize, count, rows);
        }
        if (j < p_.out_channels) {
          make_total_vectors<kWithVariance, false>(gradient, y, joint, j, p_.out_channels - j, count, rows);
        }
      }
      const int64_t rows = group.count * count;
      if constexpr (kPaired) {
        pair_rows(rows, p_.out_channels, total_.data() + start, total_stride_, total_pairs_.data() + start);
      }
      start += paired_rows(rows) * total_stride_;
    }
  }

  template <bool kWithVariance, bool kWhole>
  inline __attribute__((always_inline)) void make_total_vectors(const X* gradient, const X* y, int64_t joint, int64_t j,
                                                                int64_t size, int64_t count, Product* rows) {
    const auto load = [size](const X* from) __attribute__((always_inline)) {
      return kWhole ? load_widened(from) : load_widened(from, size);
    };
    const V mean = V::loadu(coefficients_.data() + j);
    const V constant = V::loadu(coefficients_.data() + out_stride_ + j);
    const V slope = V::loadu(coefficients_.data() + 2 * out_stride_ + j);
    Number* const joint_sum = joint_sums_.data() + joint * out_stride_ + j;
    V sum = V::loadu(joint_sum);
    const int64_t frame_size = p_.joints * p_.out_channels;
    for (int64_t f = 0; f < count; ++f) {
      const int64_t at = f * frame_size + joint * p_.out_channels + j;
      V total = load(gradient + at) + constant;
      if constexpr (kWithVariance) total = at::vec::fmadd(slope, load(y + at) - mean, total);
      if constexpr (kWhole) {
        store_narrowed<Product, kPaired>(total, rows + f * total_stride_ + j);
      } else {
        store_narrowed<Product, kPaired>(total, rows + f * total_stride_ + j, size);
      }
      sum = sum + total;
    }
    sum.store(joint_sum);
  }

  void multiply_all(int64_t count) {
    Number* const weight_sums = static_cast<Number*>(sums_.weight);
    int64_t gathered = 0, total = 0, gradient = 0;
    for (const auto& group : plan_.groups) {
      const int64_t rows = group.count * count, depth = this->depth_of(group), stride = this->row_stride(group);
      if constexpr (kPaired) {
        Product* pairs = gathered_pairs_.data() + gathered;
        pair_rows(rows, stride, this->gathered_.data() + gathered, stride, pairs);
        multiply_transposed(depth, p_.out_channels, rows, pairs, stride, total_pairs_.data() + total, p_.out_channels,
                            weight_sums, p_.out_channels, true);
      } else {
        multiply_transposed(depth, p_.out_channels, rows, this->gathered_.data() + gathered, stride,
                            total_.data() + total, total_stride_, weight_sums, p_.out_channels, true);
      }
      const int64_t gradient_stride = this->gradient_stride(group);
      for (int64_t k = 0; k < depth; k += kPanel) {
        multiply(rows, std::min(kPanel, gradient_stride - k), p_.out_channels, total_.data() + total, total_stride_,
                 weights_.panel(k), kPanel, gathered_gradient_.data() + gradient + k, gradient_stride, false);
      }
      gathered += paired_rows(rows) * stride;
      total += paired_rows(rows) * total_stride_;
      gradient += rows * gradient_stride;
    }
  }

  // The gradient of x, from that of what was gathered, and the edges' sums.
  template <typename Source>
  void scatter(const Source* source, int64_t joint_stride, int64_t frame, int64_t count) {
    if (p_.x_gradient) {
      clear_skipped(frame, count);
      for (int64_t f = 0; f < count; ++f) {
        write_ahead(input_gradient(frame + f), p_.joints * p_.in_channels);
      }
    }
    place_departures(count);
    const int64_t whole = p_.in_channels / kSize * kSize;
    for (int64_t joint = 0; joint < p_.joints; ++joint) {
      const Source* from = source + joint * joint_stride;
      X* to = p_.x_gradient ? input_gradient(frame) + joint * p_.in_channels : nullptr;
      for (int64_t c = 0; c < whole; c += kSize) {
        for_frames(count, [&](auto frames, int64_t f) __attribute__((always_inline)) {
          scatter_vectors<decltype(frames)::value, true>(from, to, f, joint, c);
        });
      }
      for (int64_t f = 0; whole < p_.in_channels && f < count; ++f) {
        scatter_vectors<1, false>(from, to, f, joint, whole);
      }
    }
  }

  template <int kFrames, bool kWhole, typename Source>
  inline __attribute__((always_inline)) void scatter_vectors(const Source* source, X* to, int64_t f, int64_t joint,
                                                             int64_t c) {
    Register x[kFrames], gradient[kFrames];
    const int64_t frame_stride = this->source_stride(source);
    source += f * frame_stride + c;
#pragma GCC unroll 8
    for (int i = 0; i < kFrames; ++i) {
      x[i] = load_widened(source + i * frame_stride);
      gradient[i] = V(Number(0));
    }
    const Departure* departure = departures_.data() + plan_.first_departure[joint];
    const Departure* const end = departures_.data() + plan_.first_departure[joint + 1];
    for (; departure < end; ++departure) {
      const int64_t stride = departure->stride;
      const Number* from = departure->gradient + f * stride + c;
      const V factor(departure->factor);
      V sums[2] = {V::loadu(departure->sum), V(Number(0))};
#pragma GCC unroll 8
      for (int i = 0; i < kFrames; ++i) {
        const V value = V::loadu(from + i * stride);
        sums[i % 2] = at::vec::fmadd(V(x[i]), value, sums[i % 2]);
        gradient[i] = at::vec::fmadd(factor, value, V(gradient[i]));
      }
      (sums[0] + sums[1]).store(departure->sum);
    }
    if (!to) return;
    to += f * this->input_stride() + c;
#pragma GCC unroll 8
    for (int i = 0; i < kFrames; ++i) {
      if constexpr (kWhole) {
        store_narrowed<X, kPaired>(V(gradient[i]), to + i * this->input_stride());
      } else {
        store_narrowed<X, kPaired>(V(gradient[i]), to + i * this->input_stride(), p_.in_channels - c);
      }
    }
  }

  // An edge: where the gradient of what is gathered by it stands, in the first frame, its factor and its sum.
  struct Departure {
    const Number* gradient;
    int64_t stride;
    Number factor;
    Number* sum;
  };

  void place_departures(int64_t count) {
    if (count == placed_count_) return;
    placed_count_ = count;
    for (size_t d = 0; d < plan_.departures.size(); ++d) {
      const auto [edge, group, place, rank] = plan_.departures[d];
      const int64_t stride = gradient_stride(plan_.groups[group]);
      departures_.data()[d] = {gathered_gradient_.data() + gradient_start(group, count) + place * count * stride +
                                   rank * p_.in_channels,
                               stride, this->factors_.data()[edge], edge_sums_.data() + edge * kSize};
    }
  }

  X* input_gradient(int64_t frame) const {
    return static_cast<X*>(p_.x_gradient) + (this->stream_ * p_.batch * p_.frames + this->input_frame(frame)) *
                                                p_.joints * p_.in_channels;
  }

  // Frames of x between those that are read have no gradient.
  void clear_skipped(int64_t frame, int64_t count) {
    if (p_.stride == 1) return;
    for (int64_t f = frame; f < frame + count; ++f) {
      const int64_t left = p_.frames - f % p_.out_frames * p_.stride;
      const int64_t frame_size = p_.joints * p_.in_channels;
      std::fill_n(input_gradient(f) + frame_size, (std::min(p_.stride, left) - 1) * frame_size, X(0.0f));
    }
  }

  void flush() {
    for (int64_t w = 0; w < p_.joints; ++w) {
      for (int64_t o = 0; o < p_.out_channels; ++o) {
        Number& sum = joint_sums_.data()[w * out_stride_ + o];
        sums_.joints[w * p_.out_channels + o] += sum;
        sum = 0;
      }
    }
    for (int64_t e = 0; e < p_.num_edges; ++e) {
      for (int64_t i = 0; i < kSize; ++i) {
        Number& sum = edge_sums_.data()[e * kSize + i];
        sums_.edges[e] += sum;
        sum = 0;
      }
    }
  }

  const GraphGradientSums sums_;
  const int64_t total_stride_;
  PackedMatrix<Product> weights_;
  Workspace<Product> total_, total_pairs_, gathered_pairs_;
  Workspace<Number> gathered_gradient_, joint_sums_, edge_sums_, coefficients_;
  Workspace<Departure> departures_;
  int64_t placed_count_ = 0;
};

// Calls run with x's numbers and those of products.
template <typename Run>
void choose_numbers(Numbers numbers, const Run& run) {
  switch (numbers) {
    case Numbers::kFloat:
      return run(float{}, float{});
    case Numbers::kDouble:
      return run(double{}, double{});
    case Numbers::kBFloat16:
#ifdef CPU_CAPABILITY_AVX512
      if (has_bfloat16_products()) {
        run(at::BFloat16{}, at::BFloat16{});
        if (at::native::cpublas::could_pack(at::kBFloat16)) {
          at::native::cpublas::brgemm_release(/*is_vnni=*/true);
        }
        return;
      }
#endif
      return run(at::BFloat16{}, float{});
  }
}

}  // namespace

void convolve_graph(const GraphConvolution& parameters, int64_t stream, int64_t first, int64_t last,
                    const GraphStatistics* statistics) {
  choose_numbers(parameters.numbers, [&](auto x, auto product) {
    Forward<decltype(x), decltype(product)>(parameters, stream, statistics).run(first, last);
  });
}

void convolve_graph_backward(const GraphConvolution& parameters, int64_t stream, int64_t first, int64_t last,
                             const GraphGradientSums& sums) {
  choose_numbers(parameters.numbers, [&](auto x, auto product) {
    Backward<decltype(x), decltype(product)>(parameters, stream, sums).run(first, last);
  });
}

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
