#include "cpu/residual_activation.h"

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "cpu/dropout_bits.h"
#include "cpu/widened_vector.h"
#include "cpu/workspace.h"

namespace ikem_fast::cpu::CPU_CAPABILITY {

namespace {

enum class Residual { kNone, kPlain, kScaled };

// Lanes that are let through.
template <typename A>
class Gate {
 public:
  using V = at::vec::Vectorized<A>;

  // Where a ReLU has a slope; NaN passes.
  static Gate active(const V& value) { return Gate(value <= V(A(0))); }
  // Bits from `first` on, a multiple of the number of lanes.
  static Gate open(const uint8_t* bits, int64_t first);

  V pass(const V& value) const { return V::blendv(value, V(A(0)), closed_); }
  V product(const V& value, const V& factor) const { return pass(value * factor); }

 private:
  explicit Gate(const V& closed) : closed_(closed) {}
  V closed_;
};

template <typename A>
Gate<A> Gate<A>::open(const uint8_t* bits, int64_t first) {
  A is_open[V::size()];
  for (int64_t i = 0; i < V::size(); ++i) is_open[i] = A(bits[(first + i) / 8] >> ((first + i) % 8) & 1);
  return Gate(V::loadu(is_open) == V(A(0)));
}

#if defined(CPU_CAPABILITY_AVX512)
template <>
class Gate<float> {
 public:
  using V = at::vec::Vectorized<float>;
  static Gate active(const V& value) {
    return Gate(_mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_NLE_UQ));
  }
  static Gate open(const uint8_t* bits, int64_t first) {
    __mmask16 mask;
    std::memcpy(&mask, bits + first / 8, sizeof(mask));
    return Gate(mask);
  }
  V pass(const V& value) const { return _mm512_maskz_mov_ps(mask_, value); }
  V product(const V& value, const V& factor) const { return _mm512_maskz_mul_ps(mask_, value, factor); }

 private:
  explicit Gate(__mmask16 mask) : mask_(mask) {}
  __mmask16 mask_;
};
#elif defined(CPU_CAPABILITY_AVX2)
template <>
inline Gate<float> Gate<float>::open(const uint8_t* bits, int64_t first) {
  const __m256i of_lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(bits[first / 8]), of_lanes);
  return Gate(_mm256_castsi256_ps(_mm256_cmpeq_epi32(set, _mm256_setzero_si256())));
}
#endif

// Values of a stream lie one after another, and the channel of each recurs with this period, of which coefficients and
// sums are kept for whole registers at once.
struct Period {
  static constexpr int64_t kMostLanes = 16;
  static constexpr int64_t kShortest = 128;     // sums in memory are not needed again at once
  static constexpr int64_t kLongest = 1 << 14;  // coefficients and sums stay in a second-level cache
  static constexpr int64_t kTile = 1024;        // values whose mask is made together

  explicit Period(int64_t channels) {
    const int64_t whole = std::lcm(channels, kMostLanes);
    if (whole > kLongest) {
      length = tile = channels;  // the last register of each row is not full
      return;
    }
    length = whole * std::max<int64_t>(1, kShortest / whole);
    tile = length * std::max<int64_t>(1, kTile / length);
  }

  int64_t length, tile;
};

// Sums over the places of a period: of some registers as they are, then in double.
template <typename A>
class Sums {
 public:
  static constexpr int kMost = 4;

  Sums(int64_t num_sums, int64_t channels, int64_t length)
      : num_sums_(num_sums), channels_(channels), length_(length), partial_(num_sums * length),
        total_(num_sums * length) {
    clear();
  }

  A* of(int sum) const { return partial_.data() + sum * length_; }

  // After each period.
  void count_period() {
    if (++periods_ == kPeriods) flush();
  }

  // Adds to the sums (num_sums, channels) and starts again.
  void take(double* sums) {
    flush();
    for (int64_t sum = 0; sum < num_sums_; ++sum) {
      const double* const total = total_.data() + sum * length_;
      for (int64_t first = 0; first < length_; first += channels_) {
        for (int64_t c = 0; c < channels_; ++c) sums[sum * channels_ + c] += total[first + c];
      }
    }
    clear();
  }

