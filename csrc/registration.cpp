// The schema of every operator of ikem_fast. Implementations register themselves beside their checks: csrc/ops for
// the CPU, csrc/cuda for CUDA.
#include <torch/library.h>

TORCH_LIBRARY(ikem_fast, m) {
  m.def(
      "derive_modalities(Tensor clips, Tensor num_frames, int[] bone_parents, int[] previous_bones, int[] chest_normal, "
      "int[] modalities) -> Tensor");
  m.def(
      "draw_views(Tensor indices, int seed, int epoch, int num_views, int num_frames, int crop_padding_ratio, float shear, "
      "float camera_view) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "clip_views(Tensor clips, Tensor? indices, Tensor num_frames, Tensor? crop_start, int crop_padding, Tensor? shear, "
      "Tensor? camera_scale, Tensor? camera_angles, Tensor? motion_scale, int[] bone_parents, int[] previous_bones, "
      "int[] chest_normal, int[] modalities, int num_views, ScalarType dtype, bool statistics) -> (Tensor, Tensor)");
}
