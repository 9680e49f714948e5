// Which positions a mask makes a block compute, as lists of indices.
#pragma once

#include "cpu/mask_geometry.h"
#include "cpu/workspace.h"

namespace las_mm::cpu {

struct Wanted {
  bool dropped = false;     // fill Workspace::dropped
  bool halo = false;        // fill Workspace::halo
  bool tiles = false;       // fill Workspace::tiles
  bool halo_tiles = false;  // fill Workspace::halo_tiles
};

// A map cut into tiles of 2x2 positions, of which the first is (-origin, -origin).
struct TileGrid {
  int64_t height, width, origin;

  int64_t rows() const { return ceil_div(height + origin, 2); }
  int64_t columns() const { return ceil_div(width + origin, 2); }
};

// Of the halo's tiles: around patches of an even size it fills whole tiles from (-1, -1) on.
inline int64_t halo_origin(const MaskGeometry& g) {
  const bool cut = g.rows.granularity < std::max(g.rows.size, g.columns.size);
  return cut && g.rows.granularity % 2 == 0 ? 1 : 0;
}

// Fills w.kept with the outputs that `mask` keeps, w.dropped with the others, w.halo with conv1's
// outputs that these read, w.tiles and w.halo_tiles with the tiles that hold one of these (indices
// into the tiles of all images, from 0 and from halo_origin on). `patches` are the decisions of all
// images, null: all are kept.
void list_positions(const bool* patches, int64_t images, const MaskGeometry& g, Wanted wanted,
                    Workspace& w);

// The decisions of a mask of any dtype that checks.h accepts, as a contiguous bool tensor. Throws
// ValueError if it is not finite.
at::Tensor decisions(const at::Tensor& mask, const char* name = "mask");

}  // namespace las_mm::cpu
