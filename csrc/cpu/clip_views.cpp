#include "cpu/clip_views.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <utility>

#include "cpu/interleave.h"
#include "cpu/modality_block.h"
#include "cpu/workspace.h"
#include "math/augmentation.h"

namespace ikem_fast::cpu::CPU_CAPABILITY {

namespace {

using at::vec::Vectorized;

// What a register may reach beyond a buffer's last value.
constexpr int64_t kPadding = 64;

template <typename T, typename Stored>
const T* widen(const Stored* row, int64_t count, T* scratch) {
  if constexpr (std::is_same_v<T, Stored>) {
    return row;
  } else {
    using Narrow = Vectorized<Stored>;
    for (int64_t i = 0; i < count; i += Narrow::size()) {
      const auto [low, high] =
          at::vec::convert_to_float<Stored>(Narrow::loadu(row + i, std::min<int64_t>(Narrow::size(), count - i)));
      low.store(scratch + i);
      high.store(scratch + i + Vectorized<float>::size());
    }
    return scratch;
  }
}

#ifdef CPU_CAPABILITY_AVX512
// By the instruction for it, which not every CPU with the other AVX-512 sets has; it takes numbers below 1.2e-38 as 0.
__attribute__((target("avx512bf16"))) inline void round_block_in_hardware(float* block, int64_t count,
                                                                          at::BFloat16* rounded) {
  for (int64_t i = 0; i < count; i += 32) {
    const __m512bh values = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(block + i + 16), _mm512_loadu_ps(block + i));
    const auto bits = reinterpret_cast<__m512i>(values);
    _mm512_storeu_si512(rounded + i, bits);
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1));
    _mm512_storeu_si512(block + i, _mm512_slli_epi32(low, 16));
    _mm512_storeu_si512(block + i + 16, _mm512_slli_epi32(high, 16));
  }
}
#endif

// Rounds a block of values to what the views hold; `rounded` gets them so, and the block the same as T again.
template <typename T, typename View>
const View* round_block(T* block, int64_t count, View* rounded) {
  if constexpr (std::is_same_v<T, View>) {
    return block;
  } else {
#ifdef CPU_CAPABILITY_AVX512
    if constexpr (std::is_same_v<View, at::BFloat16>) {
      static const bool in_hardware = __builtin_cpu_supports("avx512bf16");
      if (in_hardware) {
        round_block_in_hardware(block, count, rounded);
        return rounded;
      }
    }
#endif
    using Narrow = Vectorized<View>;
    using Wide = Vectorized<float>;
    for (int64_t i = 0; i < count; i += Narrow::size()) {
      const Narrow values =
          at::vec::convert_from_float<View>(Wide::loadu(block + i), Wide::loadu(block + i + Wide::size()));
      values.store(rounded + i);
      const auto [low, high] = at::vec::convert_to_float<View>(values);
      low.store(block + i);
      high.store(block + i + Wide::size());
    }
    return rounded;
  }
}

// Copies to memory that is not read soon: past the caches where the instruction set can, so that it need not be fetched
// before it is written.
template <typename View>
void copy_past_caches(const View* values, int64_t count, View* out) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  constexpr int64_t kBytes = 64;
  constexpr int64_t kValues = kBytes / static_cast<int64_t>(sizeof(View));
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kBytes);
  const int64_t head = std::min<int64_t>(count, (kBytes - misaligned) % kBytes / static_cast<int64_t>(sizeof(View)));
  std::copy_n(values, head, out);
  int64_t i = head;
  for (; i + kValues <= count; i += kValues) {
#ifdef CPU_CAPABILITY_AVX512
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), _mm512_loadu_si512(values + i));
#else
    const auto* const from = reinterpret_cast<const __m256i*>(values + i);
    auto* const to = reinterpret_cast<__m256i*>(out + i);
    _mm256_stream_si256(to, _mm256_loadu_si256(from));
    _mm256_stream_si256(to + 1, _mm256_loadu_si256(from + 1));
#endif
  }
  std::copy_n(values + i, count - i, out + i);
#else
  std::copy_n(values, count, out);
#endif
}

// Makes what went past the caches visible to other threads.
inline void finish_copies() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

using Doubles = Vectorized<double>;

// As many floats as there are doubles in a register.
inline Doubles load_doubles(const float* values) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvtps_pd(_mm256_loadu_ps(values));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtps_pd(_mm_loadu_ps(values));
#else
  double doubles[Doubles::size()];
  std::copy_n(values, Doubles::size(), doubles);
  return Doubles::loadu(doubles);
#endif
}

