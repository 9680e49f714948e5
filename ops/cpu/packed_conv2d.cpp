// las_mm::packed_conv2d on the CPU: a convolution of a whole map, 1x1 or 3x3, without a mask.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "common/arguments.h"
#include "cpu/conv3x3.h"

namespace las_mm::cpu {
namespace {

template <typename T>
void pointwise(const Rows<const T>& from, const Conv<T>& conv, int64_t images, int64_t stride,
               const Rows<T>& to) {
  const Panels panels{conv.channels};
  parallel_chunks(images * to.height * to.width, kChunkRows, panels.count(),
                  [&](int64_t lo, int64_t hi, int64_t first, int64_t last) {
                    const T** in = scratch().pointers.template get<const T*>(2 * (hi - lo));
                    T** out = const_cast<T**>(in) + (hi - lo);
                    for (int64_t i = lo; i < hi; ++i) {
                      const Point p = point(i, to.height, to.width);
                      in[i - lo] = from.at(p.image, p.y * stride, p.x * stride);
                      out[i - lo] = to.data + i * to.pitch;
                    }
                    const Tap<T> tap{in, 0, conv.depth, conv.direct, 0, 1};
                    run_panels<T>(hi - lo, &tap, 1, panels, first, last,
                                  {conv.bias, nullptr, out, 0, conv.relu});
                  });
}

template <typename T>
void run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& winograd,
         const at::Tensor& bias, int64_t kernel, int64_t stride, int64_t dilation, bool relu,
         const at::Tensor& out) {
  const Rows<const T> from{values(x, T{}), x.size(2), x.size(3), x.size(1)};
  const Rows<T> to{mutable_values(out, T{}), out.size(2), out.size(3), out.size(1)};
  const bool tiled = winograd.numel() > 0;
  const Conv<T> conv{x.size(1),
                     out.size(1),
                     weight.numel() > 0 ? values(weight, T{}) : nullptr,
                     tiled ? winograd.const_data_ptr<float>() : nullptr,
                     bias.const_data_ptr<float>(),
                     relu};
  if (kernel == 1) return pointwise<T>(from, conv, x.size(0), stride, to);
  Workspace& w = workspace();
  const MaskGeometry g{to.height, to.width, 1, 1, 1};
  Wanted wanted;
  wanted.tiles = tiled;
  list_positions(nullptr, x.size(0), g, wanted, w);
  T* zeros = w.zeros.template get<T>(conv.inputs());
  std::fill_n(zeros, conv.inputs(), T{});
  Conv3x3<T>(from, conv, stride, dilation, zeros)
      .run({tiled ? w.tiles : w.kept, tiled, {to.height, to.width, 0}}, false,
           [&](int64_t image, int64_t y, int64_t x) {
             return Place<T>{nullptr, to.at(image, y, x)};
           });
}

at::Tensor packed_conv2d(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& winograd,
                         const at::Tensor& bias, int64_t kernel, int64_t stride, int64_t dilation,
                         bool relu) {
  check_packed_conv2d(x, weight, winograd, bias, kernel, stride, dilation);
  const at::Tensor input = x.contiguous(at::MemoryFormat::ChannelsLast);
  at::Tensor out = output_map(x, {x.size(0), bias.numel(), ceil_div(x.size(2), stride),
                                  ceil_div(x.size(3), stride)});
  if (x.scalar_type() == at::kFloat) {
    run<float>(input, weight.contiguous(), winograd.contiguous(), bias.contiguous(), kernel, stride,
               dilation, relu, out);
  } else {
    run<bf16>(input, weight.contiguous(), winograd.contiguous(), bias.contiguous(), kernel, stride,
              dilation, relu, out);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CPU, m) { m.impl("packed_conv2d", &packed_conv2d); }

}  // namespace las_mm::cpu
