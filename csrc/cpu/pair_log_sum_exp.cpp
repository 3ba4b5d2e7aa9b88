#include "cpu/pair_log_sum_exp.h"

#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/exponential.h"
#include "cpu/matrix_product.h"
#include "cpu/queue_columns.h"
#include "cpu/workspace.h"

namespace ikem_fast::cpu::CPU_CAPABILITY {

namespace {

constexpr double kLog2E = 1.44269504088896340736;

// Sums that are taken together, so that the left similarities are read once for them. The number is also in the pragmas
// that unroll loops over them: their sums are to be in registers.
constexpr int kGroup = 4;

// Up to this size logits are made in one operation together with what is subtracted from them. Of larger ones this would
// leave a rest of the size of their rounding, of which the exponential may be anything.
constexpr double kSmallLogit = 64;

template <typename T>
struct Types {
  using Real = T;
  // A sum relative to a bound above all its terms keeps its digits while the logits are less than this far below the
  // bound; with larger ones the sum is relative to its largest term.
  static constexpr double kSpread = std::is_same_v<T, double> ? 2 * kSmallLogit : 60;
};

template <>
struct Types<at::BFloat16> : Types<float> {};

// The exponent of two of a logit, the product of a scaled similarity and a factor, relative to a reference.
template <bool kSmall, typename V>
inline __attribute__((always_inline)) V exponent_of_two(const V& scaled, const V& factor, const V& reference) {
  using Real = typename V::value_type;
  if constexpr (kSmall) {
    return at::vec::fmsub(scaled, factor, reference);
  } else {
    return (scaled * factor - reference) * V(static_cast<Real>(kLog2E));
  }
}

// What exponent_of_two wants as the scale or the reference.
template <bool kSmall, typename Real>
Real in_its_unit(Real value) {
  return kSmall ? value * static_cast<Real>(kLog2E) : value;
}

// What passes over similarities need of the parameters, with types. T is the element of the products' factors.
template <typename T, typename Q>
class Tile {
 public:
  using Real = typename Types<T>::Real;
  using V = at::vec::Vectorized<Real>;

  Tile(const PairLogSumExp& parameters, bool transposed)
      : p(parameters),
        // Rows of similarities begin on whole registers, also in bfloat16, with room for a zero behind the last column.
        stride((p.tile / 32 + 1) * 32),
        x_tile_size_(paired_rows(p.size) * p.tile),
        y_tile_size_(p.with_y() ? paired_rows(p.y_size) * p.tile : 0),
        transposed_size_(transposed ? p.left_size() * paired_rows(p.tile) : 0),
        straight_(p.num_x * x_tile_size_ + y_tile_size_),
        transposed_(transposed_size_ * (p.with_y() ? 1 : p.num_x)),
        scratch_(std::is_same_v<T, at::BFloat16> ? std::max(p.size, p.y_size) * paired_rows(p.tile) : 0),
        similarities_(p.num_channels() * p.row_block * stride) {}

  // The tile of columns from `first`.
  void load(int64_t first) {
    begin = first;
    columns = std::min(p.tile, p.num_columns - first);
    whole = columns / V::size() * V::size();
    for (int64_t a = 0; a < p.num_x; ++a) {
      const QueueView<Q> queue{static_cast<const Q*>(p.queue) + a * p.queue_strides[0], p.queue_strides[1],
                               p.queue_strides[2]};
      load_columns(queue, p.size, begin, columns, straight_.data() + a * x_tile_size_,
                   transposed_size_ == 0 || p.with_y() ? nullptr : transposed_.data() + a * transposed_size_,
                   scratch_.data());
    }
    if (p.with_y()) {
      const QueueView<Q> queue{static_cast<const Q*>(p.y_queue), p.y_queue_strides[0], p.y_queue_strides[1]};
      load_columns(queue, p.y_size, begin, columns, straight_.data() + p.num_x * x_tile_size_,
                   transposed_size_ == 0 ? nullptr : transposed_.data(), scratch_.data());
    }
  }