// Adds `num_rows` rows to `sums` and their squares to `squares`, in the first `count` columns of some registers. What
// lies beyond is added up, too, and not stored. Registers have constant numbers, without which they would be in memory.
template <int... kRegisters>
inline void add_columns(const float* rows, int64_t num_rows, int64_t row_size, int64_t count, double* sums,
                        double* squares, std::integer_sequence<int, kRegisters...>) {
  constexpr int64_t kWidth = Doubles::size();
  const auto here = [&](int number) { return std::clamp<int64_t>(count - number * kWidth, 0, kWidth); };
  Doubles sum[] = {Doubles::loadu(sums + kRegisters * kWidth, here(kRegisters))...};
  Doubles square[] = {Doubles::loadu(squares + kRegisters * kWidth, here(kRegisters))...};
  const auto add = [](Doubles& total, Doubles& total_square, const float* from) {
    const Doubles values = load_doubles(from);
    total = total + values;
    // Doubles hold the square of a float exactly.
    total_square = at::vec::fmadd(values, values, total_square);
  };
  for (int64_t row = 0; row < num_rows; ++row) {
    (add(sum[kRegisters], square[kRegisters], rows + row * row_size + kRegisters * kWidth), ...);
  }
  (sum[kRegisters].store(sums + kRegisters * kWidth, here(kRegisters)), ...);
  (square[kRegisters].store(squares + kRegisters * kWidth, here(kRegisters)), ...);
}

// Adds the rows to `sums` and their squares to `squares`, column by column.
inline void add_rows(const float* rows, int64_t num_rows, int64_t row_size, double* sums, double* squares) {
  // Enough registers at a time that additions need not wait for each other.
  constexpr int kRegisters = 5;
  constexpr int64_t kColumns = kRegisters * Doubles::size();
  for (int64_t column = 0; column < row_size; column += kColumns) {
    const int64_t count = std::min(kColumns, row_size - column);
    add_columns(rows + column, num_rows, row_size, count, sums + column, squares + column,
                std::make_integer_sequence<int, kRegisters>());
  }
}

inline void add_rows(const double* rows, int64_t num_rows, int64_t row_size, double* sums, double* squares) {
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t column = 0; column < row_size; ++column) {
      const double value = rows[row * row_size + column];
      sums[column] += value;
      squares[column] += value * value;
    }
  }
}

// Makes views of samples, a block of frames at a time. Coordinates lie in planes: for one person and coordinate the
// joints of consecutive frames one after another.
template <typename T, typename Stored, typename View>
class ViewMaker {
 public:
  explicit ViewMaker(const ClipViews& parameters)
      : p_(parameters),
        joints_(parameters.skeleton.num_joints),
        block_frames_(parameters.block_frames()),
        plane_size_((block_frames_ + kMoreFrames) * joints_ + kPadding),
        row_scratch_size_(joints_ * parameters.num_persons + kPadding),
        values_size_(block_frames_ * parameters.row_size() + 3 * kPadding),
        workspace_((3 * parameters.num_persons + 3) * plane_size_ + 3 * row_scratch_size_ + 2 * values_size_ +
                   Block::kNumBuffers * Block::buffer_size(joints_, block_frames_)),
        planes_(workspace_.data()),
        scaled_(planes_ + 3 * parameters.num_persons * plane_size_),
        row_scratch_(scaled_ + 3 * plane_size_),
        values_(row_scratch_ + 3 * row_scratch_size_),
        rounded_(reinterpret_cast<View*>(values_ + values_size_)),
        block_(parameters.skeleton, 1, parameters.modalities, parameters.num_outputs, block_frames_,
               values_ + 2 * values_size_) {}

  // All views of all samples of a group, and their sums.
  void make_group(int64_t group) {
    const auto sums = [&](int64_t view) {
      return p_.partial_sums ? p_.partial_sums + (view * p_.num_groups() + group) * p_.group_sums_size() : nullptr;
    };
    for (int64_t view = 0; view < p_.num_views && p_.partial_sums; ++view) {
      std::fill_n(sums(view), p_.group_sums_size(), 0.0);
    }
    const int64_t end = std::min(p_.num_samples, (group + 1) * p_.group_size());
    for (int64_t sample = group * p_.group_size(); sample < end; ++sample) {
      // Clips lie anywhere in memory: the next one is fetched while this one is worked on.
      next_clip_ = sample + 1 < p_.num_samples ? clip_of(sample + 1) : nullptr;
      for (int64_t view = 0; view < p_.num_views; ++view) make_sample(view, sample, sums(view));
    }
  }

