// For operators that write into their arguments: lets autograd notice that a tensor saved for backward has changed.
#pragma once

#include <ATen/core/Tensor.h>

namespace ikem_fast {

inline void count_write(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace ikem_fast
