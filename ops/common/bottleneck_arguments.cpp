#include "common/bottleneck_arguments.h"

#include <string>

#include "common/arguments.h"
#include "common/checks.h"

namespace las_mm {
namespace {

void check_dense(const at::Tensor& x, const std::vector<at::Tensor>& dense, const Arguments& a,
                 const Shape& s) {
  TORCH_CHECK_VALUE(dense.size() == a.weights.size(), "dense must be None or hold ",
                    a.weights.size(), " weights as weights does, got ", dense.size());
  const int64_t side = a.shortcut && a.shortcut->dim() == 4 ? a.shortcut->size(1) : s.c_in;
  const std::vector<int64_t> shapes[] = {{s.hidden, s.c_in, 1, 1},
                                         {s.hidden, s.hidden / a.groups, 3, 3},
                                         {s.c_out, s.hidden, 1, 1},
                                         {s.c_out, side, 1, 1}};
  for (size_t i = 0; i < dense.size(); ++i) {
    const std::string name = "dense[" + std::to_string(i) + "]";
    TORCH_CHECK_VALUE(dense[i].sizes() == at::IntArrayRef(shapes[i]), name, " must have shape ",
                      at::IntArrayRef(shapes[i]), ", got ", dense[i].sizes());
    check_same(dense[i], x, name.c_str());
  }
}

void check_matrix(const at::Tensor& weight, const char* name, int64_t out, int64_t in,
                  const at::Tensor& x) {
  const int64_t shape[] = {out, in};
  TORCH_CHECK_VALUE(weight.sizes() == at::IntArrayRef(shape, 2), name, " must have shape ",
                    at::IntArrayRef(shape, 2), ", got ", weight.sizes());
  TORCH_CHECK_VALUE(weight.scalar_type() == at::kFloat && weight.device() == x.device(), name,
                    " must be float32 on ", x.device(), ", got ", weight.scalar_type(), " on ",
                    weight.device());
}

void check_excitation(const at::Tensor& x, const std::vector<at::Tensor>& weights,
                      const Shape& s, bool winograd) {
  TORCH_CHECK_VALUE(weights.size() == 4,
                    "excitation must be None or weight and bias of fc1 and of fc2, got ",
                    weights.size(), " tensors");
  TORCH_CHECK_VALUE(!winograd, "winograd must be None with excitation");
  const int64_t squeezed = weights[1].numel();
  check_vector(weights[1], "excitation[1]", squeezed, at::kFloat, x);
  check_vector(weights[3], "excitation[3]", s.hidden, at::kFloat, x);
  check_matrix(weights[0], "excitation[0]", squeezed, s.hidden, x);
  check_matrix(weights[2], "excitation[2]", s.hidden, squeezed, x);
}

}  // namespace

Shape check(const at::Tensor& x, const Arguments& a) {
  check_map(x, "x");
  check_strides(a.strides, a.dilation);
  TORCH_CHECK_VALUE((a.weights.size() == 3 || a.weights.size() == 4) &&
                        a.biases.size() == a.weights.size(),
                    "weights and biases must be those of conv1, conv2, conv3 and, where there is "
                    "one, the downsample convolution, got ",
                    a.weights.size(), " and ", a.biases.size());
  Shape s{x.size(0), x.size(1), x.size(2), x.size(3)};
  s.hidden_height = ceil_div(s.height, a.strides[0]);
  s.hidden_width = ceil_div(s.width, a.strides[0]);
  s.out_height = ceil_div(s.hidden_height, a.strides[1]);
  s.out_width = ceil_div(s.hidden_width, a.strides[1]);
  s.hidden = a.biases[0].numel();
  s.c_out = a.biases[2].numel();
  s.downsample = a.weights.size() == 4;
  check_groups(a.groups, s.hidden, s.hidden);
  for (size_t i = 0; i < a.biases.size(); ++i) {
    check_vector(a.biases[i], "biases[" + std::to_string(i) + "]", i < 2 ? s.hidden : s.c_out,
                 at::kFloat, x);
  }
  TORCH_CHECK_VALUE(a.winograd_cost >= 0, "winograd_cost must be a number from 0 up, got ",
                    a.winograd_cost);
  if (a.dense) check_dense(x, *a.dense, a, s);
  check_packed(a.weights[0], "weights[0]", s.hidden, s.c_in, 1, 1, x);
  check_packed(a.weights[2], "weights[2]", s.c_out, s.hidden, 1, 1, x);
  if (a.winograd) {
    TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && a.strides[1] == 1 && a.dilation == 1 &&
                          a.groups == 1,
                      "winograd must be None unless conv2 is float32 with stride, dilation and "
                      "groups 1, got ",
                      x.scalar_type(), ", stride ", a.strides[1], ", dilation ", a.dilation,
                      ", groups ", a.groups);
    check_packed(*a.winograd, "winograd", s.hidden, s.hidden, kTile, 1, x);
  }
  if (!a.winograd || a.weights[1].numel() > 0) {
    check_packed(a.weights[1], "weights[1]", s.hidden, s.hidden / a.groups, 9, a.groups, x);
  }
  if (!s.downsample) {
    TORCH_CHECK_VALUE(!a.shortcut, "shortcut must be None without a downsample convolution");
    TORCH_CHECK_VALUE(s.c_out == s.c_in && a.strides[0] == 1 && a.strides[1] == 1,
                      "weights must have a downsample convolution unless strides are [1, 1] and "
                      "the output has ",
                      s.c_in, " channels, got ", at::IntArrayRef(a.strides), " and ", s.c_out);
  } else {
    if (a.shortcut) check_shortcut_map(*a.shortcut, x, s.out_height, s.out_width);
    check_packed(a.weights[3], "weights[3]", s.c_out, a.shortcut ? a.shortcut->size(1) : s.c_in, 1,
                 1, x);
  }
  if (a.excitation) check_excitation(x, *a.excitation, s, a.winograd.has_value());
  if (a.mask) check_mask_for(*a.mask, "mask", x, s.out_height, s.out_width, a.granularity);
  return s;
}

void check_channels(const at::Tensor& channel_mask,
                    const Optional<std::vector<at::Tensor>>& constants, const at::Tensor& x,
                    const Shape& s) {
  check_channel_mask(channel_mask, x, s.hidden);
  if (!constants) return;
  TORCH_CHECK_VALUE(constants->size() == 2,
                    "constants must be None or those of conv1's and conv2's outputs, got ",
                    constants->size());
  for (size_t i = 0; i < 2; ++i) {
    check_vector((*constants)[i], "constants[" + std::to_string(i) + "]", s.hidden, at::kFloat, x);
  }
}

void make_contiguous(Arguments& a) {
  for (at::Tensor& weight : a.weights) weight = weight.contiguous();
  for (at::Tensor& bias : a.biases) bias = bias.contiguous();
  if (a.winograd) a.winograd = a.winograd->contiguous();
  if (a.excitation) {
    for (at::Tensor& weight : *a.excitation) weight = weight.contiguous();
  }
}

}  // namespace las_mm
