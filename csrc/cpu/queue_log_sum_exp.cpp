#include "cpu/queue_log_sum_exp.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/exponential.h"
#include "cpu/matrix_product.h"
#include "cpu/queue_columns.h"
#include "cpu/workspace.h"

namespace ikem_fast::cpu::CPU_CAPABILITY {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Rows whose similarities to a tile are in the cache at a time.
constexpr int64_t kRowsAtATime = 192;

template <typename T>
constexpr int64_t round_up(int64_t count) {
  return (count + at::vec::Vectorized<T>::size() - 1) / at::vec::Vectorized<T>::size() * at::vec::Vectorized<T>::size();
}

// The largest of whole vectors of numbers; NaN if one of them is.
template <typename T>
T find_largest(const T* values, int64_t count) {
  using V = at::vec::Vectorized<T>;
  V largest[2] = {V::loadu(values), V::loadu(values)};
  int64_t j = V::size();
  for (; j + 2 * V::size() <= count; j += 2 * V::size()) {
    largest[0] = at::vec::maximum(largest[0], V::loadu(values + j));
    largest[1] = at::vec::maximum(largest[1], V::loadu(values + j + V::size()));
  }
  if (j < count) {
    largest[0] = at::vec::maximum(largest[0], V::loadu(values + j));
  }
  return at::vec::vec_reduce_all<T>([](V& a, V& b) { return at::vec::maximum(a, b); },
                                    at::vec::maximum(largest[0], largest[1]));
}

// Whole vectors of similarities become exp(scale (s - largest)), whose sum is returned.
template <typename T>
T exponentiate(T* values, int64_t count, T largest, T scale) {
  using V = at::vec::Vectorized<T>;
  const V shift(largest), factor(scale);
  V sum(T(0));
  for (int64_t j = 0; j < count; j += V::size()) {
    const V value = exponential<T>((V::loadu(values + j) - shift) * factor);
    value.store(values + j);
    sum = sum + value;
  }
  return at::vec::vec_reduce_all<T>([](V& a, V& b) { return a + b; }, sum);
}

template <typename T>
void scale_row(T* values, int64_t count, T factor) {
  using V = at::vec::Vectorized<T>;
  at::vec::map<T>([factor](V v) { return v * V(factor); }, values, values, count);
}

// exp(scale (from - to)), the factor of sums relative to `from` that are to be relative to the larger `to`.
double change_of_reference(double scale, double from, double to) {
  return from == to ? 1.0 : std::exp(scale * (from - to));
}

// X and Q are the numbers of x and the queue, A those of sums.
template <typename X, typename Q, typename A>
class TileSummer {
 public:
  TileSummer(const QueueLogSumExp& parameters, const QueueSums& sums)
      : p_(parameters),
        sums_(sums),
        width_(std::min(parameters.tile, parameters.queue_size)),
        stride_(kPaired ? paired_rows(width_) : width_ + at::vec::Vectorized<A>::size()),
        similarity_stride_(round_up<A>(paired_rows(width_))),
        tile_(paired_rows(p_.size) * stride_),
        pairs_(kPaired ? paired_rows(p_.size) * width_ : 0),
        transposed_(p_.with_gradient ? paired_rows(width_) * p_.size : 0),
        similarities_(kRowsAtATime * similarity_stride_),
        rounded_(kPaired && p_.with_gradient ? kRowsAtATime * similarity_stride_ : 0) {}

  void add_tile(int64_t batch, int64_t first_row, int64_t num_rows, int64_t tile, bool is_first) {
    const int64_t start = tile * p_.tile;
    const int64_t width = std::min(p_.tile, p_.queue_size - start);
    load(static_cast<const Q*>(p_.queue) + batch * p_.batch_stride + start * p_.column_stride, width);
    const X* x = static_cast<const X*>(p_.x) + (batch * p_.rows + first_row) * p_.row_stride;
    for (int64_t row = 0; row < num_rows; row += kRowsAtATime) {
      add_rows(x + row * p_.row_stride, row, std::min(kRowsAtATime, num_rows - row), width, is_first);
    }
  }

