// Momentum update of key encoders, docs/method.md section 5.
#pragma once

#include <ATen/core/Tensor.h>

namespace ikem_fast {

// key = momentum * key + (1 - momentum) * query, tensor by tensor; each pair of one shape and dtype, float or double.
void momentum_update_(at::TensorList key_tensors, at::TensorList query_tensors, double momentum);

}  // namespace ikem_fast