 private:
  static constexpr int kPeriods = 64;

  void clear() {
    std::fill_n(partial_.data(), num_sums_ * length_, A(0));
    std::fill_n(total_.data(), num_sums_ * length_, 0.0);
    periods_ = 0;
  }

  void flush() {
    A* const partial = partial_.data();
    double* const total = total_.data();
    for (int64_t i = 0; i < num_sums_ * length_; ++i) {
      total[i] += partial[i];
      partial[i] = A(0);
    }
    periods_ = 0;
  }

  int64_t num_sums_, channels_, length_;
  Workspace<A> partial_;
  Workspace<double> total_;
  int periods_ = 0;
};

// Five streams of values at once, with the mask in between, are more than hardware fetches early enough by itself.
template <int kForWrite = 0>
inline void prefetch_after(const void* pointer) {
  constexpr uintptr_t kBytes = 4096;
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(pointer) + kBytes), kForWrite);
}

template <typename V>
inline void add_to(const V& value, typename V::value_type* to) {
  (V::loadu(to) + value).store(to);
}
template <typename V>
inline void add_to(const V& value, typename V::value_type* to, int64_t count) {
  typename V::value_type values[V::size()];
  value.store(values);
  for (int64_t i = 0; i < count; ++i) to[i] += values[i];
}

template <typename T, bool kInHardware, Residual kResidual, bool kDropout, bool kPooled>
class Activation {
 public:
  using A = Widened<T>;
  using V = WidenedVector<T>;

  explicit Activation(const ResidualActivation& parameters)
      : p_(parameters), period_(parameters.channels), coefficients_(kNumCoefficients * period_.length),
        of_mean_(kPooled ? period_.length : 0), bits_(kDropout ? kept_bits_size(period_.tile) : 0),
        factor_(static_cast<A>(math::dropout_factor(parameters.threshold))) {}

  void forward(int64_t first, int64_t last, void* out) {
    Sums<A> sums(kPooled ? 1 : 0, p_.channels, period_.length);
    Workspace<double> mean(kPooled ? p_.channels : 0);
    for_each_run(first, last, [&](const Run& run) {
      T* const to = static_cast<T*>(out) + run.place;
      for_each_register(run, [&](int64_t i, int64_t j, const uint8_t* bits, int64_t b, auto... count) {
        const V value = at::vec::clamp_min(sum(run, i, j, bits, b, count...).total, V(A(0)));
        if constexpr (kPooled) {
          add_to(value, sums.of(0) + j, count...);
        } else {
          store(value, to + i, count...);
        }
      }, [&] {
        if (kPooled) sums.count_period();
      });
      if constexpr (kPooled) {
        std::fill_n(mean.data(), p_.channels, 0.0);
        sums.take(mean.data());
        A* const means = static_cast<A*>(out) + run.mean * p_.channels;
        for (int64_t c = 0; c < p_.channels; ++c) means[c] = static_cast<A>(mean.data()[c] / p_.pool_rows);
      }
    }, [](int64_t) {});
  }

