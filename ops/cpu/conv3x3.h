// A 3x3 convolution at listed positions of a map, in direct or Winograd form. The map has no
// border: taps in the padding read a row of zeros.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/positions.h"
#include "cpu/sparse_conv.h"
#include "cpu/winograd.h"

namespace las_mm::cpu {

// The positions of a batch of maps, `pitch` values from one to the next.
template <typename T>
struct Rows {
  T* data;
  int64_t height, width, pitch;

  T* at(int64_t image, int64_t y, int64_t x) const {
    return data + ((image * height + y) * width + x) * pitch;
  }
};

// A position as index into images x height x width.
struct Point {
  int64_t image, y, x;
};
inline Point point(int64_t index, int64_t height, int64_t width) {
  return {index / (height * width), index / width % height, index % width};
}

// A convolution's weights, packed.
template <typename T>
struct Conv {
  int64_t depth, channels;  // in, out
  const T* direct;
  const float* winograd;
  const float* bias;
  bool relu;
  // Weights, in the form that is used, of one more input, which is 1 inside the map: the sum over
  // the channels that are the same everywhere. Null: there are none.
  const T* constant = nullptr;

  int64_t inputs() const { return depth + (constant != nullptr); }
};

// With so many pairs of channels the weights do not fit the second-level cache. Chunks of outputs are
// larger then (measured: 96 to 192 tiles are alike), and tiles go through the 16 values one after the
// other, with all panels each: so that the weights are read few times.
constexpr int64_t kManyWeights = 1 << 15;
constexpr int64_t kLargeChunkTiles = 128, kLargeChunkRows = 192;

// Which outputs are computed, and as what.
struct Outputs {
  const Positions& list;  // outputs, or tiles of `grid`
  bool use_tiles;
  TileGrid grid;  // of the outputs

  int64_t count() const { return static_cast<int64_t>(list.size()); }
};

// Whether a convolution runs in tiles: where these cut a mask, 16 products a tile stand against 9
// an output. `count()` lists those of all images, so that results do not depend on how threads
// share them. `cost`: time of a product in a tile relative to another one.
template <typename T, typename F>
bool prefers_tiles(const Conv<T>& conv, double cost, const Positions& tiles,
                   const Positions& outputs, const F& count) {
  if (conv.winograd == nullptr || conv.direct == nullptr) return conv.winograd != nullptr;
  count();
  return cost * kTile * static_cast<double>(tiles.size()) <
         9.0 * static_cast<double>(outputs.size());
}

// An output's row and what is added to it; a null row is not wanted.
template <typename T>
struct Place {
  const T* residual;
  T* out;
};

template <typename T>
class Conv3x3 {
 public:
  // `zeros`: as many as conv.inputs().
  Conv3x3(const Rows<const T>& from, const Conv<T>& conv, int64_t stride, int64_t dilation,
          const T* zeros)
      : from_(from),
        conv_(conv),
        stride_(stride),
        dilation_(std::min(dilation, std::max(from.height, from.width))),  // farther: padding only
        zeros_(zeros),
        panels_{conv.channels} {}

  // `place(image, y, x)` is an output's Place.
  template <typename F>
  void run(const Outputs& outputs, bool has_residual, const F& place) const {
    parallel_chunks(outputs.count(), chunk(outputs), panels_.count(),
                    [&](int64_t lo, int64_t hi, int64_t first, int64_t last) {
                      if constexpr (std::is_same_v<T, float>) {
                        if (outputs.use_tiles) {
                          return tiles(outputs, lo, hi, first, last, has_residual, place);
                        }
                      }
                      rows(outputs, lo, hi, first, last, has_residual, place);
                    });
  }

 private:
  bool has_many_weights() const { return conv_.depth * conv_.channels >= kManyWeights; }
  int64_t chunk(const Outputs& outputs) const {
    if (outputs.use_tiles) return has_many_weights() ? kLargeChunkTiles : kChunkTiles;
    return has_many_weights() ? kLargeChunkRows : kChunkRows;
  }

