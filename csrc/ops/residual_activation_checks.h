// What may go wrong with the shapes of residual_activation; no torch, so that any device's operator can share it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace ikem_fast {

struct ResidualActivationSizes {
  using Sizes = std::vector<int64_t>;
  Sizes x, scale, shift;
  std::optional<Sizes> residual, residual_scale, residual_shift, seed;
};

// The sizes of the result.
inline std::vector<int64_t> residual_activation_output(const std::vector<int64_t>& x, int64_t pool) {
  if (pool == 0) return x;
  return {x[0], x[1] / pool, x[4]};
}

// The first problem in one sentence, or nothing.
inline std::string find_residual_activation_problem(const ResidualActivationSizes& sizes, double dropout, int64_t layer,
                                                    int64_t pool) {
  using Sizes = ResidualActivationSizes::Sizes;
  const auto write = [](const Sizes& values) {
    std::string text = "(";
    for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
    return text + ")";
  };
  const auto differs = [&](const char* name, const char* shape, const Sizes& got, const Sizes& wanted) -> std::string {
    if (got == wanted) return "";
    return std::string(name) + " must be " + shape + " = " + write(wanted) + ", got " + write(got);
  };
  if (sizes.x.size() != 5) return "x must be (S, B, T, V, C), got " + write(sizes.x);
  if (sizes.residual_scale.has_value() != sizes.residual_shift.has_value() ||
      (sizes.residual_scale && !sizes.residual)) {
    return "residual_scale and residual_shift must be given both, with a residual, or none of them";
  }
  const Sizes coefficients{sizes.x[0], sizes.x[4]};
  std::string problem = differs("scale", "(S, C)", sizes.scale, coefficients);
  if (problem.empty()) problem = differs("shift", "(S, C)", sizes.shift, coefficients);
  if (problem.empty() && sizes.residual) problem = differs("residual", "(S, B, T, V, C)", *sizes.residual, sizes.x);
  if (problem.empty() && sizes.residual_scale) {
    problem = differs("residual_scale", "(S, C)", *sizes.residual_scale, coefficients);
    if (problem.empty()) problem = differs("residual_shift", "(S, C)", *sizes.residual_shift, coefficients);
  }
  if (problem.empty() && sizes.seed) problem = differs("seed", "(1,)", *sizes.seed, {1});
  if (!problem.empty()) return problem;
  if (!(dropout >= 0 && dropout < 1)) return "dropout must be in [0, 1), got " + std::to_string(dropout);
  if (dropout > 0 && !sizes.seed) return "seed must be (1,) int64 for dropout above 0, got none";
  if (layer < 0 || layer > int64_t{0xffffffff}) return "layer must be 0 ... 2^32 - 1, got " + std::to_string(layer);
  if (pool < 0 || (pool > 0 && sizes.x[1] % pool != 0)) {
    return "pool must be 0 or divide the " + std::to_string(sizes.x[1]) + " sequences of x, got " +
           std::to_string(pool);
  }
  return "";
}

}  // namespace ikem_fast
