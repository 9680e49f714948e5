// Tests the emulator itself: wrong kernels are caught, right ones pass with the right results.
//   g++ -std=c++17 -O2 -DLAS_MM_EMULATE -I ops -I tests/ops/emulator
//       tests/ops/emulator/self_test.cpp -o self_test && ./self_test
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "cuda/platform.cuh"

namespace las_mm::cuda {
namespace {

int failures = 0;

void check(const std::string& name, bool passed) {
  std::printf("%s  %s\n", passed ? "ok    " : "FAILED", name.c_str());
  if (!passed) ++failures;
}

// A kernel of one function. `values` are initialised, `fresh` are not, `absent` is not there.
struct Arrays {
  Global<const float> values;
  Global<float> out;
  Global<float> fresh;
  Global<float> absent;
  Global<int32_t> counts;
  Global<half> halves;
};

template <void (*kBody)(const Arrays&), int kSize = 64>
struct Probe {
  using Params = Arrays;
  static constexpr int kThreads = kSize;
  static constexpr int kSharedBytes = 1024;
  static LAS_MM_DEVICE void run(const Params& p) { kBody(p); }
};

constexpr int64_t kValues = 256;

// Runs it with several seeds. `expected` is a part of the error, or empty where none may occur.
template <typename Kernel>
void probe(const std::string& name, const std::string& expected, int64_t blocks = 1) {
  bool passed = true;
  for (uint64_t seed = 0; seed < 5; ++seed) {
    emulator::seed(seed);
    emulator::clear();
    const std::vector<float> ones(kValues, 1.0f);
    const Arrays arrays = {emulator::copy_of(ones, "values"),
                           emulator::allocate<float>(kValues, "out"),
                           emulator::allocate<float>(kValues, "fresh"),
                           {},
                           emulator::allocate<int32_t>(kValues, "counts", true),
                           emulator::allocate<half>(kValues, "halves", true)};
    emulator::emulate<Kernel>(blocks, arrays);
    const bool found =
        !emulator::errors().empty() && emulator::errors()[0].find(expected) != std::string::npos;
    const bool right = expected.empty() ? emulator::errors().empty() : found;
    if (!right || (seed == 0 && !expected.empty())) {
      std::printf("        %s\n",
                  emulator::errors().empty() ? "(no error)" : emulator::errors()[0].c_str());
    }
    passed = passed && right;
    emulator::reset();
  }
  check(name, passed);
}

// ---- Meetings of threads ------------------------------------------------------------------------

void barrier_and_return(const Arrays&) {
  if (thread_index() != 40) sync_block();
}
void two_barriers(const Arrays&) {
  if (thread_index() < 32) {
    sync_block();
  } else {
    sync_block();
  }
}
void ballot_and_return(const Arrays&) {
  if (thread_index() != 7) ballot(true);
}
void ballot_and_barrier(const Arrays&) {
  if (thread_index() % 32 < 5) sync_block();
  ballot(true);
  if (thread_index() % 32 >= 5) sync_block();
}
void two_ballots(const Arrays&) {
  if (thread_index() % 2 == 0) {
    ballot(true);
  } else {
    ballot(false);
  }
}
void ballot_and_shuffle(const Arrays&) { thread_index() < 3 ? ballot(true) : shuffle(1u, 0); }
void shuffle_from_far(const Arrays&) { shuffle(1.0f, 32); }
void warps_apart(const Arrays&) {  // warps need not go the same way, between barriers
  if (thread_index() < 32) {
    for (int i = 0; i < 10; ++i) ballot(true);
  }
  sync_block();
}

// ---- Shared memory ------------------------------------------------------------------------------

void shared_uninitialised(const Arrays&) {
  shared_store<uint32_t>(4 * thread_index(), 1);
  sync_block();
  shared_load<uint32_t>(4 * thread_index() + 4);
}
void shared_write_write(const Arrays&) {
  shared_store<uint32_t>(thread_index() < 2 ? 0 : 4 * thread_index(), 1);
}
void shared_write_read(const Arrays&) {
  shared_store<uint32_t>(4 * thread_index(), 1);
  sync_block();
  if (thread_index() == 3) shared_store<uint32_t>(12, 2);
  if (thread_index() == 50) shared_load<uint32_t>(12);
}
void shared_several_read(const Arrays&) {
  shared_store<uint32_t>(4 * thread_index(), 1);
  sync_block();
  shared_load<uint32_t>(0);
  if (thread_index() == 3) shared_store<uint32_t>(0, 2);
}
void shared_across_blocks(const Arrays&) {  // contents do not survive
  if (block_index() == 0) shared_store<uint32_t>(4 * thread_index(), 1);
  sync_block();
  shared_load<uint32_t>(4 * thread_index());
}
void shared_beyond(const Arrays&) { shared_store<Words>(1024 - 16 * thread_index(), Words{}); }
void shared_before(const Arrays&) { shared_load<float>(-4); }
void shared_misaligned(const Arrays&) { shared_store<Words>(8, Words{}); }
void matrices_misaligned(const Arrays&) {
  uint32_t r[4];
  load_matrices(r, 8);
}
void matrices_uninitialised(const Arrays&) {
  if (thread_index() != 9) shared_store(16 * (thread_index() % 32), Words{});
  sync_block();
  uint32_t r[4];
  load_matrices(r, 16 * (thread_index() % 32));
}
void matrices_race(const Arrays&) {
  shared_store(16 * thread_index(), Words{});
  uint32_t r[4];
  load_matrices(r, 16 * thread_index());
}

// ---- Asynchronous copies ------------------------------------------------------------------------

void copy_read_early(const Arrays& p) {
  copy16_async(16 * thread_index(), p.values, 4 * (thread_index() % 8), true);
  commit_copies();
  shared_load<float>(16 * thread_index());
  wait_copies<0>();
}
void copy_written_over(const Arrays& p) {
  if (thread_index() == 0) copy16_async(0, p.values, 0, true);
  sync_block();
  if (thread_index() == 1) shared_store(4, 1.0f);
  sync_block();
  commit_copies();
  wait_copies<0>();
}
void copy_waited_too_little(const Arrays& p) {
  copy16_async(16 * (thread_index() % 64), p.values, 0, true);
  commit_copies();
  wait_copies<1>();
  shared_load<float>(16 * (thread_index() % 64));
}
void copy_without_barrier(const Arrays& p) {
  copy16_async(16 * thread_index(), p.values, 0, true);
  commit_copies();
  wait_copies<0>();
  shared_load<float>(16 * (thread_index() ^ 1));
}
void copy_after_read(const Arrays& p) {
  shared_store(16 * thread_index(), Words{});
  sync_block();
  if (thread_index() == 1) shared_load<float>(0);
  if (thread_index() == 0) copy16_async(0, p.values, 0, true);
  commit_copies();
  wait_copies<0>();
}
void copy_uncommitted(const Arrays& p) { copy16_async(16 * thread_index(), p.values, 0, true); }
void copy_not_waited(const Arrays& p) {
  copy16_async(16 * thread_index(), p.values, 0, true);
  commit_copies();
}
void copy_beyond(const Arrays& p) {
  copy16_async(16 * thread_index(), p.values, kValues - 3, true);
}
void copy_misaligned(const Arrays& p) { copy16_async(16 * thread_index(), p.values, 1, true); }
void copy_invalid(const Arrays& p) {
  copy16_async(16 * thread_index(), p.absent, -1, false);
  commit_copies();
  wait_copies<0>();
  p.out.store(thread_index(), shared_load<float>(16 * thread_index()));
}

// ---- Global memory ------------------------------------------------------------------------------

void global_beyond(const Arrays& p) { p.values.load(kValues - 20 + thread_index()); }
void global_before(const Arrays& p) { p.out.store(thread_index() - 1, 0.0f); }
void global_far(const Arrays& p) { p.values.load(int64_t{1} << 62); }
void global_16_beyond(const Arrays& p) { p.values.load16(kValues); }
void global_16_misaligned(const Arrays& p) { p.values.load16(2); }
void global_absent(const Arrays& p) {
  if (p.absent.data == nullptr) p.absent.load(0);
}
void global_uninitialised(const Arrays& p) {
  p.fresh.store(thread_index(), 1.0f);
  p.fresh.load(thread_index());
  if (thread_index() == 63) p.fresh.load(64);
}
void global_write_write(const Arrays& p) { p.out.store(thread_index(), 1.0f); }
void global_write_read(const Arrays& p) {
  if (thread_index() == 0) p.counts.store(block_index(), 1);
  if (thread_index() == 5) p.counts.load(3);
}
void global_atomic_read(const Arrays& p) {
  p.counts.atomic_add(0, 1);
  p.counts.load(0);
}
void global_atomic_write(const Arrays& p) {
  if (thread_index() == 11) p.counts.store(0, 1);
  if (thread_index() == 12) p.counts.atomic_add(0, 1);
}
void global_halves(const Arrays& p) {  // neighbours in a word do not race
  p.halves.store(thread_index(), from_float<half>(1.0f));
  p.halves.load(thread_index());
}
void tf32_not_rounded(const Arrays&) {
  float c[4] = {};
  const uint32_t a[4] = {};
  const uint32_t b[2] = {0, float_to_bits(0.1f)};
  TensorCore<float>::multiply_add(c, a, b);
}

void test_errors() {
  probe<Probe<barrier_and_return>>("barrier, one thread returns", "barrier divergence");
  probe<Probe<two_barriers>>("two barriers at a time", "barrier divergence");
  probe<Probe<ballot_and_return>>("ballot, one lane returns", "warp divergence");
  probe<Probe<ballot_and_barrier>>("ballot against barrier", "warp divergence");
  probe<Probe<two_ballots>>("ballot at two lines", "warp divergence");
  probe<Probe<ballot_and_shuffle>>("ballot against shuffle", "warp divergence");
  probe<Probe<shuffle_from_far>>("shuffle from lane 32", "from lane 32");
  probe<Probe<warps_apart>>("warps go their own ways", "");

  probe<Probe<shared_uninitialised>>("shared: uninitialised", "uninitialised shared memory");
  probe<Probe<shared_write_write>>("shared: two writers", "race in shared memory");
  probe<Probe<shared_write_read>>("shared: write and read", "race in shared memory");
  probe<Probe<shared_several_read>>("shared: several readers, a writer", "race in shared memory");
  probe<Probe<shared_across_blocks>>("shared: of another block", "uninitialised shared", 3);
  probe<Probe<shared_beyond>>("shared: beyond the end", "out of bounds: shared memory at 1024");
  probe<Probe<shared_before>>("shared: before the start", "out of bounds: shared memory at -4");
  probe<Probe<shared_misaligned>>("shared: misaligned", "misaligned");
  probe<Probe<matrices_misaligned, 32>>("load_matrices: misaligned", "misaligned");
  probe<Probe<matrices_uninitialised, 32>>("load_matrices: uninitialised", "uninitialised shared");
  probe<Probe<matrices_race, 32>>("load_matrices: race", "race in shared memory");

  probe<Probe<copy_read_early>>("copy: read too early", "access to a copy in flight");
  probe<Probe<copy_written_over>>("copy: written over", "access to a copy in flight");
  probe<Probe<copy_waited_too_little>>("copy: waited for too few", "access to a copy in flight");
  probe<Probe<copy_without_barrier>>("copy: no barrier", " shared memory");
  probe<Probe<copy_after_read>>("copy: over what is being read", " shared memory");
  probe<Probe<copy_uncommitted>>("copy: not committed", "that was not committed");
  probe<Probe<copy_not_waited>>("copy: not waited for", "in flight");
  probe<Probe<copy_beyond>>("copy: beyond the source", "out of bounds: [253] of values");
  probe<Probe<copy_misaligned>>("copy: misaligned source", "misaligned");
  probe<Probe<copy_invalid>>("copy: not valid, of an absent array", "");

  probe<Probe<global_beyond>>("global: beyond the end", "out of bounds: [2");
  probe<Probe<global_before>>("global: before the start", "out of bounds: [-1] of out");
  probe<Probe<global_far>>("global: index that overflows", "out of bounds");
  probe<Probe<global_16_beyond>>("global: 16 bytes beyond", "out of bounds");
  probe<Probe<global_16_misaligned>>("global: 16 bytes misaligned", "misaligned");
  probe<Probe<global_absent>>("global: absent", "absent");
  probe<Probe<global_uninitialised>>("global: uninitialised", "[64] of fresh");
  probe<Probe<global_write_write>>("global: two writers", "race in global memory", 2);
  probe<Probe<global_write_write>>("global: one writer each", "");
  probe<Probe<global_write_read>>("global: write and read", "race in global memory", 4);
  probe<Probe<global_atomic_read>>("global: atomic and read", "race in global memory");
  probe<Probe<global_atomic_write>>("global: atomic and write", "race in global memory");
  probe<Probe<global_halves>>("global: neighbouring halves", "");
  probe<Probe<tf32_not_rounded>>("tf32 not rounded", "round_to_tf32");
  probe<Probe<warps_apart>>("no blocks", "cannot launch 0 blocks", 0);
}

// ---- Right programs -----------------------------------------------------------------------------

// Sums 1024 values per block through shared memory, and adds up all blocks atomically.
struct Sum {
  struct Params {
    Global<const float> values;
    Global<float> sums;
    Global<int32_t> total;
  };
  static constexpr int kThreads = 256;
  static constexpr int kSharedBytes = 4 * kThreads;

