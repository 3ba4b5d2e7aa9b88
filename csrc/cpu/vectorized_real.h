// Arithmetic of csrc/math on whole registers. Include it only in sources of csrc/cpu, before the math is used.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include "math/vector3.h"

namespace ikem_fast::math {
inline namespace CPU_CAPABILITY {

template <typename T>
struct Real<at::vec::Vectorized<T>> {
  using V = at::vec::Vectorized<T>;
  static IKEM_HOST_DEVICE V square_root(const V& x) { return x.sqrt(); }
  static IKEM_HOST_DEVICE V arctangent(const V& y, const V& x) { return y.atan2(x); }
  static IKEM_HOST_DEVICE V at_least(const V& x, const V& floor) { return at::vec::maximum(x, floor); }
  static IKEM_HOST_DEVICE V product(const V& a, const V& b) { return a * b; }
};

}  // namespace CPU_CAPABILITY
}  // namespace ikem_fast::math
