#include "common/arguments.h"

#include "common/checks.h"

namespace las_mm {

void check_masker(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                  const Optional<at::Tensor>& offset, int64_t granularity, at::IntArrayRef strides,
                  int64_t dilation, const std::string& prefix) {
  check_map(x, "x");
  const int64_t images = x.size(0), channels = x.size(1);
  TORCH_CHECK_VALUE(weight.numel() == 2 * channels, prefix, "weight must have shape [2, ",
                    channels, ", 1, 1], got ", weight.sizes());
  check_vector(weight.reshape(-1), prefix + "weight", 2 * channels, x.scalar_type(), x);
  check_vector(bias, prefix + "bias", 2, x.scalar_type(), x);
  check_positive(granularity, "granularity");
  check_strides(strides, dilation);
  if (!offset) return;
  const PatchAxis axis_rows{ceil_div(ceil_div(x.size(2), strides[0]), strides[1]), granularity};
  const PatchAxis axis_columns{ceil_div(ceil_div(x.size(3), strides[0]), strides[1]), granularity};
  const int64_t rows = axis_rows.patches(), columns = axis_columns.patches();
  TORCH_CHECK_VALUE(offset->dim() == 4 && (offset->size(0) == 1 || offset->size(0) == images) &&
                        offset->size(1) == 1 && offset->size(2) == rows &&
                        offset->size(3) == columns,
                    "offset must have shape (1 or ", images, ", 1, ", rows, ", ", columns,
                    "), got ", offset->sizes());
  TORCH_CHECK_VALUE(offset->scalar_type() == at::kFloat, "offset must be float32, got ",
                    offset->scalar_type());
  TORCH_CHECK_VALUE(offset->device() == x.device(), "offset must be on ", x.device(), ", got ",
                    offset->device());
}

int64_t check_channel_masker(const at::Tensor& x, const std::vector<at::Tensor>& weights,
                             const std::vector<at::Tensor>& biases,
                             const Optional<at::Tensor>& offset) {
  check_map(x, "x");
  TORCH_CHECK_VALUE(!weights.empty() && weights.size() == biases.size(),
                    "weights and biases must be those of the same linear layers, got ",
                    weights.size(), " and ", biases.size());
  int64_t width = x.size(1);
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::string name = "weights[" + std::to_string(i) + "]";
    TORCH_CHECK_VALUE(weights[i].dim() == 2 && weights[i].size(1) == width, name,
                      " must have shape (out, ", width, "), got ", weights[i].sizes());
    check_vector(weights[i].reshape(-1), name, weights[i].numel(), at::kFloat, x);
    width = weights[i].size(0);
    check_vector(biases[i], "biases[" + std::to_string(i) + "]", width, at::kFloat, x);
  }
  TORCH_CHECK_VALUE(width > 0 && width % 2 == 0,
                    "weights must end in two logits per decision, got ", width);
  if (offset) {
    TORCH_CHECK_VALUE(offset->dim() == 2 && (offset->size(0) == 1 || offset->size(0) == x.size(0)) &&
                          offset->size(1) == width / 2,
                      "offset must have shape (1 or ", x.size(0), ", ", width / 2, "), got ",
                      offset->sizes());
    check_vector(offset->reshape(-1), "offset", offset->numel(), at::kFloat, x);
  }
  return width / 2;
}

void check_shortcut_map(const at::Tensor& shortcut, const at::Tensor& x, int64_t height,
                        int64_t width) {
  check_map(shortcut, "shortcut");
  check_same(shortcut, x, "shortcut");
  TORCH_CHECK_VALUE(shortcut.size(0) == x.size(0) && shortcut.size(2) == height &&
                        shortcut.size(3) == width,
                    "shortcut must have ", x.size(0), " images of ", height, "x", width, ", got ",
                    shortcut.sizes());
}

void check_channel_mask(const at::Tensor& channel_mask, const at::Tensor& x, int64_t width) {
  TORCH_CHECK_VALUE(channel_mask.dim() == 2 && channel_mask.size(0) == x.size(0) &&
                        channel_mask.size(1) > 0 && width % channel_mask.size(1) == 0,
                    "channel_mask must have shape (", x.size(0), ", k) with k dividing ", width,
                    " channels, got ", channel_mask.sizes());
  check_mask_dtype(channel_mask, "channel_mask");
  TORCH_CHECK_VALUE(channel_mask.device() == x.device(), "channel_mask must be on ", x.device(),
                    ", got ", channel_mask.device());
}

void check_masker_conv1x1(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  check_map(x, "x");
  check_vector(bias, "bias", bias.numel(), at::kFloat, x);
  check_packed(weight, "weight", bias.numel(), x.size(1), 1, 1, x);
  check_positions(x.size(0) * x.size(2) * x.size(3), "x");
}

