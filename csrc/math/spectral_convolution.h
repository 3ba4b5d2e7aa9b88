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

// Multiplications for all frames of a row of channels: products of channels, and the transforms before and after.
inline double spectral_cost(const SpectralPlan& plan, int64_t frames, int64_t in_channels, int64_t out_channels) {
  // A multiplication of a transform takes as long as this many of a product of matrices.
  constexpr double kOfTransform = 3.0;
  const double products = static_cast<double>(plan.products()) * in_channels * out_channels;
  const double transforms = static_cast<double>(plan.frequencies()) * (plan.window * in_channels + plan.tile * out_channels);
  return plan.tiles(frames) * (products + kOfTransform * transforms);
}

// The cheapest way to cut `frames` into tiles.
inline SpectralPlan choose_spectral_plan(int64_t frames, int64_t taps, int64_t in_channels, int64_t out_channels) {
  constexpr int64_t kLongest = 48;  // longer circles save little
  SpectralPlan best;
  double lowest = std::numeric_limits<double>::infinity();
  for (int64_t tiles = 1; tiles <= frames; ++tiles) {
    const SpectralPlan plan = spectral_plan(frames, taps, (frames + tiles - 1) / tiles);
    const double cost = spectral_cost(plan, frames, in_channels, out_channels);
    if (cost < lowest && (plan.length <= kLongest || plan.tile == 1)) {
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