 private:
  static constexpr bool kPaired = std::is_same_v<X, at::BFloat16>;

  static constexpr int64_t paired_width(int64_t width) { return kPaired ? paired_rows(width) : width; }

  // The tile as the right factors of both products.
  void load(const Q* queue, int64_t width) {
    copy_columns<X, Q>({queue, p_.size_stride, p_.column_stride}, p_.size, 0, width, tile_.data(), stride_);
    for (int64_t d = 0; d < p_.size && width < paired_width(width); ++d) {
      tile_.data()[d * stride_ + width] = X(0.0f);
    }
    if constexpr (kPaired) {
      pair_rows(p_.size, width, tile_.data(), stride_, pairs_.data());
    }
    if (p_.with_gradient) {
      constexpr int64_t kNumbers = kPaired ? 2 : 1;  // in a word
      transpose_words<kNumbers * sizeof(X)>(p_.size, paired_width(width) / kNumbers, tile_.data(), stride_ / kNumbers,
                                            transposed_.data(), p_.size);
    }
  }

  void add_rows(const X* x, int64_t first_row, int64_t num_rows, int64_t width, bool is_first) {
    A* similarities = similarities_.data();
    if constexpr (kPaired) {
      multiply(num_rows, width, p_.size, x, p_.row_stride, pairs_.data(), width, similarities, similarity_stride_,
               false);
    } else {
      multiply(num_rows, width, p_.size, x, p_.row_stride, tile_.data(), stride_, similarities, similarity_stride_,
               false);
    }
    A* weighted = static_cast<A*>(sums_.weighted) + (p_.with_gradient ? first_row * p_.size : 0);
    const int64_t padded = round_up<A>(width);
    for (int64_t i = 0; i < num_rows; ++i) {
      A* row = similarities + i * similarity_stride_;
      std::fill(row + width, row + padded, -std::numeric_limits<A>::infinity());
      const A here = find_largest(row, padded);
      double& largest = sums_.largest[first_row + i];
      double& sum = sums_.sum[first_row + i];
      if (here > largest || std::isnan(here)) {
        const double factor = is_first ? 0.0 : change_of_reference(p_.scale, largest, here);
        sum *= factor;
        if (p_.with_gradient && !is_first) {
          scale_row(weighted + i * p_.size, p_.size, static_cast<A>(factor));
        }
        largest = here;
      }
      const bool nothing = largest == -kInfinity;
      const A row_sum = exponentiate(row, padded, nothing ? A(0) : static_cast<A>(largest), static_cast<A>(p_.scale));
      sum += nothing ? A(0) : row_sum;
      if constexpr (kPaired) {
        if (p_.with_gradient) {
          round_numbers(padded, row, rounded_.data() + i * similarity_stride_);
        }
      }
    }
    if (!p_.with_gradient) {
      return;
    }
    if constexpr (kPaired) {
      multiply(num_rows, p_.size, width, rounded_.data(), similarity_stride_, transposed_.data(), p_.size, weighted,
               p_.size, !is_first);
    } else {
      multiply(num_rows, p_.size, width, similarities, similarity_stride_, transposed_.data(), p_.size, weighted,
               p_.size, !is_first);
    }
  }

  const QueueLogSumExp& p_;
  const QueueSums& sums_;
  const int64_t width_, stride_, similarity_stride_;
  Workspace<X> tile_, pairs_, transposed_;
  Workspace<A> similarities_;
  Workspace<X> rounded_;
};

template <typename X, typename Q, typename A>
void sum_tiles(const QueueLogSumExp& parameters, int64_t batch, int64_t first_row, int64_t num_rows,
               int64_t first_tile, int64_t last_tile, const QueueSums& sums) {
  TileSummer<X, Q, A> summer(parameters, sums);
  std::fill_n(sums.largest, num_rows, -kInfinity);
  std::fill_n(sums.sum, num_rows, 0.0);
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    summer.add_tile(batch, first_row, num_rows, tile, tile == first_tile);
  }
  if (std::is_same_v<X, at::BFloat16> && at::native::cpublas::could_pack(at::kBFloat16)) {
    at::native::cpublas::brgemm_release(/*is_vnni=*/true);
  }
}

