#include "common/basic_arguments.h"

#include <string>
#include <utility>

#include "common/arguments.h"
#include "common/checks.h"

namespace las_mm {
namespace {

// Makes them plain arrays.
std::vector<at::Tensor> contiguous(std::vector<at::Tensor> tensors) {
  for (at::Tensor& tensor : tensors) tensor = tensor.contiguous();
  return tensors;
}

void check_dense(const at::Tensor& x, const BasicArguments& a, const BasicShape& s) {
  TORCH_CHECK_VALUE(a.dense.size() == a.weights.size(), "dense must be empty or hold ",
                    a.weights.size(), " weights as weights does, got ", a.dense.size());
  const int64_t side = a.shortcut ? a.shortcut->size(1) : s.c_in;
  const std::vector<int64_t> shapes[] = {
      {s.hidden, s.c_in, 3, 3}, {s.c_out, s.hidden, 3, 3}, {s.c_out, side, 1, 1}};
  for (size_t i = 0; i < a.dense.size(); ++i) {
    const std::string name = "dense[" + std::to_string(i) + "]";
    TORCH_CHECK_VALUE(a.dense[i].sizes() == at::IntArrayRef(shapes[i]), name, " must have shape ",
                      at::IntArrayRef(shapes[i]), ", got ", a.dense[i].sizes());
    check_same(a.dense[i], x, name.c_str());
  }
}

void check_shortcut(const at::Tensor& x, const BasicArguments& a, const BasicShape& s) {
  if (!s.downsample) {
    TORCH_CHECK_VALUE(!a.shortcut, "shortcut must be None without a downsample convolution");
    TORCH_CHECK_VALUE(s.c_out == s.c_in && a.stride == 1,
                      "weights must have a downsample convolution unless the stride is 1 and the "
                      "output has ",
                      s.c_in, " channels, got ", a.stride, " and ", s.c_out);
    return;
  }
  if (a.shortcut) check_shortcut_map(*a.shortcut, x, s.out_height, s.out_width);
  check_packed(a.weights[2], "weights[2]", s.c_out, a.shortcut ? a.shortcut->size(1) : s.c_in, 1, 1,
               x);
}

}  // namespace

BasicArguments::BasicArguments(const Optional<at::Tensor>& mask,
                               const Optional<at::Tensor>& shortcut,
                               std::vector<at::Tensor> weights, std::vector<at::Tensor> biases,
                               std::vector<at::Tensor> winograd, std::vector<at::Tensor> dense,
                               at::IntArrayRef geometry, at::ArrayRef<double> plan)
    : mask(mask),
      shortcut(shortcut),
      weights(contiguous(std::move(weights))),
      biases(contiguous(std::move(biases))),
      winograd(contiguous(std::move(winograd))),
      dense(std::move(dense)) {
  TORCH_CHECK_VALUE(geometry.size() == 3, "geometry must be (granularity, stride, dilation), got ",
                    geometry);
  TORCH_CHECK_VALUE(plan.size() == 2, "plan must be (winograd_cost, dense_above), got ", plan);
  granularity = geometry[0], stride = geometry[1], dilation = geometry[2];
  winograd_cost = plan[0], dense_above = plan[1];
}

BasicShape check(const at::Tensor& x, const BasicArguments& a) {
  check_map(x, "x");
  check_stride(a.stride, "stride");
  check_positive(a.dilation, "dilation");
  TORCH_CHECK_VALUE(
      (a.weights.size() == 2 || a.weights.size() == 3) && a.biases.size() == a.weights.size(),
      "weights and biases must be those of conv1, conv2 and, where there is one, the "
      "downsample convolution, got ",
      a.weights.size(), " and ", a.biases.size());
  TORCH_CHECK_VALUE(a.winograd.empty() || a.winograd.size() == 2,
                    "winograd must be empty or hold conv1's and conv2's weights, got ",
                    a.winograd.size());
  TORCH_CHECK_VALUE(a.winograd_cost >= 0, "winograd_cost must be a number from 0 up, got ",
                    a.winograd_cost);
  BasicShape s{x.size(0), x.size(1), x.size(2), x.size(3)};
  s.out_height = ceil_div(s.height, a.stride);
  s.out_width = ceil_div(s.width, a.stride);
  s.hidden = a.biases[0].numel();
  s.c_out = a.biases[1].numel();
  s.downsample = a.weights.size() == 3;
  for (size_t i = 0; i < a.biases.size(); ++i) {
    check_vector(a.biases[i], "biases[" + std::to_string(i) + "]", i < 1 ? s.hidden : s.c_out,
                 at::kFloat, x);
  }
  check_conv3x3(x, a.weights, a.winograd, 0, s.c_in, s.hidden, a.stride == 1 && a.dilation == 1);
  check_conv3x3(x, a.weights, a.winograd, 1, s.hidden, s.c_out, true);
  check_shortcut(x, a, s);
  if (!a.dense.empty()) check_dense(x, a, s);
  if (a.mask) check_mask_for(*a.mask, "mask", x, s.out_height, s.out_width, a.granularity);
  check_positions(s.images * s.height * s.width, "x");
  return s;
}

void check_in_place(size_t weights) {
  TORCH_CHECK_VALUE(weights != 3, "weights must have no downsample convolution to work in place");
}

}  // namespace las_mm
