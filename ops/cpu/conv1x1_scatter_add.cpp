// las_mm::conv1x1_scatter_add_ on the CPU.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "common/arguments.h"
#include "cpu/positions.h"
#include "cpu/sparse_conv.h"

namespace las_mm::cpu {
namespace {

template <typename T>
void conv3(const at::Tensor& residual, const at::Tensor& x, const at::Tensor& weight,
           const at::Tensor& bias, const Positions& list) {
  const int64_t c_in = x.size(1), c_out = residual.size(1);
  const T* data = values(x, T{});
  T* result = mutable_values(residual, T{});
  const Panels panels{c_out};
  parallel_chunks(list.size(), kChunkRows, panels.count(),
                  [&](int64_t lo, int64_t hi, int64_t first, int64_t last) {
                    const T** in = scratch().pointers.get<const T*>(2 * (hi - lo));
                    T** out = const_cast<T**>(in) + (hi - lo);
                    for (int64_t i = lo; i < hi; ++i) {
                      in[i - lo] = data + list[i] * c_in;
                      out[i - lo] = result + list[i] * c_out;
                    }
                    const Tap<T> tap{in, 0, c_in, values(weight, T{}), 0, 1};
                    run_panels<T>(hi - lo, &tap, 1, panels, first, last,
                                  {bias.const_data_ptr<float>(), out, out, 0, true});
                  });
}

void conv1x1_scatter_add_(const at::Tensor& residual, const at::Tensor& x, const at::Tensor& mask,
                          const at::Tensor& weight, const at::Tensor& bias, int64_t granularity) {
  check_conv1x1_scatter_add(residual, x, mask, weight, bias, granularity);
  const at::Tensor input = x.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor stream = residual.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor patches = decisions(mask);
  const MaskGeometry g(x.size(2), x.size(3), 1, 1, granularity);
  Workspace& w = workspace();
  list_positions(patches.const_data_ptr<bool>(), x.size(0), g, {}, w);
  if (x.scalar_type() == at::kFloat) {
    conv3<float>(stream, input, weight.contiguous(), bias.contiguous(), w.kept);
  } else {
    conv3<bf16>(stream, input, weight.contiguous(), bias.contiguous(), w.kept);
  }
  if (!stream.is_same(residual)) residual.copy_(stream);
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CPU, m) { m.impl("conv1x1_scatter_add_", &conv1x1_scatter_add_); }

}  // namespace las_mm::cpu
