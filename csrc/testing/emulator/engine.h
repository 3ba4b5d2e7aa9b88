// TEST-ONLY host emulator for CUDA kernels: included by cuda/kernel.h when IKEM_EMULATE_CUDA is defined.
//
// Each CUDA thread of the running block is a fiber with a stack of its own; blocks run one after another on one thread
// of the host. A fiber runs until it reaches a barrier or a warp collective, then the next one that is ready runs, in
// an order that Config::seed decides. When none is ready and some have not exited, the block is deadlocked. Errors are
// reported, not thrown: the launch is abandoned and returns cudaErrorLaunchFailure.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>
#include <sys/mman.h>
#include <unistd.h>
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <set>
#include <source_location>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_ADDRESS_SANITIZER 1
#endif
#define EMULATOR_UNCHECKED __attribute__((noinline, no_sanitize("address", "thread", "undefined")))

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __launch_bounds__(...)
#define __shared__ write_IKEM_SHARED_instead  // gcc 12 drops section attributes inside templates (PR 41091)

inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim{}, gridDim{};
constexpr int warpSize = 32;

namespace cuda_emulator {

struct Config {
  uint64_t seed = 2;           // 0: ascending order, 1: descending, others: random
  bool strict_barrier = true;  // an exited thread at a __syncthreads is an error
  size_t stack = 256 * 1024, max_dynamic_shared = 227 * 1024, default_dynamic_shared = 48 * 1024;
  bool echo = true;  // print reports to stderr
};
struct Stats {
  uint64_t switches = 0, barriers = 0, collectives = 0, threads = 0, blocks = 0;
};
inline Config config;
inline Stats stats;
inline std::vector<std::string> reports;  // every error of the process, oldest first
inline std::set<std::string> launched;    // names of the kernels that have run, without namespace and template arguments

// ---- hooks filled in by race_checker.h (no-ops otherwise) -----------------------------------
// kInFlight: the destination of a copy that has been issued, kArrived: the same once it was waited for.
enum AccessKind { kRead, kWrite, kAtomic, kInFlight, kHostWrite, kArrived };
struct Hooks {
  void (*launch_begin)() = nullptr;
  void (*launch_end)() = nullptr;
  void (*mark)(const void*, size_t, AccessKind kind, unsigned line) = nullptr;
  void (*region)(const void*, size_t, bool add) = nullptr;
};
inline Hooks hooks;
inline void mark(const void* p, size_t n, AccessKind kind, unsigned line = 0) {
  if (hooks.mark) hooks.mark(p, n, kind, line);
}
using Location = std::source_location;

// A cp.async that has not been waited for.
struct Copy {
  void* dst;
  const void* src;
  unsigned n, fill, line;
};
enum State : uint8_t { READY, AT_BARRIER, AT_WARP, EXITED };
// Where a barrier or collective stands in the source.
struct Site {
  const char* file;
  int line;
  const char* what;
};
// One CUDA thread.
struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* fake_stack = nullptr;  // of the address sanitizer
  State state = READY;
  uint3 thread_index{};
  unsigned id = 0, warp = 0, lane = 0;
  Site site{};
  uint32_t mask = 0;
  const void* in = nullptr;  // of the collective it waits at
  void* out = nullptr;
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;                // not committed
  uint64_t collective_function = 0;
};
// Everything about the launch that runs.
struct Engine {
  Fiber* fibers = new Fiber[1024];
  unsigned num_threads = 0, num_waiting = 0, num_exited = 0;
  Site barrier_site{};
  unsigned ready[1024] = {}, num_ready = 0;
  Fiber* current = nullptr;
  void* launcher_stack_pointer = nullptr;
  void* launcher_fake_stack = nullptr;
  const void* launcher_stack_bottom = nullptr;
  size_t launcher_stack_size = 0;
  uint32_t exited_lanes[32] = {}, warp_epochs[32] = {};  // per warp; epochs count __syncwarp
  // Epochs count barriers; two accesses in different epochs of one block are ordered.
  uint32_t epoch = 1, block_epoch = 1, launch_epoch = 1;
  uint32_t fenced = 0, fenced_before = 0, acquired = 0;  // __threadfence and then an atomic order earlier blocks
  unsigned char* dynamic_shared = nullptr;
  size_t dynamic_bytes = 0;
  unsigned char* static_shared = nullptr;  // arena of static shared variables
  size_t static_used = 0, static_bytes = 0;
  uint64_t random_state = 1;
  bool failed = false, active = false;
  const char* kernel = "?";
  void (*body)(void*) = nullptr;
  void* body_arg = nullptr;
  std::map<const void*, size_t> dynamic_limits;
  std::map<void*, size_t> allocations;
  cudaError_t last_error = cudaSuccess;
};
inline Engine engine;
constexpr size_t kStaticArena = 64 * 1024;