  void backward(int64_t first, int64_t last, const ResidualActivationGradients& gradients) {
    Sums<A> sums(p_.num_sums, p_.channels, period_.length);
    const V factor(factor_);
    for_each_run(first, last, [&](const Run& run) {
      if constexpr (kPooled) {
        const A* const means = static_cast<const A*>(gradients.out) + run.mean * p_.channels;
        for (int64_t j = 0; j < period_.length; ++j) of_mean_.data()[j] = means[j % p_.channels] / A(p_.pool_rows);
      }
      const T* const of_out = static_cast<const T*>(gradients.out) + (kPooled ? 0 : run.place);
      T* const of_x = static_cast<T*>(gradients.x) + run.place;
      T* const of_residual = static_cast<T*>(gradients.residual) + (kResidual == Residual::kNone ? 0 : run.place);
      for_each_register(run, [&](int64_t i, int64_t j, const uint8_t* bits, int64_t b, auto... count) {
        const Loaded loaded = sum(run, i, j, bits, b, count...);
        V gradient;
        if constexpr (kPooled) {
          gradient = V::loadu(of_mean_.data() + j);
        } else {
          gradient = load(of_out + i, count...);
        }
        gradient = Gate<A>::active(loaded.total).pass(gradient);
        if constexpr (kResidual == Residual::kPlain) {
          store(gradient, of_residual + i, count...);
        } else if constexpr (kResidual == Residual::kScaled) {
          store(gradient * coefficient(kResidualScale, j), of_residual + i, count...);
          add_to(gradient * loaded.residual, sums.of(2) + j, count...);
          add_to(gradient, sums.of(3) + j, count...);
        }
        if constexpr (kDropout) gradient = Gate<A>::open(bits, b).product(gradient, factor);
        store(gradient * coefficient(kScale, j), of_x + i, count...);
        add_to(gradient * loaded.x, sums.of(0) + j, count...);
        add_to(gradient, sums.of(1) + j, count...);
      }, [&] { sums.count_period(); });
    }, [&](int64_t item) {
      double* const to = gradients.sums + item * p_.num_sums * p_.channels;
      std::fill_n(to, p_.num_sums * p_.channels, 0.0);
      sums.take(to);
    });
  }

 private:
  enum Coefficient { kScale, kShift, kResidualScale, kResidualShift };
  static constexpr int kNumCoefficients = kResidual == Residual::kScaled ? 4 : 2;

  // Values that lie one after another, with one mean.
  struct Run {
    int64_t place;  // among all streams' values
    int64_t first;  // among the stream's
    int64_t count;
    int64_t mean;  // its number
  };

  struct Loaded {
    V x, residual, total;
  };

  template <typename... Count>
  static V load(const T* from, Count... count) {
    prefetch_after(from);
    return load_widened<T>(from, count...);
  }
  template <typename... Count>
  static void store(const V& values, T* to, Count... count) {
    prefetch_after<1>(to);
    store_narrowed<T, kInHardware>(values, to, count...);
  }

  V coefficient(Coefficient which, int64_t j) const { return V::loadu(coefficients_.data() + which * period_.length + j); }

  template <typename OnRun, typename OnItem>
  void for_each_run(int64_t first_item, int64_t last_item, OnRun on_run, OnItem after_item) {
    const int64_t items_of_stream = p_.items_of_stream();
    int64_t stream = -1;
    for (int64_t item = first_item; item < last_item; ++item) {
      if (stream != item / items_of_stream) {
        stream = item / items_of_stream;
        load_coefficients(stream);
      }
      const int64_t begin = item % items_of_stream * p_.rows_of_item, end = std::min(begin + p_.rows_of_item, p_.rows);
      const int64_t step = kPooled ? p_.pool_rows : end - begin;
      for (int64_t row = begin; row < end; row += step) {
        on_run(Run{(stream * p_.rows + row) * p_.channels, row * p_.channels, step * p_.channels,
                   kPooled ? (stream * p_.rows + row) / p_.pool_rows : 0});
      }
      after_item(item);
    }
  }

  void load_coefficients(int64_t stream) {
    stream_ = stream;
    const void* const sources[] = {p_.scale, p_.shift, p_.residual_scale, p_.residual_shift};
    for (int which = 0; which < kNumCoefficients; ++which) {
      const A* const from = static_cast<const A*>(sources[which]) + stream * p_.channels;
      A* const to = coefficients_.data() + which * period_.length;
      for (int64_t j = 0; j < period_.length; j += p_.channels) std::copy_n(from, p_.channels, to + j);
    }
  }

