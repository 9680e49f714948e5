// las_mm::to_nchw on the CPU: a blocked transposition into memory that is reused.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "common/checks.h"
#include "cpu/sparse_conv.h"
#include "cpu/workspace.h"

namespace las_mm::cpu {
namespace {

constexpr int64_t kPixels = 64;  // one block reads whole cache lines and writes 4 of each channel

template <typename T>
void transpose(const T* in, int64_t images, int64_t channels, int64_t pixels, T* out) {
  const int64_t blocks = ceil_div(pixels, kPixels);
  parallel_tasks(images * blocks, [&](int64_t task) {
    const int64_t image = task / blocks, first = task % blocks * kPixels;
    const int64_t count = std::min(kPixels, pixels - first);
    const T* from = in + (image * pixels + first) * channels;
    T* to = out + image * channels * pixels + first;
    for (int64_t c0 = 0; c0 < channels; c0 += kLanes) {
      const int64_t lanes = std::min<int64_t>(kLanes, channels - c0);
      T block[kLanes][kPixels];
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t c = 0; c < lanes; ++c) block[c][p] = from[p * channels + c0 + c];
      }
      for (int64_t c = 0; c < lanes; ++c) {
        std::copy_n(block[c], count, to + (c0 + c) * pixels);
      }
    }
  });
}

at::Tensor to_nchw(const at::Tensor& x) {
  check_map(x, "x");
  const at::Tensor input = x.contiguous(at::MemoryFormat::ChannelsLast);
  at::Tensor out = output_map(x, x.sizes(), false);
  const int64_t pixels = x.size(2) * x.size(3);
  if (x.scalar_type() == at::kFloat) {
    transpose(values(input, float{}), x.size(0), x.size(1), pixels, mutable_values(out, float{}));
  } else {
    transpose(values(input, bf16{}), x.size(0), x.size(1), pixels, mutable_values(out, bf16{}));
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CPU, m) { m.impl("to_nchw", &to_nchw); }

}  // namespace las_mm::cpu
