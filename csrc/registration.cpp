// The schema of every operator of ikem_fast. Implementations register themselves beside their checks: csrc/ops for
// the CPU, csrc/cuda for CUDA.
#include <torch/library.h>

TORCH_LIBRARY(ikem_fast, m) {
}
