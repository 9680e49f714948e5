// las_mm::sparse_bottleneck and sparse_bottleneck_ on a GPU: a kernel per convolution, each over the
// positions that it must compute, with the lists built on the device.
#include <torch/library.h>

#include "common/bottleneck_arguments.h"
#include "common/checks.h"
#include "cuda/device.h"

namespace las_mm::cuda {
namespace {

using MaybeTensor = std::optional<at::Tensor>;
using Tensors = std::vector<at::Tensor>;

void run(const at::Tensor& x, Arguments a, const Shape& s, const at::Tensor& out) {
  TORCH_CHECK_VALUE(a.weights[1].numel() > 0,
                    "weights[1] must be given on a GPU, which has no Winograd form");
  TORCH_CHECK_VALUE(!a.excitation, "excitation must be None on a GPU, which has no kernel for it");
  if (s.images == 0) return;
  make_contiguous(a);
  for (at::Tensor& weight : a.weights) weight = packed_weight(weight);
  const MaskGeometry g = mask_geometry(s.images, s.hidden_height, s.hidden_width, a.strides[1],
                                       a.dilation, a.granularity);
  at::Tensor patches, shortcut;
  if (a.mask) patches = decisions(*a.mask);
  if (a.shortcut) shortcut = a.shortcut->contiguous(at::MemoryFormat::ChannelsLast);
  Device device(x);
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Bottleneck<T> b{};
    b.geometry = g;
    if (a.mask) b.mask = input<uint8_t>(patches);
    b.x = input<T>(x);
    b.height = static_cast<int>(s.height);
    b.width = static_cast<int>(s.width);
    b.c_in = static_cast<int>(s.c_in);
    b.first_stride = static_cast<int>(a.strides[0]);
    b.hidden = static_cast<int>(s.hidden);
    b.c_out = static_cast<int>(s.c_out);
    b.groups = static_cast<int>(a.groups);
    for (size_t i = 0; i < a.weights.size(); ++i) {
      b.weights[i] = input<T>(a.weights[i]);
      b.biases[i] = input<float>(a.biases[i]);
    }
    b.downsample = s.downsample;
    if (a.shortcut) {
      b.shortcut = input<T>(shortcut);
      b.shortcut_channels = static_cast<int>(shortcut.size(1));
    }
    b.out = output<T>(out);
    sparse_bottleneck(device, b);
  });
}

at::Tensor run_sparse_bottleneck(const at::Tensor& x, const MaybeTensor& mask, Tensors weights,
                             Tensors biases, const MaybeTensor& winograd,
                             const MaybeTensor& shortcut, int64_t granularity,
                             at::IntArrayRef strides, int64_t dilation, int64_t groups,
                             double winograd_cost, std::optional<Tensors> dense,
                             double dense_above, std::optional<Tensors> excitation) {
  Arguments a{mask,     std::move(weights), std::move(biases), winograd,
              shortcut, granularity,        strides.vec(),     dilation,
              groups,   winograd_cost,      std::move(dense),  dense_above,
              std::move(excitation)};
  const Shape s = check(x, a);
  check_positions(s.images * s.height * s.width, "x");
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor out = empty_map(x, {s.images, s.c_out, s.out_height, s.out_width});
  run(x.contiguous(at::MemoryFormat::ChannelsLast), std::move(a), s, out);
  return out;
}

void run_sparse_bottleneck_(const at::Tensor& x, const MaybeTensor& mask, Tensors weights,
                        Tensors biases, const MaybeTensor& winograd, const MaybeTensor& shortcut,
                        int64_t granularity, at::IntArrayRef strides, int64_t dilation,
                        int64_t groups, double winograd_cost, std::optional<Tensors> dense,
                        double dense_above, std::optional<Tensors> excitation) {
  TORCH_CHECK_VALUE(weights.size() != 4,
                    "weights must have no downsample convolution to work in place");
  Arguments a{mask,     std::move(weights), std::move(biases), winograd,
              shortcut, granularity,        strides.vec(),     dilation,
              groups,   winograd_cost,      std::move(dense),  dense_above,
              std::move(excitation)};
  const Shape s = check(x, a);
  check_positions(s.images * s.height * s.width, "x");
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor stream = x.contiguous(at::MemoryFormat::ChannelsLast);
  run(stream, std::move(a), s, stream);
  if (!stream.is_same(x)) x.copy_(stream);
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CUDA, m) {
  m.impl("sparse_bottleneck", &run_sparse_bottleneck);
  m.impl("sparse_bottleneck_", &run_sparse_bottleneck_);
}

}  // namespace las_mm::cuda
