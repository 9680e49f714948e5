#include "cpu/excitation.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/sparse_conv.h"

namespace las_mm::cpu {

namespace {
constexpr int64_t kBlock = 64;  // channels that are summed together
}  // namespace

Excitation::Excitation(const std::vector<at::Tensor>& weights,
                       const std::vector<int32_t>* channels, int64_t row)
    : channels_(channels),
      width_(weights[3].numel()),
      squeezed_(weights[1].numel()),
      count_(channels ? static_cast<int64_t>(channels->size()) : width_),
      row_(row) {
  for (int i = 0; i < 4; ++i) weights_[i] = weights[i].const_data_ptr<float>();
}

template <typename T>
void Excitation::squeeze(const T* rows, const Positions& kept, int64_t images, int64_t outputs) {
  outputs_ = outputs;
  scales_ = workspace().scales.get<float>(images * (count_ + width_ + squeezed_));
  float* whole = scales_ + images * count_;
  float* hidden = whole + images * width_;
  const auto row_of = [&](int64_t image) {
    return std::lower_bound(kept.begin(), kept.end(), image * outputs) - kept.begin();
  };
  const int64_t blocks = ceil_div(count_, kBlock);
  parallel_tasks(images * blocks, [&](int64_t task) {
    const int64_t image = task / blocks, first = task % blocks * kBlock;
    const int64_t begin = row_of(image), count = row_of(image + 1) - begin;
    if (count == 0) return;
    const int64_t channels = std::min(kBlock, count_ - first);
    float* sum = scales_ + image * count_ + first;
    std::fill_n(sum, channels, 0.0f);
    sum_kernel(T{})(rows + begin * row_ + first, count, row_, channels, sum);
    for (int64_t c = 0; c < channels; ++c) sum[c] /= static_cast<float>(count);
  });
  parallel_tasks(images, [&](int64_t image) {
    if (row_of(image) == row_of(image + 1)) return;
    scale_image(scales_ + image * count_, whole + image * width_, hidden + image * squeezed_);
  });
}

// `scale`: the means, which become the scales. `whole`, `hidden`: memory.
void Excitation::scale_image(float* scale, float* whole, float* hidden) const {
  const auto dot = dot_kernel(float{});
  const float* mean = scale;
  if (channels_ != nullptr) {
    std::fill_n(whole, width_, 0.0f);
    for (int64_t i = 0; i < count_; ++i) whole[(*channels_)[i]] = scale[i];
    mean = whole;
  }
  for (int64_t i = 0; i < squeezed_; ++i) {
    const float value = weights_[1][i] + dot(mean, 1, width_, width_, weights_[0] + i * width_);
    hidden[i] = value < 0 ? 0 : value;  // a NaN stays one
  }
  for (int64_t i = 0; i < count_; ++i) {
    const int64_t c = channels_ == nullptr ? i : (*channels_)[i];
    const float* row = weights_[2] + c * squeezed_;
    const float value = weights_[3][c] + dot(hidden, 1, squeezed_, squeezed_, row);
    scale[i] = 1 / (1 + std::exp(-value));
  }
}

template <typename T>
void Excitation::excite(T* rows, const Positions& kept, int64_t lo, int64_t hi) const {
  const auto scale = scale_kernel(T{});
  for (int64_t i = lo; i < hi; ++i, rows += row_) {
    scale(rows, scales_ + kept[i] / outputs_ * count_, count_);
  }
}

template void Excitation::squeeze(const float*, const Positions&, int64_t, int64_t);
template void Excitation::squeeze(const bf16*, const Positions&, int64_t, int64_t);
template void Excitation::excite(float*, const Positions&, int64_t, int64_t) const;
template void Excitation::excite(bf16*, const Positions&, int64_t, int64_t) const;

}  // namespace las_mm::cpu
