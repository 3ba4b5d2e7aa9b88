#include "ops/enqueue.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

#include "cpu/enqueue.h"
#include "ops/enqueue_checks.h"
#include "ops/written_version.h"

namespace ikem_fast {

namespace {

cpu::RealType real_type(const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return cpu::RealType::kFloat;
    case at::kDouble:
      return cpu::RealType::kDouble;
    case at::kBFloat16:
      return cpu::RealType::kBFloat16;
    default:
      TORCH_CHECK_VALUE(false, name, " must be float32, float64 or bfloat16, got ", tensor.scalar_type());
  }
}

// Finds the keys that belong into columns [first_column, first_column + columns) of a queue of `queue_size`, of which the
// first of `num_keys` keys, at most `queue_size`, goes into column `start`. Runs count keys from that one on.
void find_runs(int64_t start, int64_t num_keys, int64_t first_column, int64_t columns, int64_t queue_size,
               cpu::EnqueueRun runs[2]) {
  const int64_t place = start - first_column;
  const bool starts_inside = place >= 0 && place < columns;
  if (starts_inside) runs[0] = {0, place, std::min(num_keys, columns - place)};
  // The number of the key that goes into the first of the columns, unless that is where keys start.
  const int64_t first_key = place < 0 ? -place : queue_size - place;
  if (num_keys > first_key) runs[1] = {first_key, 0, std::min(num_keys - first_key, columns)};
}

// With autograd in the dispatcher, the queue's new content must show in its version.
void enqueue_counting_writes(const at::Tensor& queue, const at::Tensor& keys, const at::Tensor& pointer,
                             int64_t first_column, std::optional<int64_t> queue_size) {
  static const auto enqueue_below =
      c10::Dispatcher::singleton().findSchemaOrThrow("ikem_fast::enqueue_", "").typed<decltype(enqueue_)>();
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    enqueue_below.call(queue, keys, pointer, first_column, queue_size);
  }
  count_write(queue);
  count_write(pointer);
}

}  // namespace

void enqueue_(const at::Tensor& queue, const at::Tensor& keys, const at::Tensor& pointer, int64_t first_column,
              std::optional<int64_t> queue_size) {
  const std::string problem =
      find_enqueue_problem(queue.sizes(), queue.strides(), keys.sizes(), first_column, queue_size);
  TORCH_CHECK_VALUE(problem.empty(), problem);
  TORCH_CHECK_VALUE(pointer.dim() == 1 && pointer.size(0) == 1 && pointer.scalar_type() == at::kLong,
                    "pointer must be (1,) int64, got ", pointer.sizes(), " ", pointer.scalar_type());
  TORCH_CHECK_VALUE(keys.device() == queue.device() && pointer.device() == queue.device(),
                    "keys and pointer must be on the queue's device ", queue.device(), ", got ", keys.device(), " and ",
                    pointer.device());
  const at::Tensor queues = queue.dim() == 2 ? queue.unsqueeze(0) : queue;
  const at::Tensor new_keys = keys.dim() == 2 ? keys.unsqueeze(0) : keys;

  const int64_t num_keys = new_keys.size(1), columns = queues.size(2), whole = queue_size.value_or(columns);
  const int64_t num_kept = std::min(num_keys, whole), num_dropped = num_keys - num_kept;
  cpu::Enqueue parameters;
  parameters.key_type = real_type("keys", keys);
  parameters.queue_type = real_type("queue", queue);
  parameters.size = queues.size(1);
  std::copy_n(new_keys.strides().begin(), 3, parameters.key_strides);
  std::copy_n(queues.strides().begin(), 3, parameters.queue_strides);
  parameters.keys = static_cast<const char*>(new_keys.const_data_ptr()) +
                    num_dropped * parameters.key_strides[1] * static_cast<int64_t>(new_keys.element_size());
  parameters.queue = queues.mutable_data_ptr();
  int64_t& place = *pointer.mutable_data_ptr<int64_t>();
  const auto column = [&](int64_t number) {
    const int64_t rest = number % whole;
    return rest < 0 ? rest + whole : rest;
  };
  find_runs(column(column(place) + num_dropped), num_kept, first_column, columns, whole, parameters.runs);
  place = column(column(place) + num_keys);
  const int64_t num_written = parameters.runs[0].num_keys + parameters.runs[1].num_keys;
  if (num_written == 0) return;

  const auto write = IKEM_DISPATCH_CPU(enqueue);
  constexpr int64_t kValuesPerTask = 16384;  // some ten microseconds of work
  const int64_t grain = std::max<int64_t>(1, kValuesPerTask / (num_written * cpu::Enqueue::kRows));
  at::parallel_for(0, queues.size(0) * parameters.blocks_per_stream(), grain,
                   [&](int64_t begin, int64_t end) { write(parameters, begin, end); });
}

TORCH_LIBRARY_IMPL(ikem_fast, CPU, m) { m.impl("enqueue_", &enqueue_); }
TORCH_LIBRARY_IMPL(ikem_fast, ADInplaceOrView, m) { m.impl("enqueue_", &enqueue_counting_writes); }

}  // namespace ikem_fast