template <typename A>
void add_rows_of_sums(const QueueLogSumExp& p, const QueueSums& sums, int64_t to, const QueueSums& other,
                      int64_t from) {
  const double before = sums.largest[to], more = other.largest[from];
  const double largest = std::isnan(before) || before > more ? before : more;
  const double first = change_of_reference(p.scale, before, largest);
  const double second = change_of_reference(p.scale, more, largest);
  sums.sum[to] = sums.sum[to] * first + other.sum[from] * second;
  sums.largest[to] = largest;
  if (p.with_gradient) {
    using V = at::vec::Vectorized<A>;
    A* out = static_cast<A*>(sums.weighted) + to * p.size;
    at::vec::map2<A>(
        [first, second](V a, V b) { return a * V(static_cast<A>(first)) + b * V(static_cast<A>(second)); }, out, out,
        static_cast<const A*>(other.weighted) + from * p.size, p.size);
  }
}

}  // namespace

void sum_queue_tiles(const QueueLogSumExp& parameters, int64_t batch, int64_t first_row, int64_t num_rows,
                     int64_t first_tile, int64_t last_tile, const QueueSums& sums) {
  switch (parameters.numbers) {
    case QueueNumbers::kFloat:
      return sum_tiles<float, float, float>(parameters, batch, first_row, num_rows, first_tile, last_tile, sums);
    case QueueNumbers::kBFloat16:
      return sum_tiles<at::BFloat16, at::BFloat16, float>(parameters, batch, first_row, num_rows, first_tile, last_tile,
                                                          sums);
    case QueueNumbers::kBFloat16OverFloat:
      return sum_tiles<at::BFloat16, float, float>(parameters, batch, first_row, num_rows, first_tile, last_tile, sums);
    case QueueNumbers::kDouble:
      return sum_tiles<double, double, double>(parameters, batch, first_row, num_rows, first_tile, last_tile, sums);
  }
}

void add_queue_sums(const QueueLogSumExp& parameters, const QueueSums& sums, int64_t to, const QueueSums& other,
                    int64_t from) {
  if (parameters.numbers == QueueNumbers::kDouble) {
    add_rows_of_sums<double>(parameters, sums, to, other, from);
  } else {
    add_rows_of_sums<float>(parameters, sums, to, other, from);
  }
}

double finish_queue_row(const QueueLogSumExp& parameters, const QueueSums& sums, int64_t row, double positive) {
  const double largest = parameters.scale * sums.largest[row];
  // At infinity the sum is of no use: its terms are exp(inf - inf).
  const double of_queue = std::isinf(largest) ? largest : largest + std::log(sums.sum[row]);
  const bool positive_is_higher = positive > of_queue || std::isnan(positive);
  const double higher = positive_is_higher ? positive : of_queue;
  const double lower = positive_is_higher ? of_queue : positive;
  const double result = std::isinf(higher) ? higher : higher + std::log1p(std::exp(lower - higher));
  if (parameters.with_gradient) {
    const double factor = largest == -kInfinity ? 0.0 : parameters.scale * std::exp(largest - result);
    if (parameters.numbers == QueueNumbers::kDouble) {
      scale_row(static_cast<double*>(sums.weighted) + row * parameters.size, parameters.size, factor);
    } else {
      scale_row(static_cast<float*>(sums.weighted) + row * parameters.size, parameters.size,
                static_cast<float>(factor));
    }
  }
  return result;
}

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