EMULATOR_UNCHECKED inline uint64_t next_random() {
  engine.random_state ^= engine.random_state << 13;
  engine.random_state ^= engine.random_state >> 7;
  engine.random_state ^= engine.random_state << 17;
  return engine.random_state;
}

__attribute__((naked, noinline, noipa)) inline void raw_switch(void** /*save*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp,(%rdi); movq %rsi,%rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret\n");
}
EMULATOR_UNCHECKED inline void switch_to(Fiber* to) {  // to == nullptr: the launcher
  Fiber* from = engine.current;
  if (to == from) return;
  ++stats.switches;
#ifdef EMULATOR_ADDRESS_SANITIZER
  void** fake = from ? (from->state == EXITED ? nullptr : &from->fake_stack) : &engine.launcher_fake_stack;
  __sanitizer_start_switch_fiber(fake, to ? to->stack : engine.launcher_stack_bottom,
                                 to ? config.stack : engine.launcher_stack_size);
#endif
  engine.current = to;
  if (to) threadIdx = to->thread_index;
  raw_switch(from ? &from->stack_pointer : &engine.launcher_stack_pointer,
             to ? to->stack_pointer : engine.launcher_stack_pointer);
#ifdef EMULATOR_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(engine.current ? engine.current->fake_stack : engine.launcher_fake_stack, nullptr,
                                  nullptr);
#endif
}
inline void report(const char* fmt, ...) {
  char b[700];
  va_list ap;
  va_start(ap, fmt);
  int k = 0;
  if (engine.active) {
    k = snprintf(b, sizeof b, "cuda_emulator: kernel %s seed %llu block (%u,%u,%u)", engine.kernel,
                 (unsigned long long)config.seed, blockIdx.x, blockIdx.y, blockIdx.z);
    if (engine.current)
      k += snprintf(b + k, sizeof b - k, " thread (%u,%u,%u)", engine.current->thread_index.x,
                    engine.current->thread_index.y, engine.current->thread_index.z);
    k += snprintf(b + k, sizeof b - k, ": ");
  } else
    k = snprintf(b, sizeof b, "cuda_emulator: ");
  vsnprintf(b + k, sizeof b - k, fmt, ap);
  va_end(ap);
  reports.push_back(b);
  if (config.echo) fprintf(stderr, "%s\n", b);
  engine.failed = true;
}
inline void fatal_switch() {  // abandon the launch: every fiber stack is dropped
  if (engine.current) {
    switch_to(nullptr);
    __builtin_unreachable();
  }
}
#define EMULATOR_FAIL(...)                \
  do {                                    \
    ::cuda_emulator::report(__VA_ARGS__); \
    ::cuda_emulator::fatal_switch();      \
  } while (0)

// The fiber that runs next, by the seed's rule.
EMULATOR_UNCHECKED inline Fiber* pick_ready() {
  if (!engine.num_ready) return nullptr;
  unsigned i = config.seed == 0   ? 0
               : config.seed == 1 ? engine.num_ready - 1
                                  : next_random() % engine.num_ready,
           id = engine.ready[i];
  if (config.seed < 2)
    memmove(engine.ready + i, engine.ready + i + 1, (--engine.num_ready - i) * sizeof(unsigned));
  else
    engine.ready[i] = engine.ready[--engine.num_ready];
  return &engine.fibers[id];
}
EMULATOR_UNCHECKED inline void make_ready(Fiber& x) {
  x.state = READY;
  unsigned i = engine.num_ready++;
  if (config.seed < 2)
    for (; i && engine.ready[i - 1] > x.id; --i) engine.ready[i] = engine.ready[i - 1];
  engine.ready[i] = x.id;
}
// Without a ready fiber: back to the launcher, which says who waits where.
EMULATOR_UNCHECKED inline void yield_to_next() { switch_to(pick_ready()); }

EMULATOR_UNCHECKED inline void release_barrier() {
  ++engine.epoch;
  ++stats.barriers;
  engine.num_waiting = 0;
  for (unsigned i = 0; i < engine.num_threads; ++i)
    if (engine.fibers[i].state == AT_BARRIER) make_ready(engine.fibers[i]);
}
EMULATOR_UNCHECKED inline void syncthreads(const char* file, int line) {
  Fiber* self = engine.current;
  if (engine.num_waiting && (engine.barrier_site.line != line || strcmp(engine.barrier_site.file, file)))
    EMULATOR_FAIL("divergent barrier: this thread is at %s:%d while others wait at %s:%d", file, line,
                  engine.barrier_site.file, engine.barrier_site.line);
  if (engine.num_exited && config.strict_barrier)
    EMULATOR_FAIL("divergent barrier: %u of %u threads exited before __syncthreads at %s:%d", engine.num_exited,
                  engine.num_threads, file, line);
  engine.barrier_site = self->site = {file, line, "__syncthreads"};
  self->state = AT_BARRIER;
  if (++engine.num_waiting == engine.num_threads - engine.num_exited) release_barrier();
  yield_to_next();
}

// Warp collective: the last named lane to arrive runs fn(in, out, lanes) for the whole warp.
using WarpFn = void (*)(const void** in, void** out, uint32_t lanes);
EMULATOR_UNCHECKED inline void try_collective(unsigned w, WarpFn fn_of_last, Fiber* last) {
  uint32_t want = last->mask & ~engine.exited_lanes[w], got = 0;
  const void* in[32] = {};
  void* out[32] = {};
  for (unsigned l = 0; l < 32 && w * 32 + l < engine.num_threads; ++l) {
    Fiber& x = engine.fibers[w * 32 + l];
    if (x.state == AT_WARP && x.mask == last->mask && x.site.line == last->site.line &&
        x.site.what == last->site.what) {
      got |= 1u << l;
      in[l] = x.in;
      out[l] = x.out;
    }
  }
  if ((got & want) != want) return;
  ++stats.collectives;
  if (fn_of_last) fn_of_last(in, out, got);
  for (unsigned l = 0; l < 32; ++l)
    if (got >> l & 1) make_ready(engine.fibers[w * 32 + l]);
}
EMULATOR_UNCHECKED inline void collective(uint32_t mask, Site site, const void* in, void* out, WarpFn fn,
                                          bool orders_memory = false) {
  Fiber* self = engine.current;
  uint32_t exist =
      engine.num_threads - self->warp * 32 >= 32 ? ~0u : (1u << (engine.num_threads - self->warp * 32)) - 1;
  if (!(mask >> self->lane & 1))
    EMULATOR_FAIL("%s at %s:%d: mask %08x does not name the calling lane %u", site.what, site.file, site.line, mask,
                  self->lane);
  mask &= exist;  // lanes past the block's end never exist
  self->site = site;
  self->mask = mask;
  self->in = in;
  self->out = out;
  self->state = AT_WARP;
  self->collective_function = (uint64_t)fn;
  unsigned w = self->warp;
  try_collective(w, fn, self);
  if (self->state == READY && orders_memory) ++engine.warp_epochs[w];
  yield_to_next();
}

// ---- block and launch ------------------------------------------------------------------------
EMULATOR_UNCHECKED inline void fill_with_ones(unsigned char* p, size_t n) {  // ASan red zones may lie inside
#ifdef EMULATOR_ADDRESS_SANITIZER
  for (volatile unsigned char* q = p; n--;) *q++ = 0xFF;
#else
  memset(p, 0xFF, n);
#endif
}
EMULATOR_UNCHECKED inline void fiber_main() {
#ifdef EMULATOR_ADDRESS_SANITIZER
  const void* b;
  size_t s;
  __sanitizer_finish_switch_fiber(nullptr, &b, &s);
  if (!engine.launcher_stack_bottom) {
    engine.launcher_stack_bottom = b;
    engine.launcher_stack_size = s;
  }
#endif
  engine.body(engine.body_arg);
  Fiber* self = engine.current;
  for (auto& g : self->groups)
    if (!g.empty()) EMULATOR_FAIL("thread exits with cp.async data that no wait_group covered");
  if (!self->open.empty()) EMULATOR_FAIL("thread exits with cp.async copies that were never committed");
  self->state = EXITED;
  ++engine.num_exited;
  engine.exited_lanes[self->warp] |= 1u << self->lane;
  if (engine.num_waiting && config.strict_barrier)
    EMULATOR_FAIL("divergent barrier: this thread exits while %u of %u wait at %s:%d", engine.num_waiting,
                  engine.num_threads, engine.barrier_site.file, engine.barrier_site.line);
  if (engine.num_waiting && engine.num_waiting == engine.num_threads - engine.num_exited) release_barrier();
  // A collective may only have waited for this lane.
  for (unsigned l = 0; l < 32 && self->warp * 32 + l < engine.num_threads; ++l) {
    Fiber& x = engine.fibers[self->warp * 32 + l];
    if (x.state == AT_WARP) try_collective(self->warp, (WarpFn)x.collective_function, &x);
  }
  switch_to(pick_ready());
  __builtin_unreachable();
}
inline void prepare(Fiber& x) {
  if (!x.stack) {
    size_t g = 4096;  // guard page below the stack
    char* m = (char*)mmap(nullptr, config.stack + g, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED) {
      perror("mmap");
      abort();
    }
    mprotect(m, g, PROT_NONE);
    x.stack = m + g;
  }
#ifdef EMULATOR_ADDRESS_SANITIZER
  __asan_unpoison_memory_region(x.stack, config.stack);
#endif
  void** s = (void**)(x.stack + config.stack);
  *--s = nullptr;
  *--s = (void*)fiber_main;  // ret target; (rsp+8)%16==0 at entry
  for (int i = 0; i < 6; ++i) *--s = nullptr;
  x.stack_pointer = s;
  x.fake_stack = nullptr;
  x.state = READY;
  x.groups.clear();
  x.open.clear();
}
struct Slot {  // one static shared variable of one kernel instantiation; laid out anew, with red zones, in each block
  uint32_t block = 0;
  unsigned char* p = nullptr;
  template <class T>
  EMULATOR_UNCHECKED T& as() {
    if (block != engine.block_epoch) {
      size_t al = std::max<size_t>(alignof(T), 16), at = (engine.static_used + 64 + al - 1) / al * al;
      block = engine.block_epoch;
      p = engine.static_shared + at;
      engine.static_used = at + sizeof(T);
      engine.static_bytes += sizeof(T);
      if (engine.static_bytes > 48 * 1024 || engine.static_bytes + engine.dynamic_bytes > config.max_dynamic_shared)
        EMULATOR_FAIL("static shared memory %zu + dynamic %zu bytes is too much", engine.static_bytes,
                      engine.dynamic_bytes);
#ifdef EMULATOR_ADDRESS_SANITIZER
      __asan_unpoison_memory_region(p, sizeof(T));
#endif
    }
    return *reinterpret_cast<T*>(p);
  }
};
inline void run_block() {
  engine.num_waiting = engine.num_exited = 0;
  engine.num_ready = 0;
  engine.block_epoch = ++engine.epoch;
  engine.fenced_before = engine.fenced;
  engine.acquired = 0;
  memset(engine.exited_lanes, 0, sizeof engine.exited_lanes);
  memset(engine.warp_epochs, 0, sizeof engine.warp_epochs);
  engine.static_used = engine.static_bytes = 0;
  fill_with_ones(engine.static_shared, kStaticArena);
  fill_with_ones(engine.dynamic_shared, engine.dynamic_bytes);
#ifdef EMULATOR_ADDRESS_SANITIZER
  __asan_poison_memory_region(engine.static_shared, kStaticArena);
#endif
  for (unsigned i = 0; i < engine.num_threads; ++i) {
    Fiber& x = engine.fibers[i];
    x.id = i;
    x.warp = i / 32;
    x.lane = i % 32;
    x.thread_index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    prepare(x);
    engine.ready[engine.num_ready++] = i;
  }
  ++stats.blocks;
  stats.threads += engine.num_threads;
  switch_to(pick_ready());
  if (engine.failed || engine.num_exited == engine.num_threads) return;
  std::map<std::string, unsigned> where;  // deadlock: say who waits where
  for (unsigned i = 0; i < engine.num_threads; ++i) {
    Fiber& x = engine.fibers[i];
    char b[200];
    if (x.state == EXITED)
      snprintf(b, sizeof b, "exited");
    else if (x.state == AT_WARP)
      snprintf(b, sizeof b, "%s %s:%d mask %08x", x.site.what, x.site.file, x.site.line, x.mask);
    else
      snprintf(b, sizeof b, "%s %s:%d", x.site.what, x.site.file, x.site.line);
    ++where[b];
  }
  std::string m;
  for (auto& [k, v] : where) m += "\n    " + std::to_string(v) + " threads: " + k;
  report("deadlock (divergent barrier or warp collective):%s", m.c_str());
}
// `(math::add_kernel<float>)` to `add_kernel`.
inline std::string bare_name(std::string name) {
  name.erase(0, name.find_first_not_of("( "));
  name.erase(std::min(name.size(), name.find_first_of("<) ")));
  return name.substr(name.rfind(':') + 1);
}
template <class... P, class... A>
cudaError_t launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   A&&... a) {
  uint64_t num_threads = (uint64_t)block.x * block.y * block.z, num_blocks = (uint64_t)grid.x * grid.y * grid.z;
  engine.kernel = name;
  size_t allowed = engine.dynamic_limits.count((const void*)kernel) ? engine.dynamic_limits[(const void*)kernel]
                                                                    : config.default_dynamic_shared;
  if (!num_threads || num_threads > 1024 || block.z > 64 || !num_blocks || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || shared_bytes > allowed) {
    report("launch of %s refused: grid (%u,%u,%u) block (%u,%u,%u) dynamic shared %zu (allowed %zu)", name, grid.x,
           grid.y, grid.z, block.x, block.y, block.z, shared_bytes, allowed);
    return engine.last_error = shared_bytes > allowed ? cudaErrorInvalidValue : cudaErrorInvalidConfiguration;
  }
  launched.insert(bare_name(name));
  std::tuple<std::decay_t<P>...> args(static_cast<P>(a)...);
  auto call = [&] { std::apply(kernel, args); };
  engine.body = [](void* p) { (*(decltype(call)*)p)(); };
  engine.body_arg = &call;
  engine.num_threads = (unsigned)num_threads;
  gridDim = grid;
  blockDim = block;
  engine.failed = false;
  engine.active = true;
  engine.random_state = config.seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  engine.dynamic_bytes = shared_bytes;
  engine.dynamic_shared = (unsigned char*)aligned_alloc(1024, (shared_bytes + 1023) / 1024 * 1024 + 1024);
  if (!engine.static_shared) engine.static_shared = (unsigned char*)aligned_alloc(1024, kStaticArena);
#ifdef EMULATOR_ADDRESS_SANITIZER
  __asan_poison_memory_region(engine.dynamic_shared + shared_bytes,
                              (shared_bytes + 1023) / 1024 * 1024 + 1024 - shared_bytes);
#endif
  engine.launch_epoch = ++engine.epoch;
  if (hooks.launch_begin) hooks.launch_begin();
  std::vector<uint32_t> order;
  if (config.seed >= 2) {
    order.resize(num_blocks);
    for (uint64_t i = 0; i < num_blocks; ++i) order[i] = i;
    for (uint64_t i = num_blocks; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  }
  for (uint64_t i = 0; i < num_blocks && !engine.failed; ++i) {
    uint64_t number = config.seed == 0 ? i : config.seed == 1 ? num_blocks - 1 - i : order[i];
    blockIdx = {(unsigned)(number % grid.x), (unsigned)(number / grid.x % grid.y),
                (unsigned)(number / grid.x / grid.y)};
    run_block();
  }
  if (hooks.launch_end) hooks.launch_end();
#ifdef EMULATOR_ADDRESS_SANITIZER
  __asan_unpoison_memory_region(engine.dynamic_shared, (shared_bytes + 1023) / 1024 * 1024 + 1024);
#endif
  free(engine.dynamic_shared);
  engine.active = false;
  engine.current = nullptr;
  return engine.last_error = engine.failed ? cudaErrorLaunchFailure : cudaSuccess;
}

// ---- warp intrinsics -------------------------------------------------------------------------
enum ShuffleMode { kFromLane, kUp, kDown, kXor };
struct Shuffled {
  uint64_t v;
  int src;
  bool bad;
};
template <class T>
EMULATOR_UNCHECKED T shuffle(uint32_t mask, T v, ShuffleMode mode, int arg, int width, Site s) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  int l = engine.current->lane, base = l & ~(width - 1), src = l;
  if (mode == kFromLane) src = base + (arg & (width - 1));
  if (mode == kUp) src = l - arg < base ? l : l - arg;
  if (mode == kDown) src = l + arg >= base + width ? l : l + arg;
  if (mode == kXor) src = (l ^ arg) >= base + width ? l : l ^ arg;
  Shuffled in{0, src, false}, out{};
  memcpy(&in.v, &v, sizeof v);
  collective(mask, s, &in, &out, [](const void** i, void** o, uint32_t lanes) __attribute__((no_sanitize("thread"))) {
    for (int k = 0; k < 32; ++k)
      if (lanes >> k & 1) {
        int sl = ((const Shuffled*)i[k])->src;
        *(Shuffled*)o[k] =
            lanes >> sl & 1 ? Shuffled{((const Shuffled*)i[sl])->v, sl, false} : Shuffled{~0ull, sl, true};
      }
  });
  if (out.bad)
    EMULATOR_FAIL("%s at %s:%d reads lane %d, which is exited or not in the mask", s.what, s.file, s.line, out.src);
  T r;
  memcpy(&r, &out.v, sizeof r);
  return r;
}
struct Votes {
  uint32_t pred, votes, sum, mn, mx, an, orr, xr;
};
EMULATOR_UNCHECKED inline Votes vote(uint32_t mask, uint32_t v, Site s) {
  Votes r{};
  collective(mask, s, &v, &r, [](const void** i, void** o, uint32_t lanes) __attribute__((no_sanitize("thread"))) {
    Votes a{0, 0, 0, ~0u, 0, ~0u, 0, 0};
    for (int k = 0; k < 32; ++k)
      if (lanes >> k & 1) {
        uint32_t x = *(const uint32_t*)i[k];
        a.votes |= (x != 0) << k;
        a.sum += x;
        a.mn = std::min(a.mn, x);
        a.mx = std::max(a.mx, x);
        a.an &= x;
        a.orr |= x;
        a.xr ^= x;
      }
    a.pred = lanes;
    for (int k = 0; k < 32; ++k)
      if (lanes >> k & 1) *(Votes*)o[k] = a;
  });
  return r;
}
// ---- atomics ---------------------------------------------------------------------------------
template <class T, class F>
EMULATOR_UNCHECKED T read_modify_write(T* p, F f, Location at) {
  mark(p, sizeof(T), kAtomic, at.line());
  engine.acquired = engine.fenced_before;
#ifdef EMULATOR_ADDRESS_SANITIZER
  if (void* bad = __asan_region_is_poisoned(p, sizeof(T))) {
    volatile char c = *(volatile char*)bad;
    (void)c;
    EMULATOR_FAIL("atomic on poisoned address %p", bad);
  }
#endif
  if ((uintptr_t)p % sizeof(T)) EMULATOR_FAIL("misaligned atomic at %p", (void*)p);
  T o = *p;
  *p = f(o);
  if (engine.num_ready && !(next_random() & 15)) {
    std::swap(engine.ready[next_random() % engine.num_ready], engine.ready[engine.num_ready - 1]);
    Fiber* to = &engine.fibers[engine.ready[--engine.num_ready]];
    engine.ready[engine.num_ready++] = engine.current->id;
    if (config.seed < 2) std::sort(engine.ready, engine.ready + engine.num_ready);
    switch_to(to);
  }  // lets spin loops end
  return o;
}
// ---- tensor cores and asynchronous copies ------------------------------------------------------
EMULATOR_UNCHECKED inline bool in_shared(const void* p, size_t n) {
  auto c = (const unsigned char*)p;
  return (c >= engine.dynamic_shared && c + n <= engine.dynamic_shared + engine.dynamic_bytes) ||
         (c >= engine.static_shared && c + n <= engine.static_shared + engine.static_used);
}
__attribute__((no_sanitize("thread"))) inline void touch(const void* p, size_t n, bool shared,
                                                         const char* what) {  // ASan checks it
  if ((uintptr_t)p % n) EMULATOR_FAIL("%s: address %p is not %zu-byte aligned", what, p, n);
  if (shared && !in_shared(p, n)) EMULATOR_FAIL("%s: address %p is not in shared memory", what, p);
  for (size_t i = 0; i < n; ++i) {
    volatile char c = ((const volatile char*)p)[i];
    (void)c;
  }
}
EMULATOR_UNCHECKED inline float bfloat16_at(uint32_t w, int hi) {
  uint32_t u = hi ? w & 0xffff0000u : w << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
struct MmaIn {
  uint32_t a[4], b[2];
  float c[4];
};
EMULATOR_UNCHECKED inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site s) {
  MmaIn in;
  memcpy(in.a, a, 16);
  memcpy(in.b, b, 8);
  memcpy(in.c, d, 16);
  collective(~0u, s, &in, d, [](const void** i, void** o, uint32_t lanes) __attribute__((no_sanitize("thread"))) {
    if (lanes != ~0u) {
      report("mma with %d of 32 lanes", std::popcount(lanes));
      return;
    }
    float A[16][16], B[16][8];
    for (int l = 0; l < 32; ++l) {
      auto& x = *(const MmaIn*)i[l];
      int g = l >> 2, t = l & 3;
      for (int q = 0; q < 4; ++q)
        for (int h = 0; h < 2; ++h) A[g + 8 * (q & 1)][2 * t + h + 8 * (q >> 1)] = bfloat16_at(x.a[q], h);
      for (int q = 0; q < 2; ++q)
        for (int h = 0; h < 2; ++h) B[2 * t + h + 8 * q][g] = bfloat16_at(x.b[q], h);
    }
    for (int l = 0; l < 32; ++l) {
      auto& x = *(const MmaIn*)i[l];
      int g = l >> 2, t = l & 3;
      for (int q = 0; q < 4; ++q) {
        int r = g + 8 * (q >> 1), c = 2 * t + (q & 1);
        double acc = x.c[q];
        for (int k = 0; k < 16; ++k) acc += (double)A[r][k] * B[k][c];
        ((float*)o[l])[q] = (float)acc;
      }
    }
  });
}
template <int N>
EMULATOR_UNCHECKED void ldmatrix(uint32_t (&r)[N], const void* row, bool trans, Site s) {
  struct Ptrs {
    const unsigned char* p[32];
  } ps{};
  if ((int)engine.current->lane < 8 * N) touch(row, 16, true, "ldmatrix");
  collective(~0u, s, &row, &ps, [](const void** i, void** o, uint32_t lanes) __attribute__((no_sanitize("thread"))) {
    if (lanes != ~0u) {
      report("ldmatrix with %d of 32 lanes", std::popcount(lanes));
      return;
    }
    for (int l = 0; l < 32; ++l)
      for (int k = 0; k < 32; ++k) ((Ptrs*)o[l])->p[k] = *(const unsigned char* const*)i[k];
  });
  int l = engine.current->lane;
  for (int m = 0; m < N; ++m)
    for (int h = 0; h < 2; ++h) {
      const unsigned char* src =
          trans ? ps.p[8 * m + 2 * (l & 3) + h] + 2 * (l >> 2) : ps.p[8 * m + (l >> 2)] + 4 * (l & 3) + 2 * h;
      mark(src, 2, kRead, s.line);
      memcpy((char*)&r[m] + 2 * h, src, 2);
    }
}
// The destination turns to garbage at issue and gets its data only in the wait that covers it.
inline void cp_async(void* dst, const void* src, unsigned n, unsigned fill_from, Location at) {
  touch(dst, n, true, "cp.async destination");
  if (fill_from) touch(src, n, false, "cp.async source");
  mark(dst, n, kInFlight, at.line());
  if (fill_from) mark(src, n, kRead, at.line());
  fill_with_ones((unsigned char*)dst, n);
  engine.current->open.push_back({dst, src, n, fill_from, at.line()});
}
inline void cp_commit() {
  engine.current->groups.push_back(std::move(engine.current->open));
  engine.current->open.clear();
}
EMULATOR_UNCHECKED inline void cp_wait(unsigned keep) {
  auto& gs = engine.current->groups;
  for (; gs.size() > keep; gs.pop_front())
    for (auto& c : gs.front()) {
      mark(c.dst, c.n, kArrived, c.line);
      memset(c.dst, 0, c.n);
      memcpy(c.dst, c.src, c.fill);
    }
}
// ---- runtime shims ---------------------------------------------------------------------------
inline cudaError_t device_malloc(void** p, size_t n) {
  *p = aligned_alloc(256, (n + 255) / 256 * 256 + 256);
  engine.allocations[*p] = n;
  memset(*p, 0xFF, n);
#ifdef EMULATOR_ADDRESS_SANITIZER
  __asan_poison_memory_region((char*)*p + n, (n + 255) / 256 * 256 + 256 - n);
#endif
  if (hooks.region) hooks.region(*p, n, true);
  return cudaSuccess;
}
inline cudaError_t device_free(void* p) {
  if (!p) return cudaSuccess;
  auto it = engine.allocations.find(p);
  if (it == engine.allocations.end()) {
    report("cudaFree of unknown pointer %p", p);
    return cudaErrorInvalidValue;
  }
#ifdef EMULATOR_ADDRESS_SANITIZER
  __asan_unpoison_memory_region(p, (it->second + 255) / 256 * 256 + 256);
#endif
  if (hooks.region) hooks.region(p, it->second, false);
  engine.allocations.erase(it);
  free(p);
  return cudaSuccess;
}
}  // namespace cuda_emulator
#include "testing/emulator/cuda_names.h"
