// TEST-ONLY: kernels with one planted bug each, to see that compute-sanitizer, called as scripts/gpu_check.sh calls it,
// notices them on the GPU at hand; the host harness has its own (planted_bugs.sh).
// Usage: planted_on_gpu memcheck|racecheck|synccheck|initcheck|none: the bug that this tool must notice, or none.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

// In this namespace, since the script has compute-sanitizer look at kernels with its name in theirs.
namespace ikem_fast::cuda {

constexpr int kThreads = 64;
constexpr int kFarAway = 1 << 20;  // beyond any memory of this program

enum class Bug { kNone, kOutOfBounds, kMissingBarrier, kDivergentBarrier, kUninitialised };

// Reverses kThreads values.
__global__ void planted_kernel(float* output, const float* input, Bug bug) {
  __shared__ float values[kThreads];
  const int t = threadIdx.x;
  values[t] = input[bug == Bug::kOutOfBounds ? t + kFarAway : t];
  if (bug == Bug::kDivergentBarrier) {
    if (t % 2 == 0) __syncthreads();
  } else if (bug != Bug::kMissingBarrier) {
    __syncthreads();
  }
  output[t] = values[kThreads - 1 - t];
}

}  // namespace ikem_fast::cuda

int main(int argc, char** argv) {
  using ikem_fast::cuda::Bug;
  using ikem_fast::cuda::kThreads;
  const char* const name = argc == 2 ? argv[1] : "";
  Bug bug = Bug::kNone;
  if (!strcmp(name, "memcheck")) {
    bug = Bug::kOutOfBounds;
  } else if (!strcmp(name, "racecheck")) {
    bug = Bug::kMissingBarrier;
  } else if (!strcmp(name, "synccheck")) {
    bug = Bug::kDivergentBarrier;
  } else if (!strcmp(name, "initcheck")) {
    bug = Bug::kUninitialised;
  } else if (strcmp(name, "none")) {
    fprintf(stderr, "usage: planted_on_gpu memcheck|racecheck|synccheck|initcheck|none\n");
    return 2;
  }
  float *input = nullptr, *output = nullptr;
  cudaMalloc(&input, kThreads * sizeof(float));
  cudaMalloc(&output, kThreads * sizeof(float));
  if (bug != Bug::kUninitialised) cudaMemset(input, 0, kThreads * sizeof(float));
  ikem_fast::cuda::planted_kernel<<<1, kThreads>>>(output, input, bug);
  const cudaError_t error = cudaDeviceSynchronize();
  cudaFree(input);
  cudaFree(output);
  if (error == cudaSuccess || bug != Bug::kNone) return 0;
  fprintf(stderr, "the kernel without a bug failed: %s\n", cudaGetErrorString(error));
  return 1;
}
