// What bindings need besides torch's stable ABI. Bindings include no ATen and no c10 header, so that one library serves
// torch 2.11 and later, and compiles against a torch without CUDA.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "cuda/element_type.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch before 2.13
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

// In libtorch_cuda; weak, so that the library also loads under a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace ikem_fast::cuda {

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline std::vector<int64_t> sizes_of(const torch::stable::Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
  return sizes;
}

inline std::string describe_sizes(const torch::stable::Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + ")";
}

inline ElementType element_type(const char* name, const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return ElementType::kFloat;
    case ScalarType::Double:
      return ElementType::kDouble;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64 or bfloat16, got dtype number ",
                      static_cast<int>(tensor.scalar_type()));
  }
}

}  // namespace ikem_fast::cuda
