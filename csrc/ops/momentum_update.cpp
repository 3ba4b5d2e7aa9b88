#include "ops/momentum_update.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/momentum_update.h"
#include "ops/momentum_update_checks.h"
#include "ops/written_version.h"

namespace ikem_fast {

namespace {

// With autograd in the dispatcher, the keys' new content must show in their versions.
void momentum_update_counting_writes(at::TensorList key_tensors, at::TensorList query_tensors, double momentum) {
  static const auto update_below = c10::Dispatcher::singleton()
                                       .findSchemaOrThrow("ikem_fast::momentum_update_", "")
                                       .typed<void(at::TensorList, at::TensorList, double)>();
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    update_below.call(key_tensors, query_tensors, momentum);
  }
  for (const at::Tensor& key : key_tensors) count_write(key);
}

}  // namespace

void momentum_update_(at::TensorList key_tensors, at::TensorList query_tensors, double momentum) {
  TORCH_CHECK_VALUE(momentum >= 0 && momentum <= 1, "momentum must be in [0, 1], got ", momentum);
  TORCH_CHECK_VALUE(key_tensors.size() == query_tensors.size(), "query_tensors must be ", key_tensors.size(),
                    " tensors as key_tensors is, got ", query_tensors.size());
  for (size_t i = 0; i < key_tensors.size(); ++i) {
    const at::Tensor &key = key_tensors[i], &query = query_tensors[i];
    TORCH_CHECK_VALUE(key.scalar_type() == at::kFloat || key.scalar_type() == at::kDouble, "key_tensors[", i,
                      "] must be float32 or float64, got ", key.scalar_type());
    TORCH_CHECK_VALUE(query.sizes() == key.sizes() && query.scalar_type() == key.scalar_type(), "query_tensors[", i,
                      "] must be ", key.sizes(), " ", key.scalar_type(), " as key_tensors[", i, "] is, got ",
                      query.sizes(), " ", query.scalar_type());
    TORCH_CHECK_VALUE(key.device().is_cpu() && query.device().is_cpu(), "query_tensors[", i,
                      "] must be on the device of all keys, cpu, got ", query.device(), " and the key on ",
                      key.device());
  }
  std::vector<cpu::MomentumPiece> pieces;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies;  // a copy of a key, and where it belongs
  std::vector<at::Tensor> dense_queries;
  for (size_t i = 0; i < key_tensors.size(); ++i) {
    at::Tensor key = key_tensors[i], query = query_tensors[i];
    if (!lie_alike(key.sizes(), key.strides(), query.strides())) {
      if (!key.is_contiguous()) {
        copies.emplace_back(key.contiguous(), key);
        key = copies.back().first;
      }
      query = dense_queries.emplace_back(query.contiguous());
    }
    const int64_t bytes = static_cast<int64_t>(key.element_size());
    char* values = static_cast<char*>(key.mutable_data_ptr());
    const char* query_values = static_cast<const char*>(query.const_data_ptr());
    for (int64_t first = 0; first < key.numel(); first += cpu::MomentumPiece::kMaxSize) {
      pieces.push_back({values + first * bytes, query_values + first * bytes,
                        std::min(cpu::MomentumPiece::kMaxSize, key.numel() - first), key.scalar_type() == at::kDouble});
    }
  }
  const auto update = IKEM_DISPATCH_CPU(momentum_update);
  constexpr int64_t kPiecesPerTask = 4;  // some ten microseconds of work
  at::parallel_for(0, static_cast<int64_t>(pieces.size()), kPiecesPerTask,
                   [&](int64_t begin, int64_t end) { update(pieces.data() + begin, end - begin, momentum); });
  for (const auto& [copy, key] : copies) key.copy_(copy);
}

TORCH_LIBRARY_IMPL(ikem_fast, CPU, m) { m.impl("momentum_update_", &momentum_update_); }
TORCH_LIBRARY_IMPL(ikem_fast, ADInplaceOrView, m) { m.impl("momentum_update_", &momentum_update_counting_writes); }

}  // namespace ikem_fast
