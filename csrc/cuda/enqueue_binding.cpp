// The operator enqueue_ on CUDA tensors: checks and launch.
#include "cuda/enqueue.h"

#include "cuda/stable_tensor.h"
#include "ops/enqueue_checks.h"

namespace ikem_fast::cuda {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void enqueue_op(Tensor queue, Tensor keys, Tensor pointer, int64_t first_column, std::optional<int64_t> queue_size) {
  const std::string problem =
      find_enqueue_problem(queue.sizes(), queue.strides(), keys.sizes(), first_column, queue_size);
  STD_TORCH_CHECK(problem.empty(), problem);
  STD_TORCH_CHECK(pointer.dim() == 1 && pointer.size(0) == 1 && pointer.scalar_type() == ScalarType::Long,
                  "pointer must be (1,) int64, got ", describe_sizes(pointer), " of dtype number ",
                  static_cast<int>(pointer.scalar_type()));
  for (const Tensor& tensor : {queue, keys, pointer}) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == queue.get_device_index(),
                    "keys and pointer must be on the queue's device, CUDA ", queue.get_device_index());
  }
  EnqueueInput input{};
  input.keys = keys.const_data_ptr();
  input.key_type = element_type("keys", keys);
  input.queue = queue.mutable_data_ptr();
  input.queue_type = element_type("queue", queue);
  input.pointer = static_cast<int64_t*>(pointer.mutable_data_ptr());
  const int64_t last = queue.dim() - 1;
  input.num_streams = last == 2 ? queue.size(0) : 1;
  input.num_keys = keys.size(last - 1);
  input.size = queue.size(last - 1);
  input.columns = queue.size(last);
  input.first_column = first_column;
  input.queue_size = queue_size.value_or(input.columns);
  for (int64_t i = 0; i <= last; ++i) {
    input.key_strides[i + 2 - last] = keys.stride(i);
    input.queue_strides[i + 2 - last] = queue.stride(i);
  }
  const torch::stable::accelerator::DeviceGuard guard(queue.get_device_index());
  const cudaError_t error = enqueue(input, current_stream(queue));
  STD_TORCH_CHECK(error == cudaSuccess, "enqueue_ cannot write keys ", describe_sizes(keys), " into a queue ",
                  describe_sizes(queue), ": ", cudaGetErrorString(error));
}

}  // namespace

}  // namespace ikem_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ikem_fast, CUDA, m) { m.impl("enqueue_", TORCH_BOX(&ikem_fast::cuda::enqueue_op)); }
