// The decision of a masker, shared by spatial_mask and masker_conv1x1.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace las_mm::cpu {

// See las_mm::spatial_mask in las_mm/ops/masks.py; checks its arguments.
std::tuple<at::Tensor, at::Tensor> spatial_mask(const at::Tensor& x, const at::Tensor& weight,
                                                const at::Tensor& bias,
                                                const std::optional<at::Tensor>& offset,
                                                int64_t granularity, at::IntArrayRef strides,
                                                int64_t dilation);

}  // namespace las_mm::cpu