  static LAS_MM_DEVICE void run(const Params& p) {
    const int thread = thread_index();
    float sum = 0.0f;
    for (int i = 0; i < 4; ++i) sum += p.values.load(1024 * block_index() + 256 * i + thread);
    shared_store(4 * thread, sum);
    for (int half_size = kThreads / 2; half_size > 0; half_size /= 2) {
      sync_block();
      if (thread >= half_size) continue;
      sum += shared_load<float>(4 * (thread + half_size));
      shared_store(4 * thread, sum);
    }
    if (thread == 0) p.sums.store(block_index(), sum);
    p.total.atomic_add(0, 1);
  }
};

void test_sum() {
  constexpr int64_t kBlocks = 5;
  std::vector<float> values(1024 * kBlocks);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 7);
  const auto sums = emulator::allocate<float>(kBlocks, "sums");
  const auto total = emulator::allocate<int32_t>(1, "total", true);
  const Sum::Params params = {emulator::wrap(values.data(), 1024 * kBlocks, "values"), sums, total};
  emulator::clear();
  emulator::reset_counters();
  emulator::emulate<Sum>(kBlocks, params);
  bool right = emulator::errors().empty() && total.data[0] == kBlocks * Sum::kThreads;
  for (int64_t b = 0; b < kBlocks; ++b) {
    float expected = 0.0f;
    for (int i = 0; i < 1024; ++i) expected += values[1024 * b + i];
    right = right && sums.data[b] == expected;
  }
  check("block reduction and atomics", right);

