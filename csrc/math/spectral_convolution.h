// A convolution over frames in the frequency domain, in real numbers: ikem_fast/ops/_spectral_convolution.py in C++.
//
// A tile of a sequence's frames is a circle of `length` frames. Three convolutions of sequences that lie around the
// circle's zero are all that is needed; time-reversed sequences are marked R:
//   result      y    = taps^R * h          gradient of h   dh^R = taps^R * total^R
//   gradient of taps = h * total^R         total: the gradient that reaches y
// A convolution evaluates both sequences: their sum and, for each frequency, real part a, imaginary part b (negated)
// and a + b. The products of these numbers are ac, bd and (a + b)(c + d) of a complex product, from which the wanted
// frames are interpolated.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace ikem_fast::math {

struct SpectralPlan {
  int64_t tile = 1;    // frames of the result
  int64_t window = 1;  // frames that they depend on, tile + taps - 1; for a tile of all frames just these, with zeros
                       // beyond
  int64_t length = 1;  // of the circle, odd

  int64_t frequencies() const { return (length - 1) / 2; }  // but zero
  int64_t products() const { return 1 + 3 * frequencies(); }
  // Frames of the window before the tile's first.
  int64_t before() const { return (window - tile) / 2; }
  int64_t tiles(int64_t frames) const { return (frames + tile - 1) / tile; }
};

inline SpectralPlan spectral_plan(int64_t frames, int64_t taps, int64_t tile) {
  SpectralPlan plan;
  plan.tile = tile < frames ? tile : frames;
  plan.window = tile < frames ? tile + taps - 1 : frames;
  // What goes round the circle's end must meet zeros, or frames outside the tile.
  plan.length = (tile < frames ? plan.window : frames + taps / 2) / 2 * 2 + 1;
  return plan;
}

// What the two forms of a convolution cost a (sequence, joint) on a CPU, in multiplications of a product of matrices;
// fitted to times of 16 to 256 channels, 1 to 75 frames and 3 to 9 taps, of float and bfloat16.
struct ConvolutionCosts {
  int64_t frames = 1, taps = 1, in_channels = 1, out_channels = 1;
  double rows = 1;  // sequences * joints of a stream

  double spectral(const SpectralPlan& plan) const {
    const double of_frames =
        static_cast<double>(plan.window) * in_channels + static_cast<double>(plan.tile) * out_channels;
    const double of_slots = static_cast<double>(plan.products()) * (in_channels + out_channels);
    const double products = static_cast<double>(plan.products()) * in_channels * out_channels;
    return static_cast<double>(plan.tiles(frames)) *
               (products + kOfTransform * static_cast<double>(plan.frequencies()) * of_frames + kOfSlot * of_slots +
                kOfFrame * of_frames) +
           kOfWeight * products / rows;
  }

  double direct() const {
    double products = 0;  // of taps that meet a frame
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t distance = tap < taps / 2 ? taps / 2 - tap : tap - taps / 2;
      products += distance < frames ? static_cast<double>(frames - distance) : 0;
    }
    return (products + kOfWeight * static_cast<double>(taps) / rows) * static_cast<double>(in_channels) * out_channels +
           kOfFrame * static_cast<double>(frames) * (in_channels + out_channels);
  }

 private:
  static constexpr double kOfTransform = 3;  // a multiplication of a transform
  static constexpr double kOfSlot = 30;      // a number to a slot and back
  static constexpr double kOfFrame = 40;     // a number of x or y
  static constexpr double kOfWeight = 40;    // a packed weight
};

// The cheapest way to cut the frames into tiles.
inline SpectralPlan choose_spectral_plan(const ConvolutionCosts& costs) {
  const int64_t longest = 40 + costs.taps;  // longer circles save little and no longer fit a cache
  SpectralPlan best;
  double lowest = std::numeric_limits<double>::infinity();
  for (int64_t tiles = 1; tiles <= costs.frames; ++tiles) {
    const SpectralPlan plan = spectral_plan(costs.frames, costs.taps, (costs.frames + tiles - 1) / tiles);
    const double cost = costs.spectral(plan);
    if (cost < lowest && (plan.length <= longest || plan.tile == 1)) {
      lowest = cost;
      best = plan;
    }
  }
  return best;
}

// Cosine and sine of a frequency (1 ... frequencies) at a point. Points come in pairs with opposite signs, from the
// inner to the outer: pair j of an odd number of points is at 1 + j from zero, of an even number at 1/2 + j.
inline double spectral_angle(int64_t length, int64_t frequency, int64_t num_points, int64_t pair) {
  const double point = (num_points % 2 ? 1.0 : 0.5) + static_cast<double>(pair);
  return 2 * 3.14159265358979323846 / static_cast<double>(length) * static_cast<double>(frequency) * point;
}

}  // namespace ikem_fast::math