  // Similarities of `rows` rows from `first_row` with this tile's columns.
  void multiply_rows(int64_t first_row, int64_t rows) {
    for (int64_t channel = 0; channel < p.num_channels(); ++channel) {
      const bool of_x = channel < p.num_x;
      const int64_t row_stride = of_x ? p.x_stride : p.y_stride;
      const int64_t of = of_x ? channel : channel - p.num_x;
      const T* const left =
          static_cast<const T*>(of_x ? p.x : p.y) + (of * p.num_rows + first_row) * row_stride;
      const T* const right = straight_.data() + (of_x ? channel : p.num_x) * x_tile_size_;
      multiply(rows, columns, of_x ? p.size : p.y_size, left, row_stride, right, columns, row(channel, 0), stride,
               /*accumulate=*/false);
      for (int64_t i = 0; i < rows && whole < columns; ++i) {
        std::fill(row(channel, i) + columns, row(channel, i) + whole + V::size(), Real(0));
      }
    }
  }

  Real* row(int64_t channel, int64_t i) const {
    return similarities_.data() + (channel * p.row_block + i) * stride;
  }
  const T* transposed(int64_t left) const { return transposed_.data() + (p.with_y() ? 0 : left) * transposed_size_; }

  const PairLogSumExp& p;
  const int64_t stride;
  int64_t begin = 0;
  int64_t columns = 0;
  int64_t whole = 0;  // columns in whole registers; behind the last column a register is filled up with zeros

 private:
  const int64_t x_tile_size_;
  const int64_t y_tile_size_;
  const int64_t transposed_size_;
  const Workspace<T> straight_;
  const Workspace<T> transposed_;
  const Workspace<T> scratch_;
  const Workspace<Real> similarities_;
};

template <typename Real>
bool is_better(const Neighbour<Real>& a, const Neighbour<Real>& b) {
  return a.value > b.value || (a.value == b.value && a.position < b.position);
}

template <typename V>
auto largest_lane(const V& values) {
  return at::vec::vec_reduce_all<typename V::value_type>([](V a, V b) { return at::vec::maximum(a, b); }, values);
}

// ---- forward

template <typename T, typename Q>
class Forward {
 public:
  using Real = typename Types<T>::Real;
  using V = at::vec::Vectorized<Real>;

  Forward(const PairLogSumExp& parameters, int64_t chunk, int64_t first_row, int64_t end_row)
      : p(parameters),
        tile_(parameters, /*transposed=*/false),
        chunk_(chunk),
        first_row_(first_row),
        end_row_(end_row),
        scale_(static_cast<Real>(p.scale)),
        sums_((end_row - first_row) * p.num_sums() * V::size()),
        references_((end_row - first_row) * p.num_sums(), -std::numeric_limits<Real>::infinity()),
        bounds_((end_row - first_row) * p.num_channels(), Real(-1)),
        counts_((end_row - first_row) * p.num_x, 0),
        neighbours_(static_cast<Neighbour<Real>*>(p.neighbours) + chunk * p.num_x * p.num_rows * p.most_neighbours),
        mined_(static_cast<Real*>(p.mined_values) +
               chunk * p.num_x * p.num_rows * p.most_neighbours * p.num_mined()) {
    std::fill(sums_.data(), sums_.data() + (end_row - first_row) * p.num_sums() * V::size(), Real(0));
  }

  void run() {
    for (int64_t t = p.first_tile(chunk_); t < p.first_tile(chunk_ + 1); ++t) {
      tile_.load(t * p.tile);
      for (int64_t first = first_row_; first < end_row_; first += p.row_block) {
        const int64_t rows = std::min(p.row_block, end_row_ - first);
        tile_.multiply_rows(first, rows);
        for (int64_t i = 0; i < rows; ++i) {
          measure(first + i, i);
          for (int64_t left = 0; left < p.num_left(); ++left) {
            add_sums(first + i, i, left);
          }
        }
      }
    }
    finish();
  }