  const emulator::Traffic read = emulator::last_traffic(params.values);
  const int64_t unaligned = reinterpret_cast<uintptr_t>(values.data()) % 32 != 0;
  check("traffic", read.load_bytes == 4096 * kBlocks &&
                       read.sectors_read == 128 * kBlocks + unaligned && read.store_bytes == 0 &&
                       emulator::last_traffic(sums).store_bytes == 4 * kBlocks &&
                       emulator::last_traffic(sums).sectors_written == 1 &&
                       emulator::last_traffic(total).load_bytes == 4 * 256 * kBlocks &&
                       emulator::last_launch().barriers == 8 * kBlocks &&
                       emulator::last_launch().traffic.sectors_read == read.sectors_read + 1);
  emulator::emulate<Sum>(kBlocks, params);
  check("traffic accumulates",
        emulator::traffic(params.values).sectors_read == 2 * read.sectors_read &&
            emulator::totals().launches == 2);
  emulator::reset();
}

// Ballots and shuffles against what they should return.
struct Exchanges {
  struct Params {
    Global<int32_t> right;
  };
  static constexpr int kThreads = 96;
  static constexpr int kSharedBytes = 0;

  static LAS_MM_DEVICE void run(const Params& p) {
    const int lane = thread_index() % 32;
    bool right = ballot(lane % 3 == 0) == 0x49249249u;
    right = shuffle(10 * lane, (lane + 5) % 32) == 10 * ((lane + 5) % 32) && right;
    right = shuffle_xor(int64_t{1} << lane, 9) == int64_t{1} << (lane ^ 9) && right;
    float sum = static_cast<float>(lane);
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
    right = to_float(shuffle(from_float<half>(sum), lane)) == 496.0f && right;
    right = count_bits(ballot(right)) == 32 && right;
    p.right.store(thread_index(), right);
  }
};

void test_exchanges() {
  const auto right = emulator::allocate<int32_t>(Exchanges::kThreads, "right");
  emulator::clear();
  emulator::emulate<Exchanges>(1, {right});
  bool all = emulator::errors().empty();
  for (int t = 0; t < Exchanges::kThreads; ++t) all = all && right.data[t] == 1;
  check("ballot, shuffle, shuffle_xor", all);
  emulator::reset();
}

// out(64 x 32) = a(64 x depth) * b(32 x depth)^T for 16-bit values, the way real kernels do it:
// two stages of 32 in depth, copied asynchronously, fragments by load_matrices. 128 threads, each
// warp has 16 rows. Rows in shared memory take 80 bytes.
template <typename T>
struct Product {
  struct Params {
    Global<const T> a;
    Global<const T> b;
    Global<float> out;
    int depth;
  };
  static constexpr int kThreads = 128;
  static constexpr int kRow = 80;
  static constexpr int kStage = (64 + 32) * kRow;
  static constexpr int kSharedBytes = 2 * kStage;

