// TEST-ONLY: the names of cuda/kernel.h on top of the emulator.
#pragma once

#include "testing/emulator/engine.h"
#ifdef IKEM_CHECK_RACES
#include "testing/emulator/race_checker.h"
#endif

#define IKEM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::cuda_emulator::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#define IKEM_SHARED(type, name, ...)               \
  static ::cuda_emulator::Slot shared_slot_##name; \
  auto& name = shared_slot_##name.as<type __VA_ARGS__>()
#define IKEM_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(::cuda_emulator::engine.dynamic_shared)

#define mma_m16n8k16_bf16(d, a, b) ::cuda_emulator::mma_bf16(d, a, b, EMULATOR_SITE("mma"))
#define ldmatrix_x4(r, row) ::cuda_emulator::ldmatrix<4>(r, row, false, EMULATOR_SITE("ldmatrix.x4"))
#define ldmatrix_x2(r, row) ::cuda_emulator::ldmatrix<2>(r, row, false, EMULATOR_SITE("ldmatrix.x2"))
#define ldmatrix_x4_trans(r, row) ::cuda_emulator::ldmatrix<4>(r, row, true, EMULATOR_SITE("ldmatrix.x4.trans"))
#define ldmatrix_x2_trans(r, row) ::cuda_emulator::ldmatrix<2>(r, row, true, EMULATOR_SITE("ldmatrix.x2.trans"))

inline float exp2_approximate(float x) { return x < -126.0f ? 0.0f : exp2f(x); }

inline void cp_async16(void* destination, const void* source, bool condition = true,
                       ::cuda_emulator::Location at = ::cuda_emulator::Location::current()) {
  ::cuda_emulator::cp_async(destination, source, 16, condition ? 16 : 0, at);
}
inline void cp_async_commit() { ::cuda_emulator::cp_commit(); }
template <int kKeep>
inline void cp_async_wait() {
  ::cuda_emulator::cp_wait(kKeep);
}
