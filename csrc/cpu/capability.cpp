#include "cpu/capability.h"

#include <cstdlib>
#include <stdexcept>

namespace ikem_fast::cpu {

namespace {

constexpr const char* kVariable = "IKEM_FAST_CPU_CAPABILITY";

Capability parse(const std::string& name) {
    for (Capability candidate : {Capability::kDefault, Capability::kAvx2, Capability::kAvx512}) {
        if (name == capability_name(candidate)) return candidate;
    }
    throw std::runtime_error(std::string(kVariable) + " must be default, avx2 or avx512, got '" + name + "'");
}

Capability detect() {
#ifdef IKEM_FAST_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx2 && avx512) return Capability::kAvx512;
    if (avx2) return Capability::kAvx2;
#endif
    return Capability::kDefault;
}

}  // namespace

Capability best_capability() {
    static const Capability best = detect();
    return best;
}

Capability capability() {
    const char* requested = std::getenv(kVariable);
    if (requested == nullptr || *requested == '\0') return best_capability();
    const Capability chosen = parse(requested);
    if (chosen > best_capability()) {
        throw std::runtime_error(std::string(kVariable) + " asks for " + requested +
                                 ", but the widest that this CPU has is " + capability_name(best_capability()));
    }
    return chosen;
}

std::string capability_name(Capability capability) {
    switch (capability) {
        case Capability::kAvx512:
            return "avx512";
        case Capability::kAvx2:
            return "avx2";
        default:
            return "default";
    }
}

}  // namespace ikem_fast::cpu