  static LAS_MM_DEVICE void copy_stage(const Params& p, int step) {
    for (int i = thread_index(); i < (64 + 32) * 4; i += kThreads) {
      const int row = i / 4;
      const int column = 32 * step + i % 4 * 8;
      const int at = step % 2 * kStage + row * kRow + i % 4 * 16;
      const bool valid = column < p.depth;
      if (row < 64) {
        copy16_async(at, p.a, int64_t{row} * p.depth + column, valid);
      } else {
        copy16_async(at, p.b, int64_t{row - 64} * p.depth + column, valid);
      }
    }
  }

  static LAS_MM_DEVICE void run(const Params& p) {
    const int warp = thread_index() / 32;
    const int lane = thread_index() % 32;
    const int steps = (p.depth + 31) / 32;
    float c[4][4] = {};
    copy_stage(p, 0);
    commit_copies();
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) copy_stage(p, step + 1);
      commit_copies();
      wait_copies<1>();
      sync_block();
      const int stage = step % 2 * kStage;
      for (int k = 0; k < 64; k += 32) {  // bytes
        uint32_t a[4], b[2][4];
        load_matrices(a, stage + (16 * warp + lane % 16) * kRow + k + lane / 16 * 16);
        for (int n = 0; n < 2; ++n) {
          const int row = 64 + 16 * n + lane % 8 + lane / 16 * 8;
          load_matrices(b[n], stage + row * kRow + k + lane / 8 % 2 * 16);
        }
        for (int n = 0; n < 4; ++n) {
          const uint32_t pair[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
          TensorCore<T>::multiply_add(c[n], a, pair);
        }
      }
      sync_block();
    }
    wait_copies<0>();
    for (int n = 0; n < 4; ++n) {
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * warp + lane / 4 + i / 2 * 8;
        p.out.store(row * 32 + 8 * n + lane % 4 * 2 + i % 2, c[n][i]);
      }
    }
  }
};

