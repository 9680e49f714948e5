// A GPU for tests: what cuda/platform.cuh is made of when LAS_MM_EMULATE is defined.
//
// Runs a kernel block by block on the CPU, every thread of a block as a fiber, blocks and threads
// in a shuffled order, and checks every access and every meeting of threads: bounds, alignment,
// uninitialised memory, races, copies in flight, divergence, deadlock. The first error of a launch
// ends it and is kept as text (errors()). Counts the global traffic on the way. One host thread.
#pragma once

#include <cxxabi.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <typeinfo>
#include <utility>
#include <vector>

#if !defined(__x86_64__) && !defined(LAS_MM_EMULATE_UCONTEXT)
#define LAS_MM_EMULATE_UCONTEXT
#endif
#ifdef LAS_MM_EMULATE_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#define LAS_MM_DEVICE inline
#define LAS_MM_UNROLL
#define LAS_MM_UNROLL_TWICE
#define LAS_MM_UNROLL_FOUR
#define LAS_MM_NO_UNROLL

namespace las_mm::cuda {

struct half {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

// Sixteen bytes, what one instruction moves.
struct alignas(16) Words {
  uint32_t w[4];
};

template <typename T>
struct Global;

// ---- Conversions --------------------------------------------------------------------------------

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float exponential(float value) { return std::exp(value); }

inline float to_float(float value) { return value; }
inline float to_float(half value) {
  // Shifted into place, the exponent is too small by 112; the product is exact, subnormals too.
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const uint32_t special = (value.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  return bits_to_float(float_to_bits(bits_to_float(magnitude) * 0x1p112f) | special | sign);
}
inline float to_float(bf16 value) { return bits_to_float(uint32_t{value.bits} << 16); }

// To the nearest, ties to even; NaN becomes 0x7fff as on a GPU.
template <typename T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline half from_float<half>(float value) {
  const uint32_t sign = float_to_bits(value) >> 16 & 0x8000u;
  uint32_t magnitude = float_to_bits(value) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x47800000u) {  // 2^16
    magnitude = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // 2^-14: the sum rounds to multiples of 2^-24
    magnitude = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  } else {
    magnitude = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | magnitude)};
}
template <>
inline bf16 from_float<bf16>(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

inline uint32_t bits16(half value) { return value.bits; }
inline uint32_t bits16(bf16 value) { return value.bits; }
template <typename T>
T from_bits16(uint32_t bits) {
  return T{static_cast<uint16_t>(bits)};
}

// float32 to the nearest tf32, ties away from zero, both as the bits of a float32.
inline uint32_t round_to_tf32(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (bits | 0x400000u) & ~0x1fffu;
  return (magnitude == 0x7f800000u ? bits : bits + 0x1000u) & ~0x1fffu;
}

inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

namespace emulator {

// ---- Source lines -------------------------------------------------------------------------------

// A source line in one word; as a default argument it is the line of the caller.
class Place {
 public:
  static Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    Place place;
    place.bits_ = reinterpret_cast<uintptr_t>(file) << 16 | static_cast<uint16_t>(line);
    return place;
  }
  const char* file() const {
    const char* path = reinterpret_cast<const char*>(bits_ >> 16);
    const char* slash = path == nullptr ? nullptr : std::strrchr(path, '/');
    return path == nullptr ? "?" : slash == nullptr ? path : slash + 1;
  }
  int line() const { return static_cast<int>(bits_ & 0xffff); }
  bool operator!=(Place other) const { return bits_ != other.bits_; }

 private:
  uint64_t bits_ = 0;
};

// ---- Fibers -------------------------------------------------------------------------------------

#ifndef LAS_MM_EMULATE_UCONTEXT

struct Context {
  void* stack_pointer = nullptr;
};

// Leaves what a call preserves on the running stack and continues where `to` left it. `noipa`: the
// compiler must not conclude from the body which registers survive.
#ifdef __clang__
__attribute__((naked, noinline))
#else
__attribute__((naked, noinline, noipa))
#endif
inline void switch_stacks(void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

inline void switch_context(Context& from, Context& to) {
  switch_stacks(&from.stack_pointer, to.stack_pointer);
}

// The first switch to `context` calls `entry` on the stack that ends at `top`.
inline void prepare_context(Context& context, char* bottom, char* top, void (*entry)()) {
  (void)bottom;
  void** stack = reinterpret_cast<void**>(top);
  *--stack = nullptr;  // where `entry` would return to; also aligns its frame
  *--stack = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--stack = nullptr;
  context.stack_pointer = stack;
}

#else

struct Context {
  ucontext_t context;
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

inline void prepare_context(Context& context, char* bottom, char* top, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = bottom;
  context.context.uc_stack.ss_size = static_cast<size_t>(top - bottom);
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}

#endif

// Memory for one fiber; running over its end faults in the guard page instead of corrupting.
class Stack {
 public:
  explicit Stack(int number) {
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) std::abort();
    memory_ = static_cast<char*>(memory);
    // Stacks that all end at the same offset in a page would compete for the same cache lines.
    top_ = memory_ + kBytes - number * 1600 % 32768 / 64 * 64;
  }
  Stack(Stack&& other) : memory_(std::exchange(other.memory_, nullptr)), top_(other.top_) {}
  ~Stack() {
    if (memory_ != nullptr) munmap(memory_, kBytes);
  }
  // Abandoned fibers left marks of the address sanitizer.
  void clean() const {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(memory_, kBytes);
#endif
  }
  char* bottom() const { return memory_ + kGuardBytes; }
  char* top() const { return top_; }

 private:
  static constexpr size_t kBytes = 128 << 10;
  static constexpr size_t kGuardBytes = 4 << 10;
  char* memory_;
  char* top_;
};

// ---- Counters -----------------------------------------------------------------------------------

// Global memory traffic; a sector is 32 aligned bytes and counts once per launch and direction.
// An atomic operation is a load and a store.
struct Traffic {
  int64_t load_bytes = 0;
  int64_t store_bytes = 0;
  int64_t sectors_read = 0;
  int64_t sectors_written = 0;

  Traffic& operator+=(const Traffic& other) {
    load_bytes += other.load_bytes;
    store_bytes += other.store_bytes;
    sectors_read += other.sectors_read;
    sectors_written += other.sectors_written;
    return *this;
  }
};

struct Counters {
  Traffic traffic;
  int64_t multiply_adds = 0;  // of the tensor cores
  int64_t barriers = 0;       // each counted once per block
  int64_t blocks = 0;
  int64_t launches = 0;

  Counters& operator+=(const Counters& other) {
    traffic += other.traffic;
    multiply_adds += other.multiply_adds;
    barriers += other.barriers;
    blocks += other.blocks;
    launches += other.launches;
    return *this;
  }
};

// ---- Global memory ------------------------------------------------------------------------------

// Who touched one element of an allocation. Fields are valid in the launch they name, so that
// nothing needs clearing; threads are numbered through the launch.
struct Element {
  static constexpr uint32_t kSeveral = 0x7fffffffu;  // threads
  static constexpr uint32_t kAtomic = 0x80000000u;   // added to the writer: only atomically so far

  uint32_t write_launch;  // 0: not written by any launch
  uint32_t writer;
  uint32_t read_launch;
  uint32_t reader;
};

struct Sector {
  uint32_t read_launch;
  uint32_t write_launch;
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <typename T>
using Array = std::unique_ptr<T[], Free>;

// calloc: what is never touched costs nothing.
template <typename T>
Array<T> zeros(uint64_t count) {
  void* memory = std::calloc(count + 1, sizeof(T));
  if (memory == nullptr) std::abort();
  return Array<T>(static_cast<T*>(memory));
}

struct Allocation {
  std::string name;
  unsigned char* data;
  uint64_t bytes;
  int element_shift;  // log2 of the element size; for odd sizes, of its largest factor 2^n
  bool initialised;
  Array<unsigned char> owned;
  Array<Element> elements;
  Array<Place> write_places;  // of the last write, per element
  Array<Sector> sectors;
  Traffic last;  // of the last launch
  Traffic before;

  uint64_t sector_of(uint64_t offset) const {
    return (reinterpret_cast<uintptr_t>(data) % 32 + offset) / 32;
  }
};

// ---- Shared memory, threads, warps --------------------------------------------------------------

// Who touched four bytes of shared memory. An epoch is the time between two barriers; epochs are
// numbered through all launches, so that nothing needs clearing.
struct SharedWord {
  static constexpr uint16_t kSeveral = 0xffff;

  uint32_t write_epoch;  // before the block's first one: not initialised
  uint32_t read_epoch;
  uint32_t flight_epoch;  // when the copy in flight to here started; 0: none
  uint16_t writer;
  uint16_t reader;
  Place write_place;
  Place read_place;
};

struct Copy {
  Words value;
  int at;
  int64_t group;
  Place place;
};

struct Warp;

struct Thread {
  Context context;
  Warp* warp;
  int index;
  int lane;
  int position;  // in the order of the warp
  bool returned;
  int64_t groups;            // committed so far
  std::vector<Copy> copies;  // in flight or not committed, oldest first
};

// What the lanes of a warp do together: the last one to arrive performs it for all.
struct Operation {
  const char* name;
  void (*perform)(Warp& warp);
};

struct Warp {
  // Bits by position in `order`. Lanes in neither wait at a barrier or have returned.
  uint32_t runnable;
  uint32_t arrived;  // at `operation`
  const Operation* operation;
  Place place;
  Thread* order[32];
  void* arguments[32];  // by lane; on the stacks of the waiting lanes
  Thread* lanes;
};

// One launch at a time.
struct State {
  // The running thread and its block.
  Thread* thread = nullptr;
  int64_t block = 0;
  uint32_t first_thread = 0;  // of the block, numbered through the launch
  uint32_t first_epoch = 1;
  uint32_t epoch = 1;
  int waiting = 0;  // threads at the barrier
  int returned = 0;
  Place barrier_place;
  int barrier_thread = 0;

  // Shared memory.
  int shared_bytes = 0;
  std::vector<unsigned char> shared;
  std::vector<SharedWord> shared_words;

  // The launch.
  uint32_t launch = 0;
  std::string kernel;
  void (*run)(const void*) = nullptr;
  const void* params = nullptr;
  int64_t blocks = 0;
  int threads = 0;
  int warps = 0;
  bool failed = false;
  Counters last;
  Context host;

  std::vector<Thread> all_threads;
  std::vector<Warp> all_warps;
  std::vector<Stack> stacks;
  std::vector<int64_t> block_order;

  uint64_t random = 0x9e3779b97f4a7c15u;
  Counters totals;
  std::vector<std::string> errors;
  std::vector<std::unique_ptr<Allocation>> allocations;
};

inline State state;

// In [0, bound), by xorshift.
inline uint32_t random_below(uint32_t bound) {
  state.random ^= state.random << 13;
  state.random ^= state.random >> 7;
  state.random ^= state.random << 17;
  return static_cast<uint32_t>((state.random >> 32) * bound >> 32);
}

template <typename T>
void shuffle_order(T* values, int64_t count) {
  for (int64_t i = count - 1; i > 0; --i) {
    std::swap(values[i], values[random_below(static_cast<uint32_t>(i + 1))]);
  }
}

// ---- Errors -------------------------------------------------------------------------------------

// Records the error and leaves the launch; its fibers are abandoned where they are.
[[noreturn]] __attribute__((noinline, cold, format(printf, 3, 4))) inline void fail(
    int thread, Place where, const char* format, ...) {
  char what[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof(what), format, arguments);
  va_end(arguments);
  char text[1024];
  std::snprintf(text, sizeof(text), "%s, block %lld of %lld, thread %d, %s:%d: %s",
                state.kernel.c_str(), static_cast<long long>(state.block),
                static_cast<long long>(state.blocks), thread, where.file(), where.line(), what);
  state.errors.emplace_back(text);
  state.failed = true;
  Context abandoned;
  switch_context(abandoned, state.host);
  std::abort();
}

inline Thread& running() {
  if (__builtin_expect(state.thread == nullptr, 0)) {
    std::fprintf(stderr, "emulator: device code called outside of a launch\n");
    std::abort();
  }
  return *state.thread;
}

// ---- Scheduling ---------------------------------------------------------------------------------

[[noreturn]] __attribute__((noinline, cold)) inline void report_deadlock() {
  for (int w = 0; w < state.warps; ++w) {
    const Warp& warp = state.all_warps[w];
    if (warp.arrived == 0) continue;
    const Thread& first = *warp.order[__builtin_ctz(warp.arrived)];
    const Thread& missing = *warp.order[__builtin_ctz(~warp.arrived)];
    if (missing.returned) {
      fail(first.index, warp.place, "warp divergence: waits in %s for thread %d, which returned",
           warp.operation->name, missing.index);
    }
    fail(first.index, warp.place,
         "warp divergence: waits in %s for thread %d, which waits in sync_block at %s:%d",
         warp.operation->name, missing.index, state.barrier_place.file(),
         state.barrier_place.line());
  }
  int missing = 0;
  while (missing + 1 < state.threads && !state.all_threads[missing].returned) ++missing;
  fail(state.barrier_thread, state.barrier_place,
       "barrier divergence: waits in sync_block for thread %d, which returned", missing);
}

// After the running thread, the others of its warp have their turn, then other warps.
inline Thread& next_thread() {
  const Thread& me = *state.thread;
  const uint32_t after = me.warp->runnable & 0xfffffffeu << me.position;
  const uint32_t candidates = after != 0 ? after : me.warp->runnable;
  if (candidates != 0) return *me.warp->order[__builtin_ctz(candidates)];
  const int mine = static_cast<int>(me.warp - state.all_warps.data());
  for (int i = 1; i < state.warps; ++i) {
    const int w = mine + i < state.warps ? mine + i : mine + i - state.warps;
    const Warp& warp = state.all_warps[w];
    if (warp.runnable != 0) return *warp.order[__builtin_ctz(warp.runnable)];
  }
  report_deadlock();
}

inline void switch_to(Thread& next) {
  Thread& me = *state.thread;
  state.thread = &next;
  switch_context(me.context, next.context);
}

inline uint32_t position_bit(const Thread& thread) { return 1u << thread.position; }

// `arguments` stay valid until all lanes have arrived and the last one has performed `operation`.
__attribute__((noinline)) inline void meet_warp(const Operation& operation, void* arguments,
                                                Place where) {
  Thread& me = running();
  Warp& warp = *me.warp;
  if (warp.arrived == 0) {
    warp.operation = &operation;
    warp.place = where;
  } else if (warp.operation != &operation || warp.place != where) {
    fail(me.index, where, "warp divergence: is in %s, but thread %d waits in %s at %s:%d",
         operation.name, warp.order[__builtin_ctz(warp.arrived)]->index, warp.operation->name,
         warp.place.file(), warp.place.line());
  }
  warp.arguments[me.lane] = arguments;
  warp.arrived |= position_bit(me);
  if (warp.arrived == ~0u) {
    operation.perform(warp);
    warp.arrived = 0;
    warp.runnable = ~0u;
  } else {
    warp.runnable &= ~position_bit(me);
    switch_to(next_thread());
  }
}

__attribute__((noinline)) inline void meet_block(Place where) {
  Thread& me = running();
  if (state.waiting == 0) {
    state.barrier_place = where;
    state.barrier_thread = me.index;
  } else if (state.barrier_place != where) {
    fail(me.index, where,
         "barrier divergence: is in sync_block, but thread %d waits in the one at %s:%d",
         state.barrier_thread, state.barrier_place.file(), state.barrier_place.line());
  }
  me.warp->runnable &= ~position_bit(me);
  if (++state.waiting < state.threads) {
    switch_to(next_thread());
    return;
  }
  state.waiting = 0;
  ++state.epoch;
  ++state.last.barriers;
  for (int w = 0; w < state.warps; ++w) state.all_warps[w].runnable = ~0u;
  const Warp& warp = state.all_warps[random_below(static_cast<uint32_t>(state.warps))];
  Thread& next = *warp.order[random_below(32)];
  if (&next != &me) switch_to(next);
}

// What a fiber runs.
inline void thread_main() {
  state.run(state.params);
  Thread& me = *state.thread;
  if (!me.copies.empty()) {
    const Copy& copy = me.copies.back();
    fail(me.index, copy.place, "returned with a copy16_async %s",
         copy.group == me.groups ? "that was not committed" : "in flight");
  }
  me.returned = true;
  me.warp->runnable &= ~position_bit(me);
  if (++state.returned == state.threads) {
    switch_context(me.context, state.host);
  } else {
    switch_to(next_thread());
  }
  std::abort();  // nobody continues a thread that returned
}

// ---- Launches -----------------------------------------------------------------------------------

inline void start_block(int64_t block) {
  state.block = block;
  state.first_thread = static_cast<uint32_t>(block * state.threads);
  state.first_epoch = ++state.epoch;
  state.waiting = 0;
  state.returned = 0;
  std::fill_n(state.shared.begin(), state.shared_bytes, static_cast<unsigned char>(0xff));
  for (int t = 0; t < state.threads; ++t) {
    Thread& thread = state.all_threads[t];
    state.stacks[t].clean();
    prepare_context(thread.context, state.stacks[t].bottom(), state.stacks[t].top(), thread_main);
    thread.index = t;
    thread.lane = t % 32;
    thread.returned = false;
    thread.groups = 0;
    thread.copies.clear();
  }
  for (int w = 0; w < state.warps; ++w) state.all_warps[w].lanes = &state.all_threads[32 * w];
  shuffle_order(state.all_warps.data(), state.warps);
  for (int w = 0; w < state.warps; ++w) {
    Warp& warp = state.all_warps[w];
    warp.runnable = ~0u;
    warp.arrived = 0;
    for (int lane = 0; lane < 32; ++lane) warp.order[lane] = &warp.lanes[lane];
    shuffle_order(warp.order, 32);
    for (int position = 0; position < 32; ++position) {
      warp.order[position]->position = position;
      warp.order[position]->warp = &warp;
    }
  }
}

inline void run_blocks() {
  state.block_order.resize(static_cast<size_t>(state.blocks));
  for (int64_t b = 0; b < state.blocks; ++b) state.block_order[b] = b;
  shuffle_order(state.block_order.data(), state.blocks);
  for (const int64_t block : state.block_order) {
    start_block(block);
    state.thread = state.all_warps[0].order[0];
    switch_context(state.host, state.thread->context);
    state.thread = nullptr;
    if (state.failed) return;
    ++state.last.blocks;
  }
}

inline void launch(const char* kernel, int64_t blocks, int threads, int shared_bytes,
                   void (*run)(const void*), const void* params) {
  char* name = abi::__cxa_demangle(kernel, nullptr, nullptr, nullptr);
  state.kernel = name != nullptr ? name : kernel;
  std::free(name);
  if (blocks < 1 || blocks * threads >= Element::kSeveral) {
    state.errors.push_back(state.kernel + ": cannot launch " + std::to_string(blocks) + " blocks");
    return;
  }
  ++state.launch;
  state.run = run;
  state.params = params;
  state.blocks = blocks;
  state.threads = threads;
  state.warps = threads / 32;
  state.failed = false;
  state.last = Counters();
  state.last.launches = 1;
  state.shared_bytes = shared_bytes;
  const size_t words = static_cast<size_t>(shared_bytes + 3) / 4;
  if (state.shared_words.size() < words) state.shared_words.resize(words);
  if (state.shared.size() < 4 * words) state.shared.resize(4 * words);
  if (state.all_threads.size() < static_cast<size_t>(threads)) {
    state.all_threads.resize(static_cast<size_t>(threads));
    state.all_warps.resize(static_cast<size_t>(state.warps));
  }
  for (int t = static_cast<int>(state.stacks.size()); t < threads; ++t) {
    state.stacks.emplace_back(t);
  }
  for (auto& allocation : state.allocations) {
    allocation->before += allocation->last;
    allocation->last = Traffic();
  }
  run_blocks();
  for (auto& allocation : state.allocations) state.last.traffic += allocation->last;
  state.totals += state.last;
}

// ---- Checks of accesses to global memory --------------------------------------------------------

// Offset of element `i` of an array; fails unless all `bytes` from there are in the allocation.
inline uint64_t checked_offset(const Allocation* allocation, const void* data, int64_t i,
                               uint64_t element_bytes, uint64_t bytes, Place where) {
  const int me = running().index;
  if (data == nullptr) fail(me, where, "access to an absent array");
  if (allocation == nullptr) fail(me, where, "access to an array without an allocation");
  const uint64_t start =
      reinterpret_cast<uintptr_t>(data) - reinterpret_cast<uintptr_t>(allocation->data);
  const uint64_t offset = start + static_cast<uint64_t>(i) * element_bytes;
  // The first comparison keeps the product above from wrapping around.
  if (static_cast<uint64_t>(i) > allocation->bytes || offset > allocation->bytes ||
      allocation->bytes - offset < bytes) {
    fail(me, where, "out of bounds: [%lld] of %s (%llu bytes), access of %llu bytes",
         static_cast<long long>(i), allocation->name.c_str(),
         static_cast<unsigned long long>(allocation->bytes),
         static_cast<unsigned long long>(bytes));
  }
  if (bytes == 16 && (reinterpret_cast<uintptr_t>(allocation->data) + offset) % 16 != 0) {
    fail(me, where, "misaligned 16-byte access to [%lld] of %s", static_cast<long long>(i),
         allocation->name.c_str());
  }
  return offset;
}

// `other` touched the element before: a thread as in Element. Only writes have a known line.
[[noreturn]] __attribute__((noinline, cold)) inline void report_global_race(
    const Allocation& allocation, uint64_t element, const char* access, bool written,
    uint32_t other, Place where) {
  char line[256] = "";
  if (written) {
    const Place place = allocation.write_places[element];
    std::snprintf(line, sizeof(line), " at %s:%d", place.file(), place.line());
  }
  char who[64] = "several threads";
  const uint32_t id = other & ~Element::kAtomic;
  const uint32_t threads = static_cast<uint32_t>(state.threads);
  if (id != Element::kSeveral) {
    std::snprintf(who, sizeof(who), "block %u, thread %u", id / threads, id % threads);
  }
  fail(state.thread->index, where, "race in global memory: %s [%llu] of %s, %s by %s%s", access,
       static_cast<unsigned long long>(element), allocation.name.c_str(),
       written ? "written" : "read", who, line);
}

inline uint32_t launch_thread() {
  return state.first_thread + static_cast<uint32_t>(state.thread->index);
}

inline void count_read(Allocation& allocation, uint64_t offset, uint64_t bytes) {
  allocation.last.load_bytes += static_cast<int64_t>(bytes);
  const uint64_t end = allocation.sector_of(offset + bytes - 1);
  for (uint64_t s = allocation.sector_of(offset); s <= end; ++s) {
    if (allocation.sectors[s].read_launch == state.launch) continue;
    allocation.sectors[s].read_launch = state.launch;
    ++allocation.last.sectors_read;
  }
}

inline void count_write(Allocation& allocation, uint64_t offset, uint64_t bytes) {
  allocation.last.store_bytes += static_cast<int64_t>(bytes);
  const uint64_t end = allocation.sector_of(offset + bytes - 1);
  for (uint64_t s = allocation.sector_of(offset); s <= end; ++s) {
    if (allocation.sectors[s].write_launch == state.launch) continue;
    allocation.sectors[s].write_launch = state.launch;
    ++allocation.last.sectors_written;
  }
}

inline void check_initialised(const Allocation& allocation, uint64_t element, Place where) {
  if (allocation.elements[element].write_launch != 0 || allocation.initialised) return;
  fail(state.thread->index, where, "read of uninitialised global memory: [%llu] of %s",
       static_cast<unsigned long long>(element), allocation.name.c_str());
}

inline void note_load(Allocation& allocation, uint64_t offset, uint64_t bytes, Place where) {
  const uint32_t me = launch_thread();
  const uint64_t end = (offset + bytes - 1) >> allocation.element_shift;
  for (uint64_t e = offset >> allocation.element_shift; e <= end; ++e) {
    Element& element = allocation.elements[e];
    check_initialised(allocation, e, where);
    if (element.write_launch == state.launch && (element.writer & ~Element::kAtomic) != me) {
      report_global_race(allocation, e, "reads", true, element.writer, where);
    }
    if (element.read_launch != state.launch) {
      element.read_launch = state.launch;
      element.reader = me;
    } else if (element.reader != me) {
      element.reader = Element::kSeveral;
    }
  }
  count_read(allocation, offset, bytes);
}

inline void note_store(Allocation& allocation, uint64_t offset, uint64_t bytes, Place where) {
  const uint32_t me = launch_thread();
  const uint64_t end = (offset + bytes - 1) >> allocation.element_shift;
  for (uint64_t e = offset >> allocation.element_shift; e <= end; ++e) {
    Element& element = allocation.elements[e];
    if (element.write_launch == state.launch && (element.writer & ~Element::kAtomic) != me) {
      report_global_race(allocation, e, "writes", true, element.writer, where);
    }
    if (element.read_launch == state.launch && element.reader != me) {
      report_global_race(allocation, e, "writes", false, element.reader, where);
    }
    element.write_launch = state.launch;
    element.writer = me;
    allocation.write_places[e] = where;
  }
  count_write(allocation, offset, bytes);
}

inline void note_atomic(Allocation& allocation, uint64_t offset, uint64_t bytes, Place where) {
  const uint32_t me = launch_thread();
  const uint64_t e = offset >> allocation.element_shift;
  Element& element = allocation.elements[e];
  check_initialised(allocation, e, where);
  if (element.read_launch == state.launch && element.reader != me) {
    report_global_race(allocation, e, "adds atomically to", false, element.reader, where);
  }
  if (element.write_launch != state.launch) {
    element.write_launch = state.launch;
    element.writer = me | Element::kAtomic;
  } else if ((element.writer & ~Element::kAtomic) != me) {
    if ((element.writer & Element::kAtomic) == 0) {
      report_global_race(allocation, e, "adds atomically to", true, element.writer, where);
    }
    element.writer = Element::kSeveral | Element::kAtomic;
  }
  allocation.write_places[e] = where;
  count_read(allocation, offset, bytes);
  count_write(allocation, offset, bytes);
}

// ---- Checks of accesses to shared memory --------------------------------------------------------

inline void check_shared(int thread, int at, int bytes, Place where) {
  if (at < 0 || at > state.shared_bytes - bytes) {
    fail(thread, where, "out of bounds: shared memory at %d (%d bytes), access of %d bytes", at,
         state.shared_bytes, bytes);
  }
  if (at % bytes != 0) {
    fail(thread, where, "misaligned %d-byte access to shared memory at %d", bytes, at);
  }
}

// Finds out what is wrong with an access that may not be.
[[noreturn]] __attribute__((noinline, cold)) inline void report_shared(int word, int thread,
                                                                       bool writes, Place where) {
  const SharedWord& shared = state.shared_words[word];
  const char* access = writes ? "writes" : "reads";
  const Place place = shared.write_place;
  if (shared.flight_epoch >= state.first_epoch) {
    fail(thread, where,
         "access to a copy in flight: %s shared memory at %d, copy16_async by thread %d at %s:%d",
         access, 4 * word, shared.writer, place.file(), place.line());
  }
  if (shared.write_epoch == state.epoch && shared.writer != thread) {
    fail(thread, where,
         "race in shared memory: %s at %d, written by thread %d at %s:%d and no barrier since",
         access, 4 * word, shared.writer, place.file(), place.line());
  }
  if (!writes) {
    fail(thread, where, "read of uninitialised shared memory at %d", 4 * word);
  }
  const Place read_place = shared.read_place;
  if (shared.reader == SharedWord::kSeveral) {
    fail(thread, where,
         "race in shared memory: writes at %d, read by others, first at %s:%d, no barrier since",
         4 * word, read_place.file(), read_place.line());
  }
  fail(thread, where,
       "race in shared memory: writes at %d, read by thread %d at %s:%d and no barrier since",
       4 * word, shared.reader, read_place.file(), read_place.line());
}

inline void note_shared_read(int word, int thread, Place where) {
  SharedWord& shared = state.shared_words[word];
  // A word with a copy in flight counts as not written.
  if (shared.write_epoch < state.first_epoch ||
      (shared.write_epoch == state.epoch && shared.writer != thread)) {
    report_shared(word, thread, false, where);
  }
  if (shared.read_epoch != state.epoch) {
    shared.read_epoch = state.epoch;
    shared.reader = static_cast<uint16_t>(thread);
    shared.read_place = where;
  } else if (shared.reader != thread) {
    shared.reader = SharedWord::kSeveral;
  }
}

inline void note_shared_write(int word, int thread, Place where) {
  SharedWord& shared = state.shared_words[word];
  if (shared.flight_epoch >= state.first_epoch ||
      (shared.write_epoch == state.epoch && shared.writer != thread) ||
      (shared.read_epoch == state.epoch && shared.reader != thread)) {
    report_shared(word, thread, true, where);
  }
  shared.write_epoch = state.epoch;
  shared.writer = static_cast<uint16_t>(thread);
  shared.write_place = where;
}

// Completes the copies of the running thread of all but the last `pending` groups.
inline void finish_copies(int pending) {
  Thread& me = running();
  auto copy = me.copies.begin();
  for (; copy != me.copies.end() && copy->group < me.groups - pending; ++copy) {
    for (int w = 0; w < 4; ++w) {
      SharedWord& shared = state.shared_words[copy->at / 4 + w];
      shared.flight_epoch = 0;
      shared.write_epoch = state.epoch;
    }
    std::memcpy(&state.shared[copy->at], &copy->value, 16);
  }
  me.copies.erase(me.copies.begin(), copy);
}

// ---- Operations of a warp -----------------------------------------------------------------------

template <typename T>
T& argument(Warp& warp, int lane) {
  return *static_cast<T*>(warp.arguments[lane]);
}

struct Ballot {
  bool value;
  uint32_t result;
};

inline void perform_ballot(Warp& warp) {
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane) {
    result |= uint32_t{argument<Ballot>(warp, lane).value} << lane;
  }
  for (int lane = 0; lane < 32; ++lane) argument<Ballot>(warp, lane).result = result;
}

struct Shuffle {
  uint64_t value;
  int source;
  uint64_t result;
};

inline void perform_shuffle(Warp& warp) {
  for (int lane = 0; lane < 32; ++lane) {
    Shuffle& shuffle = argument<Shuffle>(warp, lane);
    if (shuffle.source < 0 || shuffle.source > 31) {
      fail(warp.lanes[lane].index, warp.place, "%s from lane %d", warp.operation->name,
           shuffle.source);
    }
    shuffle.result = argument<Shuffle>(warp, shuffle.source).value;
  }
}

struct LoadMatrices {
  uint32_t* r;
  int at;
};

// A word is read by the lane that receives it, not by the one that names its row.
inline void perform_load_matrices(Warp& warp) {
  for (int lane = 0; lane < 32; ++lane) {
    const int at = argument<LoadMatrices>(warp, lane).at;
    check_shared(warp.lanes[lane].index, at, 16, warp.place);
    for (int w = 0; w < 4; ++w) {
      const int receiver = lane % 8 * 4 + w;
      note_shared_read(at / 4 + w, warp.lanes[receiver].index, warp.place);
      std::memcpy(&argument<LoadMatrices>(warp, receiver).r[lane / 8], &state.shared[at + 4 * w],
                  4);
    }
  }
}

struct MultiplyAdd {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

// Vectors as wide as every x86-64 has them.
using Floats4 = float __attribute__((vector_size(16), may_alias));
using Words4 = uint32_t __attribute__((vector_size(16), may_alias));

// The fragments as matrices of words: 16x8, 8x8 and 16x8. For 16-bit types a word is two steps in
// depth.
struct Fragments {
  alignas(16) uint32_t a[16][8];
  alignas(16) uint32_t b[8][8];
  alignas(16) float c[16][8];
};

inline void gather_fragments(Warp& warp, Fragments& fragments) {
  for (int lane = 0; lane < 32; ++lane) {
    const MultiplyAdd& mine = argument<MultiplyAdd>(warp, lane);
    const int group = lane / 4;
    const int member = lane % 4;
    for (int i = 0; i < 4; ++i) {
      fragments.a[group + i % 2 * 8][member + i / 2 * 4] = mine.a[i];
      fragments.c[group + i / 2 * 8][2 * member + i % 2] = mine.c[i];
    }
    for (int i = 0; i < 2; ++i) fragments.b[member + 4 * i][group] = mine.b[i];
  }
}

inline void scatter_sums(Warp& warp, const Fragments& fragments) {
  for (int lane = 0; lane < 32; ++lane) {
    float* c = argument<MultiplyAdd>(warp, lane).c;
    for (int i = 0; i < 4; ++i) c[i] = fragments.c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

// to_float() of four values at once, given in the low halves of the words.
template <typename T>
Floats4 widen(Words4 bits);
template <>
inline Floats4 widen<half>(Words4 bits) {
  const Floats4 magnitude = reinterpret_cast<Floats4>((bits & 0x7fffu) << 13) * 0x1p112f;
  const Words4 special = reinterpret_cast<Words4>((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return reinterpret_cast<Floats4>(reinterpret_cast<Words4>(magnitude) | special |
                                   (bits & 0x8000u) << 16);
}
template <>
inline Floats4 widen<bf16>(Words4 bits) {
  return reinterpret_cast<Floats4>(bits << 16);
}

// The values that the words of a matrix hold in their low (0) or high half (1).
template <typename T, int kRows>
void widen_matrix(const uint32_t (&words)[kRows][8], int part, float (&values)[kRows][8]) {
  for (int i = 0; i < 8 * kRows; i += 4) {
    const Words4 bits = *reinterpret_cast<const Words4*>(&words[0][0] + i);
    *reinterpret_cast<Floats4*>(&values[0][0] + i) = widen<T>(bits >> (16 * part) & 0xffffu);
  }
}

// c += a * b for a depth of eight.
inline void multiply_add_8(const float (&a)[16][8], const float (&b)[8][8], float (&c)[16][8]) {
  for (int column = 0; column < 8; column += 4) {
    Floats4 rows[8];
    for (int k = 0; k < 8; ++k) rows[k] = *reinterpret_cast<const Floats4*>(&b[k][column]);
    for (int row = 0; row < 16; ++row) {
      Floats4& sum = *reinterpret_cast<Floats4*>(&c[row][column]);
      Floats4 even = a[row][0] * rows[0];
      Floats4 odd = a[row][1] * rows[1];
      for (int k = 2; k < 8; k += 2) {
        even += a[row][k] * rows[k];
        odd += a[row][k + 1] * rows[k + 1];
      }
      sum += even + odd;
    }
  }
}

template <typename T>
void perform_multiply_add(Warp& warp) {
  Fragments fragments;
  gather_fragments(warp, fragments);
  alignas(16) float a[16][8];
  alignas(16) float b[8][8];
  for (int part = 0; part < 2; ++part) {
    widen_matrix<T>(fragments.a, part, a);
    widen_matrix<T>(fragments.b, part, b);
    multiply_add_8(a, b, fragments.c);
  }
  scatter_sums(warp, fragments);
  state.last.multiply_adds += 16 * 8 * 16;
}

template <>
inline void perform_multiply_add<float>(Warp& warp) {
  for (int lane = 0; lane < 32; ++lane) {
    const MultiplyAdd& mine = argument<MultiplyAdd>(warp, lane);
    const uint32_t bits = mine.a[0] | mine.a[1] | mine.a[2] | mine.a[3] | mine.b[0] | mine.b[1];
    if ((bits & 0x1fffu) != 0) {
      fail(warp.lanes[lane].index, warp.place, "a fragment was not rounded by round_to_tf32");
    }
  }
  Fragments fragments;
  gather_fragments(warp, fragments);
  alignas(16) float a[16][8];
  alignas(16) float b[8][8];
  std::memcpy(a, fragments.a, sizeof(a));
  std::memcpy(b, fragments.b, sizeof(b));
  multiply_add_8(a, b, fragments.c);
  scatter_sums(warp, fragments);
  state.last.multiply_adds += 16 * 8 * 8;
}

inline constexpr Operation kBallot = {"ballot", perform_ballot};
inline constexpr Operation kShuffle = {"shuffle", perform_shuffle};
inline constexpr Operation kShuffleXor = {"shuffle_xor", perform_shuffle};
inline constexpr Operation kLoadMatrices = {"load_matrices", perform_load_matrices};
template <typename T>
inline constexpr Operation kMultiplyAdd = {"multiply_add", perform_multiply_add<T>};

template <typename T>
T exchange(const Operation& operation, T value, int source, Place where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "what a GPU can shuffle");
  Shuffle shuffle = {0, source, 0};
  std::memcpy(&shuffle.value, &value, sizeof(T));
  meet_warp(operation, &shuffle, where);
  std::memcpy(&value, &shuffle.result, sizeof(T));
  return value;
}

// ---- For tests ----------------------------------------------------------------------------------

// Runs the kernel; see errors() afterwards. As on a GPU, there must be at least one block.
template <class Kernel>
void emulate(int64_t blocks, const typename Kernel::Params& params) {
  static_assert(Kernel::kThreads % 32 == 0 && Kernel::kThreads > 0 && Kernel::kThreads <= 1024);
  launch(
      typeid(Kernel).name(), blocks, Kernel::kThreads, Kernel::kSharedBytes,
      [](const void* p) { Kernel::run(*static_cast<const typename Kernel::Params*>(p)); }, &params);
}

// At most one per launch since the last clear().
inline const std::vector<std::string>& errors() { return state.errors; }
inline void clear() { state.errors.clear(); }

// The order of blocks and threads follows from it.
inline void seed(uint64_t value) { state.random = value << 1 ^ 0x9e3779b97f4a7c15u; }

inline Allocation* new_allocation(void* data, uint64_t bytes, uint64_t element_bytes,
                                  const char* name, bool initialised) {
  auto allocation = std::make_unique<Allocation>();
  allocation->name = name;
  allocation->data = static_cast<unsigned char*>(data);
  allocation->bytes = bytes;
  allocation->element_shift = __builtin_ctzll(element_bytes);
  allocation->initialised = initialised;
  const uint64_t elements = bytes >> allocation->element_shift;
  allocation->elements = zeros<Element>(elements);
  allocation->write_places = zeros<Place>(elements);
  allocation->sectors = zeros<Sector>(bytes / 32 + 2);
  state.allocations.push_back(std::move(allocation));
  return state.allocations.back().get();
}

// An array over memory of the caller, which has its values; a null pointer makes an absent array.
// Two arrays over the same memory are not checked against each other.
template <typename T>
Global<T> wrap(T* data, int64_t count, const char* name) {
  if (data == nullptr) return {};
  void* memory = const_cast<std::remove_const_t<T>*>(data);
  return {data,
          new_allocation(memory, static_cast<uint64_t>(count) * sizeof(T), sizeof(T), name, true)};
}

// An array that lives until reset(), aligned like one of cudaMalloc. Zeros if `initialised`; else
// 0xff in every byte, and an error to read before a kernel wrote it.
template <typename T>
Global<T> allocate(int64_t count, const char* name, bool initialised = false) {
  const uint64_t bytes = static_cast<uint64_t>(count) * sizeof(T);
  void* memory = std::aligned_alloc(256, (bytes / 256 + 1) * 256);
  if (memory == nullptr) std::abort();
  std::memset(memory, initialised ? 0 : 0xff, bytes);
  Allocation* allocation = new_allocation(memory, bytes, sizeof(T), name, initialised);
  allocation->owned.reset(static_cast<unsigned char*>(memory));
  return {static_cast<T*>(memory), allocation};
}

// An initialised array with these values.
template <typename T>
Global<T> copy_of(const std::vector<T>& values, const char* name) {
  const Global<T> copy = allocate<T>(static_cast<int64_t>(values.size()), name, true);
  if (!values.empty()) std::memcpy(copy.data, values.data(), values.size() * sizeof(T));
  return copy;
}

// After the host has written to an array that was allocated uninitialised.
template <typename T>
void mark_initialised(const Global<T>& array) {
  array.allocation->initialised = true;
}

// Of the last launch; of all since reset_counters().
inline const Counters& last_launch() { return state.last; }
inline const Counters& totals() { return state.totals; }
template <typename T>
Traffic last_traffic(const Global<T>& array) {
  return array.allocation->last;
}
template <typename T>
Traffic traffic(const Global<T>& array) {
  Traffic sum = array.allocation->before;
  return sum += array.allocation->last;
}
inline void reset_counters() {
  state.last = state.totals = Counters();
  for (auto& allocation : state.allocations) allocation->last = allocation->before = Traffic();
}

// Frees all arrays.
inline void reset() { state.allocations.clear(); }

}  // namespace emulator

// ---- What kernels use; cuda/platform.cuh describes it -------------------------------------------

inline int thread_index() { return emulator::running().index; }
inline int thread_index_again() { return thread_index(); }
inline int64_t block_index() {
  emulator::running();
  return emulator::state.block;
}
inline int64_t block_count() {
  emulator::running();
  return emulator::state.blocks;
}

inline void sync_block(emulator::Place where = emulator::Place::here()) {
  emulator::meet_block(where);
}

inline uint32_t ballot(bool value, emulator::Place where = emulator::Place::here()) {
  emulator::Ballot ballot = {value, 0};
  emulator::meet_warp(emulator::kBallot, &ballot, where);
  return ballot.result;
}
template <typename T>
T shuffle(T value, int lane, emulator::Place where = emulator::Place::here()) {
  return emulator::exchange(emulator::kShuffle, value, lane, where);
}
template <typename T>
T shuffle_xor(T value, int lanes, emulator::Place where = emulator::Place::here()) {
  return emulator::exchange(emulator::kShuffleXor, value, emulator::running().lane ^ lanes, where);
}

template <typename T>
struct Global {
  using Value = std::remove_const_t<T>;
  using Place = emulator::Place;

  T* data = nullptr;
  emulator::Allocation* allocation = nullptr;

  template <typename U,
            typename = std::enable_if_t<!std::is_const_v<T> && std::is_same_v<U, const T>>>
  operator Global<U>() const {
    return {data, allocation};
  }

  Value load(int64_t i, Place where = Place::here()) const { return read<Value>(i, where); }
  Words load16(int64_t i, Place where = Place::here()) const { return read<Words>(i, where); }
  void store(int64_t i, T value, Place where = Place::here()) const { write(i, value, where); }
  void store16(int64_t i, Words value, Place where = Place::here()) const {
    write(i, value, where);
  }
  void prefetch(int64_t i, Place where = Place::here()) const {
    emulator::checked_offset(allocation, data, i, sizeof(T), sizeof(T), where);
  }
  T atomic_add(int64_t i, T value, Place where = Place::here()) const {
    static_assert(std::is_same_v<T, int32_t> || std::is_same_v<T, uint32_t> ||
                      std::is_same_v<T, float> || std::is_same_v<T, double>,
                  "what atomicAdd() takes");
    const uint64_t offset =
        emulator::checked_offset(allocation, data, i, sizeof(T), sizeof(T), where);
    emulator::note_atomic(*allocation, offset, sizeof(T), where);
    T before;
    std::memcpy(&before, allocation->data + offset, sizeof(T));
    const T after = before + value;
    std::memcpy(allocation->data + offset, &after, sizeof(T));
    return before;
  }

 private:
  template <typename V>
  V read(int64_t i, Place where) const {
    const uint64_t offset =
        emulator::checked_offset(allocation, data, i, sizeof(T), sizeof(V), where);
    emulator::note_load(*allocation, offset, sizeof(V), where);
    V value;
    std::memcpy(&value, allocation->data + offset, sizeof(V));
    return value;
  }
  template <typename V>
  void write(int64_t i, V value, Place where) const {
    static_assert(!std::is_const_v<T>);
    const uint64_t offset =
        emulator::checked_offset(allocation, data, i, sizeof(T), sizeof(V), where);
    emulator::note_store(*allocation, offset, sizeof(V), where);
    std::memcpy(allocation->data + offset, &value, sizeof(V));
  }
};

template <typename T>
T shared_load(int at, emulator::Place where = emulator::Place::here()) {
  static_assert((sizeof(T) == 4 || sizeof(T) == 16) && std::is_trivially_copyable_v<T>);
  const int me = emulator::running().index;
  emulator::check_shared(me, at, sizeof(T), where);
  for (size_t w = 0; w < sizeof(T) / 4; ++w) {
    emulator::note_shared_read(at / 4 + static_cast<int>(w), me, where);
  }
  T value;
  std::memcpy(&value, &emulator::state.shared[at], sizeof(T));
  return value;
}
template <typename T>
void shared_store(int at, T value, emulator::Place where = emulator::Place::here()) {
  static_assert((sizeof(T) == 4 || sizeof(T) == 16) && std::is_trivially_copyable_v<T>);
  const int me = emulator::running().index;
  emulator::check_shared(me, at, sizeof(T), where);
  for (size_t w = 0; w < sizeof(T) / 4; ++w) {
    emulator::note_shared_write(at / 4 + static_cast<int>(w), me, where);
  }
  std::memcpy(&emulator::state.shared[at], &value, sizeof(T));
}

// The copy happens when it is waited for; until then nobody may touch its destination.
template <bool kReused = false, typename T>
void copy16_async(int at, const Global<T>& from, int64_t i, bool valid,
                  emulator::Place where = emulator::Place::here()) {
  emulator::Thread& me = emulator::running();
  emulator::check_shared(me.index, at, 16, where);
  const Words value = valid ? from.load16(i, where) : Words{};
  for (int w = 0; w < 4; ++w) {
    emulator::note_shared_write(at / 4 + w, me.index, where);
    emulator::SharedWord& shared = emulator::state.shared_words[at / 4 + w];
    shared.flight_epoch = emulator::state.epoch;
    shared.write_epoch = 0;
  }
  me.copies.push_back({value, at, me.groups, where});
}
inline void commit_copies() { ++emulator::running().groups; }
template <int kPending>
void wait_copies() {
  emulator::finish_copies(kPending);
}

inline void load_matrices(uint32_t (&r)[4], int at,
                          emulator::Place where = emulator::Place::here()) {
  emulator::LoadMatrices arguments = {r, at};
  emulator::meet_warp(emulator::kLoadMatrices, &arguments, where);
}

template <typename T>
struct TensorCore {
  static void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                           emulator::Place where = emulator::Place::here()) {
    emulator::MultiplyAdd arguments = {c, a, b};
    emulator::meet_warp(emulator::kMultiplyAdd<T>, &arguments, where);
  }
};

}  // namespace las_mm::cuda
