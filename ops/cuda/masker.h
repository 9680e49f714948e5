// What the two ops with a masker share.
#pragma once

#include "cuda/device.h"

namespace las_mm::cuda {

// The masker's parameters, contiguous, and its results, still to be computed; rates if wanted.
struct Decision {
  Decision(const at::Tensor& x, const at::Tensor& weight_, const at::Tensor& bias_,
           const Optional<at::Tensor>& offset_, int64_t granularity, at::IntArrayRef strides,
           int64_t dilation, bool rated = true)
      : geometry(mask_geometry(x.size(0), ceil_div(x.size(2), strides[0]),
                               ceil_div(x.size(3), strides[0]), strides[1], dilation, granularity)),
        weight(weight_.contiguous()),
        bias(bias_.contiguous()),
        mask(at::empty({x.size(0), 1, geometry.rows, geometry.columns},
                       x.options().dtype(at::kBool).memory_format(at::MemoryFormat::Contiguous))),
        rates(rated ? at::empty({2}, x.options().dtype(at::kFloat).memory_format(
                                         at::MemoryFormat::Contiguous))
                    : at::Tensor()) {
    if (offset_) offset = offset_->contiguous();
  }

  template <typename T>
  Masker<T> masker() const {
    return {input<T>(weight), input<T>(bias), optional_input<float>(offset),
            offset ? static_cast<int>(offset->size(0)) : 1};
  }
  Global<uint8_t> mask_bytes() const { return output<uint8_t>(mask); }

  Global<float> mean_rates() const {
    return rates.defined() ? output<float>(rates) : Global<float>{};
  }

  const MaskGeometry geometry;
  const at::Tensor weight, bias, mask, rates;
  Optional<at::Tensor> offset;
};

}  // namespace las_mm::cuda