  template <typename F>
  void rows(const Outputs& outputs, int64_t lo, int64_t hi, int64_t first, int64_t last,
            bool has_residual, const F& place) const {
    const int64_t rows = hi - lo;
    const T** in = scratch().pointers.template get<const T*>(11 * rows);
    const T** residual = in + 9 * rows;
    T** out = const_cast<T**>(residual) + rows;
    int64_t steps[9];
    for (int t = 0; t < 9; ++t) {
      steps[t] = ((t / 3 - 1) * from_.width + t % 3 - 1) * dilation_ * from_.pitch;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const Point p = point(outputs.list[lo + i], outputs.grid.height, outputs.grid.width);
      const Place<T> to = place(p.image, p.y, p.x);
      residual[i] = to.residual;
      out[i] = to.out;
      const int64_t y = p.y * stride_, x = p.x * stride_;
      const T* center = from_.at(p.image, y, x);
      const bool has_row[] = {y >= dilation_, true, y + dilation_ < from_.height};
      const bool has_column[] = {x >= dilation_, true, x + dilation_ < from_.width};
      for (int t = 0; t < 9; ++t) {
        in[t * rows + i] = has_row[t / 3] && has_column[t % 3] ? center + steps[t] : zeros_;
      }
    }
    Tap<T> taps[kMaxTaps];
    for (int t = 0; t < 9; ++t) {
      taps[t] = {in + t * rows, 0, conv_.depth, conv_.direct, t, 9};
      taps[9 + t] = {in + t * rows, conv_.depth, 1, conv_.constant, t, 9};
    }
    run_panels<T>(rows, taps, conv_.constant ? 18 : 9, panels_, first, last,
                  {conv_.bias, has_residual ? residual : nullptr, out, 0, conv_.relu});
  }

  template <typename F>
  void tiles(const Outputs& outputs, int64_t lo, int64_t hi, int64_t first, int64_t last,
             bool has_residual, const F& place) const {
    const TileGrid& grid = outputs.grid;
    const int64_t tiles = hi - lo;
    const int64_t step = has_many_weights() ? last - first : 1;  // panels together
    const TileChunk chunk(tiles, conv_.inputs(), step, 8 * tiles);
    float** out = chunk.more();
    const float** residual = const_cast<const float**>(out + 4 * tiles);
    for (int64_t i = 0; i < tiles; ++i) {
      const Point p = point(outputs.list[lo + i], grid.rows(), grid.columns());
      const int64_t top = 2 * p.y - grid.origin, left = 2 * p.x - grid.origin;
      transform(chunk, i, p.image, top - 1, left - 1);
      for (int q = 0; q < 4; ++q) {
        const int64_t y = top + q / 2, x = left + q % 2;
        const bool exists = y >= 0 && y < grid.height && x >= 0 && x < grid.width;
        const Place<float> to = exists ? place(p.image, y, x) : Place<float>{nullptr, nullptr};
        residual[4 * i + q] = to.residual;
        out[4 * i + q] = to.out;
      }
    }
    for (int64_t from = first; from < last; from += step) {
      for (int t = 0; t < kTile; ++t) {
        const int64_t at = chunk.offset(t);
        const Tap<float> taps[] = {
            {chunk.in(), at, conv_.depth, conv_.winograd, t, kTile},
            {chunk.in(), at + conv_.depth, 1, conv_.constant, t, kTile}};
        run_panels<float>(tiles, taps, conv_.constant ? 2 : 1, panels_, from, from + step,
                          {nullptr, nullptr, chunk.out(), chunk.column(t, from), false});
      }
      for (int64_t i = 0; i < tiles; ++i) {
        for (int64_t p = from; p < from + step; ++p) {
          chunk.finish(i, panels_.valid(p), conv_.bias + p * kPanel,
                       {has_residual ? residual + 4 * i : nullptr, out + 4 * i, p * kPanel,
                        conv_.relu},
                       p - from);
        }
      }
    }
  }

  // The 4x4 positions from (top, left) on, of which some may be padding.
  void transform(const TileChunk& chunk, int64_t i, int64_t image, int64_t top,
                 int64_t left) const {
    const int64_t inputs = conv_.inputs();
    if (top >= 0 && top + 4 <= from_.height && left >= 0 && left + 4 <= from_.width) {
      return chunk.transform(i, from_.at(image, top, left), from_.width * from_.pitch, from_.pitch,
                             inputs);
    }
    float* patch = scratch().hidden.template get<float>(kTile * inputs);
    for (int64_t q = 0; q < kTile; ++q) {
      const int64_t y = top + q / 4, x = left + q % 4;
      const bool inside = y >= 0 && y < from_.height && x >= 0 && x < from_.width;
      std::copy_n(inside ? from_.at(image, y, x) : zeros_, inputs, patch + q * inputs);
    }
    chunk.transform(i, patch, 4 * inputs, inputs, inputs);
  }

  const Rows<const T> from_;
  const Conv<T> conv_;
  const int64_t stride_, dilation_;
  const T* zeros_;
  const Panels panels_;
};

}  // namespace las_mm::cpu