 private:
  Real* sums(int64_t n, int64_t sum) const {
    return sums_.data() + ((n - first_row_) * p.num_sums() + sum) * V::size();
  }
  Real& reference(int64_t n, int64_t sum) { return references_[(n - first_row_) * p.num_sums() + sum]; }

  // Makes a sum relative to a larger reference.
  void raise_reference(int64_t n, int64_t sum, Real to) {
    Real& from = reference(n, sum);
    (V::loadu(sums(n, sum)) * V(std::exp(from - to))).store(sums(n, sum));
    from = to;
  }

  bool is_bounded(Real bound) const { return 2 * bound <= Real(Types<T>::kSpread); }

  // Bounds of the row's similarities, from which the references of its sums follow, and its neighbours.
  void measure(int64_t n, int64_t i) {
    Real* const bounds = bounds_.data() + (n - first_row_) * p.num_channels();
    bool grown = false;
    for (int64_t channel = 0; channel < p.num_channels(); ++channel) {
      const Real* const values = tile_.row(channel, i);
      V length(Real(0)), largest(-std::numeric_limits<Real>::infinity());
      for (int64_t j = 0; j < tile_.columns; j += V::size()) {
        const V value = V::loadu(values + j);
        length = at::vec::clamp_min(value.abs(), length);
        largest = at::vec::clamp_min(value, largest);
      }
      const Real bound = largest_lane(length);
      if (bound > bounds[channel]) {
        bounds[channel] = bound;
        grown = true;
      }
      if (channel < p.num_x) mine(channel, n, i, largest);
    }
    if (!grown) return;
    for (int64_t left = 0; left < p.num_left(); ++left) {
      const Real left_bound = bounds[p.left_channel(left)] * scale_;
      follow_bound(n, left, left_bound);
      for (int64_t partner = p.first_partner(left); partner < p.num_x; ++partner) {
        follow_bound(n, p.num_left() + p.pair_row(left, partner), left_bound * bounds[partner]);
      }
    }
  }

  void follow_bound(int64_t n, int64_t sum, Real bound) {
    if (is_bounded(bound) && bound > reference(n, sum)) raise_reference(n, sum, bound);
  }

  // Takes the tile's values that are among the largest of a row so far, given the largest of every lane.
  void mine(int64_t a, int64_t n, int64_t i, const V& largest) {
    int64_t& count = counts_[(n - first_row_) * p.num_x + a];
    Neighbour<Real>* const heap = neighbours_ + (a * p.num_rows + n) * p.most_neighbours;  // the worst is in front
    const Real* const values = tile_.row(a, i);
    int64_t j = 0;
    for (; count < p.most_neighbours && j < tile_.columns; ++j, ++count) {
      heap[count] = {values[j], static_cast<int32_t>(count), tile_.begin + j};
      note_mined(a, n, i, j, count);
      std::push_heap(heap, heap + count + 1, is_better<Real>);
    }
    if (count < p.most_neighbours || !any_above(largest, heap->value)) return;
    while (j < tile_.columns) {
      if (j + V::size() <= tile_.columns && !any_above(V::loadu(values + j), heap->value)) {
        j += V::size();
        continue;
      }
      for (const int64_t end = std::min(tile_.columns, j + V::size()); j < end; ++j) {
        if (!(values[j] > heap->value)) continue;  // of equal values the earlier one stays
        std::pop_heap(heap, heap + count, is_better<Real>);
        const int32_t freed = heap[count - 1].mined_row;
        heap[count - 1] = {values[j], freed, tile_.begin + j};
        note_mined(a, n, i, j, freed);
        std::push_heap(heap, heap + count, is_better<Real>);
      }
    }
  }

