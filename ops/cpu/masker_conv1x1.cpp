// las_mm::masker_conv1x1 on the CPU: the masker, then conv1 where a kept output will read it.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "common/arguments.h"
#include "cpu/positions.h"
#include "cpu/sparse_conv.h"
#include "cpu/spatial_mask.h"

namespace las_mm::cpu {
namespace {

template <typename T>
void conv1(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, int64_t stride,
           const Positions& list, const at::Tensor& hidden) {
  const int64_t height = hidden.size(2), width = hidden.size(3), channels = hidden.size(1);
  const T* data = values(x, T{});
  T* result = mutable_values(hidden, T{});
  const Panels panels{channels};
  parallel_chunks(list.size(), kChunkRows, panels.count(),
                  [&](int64_t lo, int64_t hi, int64_t first, int64_t last) {
                    const T** in = scratch().pointers.get<const T*>(2 * (hi - lo));
                    T** out = const_cast<T**>(in) + (hi - lo);
                    for (int64_t i = lo; i < hi; ++i) {
                      const int64_t p = list[i], n = p / (height * width);
                      const int64_t y = p / width % height * stride, column = p % width * stride;
                      in[i - lo] =
                          data + ((n * x.size(2) + y) * x.size(3) + column) * x.size(1);
                      out[i - lo] = result + p * channels;
                    }
                    const Tap<T> tap{in, 0, x.size(1), values(weight, T{}), 0, 1};
                    run_panels<T>(hi - lo, &tap, 1, panels, first, last,
                                  {bias.const_data_ptr<float>(), nullptr, out, 0, true});
                  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> masker_conv1x1(
    const at::Tensor& x, const at::Tensor& masker_weight, const at::Tensor& masker_bias,
    const Optional<at::Tensor>& offset, const at::Tensor& weight, const at::Tensor& bias,
    int64_t granularity, at::IntArrayRef strides, int64_t dilation) {
  check_masker_conv1x1(x, weight, bias);
  const at::Tensor input = x.contiguous(at::MemoryFormat::ChannelsLast);
  auto [mask, rates] =
      decide(input, masker_weight, masker_bias, offset, granularity, strides, dilation, "masker_");
  const MaskGeometry g(ceil_div(x.size(2), strides[0]), ceil_div(x.size(3), strides[0]),
                       strides[1], dilation, granularity);
  Workspace& w = workspace();
  Wanted wanted;
  wanted.halo = true;
  list_positions(mask.const_data_ptr<bool>(), x.size(0), g, wanted, w);
  at::Tensor hidden =
      output_map(x, {x.size(0), bias.numel(), g.conv_rows.input, g.conv_columns.input}).zero_();
  if (x.scalar_type() == at::kFloat) {
    conv1<float>(input, weight.contiguous(), bias.contiguous(), strides[0], w.halo, hidden);
  } else {
    conv1<bf16>(input, weight.contiguous(), bias.contiguous(), strides[0], w.halo, hidden);
  }
  return {mask, rates, hidden};
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CPU, m) { m.impl("masker_conv1x1", &masker_conv1x1); }

}  // namespace las_mm::cpu
