// Derivation of modalities from joint coordinates, docs/method.md section 3, and its gradient.
#pragma once

#include <ATen/core/Tensor.h>

namespace ikem_fast {

// clips (N, 3, T, V, M) float or double, num_frames (N,) int64, bone_parents and previous_bones V joints (the root has
// itself), chest_normal three joints or none, modalities S values of Modality: (S, N, 3, T, V, M).
at::Tensor derive_modalities(const at::Tensor& clips, const at::Tensor& num_frames, at::IntArrayRef bone_parents,
                             at::IntArrayRef previous_bones, at::IntArrayRef chest_normal, at::IntArrayRef modalities);

// The gradient of the clips, (N, 3, T, V, M), given that of the modalities, (S, N, 3, T, V, M).
at::Tensor derive_modalities_backward(const at::Tensor& clips, const at::Tensor& num_frames,
                                      at::IntArrayRef bone_parents, at::IntArrayRef previous_bones,
                                      at::IntArrayRef chest_normal, at::IntArrayRef modalities,
                                      const at::Tensor& gradient);

}  // namespace ikem_fast
