// las_mm::gather_conv3x3 on a GPU.
#include <torch/library.h>

#include "common/arguments.h"
#include "cuda/device.h"

namespace las_mm::cuda {
namespace {

at::Tensor run_gather_conv3x3(const at::Tensor& hidden, const at::Tensor& mask,
                          const at::Tensor& weight, const at::Tensor& bias, int64_t granularity,
                          int64_t stride, int64_t dilation, int64_t groups) {
  check_gather_conv3x3(hidden, mask, weight, bias, granularity, stride, dilation, groups);
  const c10::cuda::CUDAGuard guard(hidden.device());
  const MaskGeometry g = mask_geometry(hidden.size(0), hidden.size(2), hidden.size(3), stride,
                                       dilation, granularity);
  const at::Tensor input_map = hidden.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor packed = packed_weight(weight), shift = bias.contiguous();
  const at::Tensor patches = decisions(mask);
  const at::Tensor out =
      empty_map(hidden, {hidden.size(0), bias.numel(), g.out_height, g.out_width}).zero_();
  if (hidden.size(0) == 0) return out;
  Device device(hidden);
  with_type(hidden.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    gather_conv3x3(device, g, input<uint8_t>(patches), input<T>(input_map), input<T>(packed),
                   input<float>(shift), static_cast<int>(hidden.size(1)),
                   static_cast<int>(bias.numel()), static_cast<int>(groups), output<T>(out));
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CUDA, m) { m.impl("gather_conv3x3", &run_gather_conv3x3); }

}  // namespace las_mm::cuda
