// Checks of what the steps over tiles of a queue receive. For bindings: those operators are called by
// ikem_fast/ops/_queue_tiles.py alone, after the public operators' own checks.
#pragma once

#include <vector>

#include "cuda/queue_tiles.h"
#include "cuda/stable_tensor.h"

namespace ikem_fast::cuda {

// A contiguous tensor on the device of `reference`, of the given dtype and sizes; -1 takes any size.
inline void check_dense(const char* name, const torch::stable::Tensor& tensor, const torch::stable::Tensor& reference,
                        torch::headeronly::ScalarType type, const std::vector<int64_t>& sizes) {
  bool fits = tensor.scalar_type() == type && tensor.dim() == static_cast<int64_t>(sizes.size()) &&
              tensor.is_contiguous() && tensor.is_cuda() && tensor.get_device_index() == reference.get_device_index();
  std::string wanted;
  for (size_t i = 0; i < sizes.size(); ++i) {
    fits = fits && (sizes[i] < 0 || tensor.size(i) == sizes[i]);
    wanted += (i ? ", " : "") + (sizes[i] < 0 ? "any" : std::to_string(sizes[i]));
  }
  STD_TORCH_CHECK(fits, name, " must be (", wanted, ") of dtype number ", static_cast<int>(type),
                  ", contiguous and on CUDA ", reference.get_device_index(), ", got ", describe_sizes(tensor),
                  " of dtype number ", static_cast<int>(tensor.scalar_type()));
}

// The shape of a tile's (B, segments, R, segment size).
inline TileShape tile_shape(const torch::stable::Tensor& tile) {
  STD_TORCH_CHECK(tile.dim() == 4 && tile.is_contiguous() && tile.size(1) >= 1 && tile.size(3) >= 8 &&
                      tile.size(3) % 8 == 0 && tile.size(1) * tile.size(3) <= INT32_MAX / 2 && tile.size(2) <= INT32_MAX,
                  "a tile must be (B, segments, R, a multiple of 8), contiguous, got ", describe_sizes(tile));
  return {tile.size(0), static_cast<int>(tile.size(2)), static_cast<int>(tile.size(1)), static_cast<int>(tile.size(3))};
}

inline void check_columns(const TileShape& shape, int64_t start, int64_t num_columns) {
  const int64_t width = static_cast<int64_t>(shape.segments) * shape.segment_size;
  STD_TORCH_CHECK(start >= 0 && num_columns >= 1 && num_columns <= width,
                  "start and num_columns must be 0 ... and 1 ... ", width, ", got ", start, " and ", num_columns);
}

inline void check_launch(const char* name, const torch::stable::Tensor& tile, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, name, " cannot run on a tile ", describe_sizes(tile), ": ",
                  cudaGetErrorString(error));
}

}  // namespace ikem_fast::cuda