  static bool any_above(const V& values, Real limit) {
    return (values > V(limit)).zero_mask() != static_cast<int>((int64_t{1} << V::size()) - 1);
  }

  void note_mined(int64_t a, int64_t n, int64_t i, int64_t j, int64_t mined_row) {
    Real* const out = mined_ + ((a * p.num_rows + n) * p.most_neighbours + mined_row) * p.num_mined();
    for (int64_t index = 0; index < p.num_mined(); ++index) {
      out[index] = tile_.row(p.mined_channel(a, index), i)[j];
    }
  }

  // The sums of a left channel: its own and those with its partners.
  void add_sums(int64_t n, int64_t i, int64_t left) {
    const Real* const left_values = tile_.row(p.left_channel(left), i);
    const Real* const bounds = bounds_.data() + (n - first_row_) * p.num_channels();
    const Real left_bound = bounds[p.left_channel(left)] * scale_;
    // Partner first - 1 is none: the sum of the left similarities themselves.
    const int64_t first = p.first_partner(left);
    for (int64_t partner = first - 1; partner < p.num_x; partner += kGroup) {
      const int64_t count = std::min<int64_t>(kGroup, p.num_x - partner);
      const Real* factors[kGroup];
      int64_t sum_rows[kGroup];
      bool all_bounded = true;
      for (int64_t g = 0; g < count; ++g) {
        const bool alone = partner + g < first;
        factors[g] = alone ? nullptr : tile_.row(partner + g, i);
        sum_rows[g] = alone ? left : p.num_left() + p.pair_row(left, partner + g);
        if (!is_bounded(alone ? left_bound : left_bound * bounds[partner + g])) {
          all_bounded = false;
          follow_largest(n, sum_rows[g], left_values, factors[g]);
        }
      }
      if (all_bounded) {
        add_group<true>(count, n, left_values, factors, sum_rows);
      } else {
        add_group<false>(count, n, left_values, factors, sum_rows);
      }
    }
  }

  // Makes a sum relative to the largest logit so far, this tile's included.
  void follow_largest(int64_t n, int64_t sum, const Real* left, const Real* factor) {
    const V scale(scale_);
    V largest(-std::numeric_limits<Real>::infinity());
    const auto logit = [&](int64_t j) {
      const V scaled = V::loadu(left + j) * scale;
      return factor == nullptr ? scaled : scaled * V::loadu(factor + j);
    };
    for (int64_t j = 0; j < tile_.whole; j += V::size()) {
      largest = at::vec::clamp_min(logit(j), largest);
    }
    if (tile_.whole < tile_.columns) {
      largest = V::set(largest, at::vec::clamp_min(logit(tile_.whole), largest), tile_.columns - tile_.whole);
    }
    const Real value = largest_lane(largest);
    if (value > reference(n, sum)) raise_reference(n, sum, value);
  }

  template <bool kBounded>
  void add_group(int64_t count, int64_t n, const Real* left, const Real* const* factors, const int64_t* sum_rows) {
    if (factors[0] == nullptr) {
      switch (count) {
        case 1: return add_group<kBounded, true, 1>(n, left, factors, sum_rows);
        case 2: return add_group<kBounded, true, 2>(n, left, factors, sum_rows);
        case 3: return add_group<kBounded, true, 3>(n, left, factors, sum_rows);
        default: return add_group<kBounded, true, kGroup>(n, left, factors, sum_rows);
      }
    }
    switch (count) {
      case 1: return add_group<kBounded, false, 1>(n, left, factors, sum_rows);
      case 2: return add_group<kBounded, false, 2>(n, left, factors, sum_rows);
      case 3: return add_group<kBounded, false, 3>(n, left, factors, sum_rows);
      default: return add_group<kBounded, false, kGroup>(n, left, factors, sum_rows);
    }
  }

