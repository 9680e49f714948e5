// Convolutions over lists of rows: what the sparse ops share between their argument checks and the
// inner loops of kernels.h.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "common/patch_geometry.h"
#include "cpu/kernels.h"

namespace las_mm::cpu {

// One tap (kernel position) of a convolution: where its inputs and its packed weights are.
template <typename T>
struct Tap {
  const T* const* rows;
  int64_t offset;     // added to each row
  int64_t depth;      // input channels
  const T* weights;   // packed weights of the group
  int index, count;   // this tap among those of the same weights
};

constexpr int kMaxTaps = 18;  // 9 taps, each in two parts
constexpr int64_t kChunkRows = 96;  // positions whose values fit the second-level cache

// Fetches values that are read soon.
template <typename T>
void prefetch(const T* values, int64_t count) {
  constexpr int64_t kLineValues = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLineValues) __builtin_prefetch(values + i);
}

// Output channels of one group, cut into panels.
struct Panels {
  int64_t channels;

  int64_t count() const { return ceil_div(channels, kPanel); }
  int width(int64_t panel) const {
    const int64_t rest = ceil_div(channels, kLanes) * kLanes - panel * kPanel;
    return static_cast<int>(std::min<int64_t>(rest, kPanel));
  }
  int valid(int64_t panel) const {
    return static_cast<int>(std::min<int64_t>(channels - panel * kPanel, kPanel));
  }
};

template <typename T>
constexpr int64_t packed_depth(int64_t depth) {
  return sizeof(T) == sizeof(float) ? depth : 2 * ceil_div(depth, 2);
}

// Where the results of run_panels go, see Panel.
template <typename T>
struct Target {
  const float* bias;
  const T* const* residual;
  T* const* out;
  int64_t column;
  bool relu;
};

// Output channels of panel `p` for all rows. The weights of the first `gathered_taps` taps are not
// theirs, but lie one after the other in `gathered`.
template <typename T>
void run_panel(int64_t rows, const Tap<T>* taps, int tap_count, const Panels& panels, int64_t p,
               const Target<T>& target, const T* gathered = nullptr, int gathered_taps = 0) {
  if (rows == 0) return;
  Segment<T> segments[kMaxTaps];
  const int width = panels.width(p);
  for (int t = 0; t < tap_count; ++t) {
    const Tap<T>& tap = taps[t];
    const int64_t depth = packed_depth<T>(tap.depth);
    segments[t] = {tap.rows, tap.offset, tap.depth,
                   t < gathered_taps
                       ? gathered + depth * t * width
                       : tap.weights + depth * (p * kPanel * tap.count + tap.index * width)};
  }
  panel_kernel(T{})({rows, segments, tap_count, width, panels.valid(p),
                     target.bias == nullptr ? nullptr : target.bias + p * kPanel, target.residual,
                     target.out, target.column + p * kPanel, target.relu});
}

// Output channels of the panels [first, last) for all rows.
template <typename T>
void run_panels(int64_t rows, const Tap<T>* taps, int tap_count, const Panels& panels,
                int64_t first, int64_t last, const Target<T>& target) {
  for (int64_t p = first; p < last; ++p) run_panel(rows, taps, tap_count, panels, p, target);
}

// Threads that a parallel loop started here would get.
inline int64_t free_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Calls f(task) for all tasks; a thread takes the next one when it is free, so that one that is held
// up by other work on the machine does not hold up the rest.
template <typename F>
void parallel_tasks(int64_t tasks, const F& f) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, free_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) f(task);
  });
}

// Cuts rows x panels into tasks for at::parallel_for and calls f(row, last_row, panel, last_panel).
// Rows are cut into chunks that fit the cache; if there are too few chunks for the threads (small
// images), panels are cut too, so that each thread reads only its part of the weights.
template <typename F>
void parallel_chunks(int64_t rows, int64_t chunk, int64_t panels, const F& f) {
  if (rows == 0) return;
  const int64_t threads = free_threads();
  int64_t row_tasks = ceil_div(rows, chunk);
  int64_t panel_tasks = 1;
  if (row_tasks < threads) {
    panel_tasks = std::min(panels, ceil_div(threads, row_tasks));
  } else {
    row_tasks = std::min(rows, ceil_div(row_tasks, threads) * threads);
  }
  parallel_tasks(row_tasks * panel_tasks, [&](int64_t task) {
    const int64_t r = task / panel_tasks, p = task % panel_tasks;
    f(rows * r / row_tasks, rows * (r + 1) / row_tasks, panels * p / panel_tasks,
      panels * (p + 1) / panel_tasks);
  });
}

}  // namespace las_mm::cpu
