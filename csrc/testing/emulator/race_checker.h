// TEST-ONLY checker of races and of reads of uninitialised memory. Kernels are compiled with -fsanitize=thread and
// linked WITHOUT it: the compiler then calls __tsan_readN and __tsan_writeN for each memory access, and this file
// supplies those functions.
//
// Rule: two accesses to a byte by different threads, at least one of them a write and not both atomic, must be
// separated by __syncthreads (same block) or __syncwarp (same warp), or between blocks by __threadfence and an atomic.
#pragma once

#include "testing/emulator/engine.h"

namespace cuda_emulator::race {

// The last access of a kind to one byte.
struct Access {
  // Who else made such accesses since the last barrier: nobody, lanes of the same warp, other warps.
  enum Sharing : uint8_t { kOneThread, kOneWarp, kManyWarps };
  uint32_t epoch = 0;
  uint32_t code = 0;  // where in the program; with the highest bit set, a source line
  uint16_t thread = 0;
  uint16_t warp_epoch = 0;
  Sharing sharing = kOneThread;
};
struct Byte {
  Access write, read, atomic;
  uint32_t initialised = 0;  // epoch of the first write, 0 for none
  bool in_flight = false;
};
struct Region {
  const unsigned char* start;
  size_t size;
  bool is_shared;
  Byte* bytes;
};

constexpr int kMaxRegions = 256;
constexpr unsigned kMaxReports = 3;  // per launch
inline Region regions[kMaxRegions];
inline int num_regions = 0;
inline unsigned errors_in_launch = 0;
inline uint32_t last_code = 0, last_other_code = 0;
inline bool is_checking = false;  // the library calls made while checking are instrumented, too
extern "C" char __executable_start;

EMULATOR_UNCHECKED inline std::string describe_code(uint32_t code) {
  if (code == 0) return "?";
  if (code >> 31) return "line " + std::to_string(code & 0x7fffffff);
  char executable[200] = {}, command[400], line[300] = "?";
  if (readlink("/proc/self/exe", executable, sizeof executable - 1) < 0) return "?";
  snprintf(command, sizeof command, "addr2line -s -e '%s' 0x%x 2>/dev/null", executable, code - 1);
  if (FILE* output = popen(command, "r")) {
    if (!fgets(line, sizeof line, output)) snprintf(line, sizeof line, "?");
    pclose(output);
  }
  line[strcspn(line, " \n")] = 0;
  return line;
}

// Whether `earlier` was made by the current thread or lies behind a barrier that orders it before the current access.
EMULATOR_UNCHECKED inline bool is_ordered(const Access& earlier, bool is_shared) {
  if (earlier.epoch < engine.launch_epoch) return true;
  if (earlier.epoch < engine.block_epoch) return is_shared || earlier.epoch <= engine.acquired;  // another block
  if (earlier.epoch != engine.epoch) return true;
  if (earlier.thread == engine.current->id && earlier.sharing == Access::kOneThread) return true;
  return earlier.sharing != Access::kManyWarps && earlier.thread / 32u == engine.current->warp &&
         earlier.warp_epoch != static_cast<uint16_t>(engine.warp_epochs[engine.current->warp]);
}

EMULATOR_UNCHECKED inline void record(Access& access, uint32_t code, bool may_be_shared) {
  const auto warp_epoch = static_cast<uint16_t>(engine.warp_epochs[engine.current->warp]);
  Access::Sharing sharing = Access::kOneThread;
  if (may_be_shared && access.epoch == engine.epoch) {
    if (access.thread / 32u != engine.current->warp) {
      sharing = Access::kManyWarps;
    } else {
      sharing = access.sharing;
      if (access.warp_epoch != warp_epoch && sharing == Access::kOneWarp) sharing = Access::kOneThread;
      if (access.warp_epoch == warp_epoch && access.thread != engine.current->id && sharing == Access::kOneThread) {
        sharing = Access::kOneWarp;
      }
    }
  }
  access = {engine.epoch, code, static_cast<uint16_t>(engine.current->id), warp_epoch, sharing};
}

EMULATOR_UNCHECKED inline void complain(const char* what, const Region& region, size_t at, uint32_t code,
                                        const Access& other) {
  engine.failed = true;
  if (code == last_code && other.code == last_other_code) return;  // one report per pair of places
  last_code = code;
  last_other_code = other.code;
  if (++errors_in_launch > kMaxReports) return;
  report("%s: %s memory, byte %zu of %zu, here %s, earlier %s by thread %u", what,
         region.is_shared ? "shared" : "global", at, region.size, describe_code(code).c_str(),
         describe_code(other.code).c_str(), other.thread);
}

// What is wrong with an access to one byte, or nullptr; `other` becomes the access it collides with.
EMULATOR_UNCHECKED inline const char* find_fault(const Byte& byte, bool is_shared, AccessKind kind, Access& other) {
  const uint32_t fresh = is_shared ? engine.block_epoch : 1;  // shared memory starts anew in every block
  if (kind == kRead || kind == kAtomic) {
    other = byte.write;
    if (byte.in_flight) return "read of cp.async data before its wait";
    if (byte.initialised < fresh) return other = Access{}, "read of uninitialised data";
  }
  if (!is_ordered(byte.write, is_shared)) {
    return other = byte.write, kind == kRead ? "race: read after write" : "race: write after write";
  }
  if (kind != kAtomic && !is_ordered(byte.atomic, is_shared)) {
    return other = byte.atomic, "race: plain access after atomic";
  }
  if (kind != kRead && !is_ordered(byte.read, is_shared)) return other = byte.read, "race: write after read";
  return nullptr;
}

EMULATOR_UNCHECKED inline void check_region(Region& region, size_t first, size_t size, AccessKind kind, uint32_t code) {
  for (size_t i = first; i < first + size && i < region.size; ++i) {
    Byte& byte = region.bytes[i];
    if (kind == kHostWrite) {
      byte.initialised = 1;
      continue;
    }
    if (!engine.current) return;
    Access other;
    if (const char* fault = find_fault(byte, region.is_shared, kind, other)) {
      complain(fault, region, i, code, other);
      return;
    }
    if (kind == kRead) {
      record(byte.read, code, true);
    } else if (kind == kAtomic) {
      record(byte.atomic, code, true);
    } else {
      record(byte.write, code, false);
      byte.initialised = engine.epoch;
      byte.in_flight = kind == kInFlight;
    }
  }
}

EMULATOR_UNCHECKED inline void check_access(const void* pointer, size_t size, AccessKind kind, uint32_t code) {
  if (is_checking || (!engine.active && kind != kHostWrite)) return;
  is_checking = true;
  const auto bytes = static_cast<const unsigned char*>(pointer);
  for (int k = num_regions - 1; k >= 0; --k) {
    Region& region = regions[k];
    if (bytes < region.start || bytes >= region.start + region.size) continue;
    check_region(region, bytes - region.start, size, kind, code);
    break;
  }
  is_checking = false;
}

EMULATOR_UNCHECKED inline void mark_hook(const void* pointer, size_t size, AccessKind kind, unsigned line) {
  check_access(pointer, size, kind, 0x80000000u | line);
}
EMULATOR_UNCHECKED inline void instrumented(const void* pointer, size_t size, AccessKind kind, const void* caller) {
  check_access(pointer, size, kind, static_cast<uint32_t>(static_cast<const char*>(caller) - &__executable_start));
}
EMULATOR_UNCHECKED inline void add_region(const void* start, size_t size, bool is_shared) {
  if (num_regions == kMaxRegions) {
    report("race checker: more than %d buffers", kMaxRegions);
    return;
  }
  regions[num_regions++] = {static_cast<const unsigned char*>(start), size, is_shared,
                            static_cast<Byte*>(calloc(size + 1, sizeof(Byte)))};
}
EMULATOR_UNCHECKED inline void drop_regions(const void* start, bool all_shared) {
  for (int i = 0; i < num_regions;) {
    if (all_shared ? regions[i].is_shared : regions[i].start == start) {
      free(regions[i].bytes);
      regions[i] = regions[--num_regions];
    } else {
      ++i;
    }
  }
}
EMULATOR_UNCHECKED inline void region_hook(const void* start, size_t size, bool is_new) {
  if (is_new) {
    add_region(start, size, false);
  } else {
    drop_regions(start, false);
  }
}
EMULATOR_UNCHECKED inline void begin_hook() {
  errors_in_launch = last_code = last_other_code = 0;
  if (engine.dynamic_bytes) add_region(engine.dynamic_shared, engine.dynamic_bytes, true);
  add_region(engine.static_shared, kStaticArena, true);
}
EMULATOR_UNCHECKED inline void end_hook() { drop_regions(nullptr, true); }
inline bool installed = (hooks = {begin_hook, end_hook, mark_hook, region_hook}, true);

}  // namespace cuda_emulator::race

