// The schema of every operator of ikem_fast. Implementations register themselves beside their checks: csrc/ops for
// the CPU, csrc/cuda for CUDA.
#include <torch/library.h>

TORCH_LIBRARY(ikem_fast, m) {
  m.def(
      "derive_modalities(Tensor clips, Tensor num_frames, int[] bone_parents, int[] previous_bones, int[] chest_normal, "
      "int[] modalities) -> Tensor");
  m.def(
      "derive_modalities_backward(Tensor clips, Tensor num_frames, int[] bone_parents, int[] previous_bones, "
      "int[] chest_normal, int[] modalities, Tensor gradient) -> Tensor");
  m.def(
      "draw_views(Tensor indices, int seed, Tensor epoch, int num_views, int num_frames, int crop_padding_ratio, "
      "float shear, float camera_view) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "clip_views(Tensor clips, Tensor? indices, Tensor num_frames, Tensor? crop_start, int crop_padding, Tensor? shear, "
      "Tensor? camera_scale, Tensor? camera_angles, Tensor? motion_scale, int[] bone_parents, int[] previous_bones, "
      "int[] chest_normal, int[] modalities, int num_views, ScalarType dtype, bool statistics) -> (Tensor, Tensor)");
  m.def(
      "queue_log_sum_exp(Tensor x, Tensor queue, Tensor positive, float scale, bool with_gradient) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "pair_log_sum_exp(Tensor x, Tensor queue, Tensor? y, Tensor? y_queue, float scale, int topk) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "pair_log_sum_exp_backward(Tensor x, Tensor queue, Tensor? y, Tensor? y_queue, float scale, Tensor single, "
      "Tensor pair, Tensor neighbours, Tensor single_gradient, Tensor pair_gradient, Tensor mined_gradient) -> Tensor");
  m.def(
      "graph_convolution(Tensor x, Tensor weight, Tensor bias, Tensor importance, Tensor adjacency, Tensor edges, "
      "int stride, bool statistics, Tensor? output_scale, Tensor? output_shift, bool output_activation) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "graph_convolution_backward(Tensor x, Tensor weight, Tensor bias, Tensor importance, Tensor adjacency, "
      "Tensor edges, int stride, Tensor y, Tensor mean, Tensor y_gradient, Tensor? mean_gradient, "
      "Tensor? variance_gradient, bool with_x_gradient) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "temporal_convolution(Tensor x, Tensor? scale, Tensor? shift, Tensor weight, Tensor bias, int stride, "
      "bool statistics, Tensor? output_scale, Tensor? output_shift, Tensor? residual) -> (Tensor, Tensor, Tensor)");
  m.def(
      "temporal_convolution_backward(Tensor x, Tensor? scale, Tensor? shift, Tensor weight, int stride, Tensor y, "
      "Tensor mean, Tensor y_gradient, Tensor? mean_gradient, Tensor? variance_gradient, bool with_x_gradient) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "residual_activation(Tensor x, Tensor scale, Tensor shift, Tensor? residual, Tensor? residual_scale, "
      "Tensor? residual_shift, float dropout, Tensor? seed, int layer, int pool) -> Tensor");
  m.def(
      "residual_activation_backward(Tensor x, Tensor scale, Tensor shift, Tensor? residual, Tensor? residual_scale, "
      "Tensor? residual_shift, float dropout, Tensor? seed, int layer, int pool, Tensor gradient) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_coefficients(Tensor mean, Tensor variance, Tensor weight, Tensor bias, float eps) "
      "-> (Tensor, Tensor)");
  m.def(
      "batch_norm_coefficients_backward(Tensor mean, Tensor variance, Tensor weight, float eps, "
      "Tensor scale_gradient, Tensor shift_gradient) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "enqueue_(Tensor(a!) queue, Tensor keys, Tensor(b!) pointer, int first_column=0, int? queue_size=None) -> ()");
  m.def("momentum_update_(Tensor(a!)[] key_tensors, Tensor[] query_tensors, float momentum) -> ()");

  // One of two ways of the CPU's temporal_convolution, which chooses by the sizes; here for the tests.
  m.def(
      "_temporal_convolution_spectral(Tensor x, Tensor? scale, Tensor? shift, Tensor weight, Tensor bias, int stride, "
      "bool statistics, Tensor? output_scale, Tensor? output_shift, Tensor? residual) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_temporal_convolution_spectral_backward(Tensor x, Tensor? scale, Tensor? shift, Tensor weight, int stride, "
      "Tensor y, Tensor mean, Tensor y_gradient, Tensor? mean_gradient, Tensor? variance_gradient, "
      "bool with_x_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // Steps of queue_log_sum_exp and pair_log_sum_exp on CUDA, called by ikem_fast/ops/_queue_tiles.py alone.
  m.def("_pack_queue_tile_(Tensor(a!) tile, Tensor queue, int start) -> ()");
  m.def(
      "_add_products_(Tensor(a!) sums, Tensor products, Tensor? factor, Tensor? divisor, bool first, float scale) "
      "-> ()");
  m.def(
      "_queue_log_sum_exp_tile_(Tensor similarity, Tensor positive, float scale, int start, int num_columns, "
      "Tensor(a!) state, Tensor(b!) log_sum_exp, Tensor(c!) best, Tensor(d!)? shares) -> ()");
  m.def(
      "_pair_statistics_tile_(Tensor x_similarity, Tensor? y_similarity, float scale, int start, int num_columns, "
      "Tensor(a!) sums, Tensor(b!)? positions, Tensor(c!)? mined) -> ()");
  m.def(
      "_pair_statistics_finish_(Tensor sums, Tensor? positions, Tensor? mined_of_slots, int num_y, Tensor(a!) single, "
      "Tensor(b!) pair, Tensor(c!)? neighbours, Tensor(d!)? mined) -> ()");
  m.def(
      "_pair_neighbours_tile_(Tensor x_similarity, Tensor? y_similarity, int start, int num_columns, "
      "Tensor positions_before, Tensor mined_before, Tensor(a!) positions, Tensor(b!) mined, Tensor(c!) scratch) "
      "-> ()");
  m.def(
      "_pair_gradient_tile_(Tensor x_similarity, Tensor? y_similarity, float scale, int start, int num_columns, "
      "Tensor single, Tensor pair, Tensor neighbours, Tensor single_gradient, Tensor pair_gradient, "
      "Tensor mined_gradient, Tensor(a!) gradient) -> ()");

  // Ways and steps of temporal_convolution on CUDA, called by ikem_fast/ops/_temporal_convolution_cuda.py alone.
  m.def(
      "_temporal_convolution_direct(Tensor x, Tensor? scale, Tensor? shift, Tensor weight, Tensor bias, int stride, "
      "bool statistics, Tensor? output_scale, Tensor? output_shift, Tensor? residual) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_temporal_convolution_direct_backward(Tensor x, Tensor? scale, Tensor? shift, Tensor weight, int stride, "
      "Tensor y, Tensor mean, Tensor y_gradient, Tensor? mean_gradient, Tensor? variance_gradient, "
      "bool with_x_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_spectral_slots_(Tensor(a!) single, Tensor(b!) pairs, Tensor x, Tensor? scale, Tensor? shift, float[] basis, "
      "int tile_frames, int lead) -> ()");
  m.def(
      "_spectral_gradient_slots_(Tensor(a!) single, Tensor(b!) pairs, Tensor(c!)? sums, Tensor y_gradient, Tensor? y, "
      "Tensor? mean, Tensor? mean_gradient, Tensor? variance_gradient, int count, float[] basis, int tile_frames, "
      "int lead) -> ()");
  m.def(
      "_spectral_frames_(Tensor(a!) y, Tensor(b!)? moments, Tensor single, Tensor pairs, Tensor bias, "
      "Tensor? output_scale, Tensor? output_shift, Tensor? residual, float[] basis, int tile_frames) -> ()");
  m.def(
      "_spectral_x_gradient_(Tensor(a!)? x_gradient, Tensor(b!)? scale_sums, Tensor(c!)? shift_sums, Tensor single, "
      "Tensor pairs, Tensor x, Tensor? scale, Tensor? shift, float[] basis, int tile_frames) -> ()");
  m.def("_spectral_weights_(Tensor(a!) single, Tensor(b!) pairs, Tensor weight, float[] basis) -> ()");
  m.def(
      "_spectral_weight_gradient_(Tensor(a!) weight_gradient, Tensor single, Tensor pairs, float[] basis) -> ()");
  m.def("_combine_channel_statistics_(Tensor(a!) mean, Tensor(b!) variance, Tensor moments) -> ()");
  m.def("_add_partial_sums_(Tensor(a!) sums, Tensor parts) -> ()");
}
