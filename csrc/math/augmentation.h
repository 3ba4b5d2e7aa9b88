// Augmentation of one clip (docs/method.md section 2), for host and device.
#pragma once

#include "math/philox.h"
#include "math/vector3.h"

namespace ikem_fast {

struct UniformRange {
  float low;
  float width;
};

// What a view's parameters are drawn from.
struct AugmentationRanges {
  uint32_t num_crop_starts;
  UniformRange shear;
  UniformRange camera_scale;
  UniformRange camera_angle;
  UniformRange motion_scale;
};

// The random parameters of one view of one sample.
struct DrawnParameters {
  int64_t crop_start;
  float shear[6];  // the coefficients a, then b
  float camera_scale;
  float camera_angles[3];
  float motion_scale;
};

namespace math {
#ifdef CPU_CAPABILITY
inline namespace CPU_CAPABILITY {
#endif

// Every parameter has its own word, so that none changes when another augmentation is turned on.
IKEM_HOST_DEVICE DrawnParameters draw_parameters(uint64_t seed, uint32_t epoch, uint32_t sample, uint32_t view,
                                                 const AugmentationRanges& ranges) {
  const RandomWords first = random_words(seed, epoch, sample, view, 0);
  const RandomWords second = random_words(seed, epoch, sample, view, 1);
  const RandomWords third = random_words(seed, epoch, sample, view, 2);
  const auto within = [](uint32_t word, const UniformRange& range) { return uniform(word, range.low, range.width); };
  DrawnParameters drawn;
  drawn.crop_start = uniform_below(first.words[0], ranges.num_crop_starts);
  for (int i = 0; i < 3; ++i) {
    drawn.shear[i] = within(first.words[i + 1], ranges.shear);
    drawn.shear[i + 3] = within(second.words[i], ranges.shear);
    drawn.camera_angles[i] = within(third.words[i + 1], ranges.camera_angle);
  }
  drawn.motion_scale = within(second.words[3], ranges.motion_scale);
  drawn.camera_scale = within(third.words[0], ranges.camera_scale);
  return drawn;
}

// The stored frame that frame t of a cropped clip shows: the crop begins `start` frames into the clip whose first and
// last `padding` frames are mirrored at its ends.
IKEM_HOST_DEVICE int64_t cropped_frame(int64_t t, int64_t start, int64_t padding, int64_t num_frames) {
  const int64_t frame = t + start - padding;
  return frame < 0 ? -1 - frame : frame >= num_frames ? 2 * num_frames - 1 - frame : frame;
}

template <typename S>
struct Matrix3 {
  S rows[3][3];
};

template <typename S>
IKEM_HOST_DEVICE Matrix3<S> identity() {
  return {{{S(1), S(0), S(0)}, {S(0), S(1), S(0)}, {S(0), S(0), S(1)}}};
}

// [[1, a1, b1], [a2, 1, b2], [a3, b3, 1]] of the coefficients a1, a2, a3, b1, b2, b3.
template <typename S>
IKEM_HOST_DEVICE Matrix3<S> shear(const S* coefficients) {
  const S* a = coefficients;
  const S* b = coefficients + 3;
  return {{{S(1), a[0], b[0]}, {a[1], S(1), b[1]}, {a[2], b[2], S(1)}}};
}

// The matrix after a counter-clockwise rotation about a coordinate axis.
template <typename S>
IKEM_HOST_DEVICE void rotate(Matrix3<S>& matrix, int axis, S angle) {
  using std::cos;
  using std::sin;
  const S cosine = cos(angle);
  const S sine = sin(angle);
  S* const second = matrix.rows[(axis + 1) % 3];
  S* const third = matrix.rows[(axis + 2) % 3];
  for (int column = 0; column < 3; ++column) {
    const S before = second[column];
    second[column] = cosine * before - sine * third[column];
    third[column] = sine * before + cosine * third[column];
  }
}

// Shear, then the camera's rotations about x, y and z and its scale, as one matrix. Null pointers leave a part out.
template <typename S>
IKEM_HOST_DEVICE Matrix3<S> view_matrix(const S* shear_coefficients, const S* camera_scale, const S* camera_angles) {
  Matrix3<S> matrix = shear_coefficients ? shear(shear_coefficients) : identity<S>();
  for (int axis = 0; axis < 3 && camera_angles; ++axis) rotate(matrix, axis, camera_angles[axis]);
  for (int i = 0; i < 9 && camera_scale; ++i) matrix.rows[i / 3][i % 3] *= *camera_scale;
  return matrix;
}

// One row of the matrix times a vector; X are registers of S or S itself.
template <typename S, typename X>
IKEM_HOST_DEVICE X row_product(const S* row, const Vector3<X>& v) {
  using R = Real<X>;
  return R::product(X(row[0]), v.x) + R::product(X(row[1]), v.y) + R::product(X(row[2]), v.z);
}

// s (x_t - m_t) + m_t with m_t the mean of the frames before and after.
template <typename X>
IKEM_HOST_DEVICE X motion_scaled(X before, X now, X after, X scale) {
  const X mean = Real<X>::product(before + after, X(0.5));
  return mean + Real<X>::product(scale, now - mean);
}

#ifdef CPU_CAPABILITY
}  // namespace CPU_CAPABILITY
#endif
}  // namespace math
}  // namespace ikem_fast
