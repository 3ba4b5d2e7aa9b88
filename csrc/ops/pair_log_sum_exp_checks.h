// What may go wrong with the sizes that pair_log_sum_exp gets, and the sizes it returns; shared by the CPU's operator
// and CUDA's, so no torch.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace ikem_fast {

struct PairSizes {
  std::vector<int64_t> x;
  std::vector<int64_t> queue;
  bool with_y;
  std::vector<int64_t> y;
  std::vector<int64_t> y_queue;

  int64_t num_x() const { return x[0]; }
  int64_t num_left() const { return with_y ? y[0] : x[0]; }
  int64_t num_pairs() const { return with_y ? x[0] * y[0] : x[0] * (x[0] - 1) / 2; }
  int64_t num_mined() const { return with_y ? 1 + y[0] : x[0]; }
  const std::vector<int64_t>& left() const { return with_y ? y : x; }

  std::vector<int64_t> single() const { return {num_left(), x[1]}; }
  std::vector<int64_t> pair() const { return {num_pairs(), x[1]}; }
  std::vector<int64_t> neighbours(int64_t topk) const { return {x[0], x[1], topk}; }
  std::vector<int64_t> mined(int64_t topk) const { return {x[0], x[1], topk, num_mined()}; }
};

inline std::string describe_sizes(const std::vector<int64_t>& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(sizes[i]);
  }
  return text + (sizes.size() == 1 ? ",)" : ")");
}

// The first problem in one sentence, or nothing.
inline std::string find_pair_problem(const PairSizes& s, double scale, int64_t topk) {
  const auto differs = [](const std::vector<int64_t>& sizes, const std::vector<int64_t>& wanted) {
    return sizes.size() != wanted.size() || sizes != wanted;
  };
  if (s.x.size() != 3 || s.x[0] < 1 || s.x[2] < 1) return "x must be (A, N, D), A and D not 0, got " + describe_sizes(s.x);
  if (s.queue.size() != 3 || differs(s.queue, {s.x[0], s.x[2], s.queue[2]})) {
    return "queue must be (A, D, K) = (" + std::to_string(s.x[0]) + ", " + std::to_string(s.x[2]) + ", any), got " +
           describe_sizes(s.queue);
  }
  if (s.with_y) {
    if (s.y.size() != 3 || s.y[0] < 1 || s.y[2] < 1 || s.y[1] != s.x[1]) {
      return "y must be (U, N, E) = (any, " + std::to_string(s.x[1]) + ", any), U and E not 0, got " +
             describe_sizes(s.y);
    }
    if (differs(s.y_queue, {s.y[2], s.queue[2]})) {
      return "y_queue must be (E, K) = " + describe_sizes({s.y[2], s.queue[2]}) + ", got " + describe_sizes(s.y_queue);
    }
  }
  if (!(scale > 0) || !std::isfinite(scale)) return "scale must be above 0 and finite, got " + std::to_string(scale);
  if (topk < 1 || topk > s.queue[2]) {
    return "topk must be in 1 ... K = " + std::to_string(s.queue[2]) + ", got " + std::to_string(topk);
  }
  return "";
}

}  // namespace ikem_fast
