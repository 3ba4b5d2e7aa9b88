// Which instruction set the CPU kernels use: compiled for several, chosen at run time, here and nowhere else.
//
// Every .cpp of csrc/cpu is compiled once per instruction set with CPU_CAPABILITY defined as DEFAULT, AVX2 or AVX512.
// A kernel is written once, declared and called like this:
//
//   csrc/cpu/scale.h     #include "cpu/capability.h"
//                        namespace ikem_fast::cpu {
//                        IKEM_DECLARE_CPU(void, scale, const float* input, float* output, int64_t count)
//                        }
//   csrc/cpu/scale.cpp   #include "cpu/scale.h"
//                        namespace ikem_fast::cpu::CPU_CAPABILITY {
//                        void scale(const float* input, float* output, int64_t count) { ... }
//                        }
//   csrc/ops/scale.cpp   IKEM_DISPATCH_CPU(scale)(input, output, count);
//
// Helpers of a kernel belong into an anonymous namespace or into CPU_CAPABILITY's, so that each instruction set has
// its own copy.
#pragma once

#include <string>

namespace ikem_fast::cpu {

enum class Capability { kDefault, kAvx2, kAvx512 };

// The widest instruction set that this CPU has and the kernels were compiled for.
Capability best_capability();

// What kernels use: best_capability(), or what the environment variable IKEM_FAST_CPU_CAPABILITY asks for (default,
// avx2, avx512). Read on every call, so that a test can change it. Throws std::runtime_error for another word and for
// a set that this CPU does not have.
Capability capability();

// "default", "avx2" or "avx512".
std::string capability_name(Capability capability);

template <typename Function>
Function choose(Function for_default, Function for_avx2, Function for_avx512) {
    switch (capability()) {
        case Capability::kAvx512:
            return for_avx512;
        case Capability::kAvx2:
            return for_avx2;
        default:
            return for_default;
    }
}

}  // namespace ikem_fast::cpu

// Declares a kernel once per instruction set; used inside namespace ikem_fast::cpu.
#ifdef IKEM_FAST_X86
#define IKEM_DECLARE_CPU(RETURN, NAME, ...) \
    namespace DEFAULT {                     \
    RETURN NAME(__VA_ARGS__);               \
    }                                       \
    namespace AVX2 {                        \
    RETURN NAME(__VA_ARGS__);               \
    }                                       \
    namespace AVX512 {                      \
    RETURN NAME(__VA_ARGS__);               \
    }
#else
#define IKEM_DECLARE_CPU(RETURN, NAME, ...) \
    namespace DEFAULT {                     \
    RETURN NAME(__VA_ARGS__);               \
    }
namespace ikem_fast::cpu {
namespace DEFAULT {}
namespace AVX2 = DEFAULT;
namespace AVX512 = DEFAULT;
}  // namespace ikem_fast::cpu
#endif

// The kernel for the instruction set in use: IKEM_DISPATCH_CPU(scale)(input, output, count).
#define IKEM_DISPATCH_CPU(NAME)                                                                \
    (::ikem_fast::cpu::choose(&::ikem_fast::cpu::DEFAULT::NAME, &::ikem_fast::cpu::AVX2::NAME, \
                              &::ikem_fast::cpu::AVX512::NAME))
