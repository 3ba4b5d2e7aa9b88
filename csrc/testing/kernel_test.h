// TEST-ONLY: what the programs that test one operator's kernels share: the count of failures and the loop over seeds.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "cuda/kernel.h"

inline int failures = 0;

// `PROGRAM [SEEDS [FILE]]`: calls check(seed) for the seeds 0 ... SEEDS - 1, which decide the order of threads and blocks,
// until one fails. Appends the names of the kernels that ran to FILE, one a line. Gives the exit status.
template <typename Check>
int run_over_seeds(const char* operator_name, int argc, char** argv, Check check) {
  const int seeds = argc > 1 ? atoi(argv[1]) : 4;
  for (int seed = 0; seed < seeds && failures == 0; ++seed) {
    cuda_emulator::config.seed = seed;
    check(seed);
  }
  if (argc > 2) {
    FILE* const file = fopen(argv[2], "a");
    for (const std::string& name : cuda_emulator::launched) {
      if (file) fprintf(file, "%s\n", name.c_str());
    }
    if (!file || fclose(file) != 0) {
      ++failures;
      printf("FAILED %s cannot be written\n", argv[2]);
    }
  }
  const bool passed = failures == 0 && cuda_emulator::reports.empty();
  printf("%s %s, %d seeds, %zu reports\n", passed ? "passed" : "FAILED", operator_name, seeds,
         cuda_emulator::reports.size());
  return passed ? 0 : 1;
}
