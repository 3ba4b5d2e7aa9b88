// What may go wrong with the shapes of a queue and its keys; shared by the CPU's operator and CUDA's binding, so no torch.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace ikem_fast {

// The first problem in one sentence, or nothing. A queue of (S, D, K) takes keys (S, N, D), one of (D, K) keys (N, D).
template <typename Integers>
std::string find_enqueue_problem(const Integers& queue_sizes, const Integers& queue_strides, const Integers& key_sizes,
                                 int64_t first_column, std::optional<int64_t> queue_size) {
  const auto describe = [](const Integers& sizes) {
    std::string text = "(";
    for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
    return text + ")";
  };
  const size_t dimensions = queue_sizes.size();
  if (dimensions != 2 && dimensions != 3) return "queue must be (S, D, K) or (D, K), got " + describe(queue_sizes);
  const bool fits = key_sizes.size() == dimensions && key_sizes[dimensions - 1] == queue_sizes[dimensions - 2] &&
                    (dimensions == 2 || key_sizes[0] == queue_sizes[0]);
  if (!fits) {
    const std::string streams = dimensions == 3 ? std::to_string(queue_sizes[0]) + ", " : "";
    return "keys must be (" + streams + "any, " + std::to_string(queue_sizes[dimensions - 2]) + "), got " +
           describe(key_sizes);
  }
  if (queue_sizes[dimensions - 1] < 1) return "queue must have at least one column, got " + describe(queue_sizes);
  for (size_t i = 0; i < dimensions; ++i) {
    if (queue_sizes[i] > 1 && queue_strides[i] == 0) return "queue must not be expanded, got a dimension of stride 0";
  }
  const int64_t columns = queue_sizes[dimensions - 1], whole = queue_size.value_or(columns);
  if (whole < columns) {
    return "queue_size must be at least the queue's " + std::to_string(columns) + " columns, got " +
           std::to_string(whole);
  }
  if (first_column < 0 || first_column > whole - columns) {
    return "first_column must be in 0 ... queue_size - columns = " + std::to_string(whole - columns) + ", got " +
           std::to_string(first_column);
  }
  return "";
}

}  // namespace ikem_fast
