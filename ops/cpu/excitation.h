// Squeeze-and-excitation between conv2 and conv3 of a bottleneck: every channel of every image is
// scaled by sigmoid(fc2(relu(fc1(mean over the kept positions)))).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "cpu/workspace.h"

namespace las_mm::cpu {

class Excitation {
 public:
  // `weights`: weight and bias of fc1 and of fc2, contiguous float32. `channels`: which of the
  // channels the rows hold, the others are zero; null: all. `row`: values from row to row.
  Excitation(const std::vector<at::Tensor>& weights, const std::vector<int32_t>* channels,
             int64_t row);

  // Computes the scales of all images. `rows`: the values at the positions `kept`, which are in
  // order; an image has `outputs` positions.
  template <typename T>
  void squeeze(const T* rows, const Positions& kept, int64_t images, int64_t outputs);

  // Scales the values at the positions kept[lo] to kept[hi - 1], which begin at `rows`.
  template <typename T>
  void excite(T* rows, const Positions& kept, int64_t lo, int64_t hi) const;

 private:
  void scale_image(float* scale, float* whole, float* hidden) const;

  const float* weights_[4];
  const std::vector<int32_t>* channels_;
  const int64_t width_, squeezed_, count_, row_;
  int64_t outputs_ = 0;
  float* scales_ = nullptr;  // of all images, in the workspace
};

}  // namespace las_mm::cpu
