// TEST-ONLY: the emulator itself. Each case is a small kernel that is correct or has one bug, and says which of the
// three builds must notice it. Usage: test_emulator plain|asan|race [CASE]. Without a case it runs all of them, each in
// a process of its own, because the address sanitizer ends the process.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "cuda/kernel.h"

namespace {

enum Mode { kPlain, kAsan, kRace };

struct Case {
  const char* name;
  bool is_noticed[3];  // by plain, asan, race
  unsigned threads = 64, blocks = 1;
  double (*expected)(int thread) = nullptr;  // of a correct kernel; nullptr where nothing is compared
};

double zero(int) { return 0; }

constexpr Case kCases[] = {
    {"barrier between write and read", {false, false, false}, 64, 1, [](int t) { return 63.0 - t; }},
    {"no barrier between write and read", {true, true, true}, 64, 1, [](int t) { return t ? t - 1.0 : 0.0; }},
    {"static shared memory overrun", {false, true, false}, 64, 1, zero},
    {"dynamic shared memory overrun", {false, true, false}, 64, 1, zero},
    {"misaligned vector load (others write there)", {false, true, true}},
    {"overflow in an index (others write there)", {false, true, true}, 32},
    {"uninitialised shared memory hidden by fmaxf", {false, false, true}, 64, 1, zero},
    {"all threads write the same value", {false, false, true}, 64, 1, [](int) { return 7.0; }},
    {"early exit before a barrier", {true, true, true}, 64, 1, zero},
    {"half a warp in a full shuffle", {true, true, true}, 32, 1, zero},
    {"two half warps vote apart", {false, false, false}, 32, 1, zero},
    {"asynchronous copy never waited for", {true, true, true}, 64, 1, zero},
    {"no barrier before the loop", {true, true, true}, 64, 1, [](int) { return 3.0; }},
    {"atomic outside its buffer", {false, true, false}, 64, 1, zero},
    {"spinning until another thread of the block stores",
     {false, false, false},
     64,
     1,
     [](int t) { return t == 1 ? 1.0 : 0.0; }},
    {"__syncwarp between write and read", {false, false, false}, 32, 1, [](int) { return 4.0; }},
    {"last block sums what the others fenced", {false, false, false}, 64, 3},
    {"last block sums without a fence", {false, false, true}, 64, 3},
};
constexpr int kNumCases = std::size(kCases);

template <int kThreads>
__global__ void case_kernel(int number, float* global, int n) {
  IKEM_SHARED(float, shared, [kThreads]);
  IKEM_DYNAMIC_SHARED(float, dynamic);
  const int t = threadIdx.x;
  switch (number) {
    case 0:
      shared[t] = t;
      __syncthreads();
      global[t] = shared[kThreads - 1 - t];
      break;
    case 1:
      shared[t] = t;
      global[t] = shared[t ? t - 1 : 0];
      break;
    case 2: {
      float* pointer = shared;
      pointer[t + n] = 1;
      global[t] = 0;
      break;
    }
    case 3:
      dynamic[t + n] = 1;
      global[t] = 0;
      break;
    case 4:
      global[t] = reinterpret_cast<float4*>(global + 1)[0].x;
      break;
    case 5:
      global[t] = global[(t * 300000000) & 7];
      break;
    case 6:
      if (t) shared[t] = -1;
      __syncthreads();
      global[t] = fmaxf(shared[t], -5.f) * 0;
      break;
    case 7:
      shared[0] = 7;
      __syncthreads();
      global[t] = shared[0];
      break;
    case 8:
      if (t == 3) return;
      __syncthreads();
      global[t] = 0;
      break;
    case 9: {
      const float value = t < 16 ? __shfl_xor_sync(~0u, 0.f, 1) : 0.f;
      __syncthreads();
      global[t] = value;
      break;
    }
    case 10: {
      int votes;
      if (t < 16) {
        votes = __ballot_sync(0xffffu, 1);
      } else {
        votes = __ballot_sync(0xffff0000u, 1);
      }
      global[t] = votes ? 0 : 1;
      break;
    }
    case 11:
      if (t == 0) cp_async16(shared, global);
      cp_async_commit();
      global[t] = 0;
      break;
    case 12: {
      shared[t] = 1;
      float sum = 0;
      for (int i = 0; i < 3; ++i) {
        sum += shared[(t + 1) % kThreads];
        __syncthreads();
      }
      global[t] = sum;
      break;
    }
    case 13:
      atomicAdd(&global[t + n], 1.f);
      break;
    case 14:
      if (t == 0) {
        while (atomicAdd(&global[1], 0.f) == 0.f) {
        }
      } else if (t == 1) {
        atomicAdd(&global[1], 1.f);
      } else {
        global[t] = 0;
      }
      break;
    case 15:
      if (t == 0) {
        shared[0] = 0;
        shared[1] = 4;
        __threadfence_block();
        atomicExch(&shared[0], 1.f);
      }
      __syncwarp();
      global[t] = shared[1];
      break;
    case 16:
    case 17:
      if (t == 0) {
        global[8 + blockIdx.x] = 2;
        if (number == 16) __threadfence();
        shared[0] = atomicAdd(&global[63], 1.f);
      }
      __syncthreads();
      if (shared[0] == gridDim.x - 1 && t == 1) global[1] = global[8] + global[9] + global[10];
      break;
  }
}

// Whether anything was noticed: a report, or a wrong value.
bool run_case(int number) {
  const Case& test = kCases[number];
  constexpr int kSize = 64;
  cuda_emulator::config.seed = 1;  // descending order: consumers come before producers
  float* global;
  cudaMalloc(&global, kSize * sizeof(float));
  cudaMemsetAsync(global, 0, kSize * sizeof(float), nullptr);
  const cudaError_t error =
      IKEM_LAUNCH((case_kernel<64>), dim3(test.blocks), dim3(test.threads), 256, nullptr, number, global, kSize);
  if (error != cudaSuccess || !cuda_emulator::reports.empty()) return true;
  if (test.expected == nullptr) return false;
  for (unsigned t = 0; t < test.threads; ++t) {
    if (global[t] != test.expected(t)) return true;
  }
  return false;
}

bool run_in_own_process(int number) {
  const pid_t child = fork();
  if (child == 0) {
    if (!freopen("/dev/null", "w", stderr)) _exit(2);
    _exit(run_case(number) ? 1 : 0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status != 0;
}

}  // namespace

int main(int argc, char** argv) {
  const Mode mode = argc < 2 || !strcmp(argv[1], "plain") ? kPlain : !strcmp(argv[1], "asan") ? kAsan : kRace;
  if (argc > 2) return run_case(atoi(argv[2])) ? 1 : 0;
  int failures = 0;
  for (int number = 0; number < kNumCases; ++number) {
    const bool noticed = run_in_own_process(number);
    if (noticed == kCases[number].is_noticed[mode]) continue;
    ++failures;
    printf("FAILED case %d, %s: %s\n", number, kCases[number].name, noticed ? "noticed" : "not noticed");
  }
  printf("%s emulator, %d cases, %d failed\n", failures ? "FAILED" : "passed", kNumCases, failures);
  return failures ? 1 : 0;
}
