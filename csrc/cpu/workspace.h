// Memory for the intermediate values of one thread of a CPU kernel.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <cstdint>

namespace ikem_fast::cpu {

template <typename T>
class Workspace {
 public:
  // Aligned to 64 bytes, not initialised.
  explicit Workspace(int64_t size) : memory_(c10::GetCPUAllocator()->allocate(size * static_cast<int64_t>(sizeof(T)))) {}
  T* data() const { return static_cast<T*>(memory_.get()); }

 private:
  at::DataPtr memory_;
};

}  // namespace ikem_fast::cpu