float some_value(int64_t i) { return static_cast<float>(i * 7919 % 1000) / 500.0f - 1.0f; }

template <typename T>
void test_product(const std::string& name) {
  constexpr int kDepth = 32 * 3 + 8;
  std::vector<T> a(64 * kDepth), b(32 * kDepth);
  for (size_t i = 0; i < a.size(); ++i) a[i] = from_float<T>(some_value(i));
  for (size_t i = 0; i < b.size(); ++i) b[i] = from_float<T>(some_value(3 * i + 1));
  const auto out = emulator::allocate<float>(64 * 32, "out");
  emulator::clear();
  emulator::emulate<Product<T>>(
      1, {emulator::copy_of(a, "a"), emulator::copy_of(b, "b"), out, kDepth});
  for (const std::string& error : emulator::errors()) std::printf("        %s\n", error.c_str());
  bool right = emulator::errors().empty();
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 32; ++column) {
      double sum = 0.0;
      for (int k = 0; k < kDepth; ++k) {
        sum += to_float(a[row * kDepth + k]) * to_float(b[column * kDepth + k]);
      }
      right = right && std::abs(out.data[row * 32 + column] - sum) < 1e-4;
    }
  }
  check(name, right);
  check(name + ": multiply-adds", emulator::last_launch().multiply_adds == 64 * 32 * 128);
  emulator::reset();
}

