// las_mm::sparse_bottleneck and sparse_bottleneck_ on a GPU: a kernel per convolution, each over the
// positions that it must compute, with the lists built on the device.
#include <torch/library.h>

#include "cuda/bottleneck.h"

namespace las_mm::cuda {
namespace {

using MaybeTensor = Optional<at::Tensor>;
using Tensors = std::vector<at::Tensor>;

void run(const at::Tensor& x, Arguments a, const Shape& s, const at::Tensor& out) {
  const BottleneckCall call(x, std::move(a), s);
  if (s.images == 0) return;
  Device device(x);
  with_type(x.scalar_type(), [&](auto zero) {
    sparse_bottleneck(device, call.operator()<decltype(zero)>(out));
  });
}

at::Tensor run_sparse_bottleneck(const at::Tensor& x, const MaybeTensor& mask, Tensors weights,
                             Tensors biases, const MaybeTensor& winograd,
                             const MaybeTensor& shortcut, int64_t granularity,
                             at::IntArrayRef strides, int64_t dilation, int64_t groups,
                             double winograd_cost, Optional<Tensors> dense,
                             double dense_above, Optional<Tensors> excitation) {
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
                        int64_t groups, double winograd_cost, Optional<Tensors> dense,
                        double dense_above, Optional<Tensors> excitation) {
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
