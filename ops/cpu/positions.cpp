#include "cpu/positions.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <numeric>

namespace las_mm::cpu {
namespace {

// Appends the indices of the bytes that are set (or, inverted, not set).
void append(Positions& list, const uint8_t* bytes, int64_t count, int64_t first, bool invert) {
  const size_t old = list.size();
  list.resize(old + count);
  int32_t* out = list.data() + old;
  const uint8_t flip = invert ? 1 : 0;
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {  // without a branch: masks are not predictable
    out[found] = static_cast<int32_t>(first + i);
    found += bytes[i] ^ flip;
  }
  list.resize(old + found);
}

void append_range(Positions& list, int64_t first, int64_t count) {
  const size_t old = list.size();
  list.resize(old + count);
  std::iota(list.begin() + old, list.end(), static_cast<int32_t>(first));
}

void expand_row(const PatchAxis& columns, const bool* patches, uint8_t* out) {
  for (int64_t patch = 0; patch < columns.patches(); ++patch) {
    const int64_t extent = columns.extent(patch);
    std::fill_n(out, extent, static_cast<uint8_t>(patches[patch]));
    out += extent;
  }
}

// Appends the tiles of image `n` that hold a byte that is set.
void append_tiles(Positions& list, const uint8_t* bytes, int64_t n, const TileGrid& grid) {
  const int64_t rows = grid.rows(), columns = grid.columns();
  for (int64_t ty = 0; ty < rows; ++ty) {
    const int64_t y = 2 * ty - grid.origin;
    const uint8_t* upper = bytes + std::max<int64_t>(y, 0) * grid.width;
    const uint8_t* lower = bytes + std::min(y + 1, grid.height - 1) * grid.width;
    for (int64_t tx = 0; tx < columns; ++tx) {
      const int64_t left = std::max<int64_t>(2 * tx - grid.origin, 0);
      const int64_t right = std::min(2 * tx - grid.origin + 1, grid.width - 1);
      if (upper[left] | upper[right] | lower[left] | lower[right]) {
        list.push_back(static_cast<int32_t>((n * rows + ty) * columns + tx));
      }
    }
  }
}

class Lister {
 public:
  Lister(const MaskGeometry& g, Wanted wanted, Workspace& w)
      : g_(g),
        wanted_(wanted),
        w_(w),
        height_(g.rows.size),
        width_(g.columns.size),
        map_width_(g.conv_columns.input) {
    kept_ = w.bytes.get<uint8_t>(height_ * width_ + map_width_ * g.conv_rows.input);
    halo_ = kept_ + height_ * width_;
    spread_ = w.spread.get<uint8_t>(g.rows.patches() * map_width_);
  }

  void image(int64_t n, const bool* patches) {
    const int64_t outputs = height_ * width_, inputs = map_width_ * g_.conv_rows.input;
    for (int64_t y = 0; y < height_; ++y) {
      const int64_t patch_row = g_.rows.patch_of(y);
      uint8_t* row = kept_ + y * width_;
      if (y > 0 && patch_row == g_.rows.patch_of(y - 1)) {
        std::copy_n(row - width_, width_, row);
      } else {
        expand_row(g_.columns, patches + patch_row * g_.columns.patches(), row);
      }
    }
    append(w_.kept, kept_, outputs, n * outputs, false);
    if (wanted_.dropped) append(w_.dropped, kept_, outputs, n * outputs, true);
    if (wanted_.halo || wanted_.halo_tiles) {
      for (int64_t r = 0; r < g_.rows.patches(); ++r) {
        spread_columns(g_, patches + r * g_.columns.patches(), spread_ + r * map_width_);
      }
      for (int64_t y = 0; y < g_.conv_rows.input; ++y) {
        join_rows(g_, spread_, y, halo_ + y * map_width_);
      }
    }
    if (wanted_.halo) append(w_.halo, halo_, inputs, n * inputs, false);
    if (wanted_.tiles) append_tiles(w_.tiles, kept_, n, {height_, width_, 0});
    if (wanted_.halo_tiles) {
      append_tiles(w_.halo_tiles, halo_, n, {g_.conv_rows.input, map_width_, halo_origin(g_)});
    }
  }

 private:
  const MaskGeometry& g_;
  const Wanted wanted_;
  Workspace& w_;
  const int64_t height_, width_, map_width_;
  uint8_t *kept_, *halo_, *spread_;
};

}  // namespace

void list_positions(const bool* patches, int64_t images, const MaskGeometry& g, Wanted wanted,
                    Workspace& w) {
  for (Positions* list : {&w.kept, &w.dropped, &w.halo, &w.tiles, &w.halo_tiles}) list->clear();
  if (patches == nullptr) {
    append_range(w.kept, 0, images * g.rows.size * g.columns.size);
    if (wanted.halo) append_range(w.halo, 0, images * g.conv_rows.input * g.conv_columns.input);
    const TileGrid outputs{g.rows.size, g.columns.size, 0};
    if (wanted.tiles) append_range(w.tiles, 0, images * outputs.rows() * outputs.columns());
    const TileGrid inputs{g.conv_rows.input, g.conv_columns.input, halo_origin(g)};
    if (wanted.halo_tiles) append_range(w.halo_tiles, 0, images * inputs.rows() * inputs.columns());
    return;
  }
  Lister lister(g, wanted, w);
  for (int64_t n = 0; n < images; ++n) {
    lister.image(n, patches + n * g.rows.patches() * g.columns.patches());
  }
}

at::Tensor decisions(const at::Tensor& mask, const char* name) {
  if (mask.scalar_type() == at::kBool) return mask.contiguous();
  TORCH_CHECK_VALUE(!mask.is_floating_point() || mask.isfinite().all().item<bool>(),
                    name, " must be finite, got NaN or infinity");
  return mask.gt(0.5).contiguous();
}

}  // namespace las_mm::cpu
