// las_mm::channel_bottleneck and channel_bottleneck_ on a GPU: every image's channels are listed on
// the device, their weights gathered into smaller convolutions, and these computed image by image.
#include <torch/library.h>

#include "cuda/bottleneck.h"

namespace las_mm::cuda {
namespace {

using MaybeTensor = Optional<at::Tensor>;
using Tensors = std::vector<at::Tensor>;

Shape check_all(const at::Tensor& x, const Arguments& a, const at::Tensor& channel_mask,
                const Optional<Tensors>& constants) {
  const Shape s = check(x, a);
  check_channels(channel_mask, constants, x, s);
  TORCH_CHECK_VALUE(!constants || !a.excitation, "constants must be None with excitation");
  check_positions(s.images * s.height * s.width, "x");
  return s;
}

void run(const at::Tensor& x, Arguments a, const Shape& s, const at::Tensor& channel_mask,
         const Optional<Tensors>& constants, const at::Tensor& out) {
  const BottleneckCall call(x, std::move(a), s);
  if (s.images == 0) return;
  const at::Tensor channels = decisions(channel_mask);
  Tensors vectors;
  if (constants) {
    for (const at::Tensor& vector : *constants) vectors.push_back(vector.contiguous());
  }
  ChannelSkipping skip{};
  skip.mask = input<uint8_t>(channels);
  skip.together = static_cast<int>(s.hidden / channels.size(1));
  for (size_t i = 0; i < vectors.size(); ++i) skip.constants[i] = input<float>(vectors[i]);
  Device device(x);
  with_type(x.scalar_type(), [&](auto zero) {
    channel_bottleneck(device, call.operator()<decltype(zero)>(out), skip);
  });
}

at::Tensor run_channel_bottleneck(const at::Tensor& x, const MaybeTensor& mask,
                                  const at::Tensor& channel_mask, Tensors weights, Tensors biases,
                                  Optional<Tensors> constants, const MaybeTensor& winograd,
                                  const MaybeTensor& shortcut, int64_t granularity,
                                  at::IntArrayRef strides, int64_t dilation, int64_t groups,
                                  double winograd_cost, Optional<Tensors> excitation) {
  Arguments a{mask,     std::move(weights), std::move(biases), winograd,
              shortcut, granularity,        strides.vec(),     dilation,
              groups,   winograd_cost,      nullopt,      1.0,
              std::move(excitation)};
  const Shape s = check_all(x, a, channel_mask, constants);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor out = empty_map(x, {s.images, s.c_out, s.out_height, s.out_width});
  run(x.contiguous(at::MemoryFormat::ChannelsLast), std::move(a), s, channel_mask, constants, out);
  return out;
}

void run_channel_bottleneck_(const at::Tensor& x, const MaybeTensor& mask,
                             const at::Tensor& channel_mask, Tensors weights, Tensors biases,
                             Optional<Tensors> constants, const MaybeTensor& winograd,
                             const MaybeTensor& shortcut, int64_t granularity,
                             at::IntArrayRef strides, int64_t dilation, int64_t groups,
                             double winograd_cost, Optional<Tensors> excitation) {
  TORCH_CHECK_VALUE(weights.size() != 4,
                    "weights must have no downsample convolution to work in place");
  Arguments a{mask,     std::move(weights), std::move(biases), winograd,
              shortcut, granularity,        strides.vec(),     dilation,
              groups,   winograd_cost,      nullopt,      1.0,
              std::move(excitation)};
  const Shape s = check_all(x, a, channel_mask, constants);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor stream = x.contiguous(at::MemoryFormat::ChannelsLast);
  run(stream, std::move(a), s, channel_mask, constants, stream);
  if (!stream.is_same(x)) x.copy_(stream);
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CUDA, m) {
  m.impl("channel_bottleneck", &run_channel_bottleneck);
  m.impl("channel_bottleneck_", &run_channel_bottleneck_);
}

}  // namespace las_mm::cuda
