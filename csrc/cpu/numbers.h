// What the values of an operator's tensors are. Its sums, weights, coefficients and statistics are double for double and
// float for the others: the "computed" numbers.
#pragma once

namespace ikem_fast::cpu {

enum class Numbers { kFloat, kBFloat16, kDouble };

}  // namespace ikem_fast::cpu