  // kAlone: the first sum has no factors.
  template <bool kBounded, bool kAlone, int kCount>
  void add_group(int64_t n, const Real* left, const Real* const* factors, const int64_t* sum_rows) {
    const V scale(in_its_unit<kBounded>(scale_));
    V references[kCount], totals[kCount];
#pragma GCC unroll 4
    for (int g = 0; g < kCount; ++g) {
      references[g] = V(in_its_unit<kBounded>(reference(n, sum_rows[g])));
      totals[g] = V(Real(0));
    }
    const auto term = [&](const V& scaled, int g, int64_t j) __attribute__((always_inline)) {
      const V factor = kAlone && g == 0 ? V(Real(1)) : V::loadu(factors[g] + j);
      return power_of_two<!kBounded>(exponent_of_two<kBounded>(scaled, factor, references[g]));
    };
    for (int64_t j = 0; j < tile_.whole; j += V::size()) {
      const V scaled = V::loadu(left + j) * scale;
#pragma GCC unroll 4
      for (int g = 0; g < kCount; ++g) {
        totals[g] = totals[g] + term(scaled, g, j);
      }
    }
    if (tile_.whole < tile_.columns) {
      const V scaled = V::loadu(left + tile_.whole) * scale;
#pragma GCC unroll 4
      for (int g = 0; g < kCount; ++g) {
        const V last = term(scaled, g, tile_.whole);
        totals[g] = totals[g] + V::set(V(Real(0)), last, tile_.columns - tile_.whole);
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < kCount; ++g) {
      (V::loadu(sums(n, sum_rows[g])) + totals[g]).store(sums(n, sum_rows[g]));
    }
  }

  void finish() {
    for (int64_t sum = 0; sum < p.num_sums(); ++sum) {
      for (int64_t n = first_row_; n < end_row_; ++n) {
        double total = 0;
        for (int64_t lane = 0; lane < V::size(); ++lane) {
          total += sums(n, sum)[lane];
        }
        p.partial[(chunk_ * p.num_sums() + sum) * p.num_rows + n] = reference(n, sum) + std::log(total);
      }
    }
  }

  const PairLogSumExp& p;
  Tile<T, Q> tile_;
  const int64_t chunk_;
  const int64_t first_row_;
  const int64_t end_row_;
  const Real scale_;
  const Workspace<Real> sums_;     // of exp(logit - reference), one a lane
  std::vector<Real> references_;
  std::vector<Real> bounds_;       // largest absolute similarities so far
  std::vector<int64_t> counts_;    // neighbours so far
  Neighbour<Real>* const neighbours_;
  Real* const mined_;
};

template <typename Real>
void join(const PairLogSumExp& p, int64_t begin, int64_t end) {
  for (int64_t sum = 0; sum < p.num_sums(); ++sum) {
    Real* const out = sum < p.num_left() ? static_cast<Real*>(p.single) + sum * p.num_rows
                                         : static_cast<Real*>(p.pair) + (sum - p.num_left()) * p.num_rows;
    for (int64_t n = begin; n < end; ++n) {
      const auto part = [&](int64_t chunk) { return p.partial[(chunk * p.num_sums() + sum) * p.num_rows + n]; };
      double largest = part(0), total = 0;
      for (int64_t chunk = 1; chunk < p.column_chunks; ++chunk) {
        largest = std::max(largest, part(chunk));
      }
      for (int64_t chunk = 0; chunk < p.column_chunks; ++chunk) {
        total += std::exp(part(chunk) - largest);
      }
      out[n] = static_cast<Real>(largest + std::log(total));
    }
  }
  struct Found {
    Neighbour<Real> neighbour;
    int64_t chunk;
  };
  std::vector<Found> found;
  for (int64_t a = 0; a < p.num_x; ++a) {
    for (int64_t n = begin; n < end; ++n) {
      found.clear();
      for (int64_t chunk = 0; chunk < p.column_chunks; ++chunk) {
        const int64_t columns = std::min(p.first_tile(chunk + 1) * p.tile, p.num_columns) - p.first_tile(chunk) * p.tile;
        const auto* const of_chunk = static_cast<const Neighbour<Real>*>(p.neighbours) +
                                     ((chunk * p.num_x + a) * p.num_rows + n) * p.most_neighbours;
        for (int64_t i = 0; i < std::min(columns, p.most_neighbours); ++i) {
          found.push_back({of_chunk[i], chunk});
        }
      }
      // With NaNs there is no order, which this sort survives.
      std::partial_sort(found.begin(), found.begin() + p.topk, found.end(),
                        [](const Found& b, const Found& c) { return is_better(b.neighbour, c.neighbour); });
      for (int64_t i = 0; i < p.topk; ++i) {
        const int64_t row = (a * p.num_rows + n) * p.topk + i;
        p.positions[row] = found[i].neighbour.position;
        const int64_t mined_row =
            ((found[i].chunk * p.num_x + a) * p.num_rows + n) * p.most_neighbours + found[i].neighbour.mined_row;
        std::copy_n(static_cast<const Real*>(p.mined_values) + mined_row * p.num_mined(), p.num_mined(),
                    static_cast<Real*>(p.mined) + row * p.num_mined());
      }
    }
  }
}

// ---- backward

template <typename T, typename Q>
class Backward {
 public:
  using Real = typename Types<T>::Real;
  using V = at::vec::Vectorized<Real>;

