// The operators _add_partial_sums_ and _combine_channel_statistics_.
#include "cuda/partial_sums.h"

#include "cuda/partial_statistics.h"
#include "cuda/tile_arguments.h"

namespace ikem_fast::cuda {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void add_partial_sums_op(Tensor sums, Tensor parts) {
  check_dense("sums", sums, sums, ScalarType::Float, {-1, -1});
  check_dense("parts", parts, sums, ScalarType::Float, {sums.size(0), -1, sums.size(1)});
  STD_TORCH_CHECK(parts.size(1) <= INT32_MAX, "parts must be below 2^31, got ", describe_sizes(parts));
  const PartialSums given{static_cast<const float*>(parts.const_data_ptr()), parts.size(0), parts.size(2),
                          parts.size(2), static_cast<int>(parts.size(1))};
  const torch::stable::accelerator::DeviceGuard guard(sums.get_device_index());
  check_launch("_add_partial_sums_", parts,
               add_partial_sums(static_cast<float*>(sums.mutable_data_ptr()), given, current_stream(sums)));
}

void combine_channel_statistics_op(Tensor mean, Tensor variance, Tensor moments) {
  check_dense("mean", mean, mean, ScalarType::Float, {-1, -1});
  check_dense("variance", variance, mean, ScalarType::Float, {mean.size(0), mean.size(1)});
  check_dense("moments", moments, mean, ScalarType::Float, {mean.size(0), -1, 3, mean.size(1)});
  STD_TORCH_CHECK(moments.size(1) <= INT32_MAX, "moments must be below 2^31, got ", describe_sizes(moments));
  const PartialStatistics partial{static_cast<const float*>(moments.const_data_ptr()), moments.size(0),
                                  static_cast<int>(moments.size(1)), moments.size(3)};
  const torch::stable::accelerator::DeviceGuard guard(mean.get_device_index());
  check_launch("_combine_channel_statistics_", moments,
               combine_channel_statistics(static_cast<float*>(mean.mutable_data_ptr()),
                                          static_cast<float*>(variance.mutable_data_ptr()), partial,
                                          current_stream(mean)));
}

}  // namespace

}  // namespace ikem_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ikem_fast, CUDA, m) {
  m.impl("_add_partial_sums_", TORCH_BOX(&ikem_fast::cuda::add_partial_sums_op));
  m.impl("_combine_channel_statistics_", TORCH_BOX(&ikem_fast::cuda::combine_channel_statistics_op));
}
