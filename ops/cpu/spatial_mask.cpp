// las_mm::spatial_mask on the CPU: one pass over the features. The masker is linear, so pooling
// and its 1x1 convolution are one weighted sum per patch, formed row by row.
#include "cpu/spatial_mask.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "common/arguments.h"
#include "cpu/mask_geometry.h"
#include "cpu/workspace.h"

namespace las_mm::cpu {
namespace {

// Logit 0 minus logit 1, weights and bias, in float32.
struct Difference {
  std::vector<float> weight;
  float bias;
};

Difference difference(const at::Tensor& weight, const at::Tensor& bias, int64_t channels) {
  const at::Tensor w = weight.reshape({2, channels}).to(at::kFloat).contiguous();
  const at::Tensor b = bias.reshape({2}).to(at::kFloat).contiguous();
  const float* values = w.const_data_ptr<float>();
  Difference d{std::vector<float>(channels), b.const_data_ptr<float>()[0] - b.const_data_ptr<float>()[1]};
  for (int64_t c = 0; c < channels; ++c) d.weight[c] = values[c] - values[channels + c];
  return d;
}

// scores[n][y][column] = sum over the patch column's positions in row y.
template <typename T>
void score_rows(const at::Tensor& x, const PatchAxis& columns, const float* weight,
                float* scores) {
  const int64_t channels = x.size(1), width = x.size(3), patches = columns.patches();
  const int64_t pitch = row_pitch(x);
  const T* data = values(x, T{});
  const auto dot = dot_kernel(T{});
  const int64_t grain = std::max<int64_t>(1, 32768 / (width * channels));
  at::parallel_for(0, x.size(0) * x.size(2), grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t p = 0; p < patches; ++p) {
        const T* first = data + (row * width + p * columns.granularity) * pitch;
        scores[row * patches + p] = dot(first, columns.extent(p), pitch, channels, weight);
      }
    }
  });
}

// Mean shares of kept outputs and of the conv1 outputs that they read.
void mean_rates(const bool* mask, int64_t images, const MaskGeometry& g, Workspace& w,
                float* rates) {
  const int64_t height = g.conv_rows.input, width = g.conv_columns.input;
  uint8_t* spread = w.spread.get<uint8_t>((g.rows.patches() + 1) * width);
  uint8_t* row = spread + g.rows.patches() * width;
  int64_t kept = 0, halo = 0;
  for (int64_t n = 0; n < images; ++n) {
    const bool* patches = mask + n * g.rows.patches() * g.columns.patches();
    kept += count_outputs(g, patches);
    for (int64_t r = 0; r < g.rows.patches(); ++r) {
      spread_columns(g, patches + r * g.columns.patches(), spread + r * width);
    }
    for (int64_t y = 0; y < height; ++y) halo += join_rows(g, spread, y, row);
  }
  const double count = static_cast<double>(std::max<int64_t>(images, 1));
  rates[0] = static_cast<float>(kept / (count * g.rows.size * g.columns.size));
  rates[1] = static_cast<float>(halo / (count * height * width));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> decide(const at::Tensor& x, const at::Tensor& weight,
                                          const at::Tensor& bias,
                                          const Optional<at::Tensor>& offset, int64_t granularity,
                                          at::IntArrayRef strides, int64_t dilation,
                                          const std::string& prefix) {
  check_masker(x, weight, bias, offset, granularity, strides, dilation, prefix);
  const int64_t images = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  const MaskGeometry g(ceil_div(height, strides[0]), ceil_div(width, strides[0]), strides[1],
                       dilation, granularity);
  const int64_t rows = g.rows.patches(), columns = g.columns.patches();
  at::Tensor forced;
  if (offset) {
    forced = offset->expand({images, 1, rows, columns}).contiguous();
  }
  const at::Tensor input = as_rows(x);
  const Difference d = difference(weight, bias, channels);
  const int64_t stride = strides[0] * strides[1];
  // A patch in input pixels; one longer than the map is the whole map.
  const int64_t side = granularity > std::max(height, width) / stride
                           ? std::max(height, width)
                           : granularity * stride;
  const PatchAxis input_rows{height, side}, input_columns{width, side};
  Workspace& w = workspace();
  float* scores = w.scores.get<float>(images * height * columns);
  if (x.scalar_type() == at::kFloat) {
    score_rows<float>(input, input_columns, d.weight.data(), scores);
  } else {
    score_rows<bf16>(input, input_columns, d.weight.data(), scores);
  }

  at::Tensor mask = at::empty({images, 1, rows, columns}, x.options().dtype(at::kBool).memory_format(
                                                              at::MemoryFormat::Contiguous));
  bool* decisions = mask.mutable_data_ptr<bool>();
  const float* shifts = offset ? forced.const_data_ptr<float>() : nullptr;
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t first = n * height + r * side, extent = input_rows.extent(r);
      for (int64_t c = 0; c < columns; ++c) {
        double sum = 0;
        for (int64_t y = 0; y < extent; ++y) sum += scores[(first + y) * columns + c];
        const int64_t area = extent * input_columns.extent(c), at = (n * rows + r) * columns + c;
        const float keep = static_cast<float>(sum / area) + d.bias;
        decisions[at] = (shifts ? keep + shifts[at] : keep) >= 0;
      }
    }
  }
  at::Tensor rates = at::empty({2}, x.options().dtype(at::kFloat).memory_format(
                                        at::MemoryFormat::Contiguous));
  mean_rates(decisions, images, g, w, rates.mutable_data_ptr<float>());
  return {mask, rates};
}

namespace {

std::tuple<at::Tensor, at::Tensor> spatial_mask(const at::Tensor& x, const at::Tensor& weight,
                                                const at::Tensor& bias,
                                                const Optional<at::Tensor>& offset,
                                                int64_t granularity, at::IntArrayRef strides,
                                                int64_t dilation) {
  return decide(x, weight, bias, offset, granularity, strides, dilation, "");
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CPU, m) { m.impl("spatial_mask", &spatial_mask); }

}  // namespace las_mm::cpu