 private:
  using V = Vectorized<T>;
  using Block = ModalityBlock<T>;
  static constexpr int64_t kWidth = V::size();
  // Frames that a block needs besides its own: one before and three after it.
  static constexpr int64_t kMoreFrames = 4;

  void make_sample(int64_t view, int64_t sample, double* sums) {
    const int64_t drawn = view * p_.num_samples + sample;
    const Stored* const coordinates = clip_of(sample);
    const int64_t crop_start = p_.crop_start ? p_.crop_start[drawn] : 0;
    const auto parameter = [&](const void* values, int64_t size) {
      return values ? static_cast<const T*>(values) + drawn * size : nullptr;
    };
    const T* const shear = parameter(p_.shear, 6);
    const T* const camera_scale = parameter(p_.camera_scale, 1);
    const T* const camera_angles = parameter(p_.camera_angles, 3);
    const T* const motion_scale = parameter(p_.motion_scale, 1);
    const math::Matrix3<T> matrix = math::view_matrix(shear, camera_scale, camera_angles);
    const T time_scale = math::time_scale<T>(p_.num_frames[p_.indices ? p_.indices[sample] : sample]);

    for (int64_t first = 0; first < p_.clip_frames; first += block_frames_) {
      const int64_t frames = std::min(block_frames_, p_.clip_frames - first);
      // Up to two frames after the block are derived from; motion scale looks at the neighbours of all of them.
      const int64_t needed_end = std::min(p_.clip_frames, first + frames + 2);
      const int64_t begin = motion_scale && first > 0 ? first - 1 : first;
      const int64_t end = motion_scale ? std::min(p_.clip_frames, needed_end + 1) : needed_end;
      for (int64_t t = begin; t < end; ++t) {
        const int64_t stored =
            p_.crop_start ? math::cropped_frame(t, crop_start, p_.crop_padding, p_.clip_frames) : t;
        read_frame(coordinates, stored, t - begin);
      }
      if (view == 0) prefetch_next(first, frames);
      for (int64_t person = 0; person < p_.num_persons; ++person) {
        if (shear || camera_scale || camera_angles) transform(matrix, person, end - begin);
        const T* joints[3];
        for (int c = 0; c < 3; ++c) {
          joints[c] = motion_scale ? scale_motion(plane(person, c), begin, first, needed_end, *motion_scale, c)
                                   : plane(person, c);
        }
        block_.load(joints, frames, p_.clip_frames - first - frames, time_scale);
        write_modalities(view, sample * p_.num_persons + person, first, frames, sums);
      }
    }
  }

  const Stored* clip_of(int64_t sample) const {
    return static_cast<const Stored*>(p_.clips) + (p_.indices ? p_.indices[sample] : sample) * p_.clip_stride;
  }

