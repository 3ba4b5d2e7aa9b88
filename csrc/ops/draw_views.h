// Random parameters of views of samples, docs/method.md section 2.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace ikem_fast {

// indices (B,) and epoch (1,) int64, both in 0 ... 2^32 - 1. Returns crop_start (R, B) int64, shear (R, B, 2, 3),
// camera_scale (R, B), camera_angles (R, B, 3) and motion_scale (R, B) float.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> draw_views(
    const at::Tensor& indices, int64_t seed, const at::Tensor& epoch, int64_t num_views, int64_t num_frames,
    int64_t crop_padding_ratio, double shear, double camera_view);

}  // namespace ikem_fast
