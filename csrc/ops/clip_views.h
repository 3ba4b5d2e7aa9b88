// Views of stored clips: augmented, in all modalities, as the encoder reads them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace ikem_fast {

// clips (N, 3, T, V, M), each clip contiguous; indices (B,) int64, none for all clips in order; num_frames (N,) int64;
// parameters of R views, each of them none where it is off: crop_start (R, B) int64 in 0 ... 2 crop_padding, shear
// (R, B, 2, 3), camera_scale (R, B), camera_angles (R, B, 3), motion_scale (R, B), double for double clips and float
// otherwise; bone_parents, previous_bones, chest_normal and modalities as derive_modalities takes them. Returns the
// views (R, S, B * M, T, V, 3) of `dtype` and, with `statistics`, their sums and sums of squares (2, R, S, V, 3) double;
// without, an empty tensor.
std::tuple<at::Tensor, at::Tensor> clip_views(
    const at::Tensor& clips, const std::optional<at::Tensor>& indices, const at::Tensor& num_frames,
    const std::optional<at::Tensor>& crop_start, int64_t crop_padding, const std::optional<at::Tensor>& shear,
    const std::optional<at::Tensor>& camera_scale, const std::optional<at::Tensor>& camera_angles,
    const std::optional<at::Tensor>& motion_scale, at::IntArrayRef bone_parents, at::IntArrayRef previous_bones,
    at::IntArrayRef chest_normal, at::IntArrayRef modalities, int64_t num_views, at::ScalarType dtype, bool statistics);

}  // namespace ikem_fast
