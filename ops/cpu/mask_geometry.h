// How far a mask reaches: shared by the ops that take one. Byte operations, free of torch headers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "common/patch_geometry.h"

namespace las_mm::cpu {

struct MaskGeometry {
  // `height` and `width` of conv1's output, `stride` and `dilation` of conv2.
  MaskGeometry(int64_t height, int64_t width, int64_t stride, int64_t dilation,
               int64_t granularity)
      : conv_rows{height, stride, std::min(dilation, std::max(height, width))},
        conv_columns{width, stride, std::min(dilation, std::max(height, width))},
        rows{conv_rows.output(), granularity},
        columns{conv_columns.output(), granularity} {}

  ConvAxis conv_rows, conv_columns;  // farther taps than the map is wide read only padding
  PatchAxis rows, columns;
};

// Marks the columns that the convolution reads for the kept patches of one patch row.
inline void spread_columns(const MaskGeometry& g, const bool* patches, uint8_t* out) {
  std::fill_n(out, g.conv_columns.input, uint8_t{0});
  for (int64_t patch = 0; patch < g.columns.patches(); ++patch) {
    if (!patches[patch]) continue;
    const int64_t first = patch * g.columns.granularity;
    for (int64_t o = first; o < first + g.columns.extent(patch); ++o) {
      for (int tap = -1; tap <= 1; ++tap) {
        const int64_t i = g.conv_columns.input_of(o, tap);
        if (i >= 0) out[i] = 1;
      }
    }
  }
}

// Joins the spread patch rows that read input row `y`; returns the number of marked positions.
inline int64_t join_rows(const MaskGeometry& g, const uint8_t* spread, int64_t y, uint8_t* out) {
  const int64_t width = g.conv_columns.input;
  std::fill_n(out, width, uint8_t{0});
  for (int tap = -1; tap <= 1; ++tap) {
    const int64_t o = g.conv_rows.output_of(y, tap);
    if (o < 0) continue;
    const uint8_t* row = spread + g.rows.patch_of(o) * width;
    for (int64_t x = 0; x < width; ++x) out[x] |= row[x];
  }
  return std::accumulate(out, out + width, int64_t{0});
}

inline int64_t count_outputs(const MaskGeometry& g, const bool* patches) {
  int64_t count = 0;
  for (int64_t r = 0; r < g.rows.patches(); ++r) {
    for (int64_t c = 0; c < g.columns.patches(); ++c) {
      count += *patches++ ? g.rows.extent(r) * g.columns.extent(c) : 0;
    }
  }
  return count;
}

}  // namespace las_mm::cpu
