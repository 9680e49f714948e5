// las_mm::dilate_mask on the CPU: O(N * H * W) byte operations, whatever granularity and dilation.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "cpu/mask_geometry.h"

namespace las_mm::cpu {
namespace {

constexpr int64_t kBytesPerTask = 1 << 17;  // about 10 us of work, well above the cost of a fork

std::tuple<at::Tensor, at::Tensor> dilate_mask(const at::Tensor& mask, int64_t granularity,
                                               at::IntArrayRef size, int64_t stride,
                                               int64_t dilation) {
  check_mask(mask, "mask");
  check_positive(granularity, "granularity");
  check_size(size, "size");
  check_positive(stride, "stride");
  check_positive(dilation, "dilation");
  const int64_t height = size[0], width = size[1];
  const MaskGeometry g(height, width, stride, dilation, granularity);
  check_grid(mask, g.rows, g.columns, "mask");

  const int64_t images = mask.size(0);
  const int64_t patch_rows = images * g.rows.patches();
  const at::Tensor kept = mask.gt(0.5).contiguous();
  const at::Tensor spread = at::empty({patch_rows, width}, mask.options().dtype(at::kByte));
  at::Tensor halo = at::empty({images, 1, height, width}, mask.options().dtype(at::kBool));
  at::Tensor counts = at::empty({images, 2}, mask.options().dtype(at::kLong));
  const bool* kept_data = kept.const_data_ptr<bool>();
  uint8_t* spread_data = spread.data_ptr<uint8_t>();
  uint8_t* halo_data = reinterpret_cast<uint8_t*>(halo.data_ptr<bool>());
  int64_t* counts_data = counts.data_ptr<int64_t>();
  std::vector<int64_t> row_counts(images * height);

  const int64_t grain = std::max<int64_t>(1, kBytesPerTask / width);
  at::parallel_for(0, patch_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      spread_columns(g, kept_data + r * g.columns.patches(), spread_data + r * width);
    }
  });
  at::parallel_for(0, images * height, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const uint8_t* image = spread_data + r / height * g.rows.patches() * width;
      row_counts[r] = join_rows(g, image, r % height, halo_data + r * width);
    }
  });
  for (int64_t n = 0; n < images; ++n) {
    const auto first = row_counts.begin() + n * height;
    counts_data[2 * n] = count_outputs(g, kept_data + n * g.rows.patches() * g.columns.patches());
    counts_data[2 * n + 1] = std::accumulate(first, first + height, int64_t{0});
  }
  return {halo, counts};
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CPU, m) { m.impl("dilate_mask", &dilate_mask); }

}  // namespace las_mm::cpu
