// las_mm::gather_conv3x3 on the CPU. Unlike in the fused bottleneck the input has no border, so
// every tap has its own row pointers, and those in the padding point to a row of zeros.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "common/arguments.h"
#include "cpu/positions.h"
#include "cpu/sparse_conv.h"

namespace las_mm::cpu {
namespace {

template <typename T>
void conv2(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias,
           const MaskGeometry& g, int64_t groups, Workspace& w, const at::Tensor& out) {
  const int64_t c_in = hidden.size(1), c_out = out.size(1);
  const int64_t height = g.rows.size, width = g.columns.size;
  const T* data = values(hidden, T{});
  T* result = mutable_values(out, T{});
  T* zeros = w.zeros.get<T>(c_in);
  std::fill_n(zeros, c_in, T{});
  const Panels panels{c_out / groups};
  const int64_t group_weights =
      packed_numel(c_out / groups, c_in / groups, 9, 1, sizeof(T) == sizeof(float));
  const Positions& list = w.kept;
  parallel_chunks(
      list.size(), kChunkRows, panels.count(),
      [&](int64_t lo, int64_t hi, int64_t first, int64_t last) {
        const int64_t rows = hi - lo;
        const T** in = scratch().pointers.get<const T*>(10 * rows);
        T** to = const_cast<T**>(in) + 9 * rows;
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t p = list[lo + i], image = p / (height * width) * g.conv_rows.input;
          to[i] = result + p * c_out;
          for (int t = 0; t < 9; ++t) {
            const int64_t y = g.conv_rows.input_of(p / width % height, t / 3 - 1);
            const int64_t x = g.conv_columns.input_of(p % width, t % 3 - 1);
            in[t * rows + i] =
                y < 0 || x < 0 ? zeros : data + ((image + y) * g.conv_columns.input + x) * c_in;
          }
        }
        for (int64_t group = 0; group < groups; ++group) {
          Tap<T> taps[9];
          for (int t = 0; t < 9; ++t) {
            taps[t] = {in + t * rows,      group * (c_in / groups),
                       c_in / groups,      values(weight, T{}) + group * group_weights,
                       t,                  9};
          }
          const int64_t column = group * (c_out / groups);
          run_panels<T>(rows, taps, 9, panels, first, last,
                        {bias.const_data_ptr<float>() + column, nullptr, to, column, true});
        }
      });
}

at::Tensor gather_conv3x3(const at::Tensor& hidden, const at::Tensor& mask,
                          const at::Tensor& weight, const at::Tensor& bias, int64_t granularity,
                          int64_t stride, int64_t dilation, int64_t groups) {
  check_gather_conv3x3(hidden, mask, weight, bias, granularity, stride, dilation, groups);
  const int64_t c_out = bias.numel();
  const MaskGeometry g(hidden.size(2), hidden.size(3), stride, dilation, granularity);
  const at::Tensor input = hidden.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor patches = decisions(mask);
  Workspace& w = workspace();
  list_positions(patches.const_data_ptr<bool>(), hidden.size(0), g, {}, w);
  at::Tensor out = output_map(hidden, {hidden.size(0), c_out, g.rows.size, g.columns.size}).zero_();
  if (hidden.scalar_type() == at::kFloat) {
    conv2<float>(input, weight.contiguous(), bias.contiguous(), g, groups, w, out);
  } else {
    conv2<bf16>(input, weight.contiguous(), bias.contiguous(), g, groups, w, out);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CPU, m) { m.impl("gather_conv3x3", &gather_conv3x3); }

}  // namespace las_mm::cpu
