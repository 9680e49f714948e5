#include "cpu/excitation.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/sparse_conv.h"

namespace las_mm::cpu {
namespace {

constexpr int64_t kBlock = 64;  // channels that are summed together

inline float load(float value) { return value; }
inline float load(bf16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline void store(float* to, float value) { *to = value; }
inline void store(bf16* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (std::isnan(value)) {
    to->bits = static_cast<uint16_t>(bits >> 16 | 0x40);
  } else {
    to->bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

// Mean over `count` rows of up to kBlock channels.
template <typename T>
void mean_rows(const T* rows, int64_t count, int64_t stride, int64_t channels, float* mean) {
  float sums[kBlock] = {};
  if (channels == kBlock) {  // a constant number of steps is vectorised
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < kBlock; ++c) sums[c] += load(rows[i * stride + c]);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < channels; ++c) sums[c] += load(rows[i * stride + c]);
    }
  }
  for (int64_t c = 0; c < channels; ++c) mean[c] = sums[c] / static_cast<float>(count);
}

}  // namespace

Excitation::Excitation(const std::vector<at::Tensor>& weights)
    : channels_(weights[3].numel()), squeezed_(weights[1].numel()) {
  for (int i = 0; i < 4; ++i) weights_[i] = weights[i].const_data_ptr<float>();
}

template <typename T>
void Excitation::squeeze(const T* rows, const Positions& kept, int64_t images, int64_t outputs) {
  outputs_ = outputs;
  Buffer& memory = workspace().scales;
  scales_ = memory.get<float>(images * (2 * channels_ + squeezed_));
  float* means = scales_ + images * channels_;
  float* hidden = means + images * channels_;
  const auto row_of = [&](int64_t image) {
    return std::lower_bound(kept.begin(), kept.end(), image * outputs) - kept.begin();
  };
  const int64_t blocks = ceil_div(channels_, kBlock);
  parallel_tasks(images * blocks, [&](int64_t task) {
    const int64_t image = task / blocks, first = task % blocks * kBlock;
    const int64_t begin = row_of(image), end = row_of(image + 1);
    if (begin == end) return;
    mean_rows(rows + begin * channels_ + first, end - begin, channels_,
              std::min(kBlock, channels_ - first), means + image * channels_ + first);
  });
  parallel_tasks(images, [&](int64_t image) {
    if (row_of(image) == row_of(image + 1)) return;
    scale_image(means + image * channels_, hidden + image * squeezed_, scales_ + image * channels_);
  });
}

void Excitation::scale_image(const float* mean, float* hidden, float* scale) const {
  const auto dot = dot_kernel(float{});
  for (int64_t i = 0; i < squeezed_; ++i) {
    const float value = weights_[1][i] + dot(mean, 1, channels_, weights_[0] + i * channels_);
    hidden[i] = value < 0 ? 0 : value;  // a NaN stays one
  }
  for (int64_t i = 0; i < channels_; ++i) {
    const float value = weights_[3][i] + dot(hidden, 1, squeezed_, weights_[2] + i * squeezed_);
    scale[i] = 1 / (1 + std::exp(-value));
  }
}

template <typename T>
void Excitation::excite(T* rows, const Positions& kept, int64_t lo, int64_t hi) const {
  for (int64_t i = lo; i < hi; ++i, rows += channels_) {
    const float* scale = scales_ + kept[i] / outputs_ * channels_;
    for (int64_t c = 0; c < channels_; ++c) store(rows + c, load(rows[c]) * scale[c]);
  }
}

template void Excitation::squeeze(const float*, const Positions&, int64_t, int64_t);
template void Excitation::squeeze(const bf16*, const Positions&, int64_t, int64_t);
template void Excitation::excite(float*, const Positions&, int64_t, int64_t) const;
template void Excitation::excite(bf16*, const Positions&, int64_t, int64_t) const;

}  // namespace las_mm::cpu
