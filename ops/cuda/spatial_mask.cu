// las_mm::spatial_mask and patch_mask on a GPU.
#include <torch/library.h>

#include <tuple>

#include "common/arguments.h"
#include "common/checks.h"
#include "cuda/device.h"
#include "cuda/masker.h"

namespace las_mm::cuda {
namespace {

// `rated`: also the mean rates, which cost two launches.
Decision run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
             const Optional<at::Tensor>& offset, int64_t granularity, at::IntArrayRef strides,
             int64_t dilation, bool rated) {
  check_masker(x, weight, bias, offset, granularity, strides, dilation, "");
  check_positions(x.size(0) * x.size(2) * x.size(3), "x");
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor input_map = x.contiguous(at::MemoryFormat::ChannelsLast);
  const Decision d(x, weight, bias, offset, granularity, strides, dilation, rated);
  if (x.size(0) == 0) return d;
  Device device(x);
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    spatial_mask(device, d.geometry, d.masker<T>(), input<T>(input_map),
                 static_cast<int>(x.size(2)), static_cast<int>(x.size(3)),
                 static_cast<int>(x.size(1)), static_cast<int>(strides[0]), d.mask_bytes(),
                 d.mean_rates());
  });
  return d;
}

std::tuple<at::Tensor, at::Tensor> run_spatial_mask(const at::Tensor& x, const at::Tensor& weight,
                                                const at::Tensor& bias,
                                                const Optional<at::Tensor>& offset,
                                                int64_t granularity, at::IntArrayRef strides,
                                                int64_t dilation) {
  const Decision d = run(x, weight, bias, offset, granularity, strides, dilation, true);
  return {d.mask, x.size(0) == 0 ? d.rates.zero_() : d.rates};
}

at::Tensor run_patch_mask(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                          const Optional<at::Tensor>& offset, int64_t granularity,
                          at::IntArrayRef strides, int64_t dilation) {
  return run(x, weight, bias, offset, granularity, strides, dilation, false).mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CUDA, m) {
  m.impl("spatial_mask", &run_spatial_mask);
  m.impl("patch_mask", &run_patch_mask);
}

}  // namespace las_mm::cuda
