// What may go wrong with the shapes of queue_log_sum_exp; no torch, so that any device's operator can share it.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

namespace ikem_fast {

// The first problem in one sentence, or nothing. Sizes and numbers of dimensions are those of the arguments.
template <typename Sizes>
std::string find_queue_problem(const Sizes& x, const Sizes& queue, const Sizes& positive, double scale) {
  const auto write = [](const Sizes& sizes) {
    std::string text = "(";
    for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
    return text + ")";
  };
  if (x.size() != 3) return "x must be (B, R, D), got " + write(x);
  if (queue.size() != 3 || queue[0] != x[0] || queue[1] != x[2]) {
    return "queue must be (B, D, K) = (" + std::to_string(x[0]) + ", " + std::to_string(x[2]) + ", any), got " +
           write(queue);
  }
  if (positive.size() != 2 || positive[0] != x[0] || positive[1] != x[1]) {
    return "positive must be (B, R) = (" + std::to_string(x[0]) + ", " + std::to_string(x[1]) + "), got " +
           write(positive);
  }
  if (!(scale > 0) || !std::isfinite(scale)) return "scale must be above 0 and finite, got " + std::to_string(scale);
  return "";
}

}  // namespace ikem_fast
