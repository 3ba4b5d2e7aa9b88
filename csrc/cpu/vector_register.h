// What holds a vector of at::vec. Arrays of its class, indexed in a loop that is unrolled, would stay in memory beside the
// registers. Include it only in sources of csrc/cpu.
#pragma once

#include <ATen/cpu/vec/vec.h>

namespace ikem_fast::cpu::CPU_CAPABILITY {

template <typename T>
struct VectorRegister {
  using Type = at::vec::Vectorized<T>;
};
#if defined(CPU_CAPABILITY_AVX512)
template <>
struct VectorRegister<float> {
  using Type = __m512;
};
#elif defined(CPU_CAPABILITY_AVX2)
template <>
struct VectorRegister<float> {
  using Type = __m256;
};
#endif

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
