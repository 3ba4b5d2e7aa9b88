// Vectors of three coordinates, for host and device. S is float, double or at::vec::Vectorized of either: then one
// Vector3 holds as many vectors as a register has lanes.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define IKEM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define IKEM_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace ikem_fast::math {
#ifdef CPU_CAPABILITY
// Each instruction set has its own copy, so that none runs on a CPU without it.
inline namespace CPU_CAPABILITY {
#endif

// Arithmetic on S that differs between scalars and registers; csrc/cpu/vectorized_real.h has the registers'.
template <typename S>
struct Real {
  static IKEM_HOST_DEVICE S square_root(S x) {
    using std::sqrt;
    return sqrt(x);
  }
  // For y of at least 0.
  static IKEM_HOST_DEVICE S arctangent(S y, S x) {
    using std::atan2;
    return atan2(y, x);
  }
  // At least `floor`; NaN stays NaN.
  static IKEM_HOST_DEVICE S at_least(S x, S floor) { return x < floor ? floor : x; }
  // x, or zero where `size` is less than `floor`.
  static IKEM_HOST_DEVICE S zero_below(S x, S size, S floor) { return size < floor ? S(0) : x; }
  // A product that is rounded before anything is added to it: fused multiply-adds would leave a residue where two
  // equal products cancel. (On the host the compiler is told not to fuse.)
  static IKEM_HOST_DEVICE S product(S a, S b) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(S) == 4) {
      return __fmul_rn(a, b);
    } else {
      return __dmul_rn(a, b);
    }
#else
    return a * b;
#endif
  }
};

template <typename S>
struct Vector3 {
  S x, y, z;
};

template <typename S>
IKEM_HOST_DEVICE Vector3<S> operator+(const Vector3<S>& a, const Vector3<S>& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z};
}

template <typename S>
IKEM_HOST_DEVICE Vector3<S> operator-(const Vector3<S>& a, const Vector3<S>& b) {
  return {a.x - b.x, a.y - b.y, a.z - b.z};
}

template <typename S>
IKEM_HOST_DEVICE Vector3<S> operator*(const Vector3<S>& a, S factor) {
  return {a.x * factor, a.y * factor, a.z * factor};
}

template <typename S>
IKEM_HOST_DEVICE Vector3<S> operator/(const Vector3<S>& a, S divisor) {
  return {a.x / divisor, a.y / divisor, a.z / divisor};
}

template <typename S>
IKEM_HOST_DEVICE S dot(const Vector3<S>& a, const Vector3<S>& b) {
  using R = Real<S>;
  return R::product(a.x, b.x) + R::product(a.y, b.y) + R::product(a.z, b.z);
}

// Exactly zero for parallel vectors whose products round alike, such as equal ones.
template <typename S>
IKEM_HOST_DEVICE Vector3<S> cross(const Vector3<S>& a, const Vector3<S>& b) {
  using R = Real<S>;
  return {R::product(a.y, b.z) - R::product(a.z, b.y), R::product(a.z, b.x) - R::product(a.x, b.z),
          R::product(a.x, b.y) - R::product(a.y, b.x)};
}

template <typename S>
IKEM_HOST_DEVICE S norm(const Vector3<S>& a) {
  return Real<S>::square_root(dot(a, a));
}

// a / max(|a|, 1e-12). Divides, although a reciprocal would be faster, to round as PyTorch does: products with a chest
// normal may cancel, and would magnify a difference.
template <typename S>
IKEM_HOST_DEVICE Vector3<S> normalize(const Vector3<S>& a, S length) {
  return a / Real<S>::at_least(length, S(1e-12));
}

template <typename S>
IKEM_HOST_DEVICE Vector3<S> normalize(const Vector3<S>& a) {
  return normalize(a, norm(a));
}

template <typename S>
IKEM_HOST_DEVICE Vector3<S> zero_below(const Vector3<S>& a, S size, S floor) {
  using R = Real<S>;
  return {R::zero_below(a.x, size, floor), R::zero_below(a.y, size, floor), R::zero_below(a.z, size, floor)};
}

// The gradient of a, given that of normalize(a): its part across a, over the length. None passes below 1e-12.
template <typename S>
IKEM_HOST_DEVICE Vector3<S> normalize_gradient(const Vector3<S>& normalized, S length, const Vector3<S>& gradient) {
  const Vector3<S> across = gradient - normalized * dot(normalized, gradient);
  return zero_below(across * (S(1) / Real<S>::at_least(length, S(1e-12))), length, S(1e-12));
}

#ifdef CPU_CAPABILITY
}  // namespace CPU_CAPABILITY
#endif
}  // namespace ikem_fast::math
