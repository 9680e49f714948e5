// The decision of a masker, shared by spatial_mask and masker_conv1x1.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>

#include "common/compat.h"

namespace las_mm::cpu {

// See las_mm::spatial_mask in las_mm/ops/masks.py; checks its arguments, calling weight and bias
// `prefix` + "weight" and "bias".
std::tuple<at::Tensor, at::Tensor> decide(const at::Tensor& x, const at::Tensor& weight,
                                          const at::Tensor& bias,
                                          const Optional<at::Tensor>& offset, int64_t granularity,
                                          at::IntArrayRef strides, int64_t dilation,
                                          const std::string& prefix);

}  // namespace las_mm::cpu