  Backward(const PairLogSumExp& parameters, int64_t chunk, int64_t first_row, int64_t end_row)
      : p(parameters),
        tile_(parameters, /*transposed=*/true),
        chunk_(chunk),
        first_row_(first_row),
        end_row_(end_row),
        scale_(static_cast<Real>(p.scale)),
        zeros_(tile_.stride, Real(0)),
        gradients_(p.num_left() * p.row_block * tile_.stride),
        rounded_(std::is_same_v<T, Real> ? 0 : p.row_block * tile_.stride) {}

  void run() {
    const int64_t first_tile = p.first_tile(chunk_);
    for (int64_t t = first_tile; t < p.first_tile(chunk_ + 1); ++t) {
      tile_.load(t * p.tile);
      for (int64_t first = first_row_; first < end_row_; first += p.row_block) {
        const int64_t rows = std::min(p.row_block, end_row_ - first);
        tile_.multiply_rows(first, rows);
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t left = 0; left < p.num_left(); ++left) {
            add_shares(first + i, i, left);
          }
          add_mined(first + i, i);
        }
        for (int64_t left = 0; left < p.num_left(); ++left) {
          multiply_gradient(first, rows, left, /*accumulate=*/t > first_tile);
        }
      }
    }
  }

 private:
  // The gradient with respect to a row of similarities.
  Real* gradient(int64_t left, int64_t i) const {
    return gradients_.data() + (left * p.row_block + i) * tile_.stride;
  }

  // Of one sum: its value, the factors of its logits, the weight of its shares, and where their gradient is and goes.
  struct Sum {
    const Real* factors = nullptr;
    Real log_sum_exp = 0;
    Real weight = 0;
    const Real* from = nullptr;
    Real* to = nullptr;
  };