  // on_register(place in the run, place in the period, bits and the place in them, and for a part of a register how
  // many values).
  template <typename OnRegister, typename OnPeriod>
  void for_each_register(const Run& run, OnRegister on_register, OnPeriod after_period) {
    const Dropout dropout(p_.seed, p_.layer, static_cast<uint32_t>(stream_), p_.threshold);
    const uint8_t* const bits = bits_.data();
    for (int64_t tile = 0; tile < run.count; tile += period_.tile) {
      const int64_t size = std::min(period_.tile, run.count - tile);
      if constexpr (kDropout) write_kept_bits(dropout, run.first + tile, size, bits_.data());
      for (int64_t begin = 0; begin < size; begin += period_.length) {
        const int64_t length = std::min(period_.length, size - begin);
        int64_t j = 0;
        for (; j + V::size() <= length; j += V::size()) on_register(tile + begin + j, j, bits, begin + j);
        if (j < length) on_register(tile + begin + j, j, bits, begin + j, length - j);
        after_period();
      }
    }
  }

  template <typename... Count>
  inline __attribute__((always_inline)) Loaded sum(const Run& run, int64_t i, int64_t j, const uint8_t* bits, int64_t b,
                                                   Count... count) const {
    Loaded loaded;
    loaded.x = load(static_cast<const T*>(p_.x) + run.place + i, count...);
    loaded.total = loaded.x * coefficient(kScale, j) + coefficient(kShift, j);
    if constexpr (kDropout) loaded.total = Gate<A>::open(bits, b).product(loaded.total, V(factor_));
    if constexpr (kResidual != Residual::kNone) {
      loaded.residual = load(static_cast<const T*>(p_.residual) + run.place + i, count...);
      V added = loaded.residual;
      if constexpr (kResidual == Residual::kScaled) {
        added = added * coefficient(kResidualScale, j) + coefficient(kResidualShift, j);
      }
      loaded.total = loaded.total + added;
    }
    return loaded;
  }

  const ResidualActivation& p_;
  const Period period_;
  Workspace<A> coefficients_, of_mean_;
  Workspace<uint8_t> bits_;
  const A factor_;
  int64_t stream_ = 0;
};

// use(Activation<...>&) of the right kind.
template <typename T, bool kInHardware, Residual kResidual, typename Use>
void with_kind(const ResidualActivation& p, Use use) {
  const auto run = [&](auto dropout, auto pooled) {
    Activation<T, kInHardware, kResidual, decltype(dropout)::value, decltype(pooled)::value> activation(p);
    use(activation);
  };
  if (p.threshold != 0) {
    p.pool_rows ? run(std::true_type(), std::true_type()) : run(std::true_type(), std::false_type());
  } else {
    p.pool_rows ? run(std::false_type(), std::true_type()) : run(std::false_type(), std::false_type());
  }
}

template <typename T, bool kInHardware, typename Use>
void with_residual(const ResidualActivation& p, Use use) {
  if (p.residual == nullptr) return with_kind<T, kInHardware, Residual::kNone>(p, use);
  if (p.residual_scale == nullptr) return with_kind<T, kInHardware, Residual::kPlain>(p, use);
  with_kind<T, kInHardware, Residual::kScaled>(p, use);
}

template <typename Use>
void with_activation(const ResidualActivation& p, Use use) {
  switch (p.numbers) {
    case Numbers::kFloat:
      return with_residual<float, false>(p, use);
    case Numbers::kBFloat16:
#ifdef CPU_CAPABILITY_AVX512
      if (rounds_in_hardware()) return with_residual<at::BFloat16, true>(p, use);
#endif
      return with_residual<at::BFloat16, false>(p, use);
    case Numbers::kDouble:
      return with_residual<double, false>(p, use);
  }
}

}  // namespace

void residual_activation(const ResidualActivation& parameters, int64_t first, int64_t last, void* out) {
  with_activation(parameters, [&](auto& activation) { activation.forward(first, last, out); });
}

void residual_activation_backward(const ResidualActivation& parameters, int64_t first, int64_t last,
                                  const ResidualActivationGradients& gradients) {
  with_activation(parameters, [&](auto& activation) { activation.backward(first, last, gradients); });
}

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
