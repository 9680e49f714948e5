// las_mm::masker_conv1x1 on a GPU.
#include <torch/library.h>

#include <tuple>

#include "common/arguments.h"
#include "common/checks.h"
#include "cuda/device.h"
#include "cuda/masker.h"

namespace las_mm::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> run_masker_conv1x1(
    const at::Tensor& x, const at::Tensor& masker_weight, const at::Tensor& masker_bias,
    const Optional<at::Tensor>& offset, const at::Tensor& weight, const at::Tensor& bias,
    int64_t granularity, at::IntArrayRef strides, int64_t dilation) {
  check_masker_conv1x1(x, weight, bias);
  check_masker(x, masker_weight, masker_bias, offset, granularity, strides, dilation, "masker_");
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor input_map = x.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor packed = packed_weight(weight), shift = bias.contiguous();
  const Decision d(x, masker_weight, masker_bias, offset, granularity, strides, dilation);
  const at::Tensor hidden =
      empty_map(x, {x.size(0), bias.numel(), d.geometry.height, d.geometry.width});
  if (x.size(0) == 0) return {d.mask, d.rates.zero_(), hidden};
  Device device(x);
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    masker_conv1x1(device, d.geometry, d.masker<T>(), input<T>(input_map),
                   static_cast<int>(x.size(2)), static_cast<int>(x.size(3)),
                   static_cast<int>(x.size(1)), static_cast<int>(strides[0]), input<T>(packed),
                   input<float>(shift), static_cast<int>(bias.numel()), d.mask_bytes(),
                   output<float>(d.rates), output<T>(hidden));
  });
  return {d.mask, d.rates, hidden};
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CUDA, m) { m.impl("masker_conv1x1", &run_masker_conv1x1); }

}  // namespace las_mm::cuda
