// TEST-ONLY: memory of the emulated device, with guards at its end and marked as uninitialised until it is written.
#pragma once

#include <vector>

#include "cuda/kernel.h"

template <typename T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t size) : size_(size) { cudaMalloc(&pointer_, size * sizeof(T)); }
  explicit DeviceBuffer(const std::vector<T>& values) : DeviceBuffer(values.size()) {
    cudaMemcpy(pointer_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice);
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() { cudaFree(pointer_); }

  T* data() { return pointer_; }
  std::vector<T> values() const {
    std::vector<T> values(size_);
    if (size_) cudaMemcpy(values.data(), pointer_, size_ * sizeof(T), cudaMemcpyDeviceToHost);
    return values;
  }

 private:
  T* pointer_ = nullptr;
  size_t size_;
};