#define EMULATOR_HOOK(name, size, kind)                                                                 \
  extern "C" EMULATOR_UNCHECKED inline __attribute__((used)) void name(void* pointer) {                 \
    cuda_emulator::race::instrumented(pointer, size, cuda_emulator::kind, __builtin_return_address(0)); \
  }
#define EMULATOR_HOOKS(size)                              \
  EMULATOR_HOOK(__tsan_read##size, size, kRead)           \
  EMULATOR_HOOK(__tsan_write##size, size, kWrite)         \
  EMULATOR_HOOK(__tsan_unaligned_read##size, size, kRead) \
  EMULATOR_HOOK(__tsan_unaligned_write##size, size, kWrite)
EMULATOR_HOOKS(1)
EMULATOR_HOOKS(2)
EMULATOR_HOOKS(4)
EMULATOR_HOOKS(8)
EMULATOR_HOOKS(16)

extern "C" {
EMULATOR_UNCHECKED inline __attribute__((used)) void __tsan_read_range(void* pointer, unsigned long size) {
  cuda_emulator::race::instrumented(pointer, size, cuda_emulator::kRead, __builtin_return_address(0));
}
EMULATOR_UNCHECKED inline __attribute__((used)) void __tsan_write_range(void* pointer, unsigned long size) {
  cuda_emulator::race::instrumented(pointer, size, cuda_emulator::kWrite, __builtin_return_address(0));
}
inline __attribute__((used)) void __tsan_vptr_update(void**, void*) {}
inline __attribute__((used)) void __tsan_vptr_read(void**) {}
inline __attribute__((used)) void __tsan_init() {}
inline __attribute__((used)) void __tsan_func_entry(void*) {}
inline __attribute__((used)) void __tsan_func_exit() {}
}
