#include "cpu/draw_views.h"

#include <algorithm>

namespace ikem_fast::cpu::CPU_CAPABILITY {

void draw_views(const DrawViews& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const DrawnParameters drawn =
        math::draw_parameters(p.seed, p.epoch, static_cast<uint32_t>(p.indices[i % p.num_samples]),
                              static_cast<uint32_t>(i / p.num_samples), p.ranges);
    p.crop_start[i] = drawn.crop_start;
    std::copy_n(drawn.shear, 6, p.shear + 6 * i);
    p.camera_scale[i] = drawn.camera_scale;
    std::copy_n(drawn.camera_angles, 3, p.camera_angles + 3 * i);
    p.motion_scale[i] = drawn.motion_scale;
  }
}

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
