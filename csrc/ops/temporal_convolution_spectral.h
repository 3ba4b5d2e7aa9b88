// The convolution of temporal_convolution.h in the frequency domain on the CPU: for 13 frames and 9 taps 25 products of
// channels in place of 97. For stride 1 alone; rounding apart the same results as those of the direct form.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "ops/temporal_convolution.h"

namespace ikem_fast {

// Whether this form is the faster one, from measurements.
bool prefers_spectral(const TemporalConvolutionSizes& sizes);

// As temporal_convolution_direct and its backward pass. ValueError for another stride than 1.
std::tuple<at::Tensor, at::Tensor, at::Tensor> temporal_convolution_spectral(const TemporalConvolution& arguments);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> temporal_convolution_spectral_backward(
    const TemporalConvolutionBackward& arguments);

}  // namespace ikem_fast
