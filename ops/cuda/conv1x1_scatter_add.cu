// las_mm::conv1x1_scatter_add_ on a GPU.
#include <torch/library.h>

#include "common/arguments.h"
#include "cuda/device.h"

namespace las_mm::cuda {
namespace {

void run_conv1x1_scatter_add_(const at::Tensor& residual, const at::Tensor& x, const at::Tensor& mask,
                          const at::Tensor& weight, const at::Tensor& bias, int64_t granularity) {
  check_conv1x1_scatter_add(residual, x, mask, weight, bias, granularity);
  if (x.size(0) == 0) return;
  const c10::cuda::CUDAGuard guard(x.device());
  const MaskGeometry g =
      mask_geometry(x.size(0), x.size(2), x.size(3), 1, 1, granularity);
  const at::Tensor input_map = x.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor stream = residual.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor packed = packed_weight(weight), shift = bias.contiguous();
  const at::Tensor patches = decisions(mask);
  Device device(x);
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    conv1x1_scatter_add(device, g, input<uint8_t>(patches), output<T>(stream),
                        input<T>(input_map), input<T>(packed), input<float>(shift),
                        static_cast<int>(x.size(1)), static_cast<int>(bias.numel()));
  });
  if (!stream.is_same(residual)) residual.copy_(stream);
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CUDA, m) { m.impl("conv1x1_scatter_add_", &run_conv1x1_scatter_add_); }

}  // namespace las_mm::cuda
