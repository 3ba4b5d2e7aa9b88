// What may go wrong with the shapes of batch_norm_coefficients; no torch, so that any device's operator can share it.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

namespace ikem_fast {

// The first problem in one sentence, or nothing; `name` is that of `sizes`, which must be those of the mean.
template <typename Sizes>
std::string find_coefficients_problem(const Sizes& mean, const char* name, const Sizes& sizes) {
  const auto write = [](const Sizes& values) {
    std::string text = "(";
    for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
    return text + ")";
  };
  if (mean.size() != 2) return "mean must be (S, C), got " + write(mean);
  if (sizes.size() != 2 || sizes[0] != mean[0] || sizes[1] != mean[1]) {
    return std::string(name) + " must be (S, C) = " + write(mean) + ", got " + write(sizes);
  }
  return "";
}

inline std::string find_eps_problem(double eps) {
  return eps >= 0 && std::isfinite(eps) ? "" : "eps must be at least 0 and finite, got " + std::to_string(eps);
}

}  // namespace ikem_fast
