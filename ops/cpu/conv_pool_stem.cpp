// las_mm::conv_pool_stem on the CPU: 7x7 convolution of stride 2, bias, ReLU and 3x3 max pooling of
// stride 2, band by band, so that the convolution's output (the largest map of a ResNet) never
// leaves the cache. Rows of an NHWC image with a zero border make one kernel row of all channels
// one run of memory: the convolution is a product of 7 taps with 7 * C_in channels.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "common/checks.h"
#include "cpu/sparse_conv.h"
#include "cpu/workspace.h"

namespace las_mm::cpu {
namespace {

constexpr int64_t kKernel = 7, kStride = 2, kPadding = 3;

template <typename T>
class Stem {
 public:
  Stem(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& out)
      : images_(x.size(0)),
        c_in_(x.size(1)),
        height_(x.size(2)),
        width_(x.size(3)),
        conv_height_(ceil_div(height_, kStride)),
        conv_width_(ceil_div(width_, kStride)),
        out_height_(out.size(2)),
        out_width_(out.size(3)),
        channels_(bias.numel()),
        // The last output reads up to column stride * (conv_width - 1) + kernel - 1.
        line_(((conv_width_ - 1) * kStride + kKernel) * c_in_),
        x_(values(x, T{})),
        x_strides_(x.strides()),
        weight_(values(weight, T{})),
        bias_(bias.const_data_ptr<float>()),
        out_(mutable_values(out, T{})) {}

  void run() {
    if (images_ == 0) return;
    const int64_t bands = std::min(out_height_, ceil_div(at::get_num_threads() * 2, images_));
    parallel_tasks(images_ * bands, [&](int64_t task) {
      const int64_t band = task % bands;
      run_band(task / bands, out_height_ * band / bands, out_height_ * (band + 1) / bands);
    });
  }

 private:
  void run_band(int64_t image, int64_t first, int64_t last) {
    Scratch& memory = scratch();
    T* lines = memory.values.template get<T>(kKernel * line_);
    T* convolved = memory.output.template get<T>(3 * conv_width_ * channels_);
    const T** in = memory.pointers.template get<const T*>(2 * conv_width_);
    T** out = const_cast<T**>(in) + conv_width_;
    int64_t loaded = -kPadding - 1, done = -1;  // the last input line and convolved line so far
    for (int64_t y = first; y < last; ++y) {
      const int64_t from = std::max<int64_t>(2 * y - 1, 0);
      const int64_t to = std::min(2 * y + 1, conv_height_ - 1);
      for (int64_t line = std::max(from, done + 1); line <= to; ++line) {
        const int64_t top = line * kStride - kPadding;
        for (int64_t i = std::max(top, loaded + 1); i < top + kKernel; ++i) {
          load_line(image, i, lines + slot(i) * line_);
        }
        loaded = top + kKernel - 1;
        convolve(lines, top, convolved + line % 3 * conv_width_ * channels_, in, out);
        done = line;
      }
      pool(image, y, from, to, convolved);
    }
  }

  static int64_t slot(int64_t line) { return (line + kKernel) % kKernel; }

  void load_line(int64_t image, int64_t y, T* line) const {
    std::fill_n(line, line_, T{});
    if (y < 0 || y >= height_) return;
    const T* row = x_ + image * x_strides_[0] + y * x_strides_[2];
    const int64_t count = std::min(width_, line_ / c_in_ - kPadding);
    for (int64_t c = 0; c < c_in_; ++c) {
      const T* from = row + c * x_strides_[1];
      T* to = line + kPadding * c_in_ + c;
      for (int64_t x = 0; x < count; ++x) to[x * c_in_] = from[x * x_strides_[3]];
    }
  }

  void convolve(const T* lines, int64_t top, T* result, const T** in, T** out) const {
    for (int64_t x = 0; x < conv_width_; ++x) {
      in[x] = lines + x * kStride * c_in_;
      out[x] = result + x * channels_;
    }
    Tap<T> taps[kKernel];
    for (int k = 0; k < kKernel; ++k) {
      taps[k] = {in, slot(top + k) * line_, kKernel * c_in_, weight_, k, kKernel};
    }
    const Panels panels{channels_};
    run_panels<T>(conv_width_, taps, kKernel, panels, 0, panels.count(),
                  {bias_, nullptr, out, 0, true});
  }

  void pool(int64_t image, int64_t y, int64_t from, int64_t to, const T* convolved) const {
    for (int64_t x = 0; x < out_width_; ++x) {
      const T* rows[9];
      int count = 0;
      for (int64_t cy = from; cy <= to; ++cy) {
        const T* line = convolved + cy % 3 * conv_width_ * channels_;
        const int64_t end = std::min(2 * x + 1, conv_width_ - 1);
        for (int64_t cx = std::max<int64_t>(2 * x - 1, 0); cx <= end; ++cx) {
          rows[count++] = line + cx * channels_;
        }
      }
      T* result = out_ + ((image * out_height_ + y) * out_width_ + x) * channels_;
      max_kernel(T{})(rows, count, channels_, result);
    }
  }

  const int64_t images_, c_in_, height_, width_, conv_height_, conv_width_, out_height_,
      out_width_, channels_, line_;
  const T* x_;
  const at::IntArrayRef x_strides_;
  const T* weight_;
  const float* bias_;
  T* out_;
};

at::Tensor conv_pool_stem(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  check_map(x, "x");
  check_vector(bias, "bias", bias.numel(), at::kFloat, x);
  check_packed(weight, "weight", bias.numel(), x.size(1) * kKernel, kKernel, 1, x);
  const int64_t height = ceil_div(ceil_div(x.size(2), 2), 2);
  const int64_t width = ceil_div(ceil_div(x.size(3), 2), 2);
  at::Tensor out = output_map(x, {x.size(0), bias.numel(), height, width});
  if (x.scalar_type() == at::kFloat) {
    Stem<float>(x, weight.contiguous(), bias.contiguous(), out).run();
  } else {
    Stem<bf16>(x, weight.contiguous(), bias.contiguous(), out).run();
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CPU, m) { m.impl("conv_pool_stem", &conv_pool_stem); }

}  // namespace las_mm::cpu
