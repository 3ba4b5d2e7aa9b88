// The types of tensors' elements that launchers take.
#pragma once

namespace ikem_fast::cuda {

enum class ElementType : int { kFloat, kDouble, kBFloat16 };

}  // namespace ikem_fast::cuda
