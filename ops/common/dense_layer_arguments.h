// The arguments of las_mm::sparse_dense_layer_, see las_mm/ops/dense_layer.py, and their check.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "common/compat.h"

namespace las_mm {

// All arguments after the buffer.
struct DenseLayerArguments {
  Optional<at::Tensor> mask;
  std::vector<at::Tensor> weights, vectors, winograd;
  int64_t granularity;
  double winograd_cost;
};

struct DenseLayerShape {
  int64_t images, height, width;
  int64_t c_in, hidden, growth;
};

// Throws ValueError, naming the argument, if something does not fit.
DenseLayerShape check(const at::Tensor& buffer, const DenseLayerArguments& a);

}  // namespace las_mm
