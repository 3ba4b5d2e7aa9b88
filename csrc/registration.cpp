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
}
