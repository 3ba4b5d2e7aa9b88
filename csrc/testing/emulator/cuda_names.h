// TEST-ONLY: the CUDA names (intrinsics, atomics, math, runtime calls) on top of engine.h, which includes this file
// last.
#pragma once
#define EMULATOR_SITE(w) \
  ::cuda_emulator::Site { __FILE__, __LINE__, w }
#define __syncthreads() ::cuda_emulator::syncthreads(__FILE__, __LINE__)
#define __shfl_sync(m, v, ...) \
  ::emulated_shuffle(m, v, ::cuda_emulator::kFromLane, EMULATOR_SITE("__shfl_sync"), __VA_ARGS__)
#define __shfl_up_sync(m, v, ...) \
  ::emulated_shuffle(m, v, ::cuda_emulator::kUp, EMULATOR_SITE("__shfl_up_sync"), __VA_ARGS__)
#define __shfl_down_sync(m, v, ...) \
  ::emulated_shuffle(m, v, ::cuda_emulator::kDown, EMULATOR_SITE("__shfl_down_sync"), __VA_ARGS__)
#define __shfl_xor_sync(m, v, ...) \
  ::emulated_shuffle(m, v, ::cuda_emulator::kXor, EMULATOR_SITE("__shfl_xor_sync"), __VA_ARGS__)
template <class T>
T emulated_shuffle(uint32_t m, T v, cuda_emulator::ShuffleMode mode, cuda_emulator::Site s, int arg, int width = 32) {
  return cuda_emulator::shuffle(m, v, mode, arg, width, s);
}
#define __ballot_sync(m, p) (::cuda_emulator::vote(m, (p) ? 1u : 0u, EMULATOR_SITE("__ballot_sync")).votes)
#define __any_sync(m, p) (::cuda_emulator::vote(m, (p) ? 1u : 0u, EMULATOR_SITE("__any_sync")).votes != 0)
inline bool emulated_all(cuda_emulator::Votes r) { return r.votes == r.pred; }
#define __all_sync(m, p) ::emulated_all(::cuda_emulator::vote(m, (p) ? 1u : 0u, EMULATOR_SITE("__all_sync")))
#define __reduce_add_sync(m, v) \
  ((decltype(v))::cuda_emulator::vote(m, (uint32_t)(v), EMULATOR_SITE("__reduce_add_sync")).sum)
#define __reduce_or_sync(m, v) (::cuda_emulator::vote(m, (uint32_t)(v), EMULATOR_SITE("__reduce_or_sync")).orr)
#define __reduce_and_sync(m, v) (::cuda_emulator::vote(m, (uint32_t)(v), EMULATOR_SITE("__reduce_and_sync")).an)
#define __syncwarp(...)                                                                                        \
  ::cuda_emulator::collective((uint32_t)(0xffffffffu __VA_OPT__(&(__VA_ARGS__))), EMULATOR_SITE("__syncwarp"), \
                              nullptr, nullptr, nullptr, true)
inline uint32_t __activemask() { return 1u << cuda_emulator::engine.current->lane; }  // the smallest legal answer
EMULATOR_UNCHECKED inline void __threadfence() { cuda_emulator::engine.fenced = cuda_emulator::engine.epoch; }
inline void __threadfence_block() {}
inline void __trap() { EMULATOR_FAIL("__trap"); }

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v, cuda_emulator::Location at = cuda_emulator::Location::current()) {
  return cuda_emulator::read_modify_write(p, [=](T o) -> T { return o + v; }, at);
}
template <class T>
T atomicSub(T* p, std::type_identity_t<T> v, cuda_emulator::Location at = cuda_emulator::Location::current()) {
  return cuda_emulator::read_modify_write(p, [=](T o) -> T { return o - v; }, at);
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v, cuda_emulator::Location at = cuda_emulator::Location::current()) {
  return cuda_emulator::read_modify_write(p, [=](T o) -> T { return v > o ? v : o; }, at);
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v, cuda_emulator::Location at = cuda_emulator::Location::current()) {
  return cuda_emulator::read_modify_write(p, [=](T o) -> T { return v < o ? v : o; }, at);
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v, cuda_emulator::Location at = cuda_emulator::Location::current()) {
  return cuda_emulator::read_modify_write(p, [=](T) -> T { return v; }, at);
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> v, cuda_emulator::Location at = cuda_emulator::Location::current()) {
  return cuda_emulator::read_modify_write(p, [=](T o) -> T { return o | v; }, at);
}
template <class T>
T atomicAnd(T* p, std::type_identity_t<T> v, cuda_emulator::Location at = cuda_emulator::Location::current()) {
  return cuda_emulator::read_modify_write(p, [=](T o) -> T { return o & v; }, at);
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> c, std::type_identity_t<T> v,
            cuda_emulator::Location at = cuda_emulator::Location::current()) {
  return cuda_emulator::read_modify_write(p, [=](T o) -> T { return o == c ? v : o; }, at);
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __saturatef(float x) { return x != x ? 0.f : x < 0 ? 0.f : x > 1 ? 1.f : x; }
inline void sincospif(float x, float* s, float* c) {
  *s = (float)sin(M_PI * (double)x);
  *c = (float)cos(M_PI * (double)x);
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero((unsigned)x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __float_as_int(float f) { return std::bit_cast<int>(f); }
inline unsigned __float_as_uint(float f) { return std::bit_cast<unsigned>(f); }
inline float __int_as_float(int i) { return std::bit_cast<float>(i); }
inline float __uint_as_float(unsigned i) { return std::bit_cast<float>(i); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> min(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>)
    return fmin((C)a, (C)b);
  else
    return (C)a < (C)b ? (C)a : (C)b;
}
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> max(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>)
    return fmax((C)a, (C)b);
  else
    return (C)a > (C)b ? (C)a : (C)b;
}

template <class T>
cudaError_t cudaMalloc(T** p, size_t n) {
  return cuda_emulator::device_malloc((void**)p, n);
}
inline cudaError_t cudaFree(void* p) { return cuda_emulator::device_free(p); }
inline cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind, cudaStream_t) {
  cuda_emulator::mark(d, n, cuda_emulator::kHostWrite);
  if (n) memmove(d, s, n);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind k) {
  return cudaMemcpyAsync(d, s, n, k, nullptr);
}
inline cudaError_t cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t) {
  cuda_emulator::mark(d, n, cuda_emulator::kHostWrite);
  memset(d, v, n);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cuda_emulator::engine.last_error; }
inline cudaError_t cudaGetLastError() {
  cudaError_t e = cuda_emulator::engine.last_error;
  cuda_emulator::engine.last_error = cudaSuccess;
  return e;
}
inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess                 ? "no error"
         : cuda_emulator::reports.empty() ? "error"
                                          : cuda_emulator::reports.back().c_str();
}
template <class F>
cudaError_t cudaFuncSetAttribute(F* f, cudaFuncAttribute a, int v) {
  if (a == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if ((size_t)v > cuda_emulator::config.max_dynamic_shared)
      return cuda_emulator::engine.last_error = cudaErrorInvalidValue;
    cuda_emulator::engine.dynamic_limits[(const void*)f] = v;
  }
  return cudaSuccess;
}
