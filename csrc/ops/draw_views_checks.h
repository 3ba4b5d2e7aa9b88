// What may go wrong with the numbers that views are drawn from, and the ranges they mean; shared by the CPU's operator
// and CUDA's binding, so no torch.
#pragma once

#include <cstdint>
#include <string>

#include "math/augmentation.h"

namespace ikem_fast {

// The first problem in one sentence, or nothing.
inline std::string find_draw_problem(int64_t num_views, int64_t num_frames, int64_t crop_padding_ratio, double shear,
                                     double camera_view) {
  if (num_views < 1 || num_views > UINT16_MAX) return "num_views must be 1 ... 65535, got " + std::to_string(num_views);
  if (num_frames < 1 || num_frames > INT32_MAX) return "num_frames must be above 0, got " + std::to_string(num_frames);
  if (crop_padding_ratio < 0 || !(shear >= 0) || !(camera_view >= 0)) {
    return "crop_padding_ratio, shear and camera_view must be 0 or more, got " + std::to_string(crop_padding_ratio) +
           ", " + std::to_string(shear) + " and " + std::to_string(camera_view);
  }
  return "";
}

inline AugmentationRanges augmentation_ranges(int64_t num_frames, int64_t crop_padding_ratio, double shear,
                                              double camera_view) {
  constexpr double kPi = 3.14159265358979323846;
  const auto range = [](double low, double high) {
    return UniformRange{static_cast<float>(low), static_cast<float>(high - low)};
  };
  const int64_t padding = crop_padding_ratio ? num_frames / crop_padding_ratio : 0;
  const double angle = camera_view * kPi / 6;
  return {static_cast<uint32_t>(2 * padding + 1), range(-shear, shear), range(0.5 * camera_view, 1.5 * camera_view),
          range(-angle, angle), range(-2.0, 3.0)};
}

}  // namespace ikem_fast