  // The same frames of the next clip, to the second-level cache.
  void prefetch_next(int64_t first, int64_t frames) const {
    if (next_clip_ == nullptr) return;
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Stored));
    const int64_t lanes = joints_ * p_.num_persons;
    for (int c = 0; c < 3; ++c) {
      const Stored* const rows = next_clip_ + (c * p_.clip_frames + first) * lanes;
      for (int64_t i = 0; i < frames * lanes; i += kLine) __builtin_prefetch(rows + i, 0, 2);
    }
  }

  T* plane(int64_t person, int c) const { return planes_ + (3 * person + c) * plane_size_; }

  // A stored frame of all persons to frame `place` of their planes.
  void read_frame(const Stored* clip, int64_t stored, int64_t place) {
    const int64_t lanes = joints_ * p_.num_persons;
    for (int c = 0; c < 3; ++c) {
      const T* const row = widen(clip + (c * p_.clip_frames + stored) * lanes, lanes, row_scratch_ + c * row_scratch_size_);
      T* const out = plane(0, c) + place * joints_;
      // Whole registers are written: what they write beyond the frame, the next frame overwrites.
      if (p_.num_persons == 1) {
        for (int64_t i = 0; i < joints_; i += kWidth) V::loadu(row + i, std::min(kWidth, joints_ - i)).store(out + i);
      } else if (p_.num_persons == 2) {
        for (int64_t i = 0; i < joints_; i += kWidth) {
          const int64_t rest = lanes - 2 * i;
          const auto [one, other] = at::vec::deinterleave2(V::loadu(row + 2 * i, std::min(kWidth, rest)),
                                                           V::loadu(row + 2 * i + kWidth, std::clamp<int64_t>(rest - kWidth, 0, kWidth)));
          one.store(out + i);
          other.store(out + 3 * plane_size_ + i);
        }
      } else {
        for (int64_t person = 0; person < p_.num_persons; ++person) {
          for (int64_t i = 0; i < joints_; ++i) out[3 * person * plane_size_ + i] = row[i * p_.num_persons + person];
        }
      }
    }
  }

  // Applies the matrix to the first frames of a person.
  void transform(const math::Matrix3<T>& matrix, int64_t person, int64_t frames) {
    T* const x = plane(person, 0);
    T* const y = plane(person, 1);
    T* const z = plane(person, 2);
    for (int64_t i = 0; i < frames * joints_; i += kWidth) {
      const math::Vector3<V> vectors{V::loadu(x + i), V::loadu(y + i), V::loadu(z + i)};
      math::row_product(matrix.rows[0], vectors).store(x + i);
      math::row_product(matrix.rows[1], vectors).store(y + i);
      math::row_product(matrix.rows[2], vectors).store(z + i);
    }
  }

  // Coordinate c in frames first ... end - 1 with scaled motion; `plane` begins with frame `begin`.
  const T* scale_motion(const T* plane, int64_t begin, int64_t first, int64_t end, T scale, int c) {
    T* const out = scaled_ + c * plane_size_;
    const V factor(scale);
    for (int64_t t = first; t < end; ++t) {
      const T* const now = plane + (t - begin) * joints_;
      const bool is_inner = t > 0 && t + 1 < p_.clip_frames;
      for (int64_t i = 0; i < joints_; i += kWidth) {
        const V values = V::loadu(now + i);
        const V result = is_inner ? math::motion_scaled(V::loadu(now - joints_ + i), values, V::loadu(now + joints_ + i), factor)
                                  : values;
        result.store(out + (t - first) * joints_ + i);
      }
    }
    return out;
  }

  void write_modalities(int64_t view, int64_t sequence, int64_t first, int64_t frames, double* sums) {
    const int64_t row_size = p_.row_size();
    const int64_t num_sequences = p_.num_samples * p_.num_persons;
    for (int64_t s = 0; s < p_.num_outputs; ++s) {
      block_.derive(static_cast<Modality>(p_.modalities[s]), [&](int64_t i, const auto& vectors, int64_t) {
        store_interleaved(vectors, values_ + 3 * i);
      });
      const int64_t row = ((view * p_.num_outputs + s) * num_sequences + sequence) * p_.clip_frames + first;
      const View* const rounded = round_block(values_, frames * row_size, rounded_);
      copy_past_caches(rounded, frames * row_size, static_cast<View*>(p_.views) + row * row_size);
      if (sums) add_rows(values_, frames, row_size, sums + s * row_size, sums + (p_.num_outputs + s) * row_size);
    }
  }

  const ClipViews& p_;
  const int64_t joints_;
  const int64_t block_frames_;
  const int64_t plane_size_;
  const int64_t row_scratch_size_;
  const int64_t values_size_;
  const Workspace<T> workspace_;
  T* const planes_;       // (M, 3) planes
  T* const scaled_;       // 3 planes
  T* const row_scratch_;  // 3 stored rows as T
  T* const values_;       // a block of one modality, (frames, V, 3)
  View* const rounded_;   // the same as it is written
  Block block_;
  const Stored* next_clip_ = nullptr;
};

template <typename T, typename Stored, typename View>
void make_groups(const ClipViews& parameters, int64_t begin, int64_t end) {
  ViewMaker<T, Stored, View> maker(parameters);
  for (int64_t group = begin; group < end; ++group) maker.make_group(group);
  finish_copies();
}

template <typename Stored>
void make_groups_of_floats(const ClipViews& parameters, int64_t begin, int64_t end) {
  switch (parameters.view_element) {
    case Element::kHalf:
      return make_groups<float, Stored, at::Half>(parameters, begin, end);
    case Element::kBFloat16:
      return make_groups<float, Stored, at::BFloat16>(parameters, begin, end);
    default:
      return make_groups<float, Stored, float>(parameters, begin, end);
  }
}

}  // namespace

void clip_views(const ClipViews& parameters, int64_t begin, int64_t end) {
  switch (parameters.clip_element) {
    case Element::kHalf:
      return make_groups_of_floats<at::Half>(parameters, begin, end);
    case Element::kBFloat16:
      return make_groups_of_floats<at::BFloat16>(parameters, begin, end);
    case Element::kDouble:
      return make_groups<double, double, double>(parameters, begin, end);
    default:
      return make_groups_of_floats<float>(parameters, begin, end);
  }
}

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
