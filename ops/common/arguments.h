// The arguments of the smaller ops, see las_mm/ops/, and their checks for all native back ends. Each
// throws ValueError, naming the argument, if something does not fit.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "common/compat.h"

namespace las_mm {

// The masker of las_mm::spatial_mask; its weight and bias are called `prefix` + "weight", "bias".
void check_masker(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                  const Optional<at::Tensor>& offset, int64_t granularity, at::IntArrayRef strides,
                  int64_t dilation, const std::string& prefix);

// The masker of las_mm::channel_mask; returns the number of its decisions.
int64_t check_channel_masker(const at::Tensor& x, const std::vector<at::Tensor>& weights,
                             const std::vector<at::Tensor>& biases,
                             const Optional<at::Tensor>& offset);

// What a downsample convolution reads in place of x.
void check_shortcut_map(const at::Tensor& shortcut, const at::Tensor& x, int64_t height,
                        int64_t width);

// Decisions about `width` channels of the images of x.
void check_channel_mask(const at::Tensor& channel_mask, const at::Tensor& x, int64_t width);

// Without those of the masker.
void check_masker_conv1x1(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias);

void check_gather_conv3x3(const at::Tensor& hidden, const at::Tensor& mask,
                          const at::Tensor& weight, const at::Tensor& bias, int64_t granularity,
                          int64_t stride, int64_t dilation, int64_t groups);

// A 3x3 convolution `in` -> `out` whose weight `i` is packed in direct or Winograd form, or both;
// empty: not so. `tiled`: whether its stride and dilation allow the latter.
void check_conv3x3(const at::Tensor& x, const std::vector<at::Tensor>& weights,
                   const std::vector<at::Tensor>& winograd, size_t i, int64_t in, int64_t out,
                   bool tiled);

void check_conv1x1_scatter_add(const at::Tensor& residual, const at::Tensor& x,
                               const at::Tensor& mask, const at::Tensor& weight,
                               const at::Tensor& bias, int64_t granularity);

// `weight` may be empty where `winograd` is not.
void check_packed_conv2d(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& winograd,
                         const at::Tensor& bias, int64_t kernel, int64_t stride, int64_t dilation);

void check_dense_transition(const at::Tensor& out, const at::Tensor& buffer,
                            const at::Tensor& weight, const std::vector<at::Tensor>& vectors);

}  // namespace las_mm
