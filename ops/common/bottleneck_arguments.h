// The arguments of las_mm::sparse_bottleneck, see las_mm/ops/bottleneck.py, and their check.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "common/compat.h"

namespace las_mm {

// All arguments after x.
struct Arguments {
  Optional<at::Tensor> mask;
  std::vector<at::Tensor> weights, biases;
  Optional<at::Tensor> winograd, shortcut;
  int64_t granularity;
  std::vector<int64_t> strides;
  int64_t dilation, groups;
  double winograd_cost;
  Optional<std::vector<at::Tensor>> dense;
  double dense_above;
  Optional<std::vector<at::Tensor>> excitation;
};

struct Shape {
  int64_t images, c_in, height, width;  // of x
  int64_t hidden_height, hidden_width;  // of conv1's output
  int64_t out_height, out_width;
  int64_t hidden, c_out;
  bool downsample;
};

// Throws ValueError, naming the argument, if something does not fit.
Shape check(const at::Tensor& x, const Arguments& a);

// The arguments of las_mm::channel_bottleneck that sparse_bottleneck does not have, see
// las_mm/ops/channels.py.
void check_channels(const at::Tensor& channel_mask,
                    const Optional<std::vector<at::Tensor>>& constants, const at::Tensor& x,
                    const Shape& s);

// The kernels read weights and biases as plain arrays.
void make_contiguous(Arguments& a);

}  // namespace las_mm