// out(16 x 8) = a(16 x 8) * b(8 x 8) with one instruction.
struct Tf32Product {
  struct Params {
    Global<const float> a;
    Global<const float> b;
    Global<float> out;
  };
  static constexpr int kThreads = 32;
  static constexpr int kSharedBytes = 0;

  static LAS_MM_DEVICE void run(const Params& p) {
    const int group = thread_index() / 4;
    const int member = thread_index() % 4;
    float c[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; ++i) {
      const int at = (group + i % 2 * 8) * 8 + member + i / 2 * 4;
      a[i] = round_to_tf32(float_to_bits(p.a.load(at)));
    }
    for (int i = 0; i < 2; ++i) {
      b[i] = round_to_tf32(float_to_bits(p.b.load((member + 4 * i) * 8 + group)));
    }
    TensorCore<float>::multiply_add(c, a, b);
    for (int i = 0; i < 4; ++i) {
      p.out.store((group + i / 2 * 8) * 8 + member * 2 + i % 2, c[i]);
    }
  }
};

void test_tf32() {
  std::vector<float> a(16 * 8), b(8 * 8);
  for (size_t i = 0; i < a.size(); ++i) a[i] = some_value(i);
  for (size_t i = 0; i < b.size(); ++i) b[i] = some_value(5 * i + 2);
  const auto out = emulator::allocate<float>(16 * 8, "out");
  emulator::clear();
  emulator::emulate<Tf32Product>(1, {emulator::copy_of(a, "a"), emulator::copy_of(b, "b"), out});
  bool right = emulator::errors().empty();
  const auto rounded = [](float value) {
    return bits_to_float(round_to_tf32(float_to_bits(value)));
  };
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double sum = 1.0;
      for (int k = 0; k < 8; ++k) sum += rounded(a[row * 8 + k]) * rounded(b[k * 8 + column]);
      right = right && std::abs(out.data[row * 8 + column] - sum) < 1e-5;
    }
  }
  check("tf32 product", right);
  emulator::reset();
}

