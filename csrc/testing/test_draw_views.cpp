// TEST-ONLY: Philox against published vectors, and the CUDA kernel of draw_views against bits that the Python definition
// (ikem_fast.ops.draw_views_reference) gives for the same numbers.
// Usage: test_draw_views [SEEDS [FILE]]. One translation unit: it includes the kernel, or a copy with a planted bug.
#ifndef KERNEL_SOURCE
#define KERNEL_SOURCE "cuda/draw_views.cu"
#endif
#include KERNEL_SOURCE

#include <array>
#include <bit>
#include <cstdio>
#include <vector>

#include "ops/draw_views_checks.h"
#include "testing/device_buffer.h"
#include "testing/kernel_test.h"

namespace {

void check_philox(const std::array<uint32_t, 4>& counter, uint64_t seed, const std::array<uint32_t, 4>& expected) {
  const ikem_fast::math::RandomWords words =
      ikem_fast::math::philox({{counter[0], counter[1], counter[2], counter[3]}}, seed);
  for (int i = 0; i < 4; ++i) {
    if (words.words[i] == expected[i]) continue;
    ++failures;
    printf("FAILED Philox, word %d: %08x, must be %08x\n", i, words.words[i], expected[i]);
  }
}

struct Expected {
  size_t place;
  int64_t crop_start;
  uint32_t shear[6];
  uint32_t camera_scale;
  uint32_t camera_angles[3];
  uint32_t motion_scale;
};

void check_draws() {
  constexpr uint64_t kSeed = 0x0123456789abcdef;
  constexpr int kSamples = 3, kViews = 2, kDraws = kSamples * kViews;
  DeviceBuffer<int64_t> indices(std::vector<int64_t>{7, 4000000000, 7}), epoch(std::vector<int64_t>{300});
  DeviceBuffer<int64_t> crop_start(kDraws);
  DeviceBuffer<float> shear(6 * kDraws), camera_scale(kDraws), camera_angles(3 * kDraws), motion_scale(kDraws);
  const cudaError_t error = ikem_fast::cuda::draw_views(
      {crop_start.data(), shear.data(), camera_scale.data(), camera_angles.data(), motion_scale.data()}, indices.data(),
      kSamples, kViews, kSeed, epoch.data(), ikem_fast::augmentation_ranges(50, 6, 0.5, 1.0), nullptr);
  const Expected draws[] = {
      {0, 0, {0x3dc1fb68, 0x3d7e9850, 0xbea6a45e, 0xbe0bbda4, 0x3e1d2690, 0x3ea22dc6}, 0x3fb94a44,
       {0x3de7b018, 0xbec9400b, 0xbefdb989}, 0x40366604},
      {4, 15, {0xbe7a9298, 0xbef7188e, 0xbe42848c, 0x3e4dee18, 0x3e13649c, 0xbeceed5e}, 0x3f8893d6,
       {0x3f020db0, 0x3ea2c098, 0xbd8e65a4}, 0x3ff31c58}};
  bool right = error == cudaSuccess;
  const auto same = [&](float value, uint32_t bits) { right = right && std::bit_cast<uint32_t>(value) == bits; };
  const auto all_shear = shear.values(), all_scales = camera_scale.values(), all_angles = camera_angles.values();
  const auto all_motion = motion_scale.values();
  const auto all_starts = crop_start.values();
  for (const Expected& draw : draws) {
    right = right && all_starts[draw.place] == draw.crop_start;
    for (int i = 0; i < 6; ++i) same(all_shear[6 * draw.place + i], draw.shear[i]);
    for (int i = 0; i < 3; ++i) same(all_angles[3 * draw.place + i], draw.camera_angles[i]);
    same(all_scales[draw.place], draw.camera_scale);
    same(all_motion[draw.place], draw.motion_scale);
  }
  // The same sample twice in a batch has the same parameters.
  for (int i = 0; i < 6; ++i) right = right && all_shear[i] == all_shear[6 * 2 + i];
  if (right) return;
  ++failures;
  printf("FAILED draws of seed %llu: error %d or other bits than the Python definition's\n",
         static_cast<unsigned long long>(cuda_emulator::config.seed), static_cast<int>(error));
}

void check_many() {
  // More draws than a block has threads, none of which may be left out or written twice.
  constexpr int kSamples = 67, kViews = 2, kDraws = kSamples * kViews;
  std::vector<int64_t> samples(kSamples);
  for (int b = 0; b < kSamples; ++b) samples[b] = b * b;
  DeviceBuffer<int64_t> indices(samples), epoch(std::vector<int64_t>{6}), crop_start(kDraws);
  DeviceBuffer<float> shear(6 * kDraws), camera_scale(kDraws), camera_angles(3 * kDraws), motion_scale(kDraws);
  const ikem_fast::AugmentationRanges ranges = ikem_fast::augmentation_ranges(50, 6, 0.5, 0.0);
  const cudaError_t error = ikem_fast::cuda::draw_views(
      {crop_start.data(), shear.data(), camera_scale.data(), camera_angles.data(), motion_scale.data()}, indices.data(),
      kSamples, kViews, 5, epoch.data(), ranges, nullptr);
  const auto starts = crop_start.values();
  const auto scales = motion_scale.values();
  bool right = error == cudaSuccess;
  for (int i = 0; i < kDraws; ++i) {
    const auto words = [&](uint32_t draw) {
      return ikem_fast::math::philox({{draw, static_cast<uint32_t>(i / kSamples),
                                       static_cast<uint32_t>(samples[i % kSamples]), 6}}, 5);
    };
    right = right && starts[i] == static_cast<int64_t>(words(0).words[0] / 4294967296.0 * 17) &&
            scales[i] == (words(1).words[3] >> 8) / 16777216.0f * 5.0f - 2.0f;
  }
  if (right) return;
  ++failures;
  printf("FAILED draws of %d samples\n", kSamples);
}

}  // namespace

int main(int argc, char** argv) {
  // From the tests that come with Random123, the library of Philox's authors.
  constexpr uint32_t kOnes = 0xffffffff;
  check_philox({0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  check_philox({kOnes, kOnes, kOnes, kOnes}, 0xffffffffffffffff, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  check_philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822,
               {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
  return run_over_seeds("draw_views", argc, argv, [](int) {
    check_draws();
    check_many();
  });
}
