// las_mm::channel_mean on a GPU.
#include <torch/library.h>

#include "common/checks.h"
#include "cuda/device.h"

namespace las_mm::cuda {
namespace {

at::Tensor run_channel_mean(const at::Tensor& x) {
  check_map(x, "x");
  check_positions(x.size(0) * x.size(2) * x.size(3), "x");
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor map = x.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor means =
      at::empty({x.size(0), x.size(1)}, x.options().dtype(at::kFloat).memory_format(
                                            at::MemoryFormat::Contiguous));
  if (x.size(0) == 0) return means;
  Device device(x);
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    channel_mean(device, Global<T>(const_cast<T*>(input<T>(map).data)),
                 static_cast<int>(x.size(0)), static_cast<int>(x.size(2)),
                 static_cast<int>(x.size(3)), static_cast<int>(x.size(1)), output<float>(means));
  });
  return means;
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CUDA, m) { m.impl("channel_mean", &run_channel_mean); }

}  // namespace las_mm::cuda