// Both conversions of half against arithmetic on doubles; bfloat16 and tf32 at chosen values.
void test_conversions() {
  bool right = true;
  const auto exact = [](uint32_t bits) {  // magnitude of a finite half; 0x7c00 counts as 2^16
    const int exponent = static_cast<int>(bits >> 10);
    const double fraction = bits & 0x3ff;
    return exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  };
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const float value = to_float(from_bits16<half>(bits));
    right = right && value == exact(bits) && to_float(from_bits16<half>(bits | 0x8000)) == -value;
    right = right && bits16(from_float<half>(value)) == bits;
    // The middle of two neighbours goes to the even one, and what is next to it to the nearer.
    const float middle = static_cast<float>((exact(bits) + exact(bits + 1)) / 2);
    right = right && bits16(from_float<half>(middle)) == bits + (bits & 1);
    right = right && bits16(from_float<half>(std::nextafter(middle, 0.0f))) == bits;
    right = right && bits16(from_float<half>(-std::nextafter(middle, 1e9f))) == (bits + 1) + 0x8000;
  }
  const float infinity = std::numeric_limits<float>::infinity();
  const float not_a_number = std::numeric_limits<float>::quiet_NaN();
  right = right && to_float(from_bits16<half>(0x7c00)) == infinity &&
          to_float(from_bits16<half>(0xfc00)) == -infinity &&
          bits16(from_float<half>(infinity)) == 0x7c00 &&
          bits16(from_float<half>(-3e38f)) == 0xfc00 &&
          std::isnan(to_float(from_bits16<half>(0x7e01))) &&
          std::isnan(to_float(from_float<half>(not_a_number)));
  check("half conversions", right);

  const auto to_bf16 = [](uint32_t bits) { return bits16(from_float<bf16>(bits_to_float(bits))); };
  check("bf16 conversions", to_bf16(0x3f808000) == 0x3f80 && to_bf16(0x3f818000) == 0x3f82 &&
                                to_bf16(0x3f808001) == 0x3f81 && to_bf16(0xff7fffff) == 0xff80 &&
                                to_bf16(0x7f800000) == 0x7f80 && to_bf16(0x00008001) == 1 &&
                                std::isnan(to_float(from_float<bf16>(bits_to_float(0x7f800001)))) &&
                                to_float(from_bits16<bf16>(0xbf80)) == -1.0f);
  check("tf32 rounding",
        round_to_tf32(0x3f801000) == 0x3f802000 && round_to_tf32(0x3f800fff) == 0x3f800000 &&
            round_to_tf32(0xbf801000) == 0xbf802000 && round_to_tf32(0x7f800000) == 0x7f800000 &&
            std::isnan(bits_to_float(round_to_tf32(0xff800001))));
}

// ---- Speed --------------------------------------------------------------------------------------

void many_ballots(const Arrays&) {
  for (int i = 0; i < 20000; ++i) ballot(true);
}

template <typename Function>
double best_seconds(const Function& function) {
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < 5; ++i) {
    const auto start = std::chrono::steady_clock::now();
    function();
    const auto end = std::chrono::steady_clock::now();
    best = std::min(best, std::chrono::duration<double>(end - start).count());
  }
  return best;
}

void print_speed() {
  const double ballots =
      best_seconds([] { emulator::emulate<Probe<many_ballots, 128>>(1, Arrays{}); });
  std::printf("ballot: %.1f ns a lane (one switch each)\n", ballots / (20000 * 128) * 1e9);
  constexpr int kDepth = 32 * 50;
  const auto a = emulator::copy_of(std::vector<half>(64 * kDepth), "a");
  const auto b = emulator::copy_of(std::vector<half>(32 * kDepth), "b");
  const auto out = emulator::allocate<float>(64 * 32, "out");
  const double product =
      best_seconds([&] { emulator::emulate<Product<half>>(1, {a, b, out, kDepth}); });
  std::printf("64x32 tile, 128 threads, 50 steps of 32: %.2f ms, 14 collectives a step and warp\n",
              product * 1e3);
  emulator::reset();
}

}  // namespace
}  // namespace las_mm::cuda

int main() {
  using namespace las_mm::cuda;
  test_errors();
  test_sum();
  test_exchanges();
  test_product<half>("half product, copies and load_matrices");
  test_product<bf16>("bf16 product, copies and load_matrices");
  test_tf32();
  test_conversions();
  print_speed();
  if (failures != 0) std::printf("%d checks FAILED\n", failures);
  return failures == 0 ? 0 : 1;
}
