// Which images of a batch a thread computes from beginning to end.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "cpu/mask_geometry.h"
#include "cpu/sparse_conv.h"

namespace las_mm::cpu {

// Kept outputs of each of `images` images; `patches`: their decisions, undefined: all are kept.
std::vector<int64_t> outputs_of_images(const MaskGeometry& g, int64_t images,
                                       const at::Tensor& patches);

// Consecutive images that are one task, where `outputs` is the work of each: the first image of
// every task, and the end. A thread that computes whole images finds what it has written in its own
// cache, and waits for no one. One task for all: `threads` could not share the images evenly.
std::vector<int64_t> share_images(const std::vector<int64_t>& outputs, int64_t threads);

// Calls f(first image, images) for every task. Where there is one only, threads share its parts.
template <typename F>
void for_images(const std::vector<int64_t>& outputs, const F& f) {
  const std::vector<int64_t> firsts = share_images(outputs, free_threads());
  const auto tasks = static_cast<int64_t>(firsts.size()) - 1;
  if (tasks == 1) return f(0, firsts[1]);
  parallel_tasks(tasks, [&](int64_t task) { f(firsts[task], firsts[task + 1] - firsts[task]); });
}

}  // namespace las_mm::cpu
