// Winograd's F(2x2, 3x3) (arXiv 1509.09308) for a chunk of tiles: what the convolutions share.
#pragma once

#include "common/patch_geometry.h"
#include "cpu/kernels.h"
#include "cpu/workspace.h"

namespace las_mm::cpu {

constexpr int64_t kChunkTiles = 48;  // of 2x2 outputs; measured: 36 to 60 are alike

// Transformed inputs, tile by tile within each of the 16 values, and a panel of their products. An
// output is a sum over its own nine inputs only: what else lies under a tile may be anything.
class TileChunk {
 public:
  // `channels` at most; the products with `panels` panels are kept. Takes pointers, values and output
  // of scratch(); `more` pointers are left for the caller behind those.
  TileChunk(int64_t tiles, int64_t channels, int64_t panels = 1, int64_t more = 0)
      : row_(ceil_div(channels, kLanes) * kLanes),
        in_step_(tiles * row_ + kLanes),
        out_row_(panels * kPanel),
        out_step_(tiles * out_row_ + kLanes),
        kernels_(kernels()) {
    Scratch& memory = scratch();
    in_ = memory.pointers.get<const float*>(2 * tiles + more);
    out_ = const_cast<float**>(in_) + tiles;
    more_ = out_ + tiles;
    transformed_ = memory.values.get<float>(kTile * in_step_);
    products_ = memory.output.get<float>(kTile * out_step_);
    for (int64_t i = 0; i < tiles; ++i) {
      in_[i] = transformed_ + i * row_;
      out_[i] = products_ + i * out_row_;
    }
  }

  // The 4x4 positions from `from` on, as strides say, become the input of tile `i`.
  void transform(int64_t i, const float* from, int64_t row_stride, int64_t column_stride,
                 int64_t channels) const {
    kernels_.winograd_input(from, row_stride, column_stride, channels, transformed_ + i * row_,
                            in_step_);
  }
  // The rows that value `t` of the tiles is multiplied as, and where its products go.
  const float* const* in() const { return in_; }
  int64_t offset(int t) const { return t * in_step_; }
  float* const* out() const { return out_; }
  // `first`: the panel whose products come first.
  int64_t column(int t, int64_t first) const { return t * out_step_ - first * kPanel; }

  // Outputs of tile `i` from its products with panel `first + kept`.
  void finish(int64_t i, int64_t channels, const float* bias, const TileTarget& to,
              int64_t kept = 0) const {
    kernels_.winograd_output(products_ + i * out_row_ + kept * kPanel, out_step_, channels, bias, to);
  }
  float** more() const { return more_; }

 private:
  const int64_t row_;
  // From one of the 16 values to the next: a cache line more than the tiles take, since those of a
  // tile would all fall into the same few sets of the cache if this were a multiple of 4 KiB.
  const int64_t in_step_, out_row_, out_step_;
  const Kernels& kernels_;
  const float** in_;
  float **out_, **more_;
  float *transformed_, *products_;
};

}  // namespace las_mm::cpu
