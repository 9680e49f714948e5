#include "common/dense_layer_arguments.h"

#include <string>

#include "common/arguments.h"
#include "common/checks.h"

namespace las_mm {

DenseLayerShape check(const at::Tensor& buffer, const DenseLayerArguments& a) {
  check_map(buffer, "buffer");
  TORCH_CHECK_VALUE(a.weights.size() == 2, "weights must be those of conv1 and conv2, got ",
                    a.weights.size());
  TORCH_CHECK_VALUE(a.vectors.size() == 4,
                    "vectors must be scale and shift of the first norm and the biases of conv1 and "
                    "conv2, got ",
                    a.vectors.size());
  TORCH_CHECK_VALUE(a.winograd.size() <= 1, "winograd must be empty or hold conv2's weight, got ",
                    a.winograd.size());
  TORCH_CHECK_VALUE(a.winograd_cost >= 0, "winograd_cost must be a number from 0 up, got ",
                    a.winograd_cost);
  const DenseLayerShape s{buffer.size(0),       buffer.size(2),       buffer.size(3),
                          a.vectors[0].numel(), a.vectors[2].numel(), a.vectors[3].numel()};
  const int64_t sizes[] = {s.c_in, s.c_in, s.hidden, s.growth};
  for (size_t i = 0; i < 4; ++i) {
    check_vector(a.vectors[i], "vectors[" + std::to_string(i) + "]", sizes[i], at::kFloat, buffer);
  }
  TORCH_CHECK_VALUE(s.c_in + s.growth <= buffer.size(1), "buffer must have room for ", s.c_in,
                    " + ", s.growth, " channels, got ", buffer.size(1));
  check_packed(a.weights[0], "weights[0]", s.hidden, s.c_in, 1, 1, buffer);
  const std::vector<at::Tensor> winograd =
      a.winograd.empty() ? a.winograd : std::vector<at::Tensor>{a.winograd[0], a.winograd[0]};
  check_conv3x3(buffer, a.weights, winograd, 1, s.hidden, s.growth, true);
  if (a.mask) check_mask_for(*a.mask, "mask", buffer, s.height, s.width, a.granularity);
  check_positions(s.images * s.height * s.width, "buffer");
  return s;
}

}  // namespace las_mm
