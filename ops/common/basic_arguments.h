// The arguments of las_mm::sparse_basic, see las_mm/ops/basic.py, and their check.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "common/compat.h"

namespace las_mm {

// All arguments after x.
struct BasicArguments {
  Optional<at::Tensor> mask, shortcut;
  std::vector<at::Tensor> weights, biases, winograd, dense;
  int64_t granularity, stride, dilation;
  double winograd_cost, dense_above;

  BasicArguments(const Optional<at::Tensor>& mask, const Optional<at::Tensor>& shortcut,
                 std::vector<at::Tensor> weights, std::vector<at::Tensor> biases,
                 std::vector<at::Tensor> winograd, std::vector<at::Tensor> dense,
                 at::IntArrayRef geometry, at::ArrayRef<double> plan);
};

struct BasicShape {
  int64_t images, c_in, height, width;  // of x
  int64_t out_height, out_width;        // of both convolutions
  int64_t hidden, c_out;
  bool downsample;
};

// Throws ValueError, naming the argument, if something does not fit.
BasicShape check(const at::Tensor& x, const BasicArguments& a);
void check_in_place(size_t weights);  // for a block of so many convolutions

}  // namespace las_mm
