// Views of stored clips on the CPU, see csrc/ops/clip_views.cpp.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/capability.h"
#include "cpu/skeleton.h"

namespace ikem_fast::cpu {

enum class Element { kFloat, kHalf, kBFloat16, kDouble };

// Everything is computed in double where clips and views are double, in float otherwise; parameters of the views are of
// that type, too. A null parameter is an augmentation that is off.
struct ClipViews {
  const void* clips = nullptr;          // (N, 3, T, V, M), each clip contiguous
  Element clip_element = Element::kFloat;
  int64_t clip_stride = 0;              // elements between two clips
  const int64_t* num_frames = nullptr;  // (N,)
  const int64_t* indices = nullptr;     // (B,) clips; null for clip b in place b
  const int64_t* crop_start = nullptr;  // (R, B)
  int64_t crop_padding = 0;             // mirrored frames at either end
  const void* shear = nullptr;          // (R, B, 6)
  const void* camera_scale = nullptr;   // (R, B)
  const void* camera_angles = nullptr;  // (R, B, 3)
  const void* motion_scale = nullptr;   // (R, B)
  void* views = nullptr;                // (R, S, B * M, T, V, 3)
  Element view_element = Element::kFloat;
  double* partial_sums = nullptr;       // (R, groups, 2, S, V, 3): sums, then sums of squares; null for none
  int64_t num_samples = 0;              // B
  int64_t num_views = 0;                // R
  int64_t clip_frames = 0;              // T
  int64_t num_persons = 0;              // M
  Skeleton skeleton;
  int64_t num_outputs = 0;              // S
  const int64_t* modalities = nullptr;  // (S,) values of Modality

  int64_t block_frames() const { return choose_block_frames(skeleton.num_joints, clip_frames); }
  // Values of a frame of one person of one modality: a row of a view.
  int64_t row_size() const { return 3 * skeleton.num_joints; }
  // Samples whose sums are added up before they meet those of others: by the batch's size alone, so that the sums do
  // not depend on the number of threads.
  int64_t group_size() const { return std::max<int64_t>(4, (num_samples + 255) / 256); }
  int64_t num_groups() const { return (num_samples + group_size() - 1) / group_size(); }
  int64_t group_sums_size() const { return 2 * num_outputs * row_size(); }
};

// Makes all views of groups [begin, end) of samples.
IKEM_DECLARE_CPU(void, clip_views, const ClipViews& parameters, int64_t begin, int64_t end)

}  // namespace ikem_fast::cpu
