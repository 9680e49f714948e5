// las_mm::channel_mean and channel_mask on the CPU: one pass over the rows of a map, and the small
// network that decides about channels from its mean.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <vector>

#include "common/arguments.h"
#include "common/checks.h"
#include "cpu/sparse_conv.h"
#include "cpu/workspace.h"

namespace las_mm::cpu {
namespace {

constexpr int64_t kTaskValues = 1 << 16;

template <typename T>
void mean(const T* x, int64_t images, int64_t channels, int64_t positions, float* out) {
  // Partial sums, added up in one order whatever the number of threads.
  const int64_t rows = std::max<int64_t>(1, kTaskValues / channels);
  const int64_t parts = ceil_div(positions, rows);
  float* sums = workspace().scores.get<float>(images * parts * channels);
  parallel_tasks(images * parts, [&](int64_t task) {
    const int64_t first = task % parts * rows, last = std::min(first + rows, positions);
    float* sum = sums + task * channels;
    std::fill_n(sum, channels, 0.0f);
    sum_kernel(T{})(x + (task / parts * positions + first) * channels, last - first, channels,
                    channels, sum);
  });
  for (int64_t n = 0; n < images; ++n) {
    float* total = out + n * channels;
    std::fill_n(total, channels, 0.0f);
    sum_kernel(float{})(sums + n * parts * channels, parts, channels, channels, total);
    for (int64_t c = 0; c < channels; ++c) total[c] /= static_cast<float>(positions);
  }
}

void mean(const at::Tensor& x, float* out) {
  const at::Tensor input = x.contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t positions = x.size(2) * x.size(3);
  if (x.scalar_type() == at::kFloat) {
    mean(values(input, float{}), x.size(0), x.size(1), positions, out);
  } else {
    mean(values(input, bf16{}), x.size(0), x.size(1), positions, out);
  }
}

at::Tensor channel_mean(const at::Tensor& x) {
  check_map(x, "x");
  at::Tensor out = at::empty({x.size(0), x.size(1)}, x.options().dtype(at::kFloat).memory_format(
                                                         at::MemoryFormat::Contiguous));
  mean(x, out.mutable_data_ptr<float>());
  return out;
}

// in (rows, depth) -> out (rows, width), by weight (width, depth).
void linear(const float* in, int64_t rows, int64_t depth, const float* weight, const float* bias,
            int64_t width, bool relu, float* out) {
  constexpr int64_t kTaskProducts = 1 << 16;  // fewer are not worth a thread's waking up
  const auto dot = dot_kernel(float{});
  const int64_t tasks = std::clamp(rows * depth * width / kTaskProducts, int64_t{1}, width);
  parallel_tasks(tasks, [&](int64_t task) {
    for (int64_t j = width * task / tasks; j < width * (task + 1) / tasks; ++j) {
      for (int64_t i = 0; i < rows; ++i) {
        const float value = bias[j] + dot(in + i * depth, 1, depth, depth, weight + j * depth);
        out[i * width + j] = relu && value < 0 ? 0 : value;  // a NaN stays one
      }
    }
  });
}

at::Tensor channel_mask(const at::Tensor& x, std::vector<at::Tensor> weights,
                        std::vector<at::Tensor> biases, const Optional<at::Tensor>& offset) {
  const int64_t decisions = check_channel_masker(x, weights, biases, offset);
  const int64_t images = x.size(0);
  int64_t widths = x.size(1);
  for (const at::Tensor& bias : biases) widths += bias.numel();
  float* in = workspace().scales.get<float>(images * widths);
  mean(x, in);
  int64_t width = x.size(1);
  for (size_t i = 0; i < weights.size(); ++i) {
    const at::Tensor weight = weights[i].contiguous(), bias = biases[i].contiguous();
    float* out = in + images * width;
    linear(in, images, width, weight.const_data_ptr<float>(), bias.const_data_ptr<float>(),
           bias.numel(), i + 1 < weights.size(), out);
    in = out;
    width = bias.numel();
  }
  at::Tensor mask = at::empty({images, decisions}, x.options().dtype(at::kBool).memory_format(
                                                       at::MemoryFormat::Contiguous));
  bool* wanted = mask.mutable_data_ptr<bool>();
  at::Tensor forced;
  if (offset) forced = offset->expand({images, decisions}).contiguous();
  const float* shifts = offset ? forced.const_data_ptr<float>() : nullptr;
  for (int64_t n = 0; n < images; ++n, in += width) {
    for (int64_t g = 0; g < decisions; ++g, ++wanted) {
      const float keep = in[g] - in[decisions + g];
      *wanted = !((shifts ? keep + *shifts++ : keep) < 0);  // NaN keeps, and so shows
    }
  }
  return mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CPU, m) {
  m.impl("channel_mean", &channel_mean);
  m.impl("channel_mask", &channel_mask);
}

}  // namespace las_mm::cpu
