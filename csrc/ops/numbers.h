// Dtypes of arguments as the CPU kernels know them.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/numbers.h"

namespace ikem_fast {

// ValueError for a dtype that there is no kernel for.
inline cpu::Numbers find_numbers(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return cpu::Numbers::kFloat;
    case at::kBFloat16:
      return cpu::Numbers::kBFloat16;
    case at::kDouble:
      return cpu::Numbers::kDouble;
    default:
      TORCH_CHECK_VALUE(false, "x must be float32, bfloat16 or float64, got ", x.scalar_type());
  }
}

// Of sums, statistics and coefficients beside x.
inline at::ScalarType computed_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline const void* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

}  // namespace ikem_fast