  // Gradients of the sums of a left channel: its own and those with its partners.
  void add_shares(int64_t n, int64_t i, int64_t left) {
    // A row's gradients begin with the first sum that they are of.
    bool begins = p.with_y() || left == 0;
    const int64_t first = p.first_partner(left);
    for (int64_t partner = first - 1; partner < p.num_x; partner += kGroup) {
      const int64_t count = std::min<int64_t>(kGroup, p.num_x - partner);
      Sum sums[kGroup];
      bool all_small = true;
      for (int64_t g = 0; g < count; ++g) {
        const bool alone = partner + g < first;
        const int64_t row = alone ? left * p.num_rows + n : p.pair_row(left, partner + g) * p.num_rows + n;
        Sum& sum = sums[g];
        sum.factors = alone ? nullptr : tile_.row(partner + g, i);
        sum.log_sum_exp = static_cast<const Real*>(alone ? p.single : p.pair)[row];
        sum.weight = static_cast<const Real*>(alone ? p.single_gradient : p.pair_gradient)[row] * scale_;
        if (!alone && !p.with_y()) {
          sum.to = gradient(partner + g, i);
          sum.from = left == 0 ? zeros_.data() : sum.to;
        }
        all_small = all_small && std::abs(sum.log_sum_exp) <= Real(kSmallLogit);
      }
      const Real* const from = begins ? zeros_.data() : gradient(left, i);
      if (all_small) {
        add_group<true>(count, i, left, from, sums);
      } else {
        add_group<false>(count, i, left, from, sums);
      }
      begins = false;
    }
  }

  template <bool kSmall>
  void add_group(int64_t count, int64_t i, int64_t left, const Real* from, const Sum* sums) {
    if (p.with_y()) {
      add_group<kSmall, false>(count, i, left, from, sums);
    } else {
      add_group<kSmall, true>(count, i, left, from, sums);
    }
  }

  template <bool kSmall, bool kBoth>
  void add_group(int64_t count, int64_t i, int64_t left, const Real* from, const Sum* sums) {
    if (sums[0].factors == nullptr) {
      switch (count) {
        case 1: return add_group<kSmall, kBoth, true, 1>(i, left, from, sums);
        case 2: return add_group<kSmall, kBoth, true, 2>(i, left, from, sums);
        case 3: return add_group<kSmall, kBoth, true, 3>(i, left, from, sums);
        default: return add_group<kSmall, kBoth, true, kGroup>(i, left, from, sums);
      }
    }
    switch (count) {
      case 1: return add_group<kSmall, kBoth, false, 1>(i, left, from, sums);
      case 2: return add_group<kSmall, kBoth, false, 2>(i, left, from, sums);
      case 3: return add_group<kSmall, kBoth, false, 3>(i, left, from, sums);
      default: return add_group<kSmall, kBoth, false, kGroup>(i, left, from, sums);
    }
  }

  // kBoth: partners have gradients too. kAlone: the first sum has no partner.
  template <bool kSmall, bool kBoth, bool kAlone, int kCount>
  void add_group(int64_t i, int64_t left, const Real* from, const Sum* sums) {
    const Real* const left_values = tile_.row(p.left_channel(left), i);
    Real* const to = gradient(left, i);
    const V scale(in_its_unit<kSmall>(scale_));
    V references[kCount], weights[kCount];
    // Copies, which stores of gradients cannot change.
    const Real* factors[kCount];
    const Real* partners_from[kCount];
    Real* partners_to[kCount];
#pragma GCC unroll 4
    for (int g = 0; g < kCount; ++g) {
      references[g] = V(in_its_unit<kSmall>(sums[g].log_sum_exp));
      weights[g] = V(sums[g].weight);
      factors[g] = sums[g].factors;
      partners_from[g] = sums[g].from;
      partners_to[g] = sums[g].to;
    }
    for (int64_t j = 0; j < tile_.columns; j += V::size()) {
      const V left_value = V::loadu(left_values + j);
      const V scaled = left_value * scale;
      V total = V::loadu(from + j);
#pragma GCC unroll 4
      for (int g = 0; g < kCount; ++g) {
        const V factor = kAlone && g == 0 ? V(Real(1)) : V::loadu(factors[g] + j);
        const V share = weights[g] * power_of_two(exponent_of_two<kSmall>(scaled, factor, references[g]));
        if (kAlone && g == 0) {
          total = total + share;
          continue;
        }
        total = at::vec::fmadd(share, factor, total);
        if (kBoth) {
          at::vec::fmadd(share, left_value, V::loadu(partners_from[g] + j)).store(partners_to[g] + j);
        }
      }
      total.store(to + j);
    }
  }

