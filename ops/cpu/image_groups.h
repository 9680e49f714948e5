// Which images of a batch a thread computes from beginning to end.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "common/bottleneck_arguments.h"

namespace las_mm::cpu {

// Kept outputs of every image; `patches`: their decisions, undefined: all are kept.
std::vector<int64_t> outputs_of_images(const Arguments& a, const Shape& s,
                                       const at::Tensor& patches);

// Consecutive images that are one task, where `outputs` is the work of each: the first image of
// every task, and the end. A thread that computes whole images finds what it has written in its own
// cache, and waits for no one. One task for all: `threads` could not share the images evenly.
std::vector<int64_t> share_images(const std::vector<int64_t>& outputs, int64_t threads);

}  // namespace las_mm::cpu
