// las_mm::channel_mean on the CPU: one pass over the rows of a map.
#include <ATen/ATen.h>
#include <torch/library.h>

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
    sum_kernel(T{})(x + (task / parts * positions + first) * channels, last - first, channels, sum);
  });
  for (int64_t n = 0; n < images; ++n) {
    float* total = out + n * channels;
    std::fill_n(total, channels, 0.0f);
    sum_kernel(float{})(sums + n * parts * channels, parts, channels, total);
    for (int64_t c = 0; c < channels; ++c) total[c] /= static_cast<float>(positions);
  }
}

at::Tensor channel_mean(const at::Tensor& x) {
  check_map(x, "x");
  const at::Tensor input = x.contiguous(at::MemoryFormat::ChannelsLast);
  at::Tensor out = at::empty({x.size(0), x.size(1)}, x.options().dtype(at::kFloat).memory_format(
                                                         at::MemoryFormat::Contiguous));
  const int64_t positions = x.size(2) * x.size(3);
  float* means = out.mutable_data_ptr<float>();
  if (x.scalar_type() == at::kFloat) {
    mean(values(input, float{}), x.size(0), x.size(1), positions, means);
  } else {
    mean(values(input, bf16{}), x.size(0), x.size(1), positions, means);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CPU, m) { m.impl("channel_mean", &channel_mean); }

}  // namespace las_mm::cpu