void check_gather_conv3x3(const at::Tensor& hidden, const at::Tensor& mask,
                          const at::Tensor& weight, const at::Tensor& bias, int64_t granularity,
                          int64_t stride, int64_t dilation, int64_t groups) {
  check_map(hidden, "hidden");
  check_stride(stride, "stride");
  check_positive(dilation, "dilation");
  const int64_t c_in = hidden.size(1), c_out = bias.numel();
  check_groups(groups, c_in, c_out);
  check_vector(bias, "bias", c_out, at::kFloat, hidden);
  check_packed(weight, "weight", c_out, c_in / groups, 9, groups, hidden);
  check_positive(granularity, "granularity");
  check_mask_for(mask, "mask", hidden, ceil_div(hidden.size(2), stride),
                 ceil_div(hidden.size(3), stride), granularity);
  check_positions(hidden.size(0) * hidden.size(2) * hidden.size(3), "hidden");
}

void check_conv3x3(const at::Tensor& x, const std::vector<at::Tensor>& weights,
                   const std::vector<at::Tensor>& winograd, size_t i, int64_t in, int64_t out,
                   bool tiled) {
  const std::string tiles = "winograd[" + std::to_string(i) + "]";
  const bool has_tiles = !winograd.empty() && winograd[i].numel() > 0;
  if (has_tiles) {
    TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && tiled, tiles,
                      " must be empty unless the convolution is float32 with stride and dilation "
                      "1, got ",
                      x.scalar_type());
    check_packed(winograd[i], tiles, out, in, kTile, 1, x);
  }
  if (!has_tiles || weights[i].numel() > 0) {
    check_packed(weights[i], "weights[" + std::to_string(i) + "]", out, in, 9, 1, x);
  }
}

void check_packed_conv2d(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& winograd,
                         const at::Tensor& bias, int64_t kernel, int64_t stride, int64_t dilation) {
  check_map(x, "x");
  TORCH_CHECK_VALUE(kernel == 1 || kernel == 3, "kernel must be 1 or 3, got ", kernel);
  check_stride(stride, "stride");
  check_positive(dilation, "dilation");
  const int64_t c_out = bias.numel();
  check_vector(bias, "bias", c_out, at::kFloat, x);
  if (kernel == 3) {
    check_conv3x3(x, {weight}, {winograd}, 0, x.size(1), c_out, stride == 1 && dilation == 1);
  } else {
    TORCH_CHECK_VALUE(winograd.numel() == 0, "winograd[0] must be empty for a 1x1 convolution");
    check_packed(weight, "weights[0]", c_out, x.size(1), 1, 1, x);
  }
  check_positions(x.size(0) * x.size(2) * x.size(3), "x");
}

void check_conv1x1_scatter_add(const at::Tensor& residual, const at::Tensor& x,
                               const at::Tensor& mask, const at::Tensor& weight,
                               const at::Tensor& bias, int64_t granularity) {
  check_map(residual, "residual");
  check_channels(residual, bias.numel(), "residual");
  check_map(x, "x");
  check_same(x, residual, "x");
  TORCH_CHECK_VALUE(x.size(0) == residual.size(0) && x.size(2) == residual.size(2) &&
                        x.size(3) == residual.size(3),
                    "x must have the images and size of residual ", residual.sizes(), ", got ",
                    x.sizes());
  check_vector(bias, "bias", residual.size(1), at::kFloat, x);
  check_packed(weight, "weight", bias.numel(), x.size(1), 1, 1, x);
  check_mask_for(mask, "mask", x, x.size(2), x.size(3), granularity);
  check_positions(x.size(0) * x.size(2) * x.size(3), "x");
}

void check_dense_transition(const at::Tensor& out, const at::Tensor& buffer,
                            const at::Tensor& weight, const std::vector<at::Tensor>& vectors) {
  check_map(buffer, "buffer");
  check_map(out, "out");
  check_same(out, buffer, "out");
  const int64_t height = buffer.size(2) / 2, width = buffer.size(3) / 2;
  TORCH_CHECK_VALUE(
      out.size(0) == buffer.size(0) && out.size(2) == height && out.size(3) == width,
      "out must have ", buffer.size(0), " images of ", height, "x", width, ", got ", out.sizes());
  TORCH_CHECK_VALUE(vectors.size() == 3, "vectors must be scale, shift and bias, got ",
                    vectors.size());
  const int64_t sizes[] = {vectors[0].numel(), vectors[0].numel(), vectors[2].numel()};
  for (size_t i = 0; i < 3; ++i) {
    check_vector(vectors[i], "vectors[" + std::to_string(i) + "]", sizes[i], at::kFloat, buffer);
  }
  TORCH_CHECK_VALUE(sizes[0] <= buffer.size(1), "buffer must have ", sizes[0],
                    " channels or more, got ", buffer.size(1));
  TORCH_CHECK_VALUE(sizes[2] <= out.size(1), "out must have room for ", sizes[2],
                    " channels, got ", out.size(1));
  check_packed(weight, "weight", sizes[2], sizes[0], 1, 1, buffer);
  check_positions(buffer.size(0) * buffer.size(2) * buffer.size(3), "buffer");
}

}  // namespace las_mm
