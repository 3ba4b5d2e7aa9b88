// The operator momentum_update_ on CUDA tensors: checks, copies of what lies scattered, launches.
#include "cuda/momentum_update.h"

#include <utility>

#include "cuda/stable_tensor.h"
#include "ops/momentum_update_checks.h"

namespace ikem_fast::cuda {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
void add_pair(std::vector<MomentumPair<T>>& pairs, const Tensor& key, const Tensor& query) {
  pairs.push_back({static_cast<T*>(key.mutable_data_ptr()), static_cast<const T*>(query.const_data_ptr()),
                   key.numel()});
}

void check_pair(const Tensor& key, const Tensor& query, size_t i, int32_t device) {
  STD_TORCH_CHECK(key.scalar_type() == ScalarType::Float || key.scalar_type() == ScalarType::Double, "key_tensors[", i,
                  "] must be float32 or float64, got dtype number ", static_cast<int>(key.scalar_type()));
  bool fits = key.dim() == query.dim() && key.scalar_type() == query.scalar_type();
  for (int64_t d = 0; fits && d < key.dim(); ++d) fits = key.size(d) == query.size(d);
  STD_TORCH_CHECK(fits, "query_tensors[", i, "] must be ", describe_sizes(key), " of dtype number ",
                  static_cast<int>(key.scalar_type()), " as key_tensors[", i, "] is, got ", describe_sizes(query),
                  " of dtype number ", static_cast<int>(query.scalar_type()));
  STD_TORCH_CHECK(key.is_cuda() && query.is_cuda() && key.get_device_index() == device &&
                      query.get_device_index() == device,
                  "query_tensors[", i, "] must be on the device of all keys, CUDA ", device);
}

void momentum_update_op(std::vector<Tensor> key_tensors, std::vector<Tensor> query_tensors, double momentum) {
  STD_TORCH_CHECK(momentum >= 0 && momentum <= 1, "momentum must be in [0, 1], got ", momentum);
  STD_TORCH_CHECK(key_tensors.size() == query_tensors.size(), "query_tensors must be ", key_tensors.size(),
                  " tensors as key_tensors is, got ", query_tensors.size());
  if (key_tensors.empty()) return;
  const int32_t device = key_tensors[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);

  std::vector<MomentumPair<float>> floats;
  std::vector<MomentumPair<double>> doubles;
  std::vector<std::pair<Tensor, Tensor>> copies;  // a copy of a key, and where it belongs
  std::vector<Tensor> dense_queries;
  for (size_t i = 0; i < key_tensors.size(); ++i) {
    Tensor key = key_tensors[i], query = query_tensors[i];
    check_pair(key, query, i, device);
    if (!lie_alike(key.sizes(), key.strides(), query.strides())) {
      if (!key.is_contiguous()) {
        copies.emplace_back(torch::stable::contiguous(key), key);
        key = copies.back().first;
      }
      query = dense_queries.emplace_back(torch::stable::contiguous(query));
    }
    if (key.scalar_type() == ScalarType::Float) {
      add_pair(floats, key, query);
    } else {
      add_pair(doubles, key, query);
    }
  }
  const cudaStream_t stream = current_stream(key_tensors[0]);
  cudaError_t error = momentum_update(floats, momentum, stream);
  if (error == cudaSuccess) error = momentum_update(doubles, momentum, stream);
  STD_TORCH_CHECK(error == cudaSuccess, "momentum_update_ cannot run on ", key_tensors.size(), " tensors: ",
                  cudaGetErrorString(error));
  for (auto& [copy, key] : copies) torch::stable::copy_(key, copy);
}

}  // namespace

}  // namespace ikem_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ikem_fast, CUDA, m) {
  m.impl("momentum_update_", TORCH_BOX(&ikem_fast::cuda::momentum_update_op));
}
