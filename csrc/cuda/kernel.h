// The one header of CUDA kernels, besides those of csrc/math. Under nvcc it is CUDA and inline PTX; with
// IKEM_EMULATE_CUDA it is the emulator of csrc/testing, which runs the same sources on the host
// (docs/developer/host_harness.md has the rules that this asks of kernels).
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef IKEM_EMULATE_CUDA
#include "testing/emulator/kernel_names.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// IKEM_LAUNCH(kernel, grid, block, dynamic shared bytes, stream, arguments...) gives the launch's cudaError_t. Kernels
// that are templates go into parentheses.
#define IKEM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::ikem_fast::cuda::launch(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
// IKEM_SHARED(float, tile, [32][33]);
#define IKEM_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define IKEM_DYNAMIC_SHARED(type, name)                                    \
  extern __shared__ __align__(1024) unsigned char ikem_dynamic_shared_[];  \
  type* name = reinterpret_cast<type*>(ikem_dynamic_shared_)

namespace ikem_fast::cuda {

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
}

}  // namespace ikem_fast::cuda

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// d += a * b of one warp: 16 x 16 times 16 x 8, bfloat16 in, float accumulators.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four or two 8 x 8 tiles of 16-bit values from shared memory; lane l names the 16 bytes of one tile's row.
#define IKEM_LDMATRIX_X4(name, modifier)                                                                     \
  __device__ __forceinline__ void name(uint32_t (&r)[4], const void* row) {                                  \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" modifier ".shared.b16 {%0,%1,%2,%3}, [%4];\n"               \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                            \
                 : "r"(shared_address(row))                                                                  \
                 : "memory");                                                                                \
  }
#define IKEM_LDMATRIX_X2(name, modifier)                                                                     \
  __device__ __forceinline__ void name(uint32_t (&r)[2], const void* row) {                                  \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" modifier ".shared.b16 {%0,%1}, [%2];\n"                     \
                 : "=r"(r[0]), "=r"(r[1])                                                                    \
                 : "r"(shared_address(row))                                                                  \
                 : "memory");                                                                                \
  }
IKEM_LDMATRIX_X4(ldmatrix_x4, "")
IKEM_LDMATRIX_X4(ldmatrix_x4_trans, ".trans")
IKEM_LDMATRIX_X2(ldmatrix_x2, "")
IKEM_LDMATRIX_X2(ldmatrix_x2_trans, ".trans")

// 2^x to 2 units in the last place, 0 for results below the normal range.
__device__ __forceinline__ float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Copies 16 bytes from global to shared memory in the background, or zeros where `condition` is false.
__device__ __forceinline__ void cp_async16(void* destination, const void* source, bool condition = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(destination)), "l"(source),
               "r"(condition ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until all but the last kKeep groups are there.
template <int kKeep>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kKeep) : "memory");
}
#endif
