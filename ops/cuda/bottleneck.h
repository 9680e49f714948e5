// The arguments of the bottleneck ops as the kernels want them.
#pragma once

#include "common/bottleneck_arguments.h"
#include "common/checks.h"
#include "cuda/device.h"

namespace las_mm::cuda {

// Keeps what the kernels read alive. `x` is channels_last.
class BottleneckCall {
 public:
  BottleneckCall(const at::Tensor& x, Arguments arguments, const Shape& shape)
      : x_(x), a_(std::move(arguments)), s_(shape) {
    TORCH_CHECK_VALUE(a_.weights[1].numel() > 0,
                      "weights[1] must be given on a GPU, which has no Winograd form");
    make_contiguous(a_);
    for (at::Tensor& weight : a_.weights) weight = packed_weight(weight);
    if (a_.mask) patches_ = decisions(*a_.mask);
    if (a_.shortcut) shortcut_ = a_.shortcut->contiguous(at::MemoryFormat::ChannelsLast);
  }

  template <typename T>
  Bottleneck<T> operator()(const at::Tensor& out) const {
    Bottleneck<T> b{};
    b.geometry = mask_geometry(s_.images, s_.hidden_height, s_.hidden_width, a_.strides[1],
                               a_.dilation, a_.granularity);
    if (a_.mask) b.mask = input<uint8_t>(patches_);
    b.x = input<T>(x_);
    b.height = static_cast<int>(s_.height);
    b.width = static_cast<int>(s_.width);
    b.c_in = static_cast<int>(s_.c_in);
    b.first_stride = static_cast<int>(a_.strides[0]);
    b.hidden = static_cast<int>(s_.hidden);
    b.c_out = static_cast<int>(s_.c_out);
    b.groups = static_cast<int>(a_.groups);
    for (size_t i = 0; i < a_.weights.size(); ++i) {
      b.weights[i] = input<T>(a_.weights[i]);
      b.biases[i] = input<float>(a_.biases[i]);
    }
    b.downsample = s_.downsample;
    if (a_.shortcut) {
      b.shortcut = input<T>(shortcut_);
      b.shortcut_channels = static_cast<int>(shortcut_.size(1));
    }
    if (a_.excitation) {
      const std::vector<at::Tensor>& weights = *a_.excitation;
      for (size_t i = 0; i < 4; ++i) b.excitation.weights[i] = input<float>(weights[i]);
      b.excitation.squeezed = static_cast<int>(weights[1].numel());
    }
    b.out = output<T>(out);
    return b;
  }

 private:
  const at::Tensor x_;
  Arguments a_;
  const Shape s_;
  at::Tensor patches_, shortcut_;
};

}  // namespace las_mm::cuda