  // Gradients of the neighbours that are in this tile.
  void add_mined(int64_t n, int64_t i) {
    const int64_t* const order = p.mined_order + n * p.num_x * p.topk;
    const auto row_of = [&](int64_t entry) {
      return (entry / p.topk * p.num_rows + n) * p.topk + entry % p.topk;
    };
    const int64_t* entry =
        std::partition_point(order, order + p.num_x * p.topk,
                             [&](int64_t other) { return p.positions[row_of(other)] < tile_.begin; });
    for (; entry < order + p.num_x * p.topk; ++entry) {
      const int64_t row = row_of(*entry);
      const int64_t column = p.positions[row] - tile_.begin;
      if (column >= tile_.columns) break;
      const Real* const values = static_cast<const Real*>(p.mined_gradient) + row * p.num_mined();
      for (int64_t left = 0; left < p.num_left(); ++left) {
        gradient(left, i)[column] += values[p.with_y() ? 1 + left : left];
      }
    }
  }

  void multiply_gradient(int64_t first, int64_t rows, int64_t left, bool accumulate) {
    const int64_t size = p.left_size();
    Real* const out = static_cast<Real*>(p.gradient) + ((chunk_ * p.num_left() + left) * p.num_rows + first) * size;
    const T* factor;
    if constexpr (std::is_same_v<T, Real>) {
      factor = gradient(left, 0);
    } else {
      factor = rounded_.data();
      for (int64_t i = 0; i < rows; ++i) {
        const Real* const from = gradient(left, i);
        T* const to = rounded_.data() + i * tile_.stride;
        for (int64_t j = 0; j < tile_.columns; j += 2 * V::size()) {  // rows hold whole pairs of registers
          at::vec::convert_from_float<T>(V::loadu(from + j), V::loadu(from + j + V::size())).store(to + j);
        }
        to[tile_.columns] = T(0.0f);  // read where their number is odd
      }
    }
    multiply(rows, size, tile_.columns, factor, tile_.stride, tile_.transposed(left), size, out, size, accumulate);
  }

  const PairLogSumExp& p;
  Tile<T, Q> tile_;
  const int64_t chunk_;
  const int64_t first_row_;
  const int64_t end_row_;
  const Real scale_;
  const std::vector<Real> zeros_;
  const Workspace<Real> gradients_;
  const Workspace<T> rounded_;
};

// ---- types

template <template <typename, typename> class Pass, typename T, typename Q>
void run_items(const PairLogSumExp& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t rows = item % p.row_chunks;
    Pass<T, Q>(p, item / p.row_chunks, p.first_row(rows), p.first_row(rows + 1)).run();
  }
  at::native::cpublas::brgemm_release();
}

template <template <typename, typename> class Pass>
void run_items(const PairLogSumExp& p, int64_t begin, int64_t end) {
  if (p.element == MatrixElement::kDouble) {
    run_items<Pass, double, double>(p, begin, end);
  } else if (p.element == MatrixElement::kFloat) {
    run_items<Pass, float, float>(p, begin, end);
  } else if (p.queue_element == MatrixElement::kFloat) {
    run_items<Pass, at::BFloat16, float>(p, begin, end);
  } else {
    run_items<Pass, at::BFloat16, at::BFloat16>(p, begin, end);
  }
}

}  // namespace

void pair_log_sum_exp(const PairLogSumExp& p, int64_t begin, int64_t end) { run_items<Forward>(p, begin, end); }

void join_pair_log_sum_exp(const PairLogSumExp& p, int64_t begin, int64_t end) {
  if (p.element == MatrixElement::kDouble) {
    join<double>(p, begin, end);
  } else {
    join<float>(p, begin, end);
  }
}

void pair_log_sum_exp_backward(const PairLogSumExp& p, int64_t begin, int64_t end) {
  run_items<Backward>(p, begin, end);
}

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
