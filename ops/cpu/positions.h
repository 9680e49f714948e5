// Which positions a mask makes a block compute, as lists of indices.
#pragma once

#include "cpu/mask_geometry.h"
#include "cpu/workspace.h"

namespace las_mm::cpu {

struct Wanted {
  bool dropped = false;  // fill Workspace::dropped
  bool halo = false;     // fill Workspace::halo
  bool tiles = false;    // fill Workspace::tiles (2x2 outputs) and Workspace::blank
};

// Fills w.kept with the outputs that `mask` keeps, w.dropped with the others, w.halo with conv1's
// outputs that these read, w.tiles with the 2x2 tiles that hold a kept output (indices into
// N x ceil(H/2) x ceil(W/2)), and w.blank with conv1's outputs that a tile's 4x4 input covers and
// no kept output reads. `patches` are the decisions of all images, null: all are kept.
void list_positions(const bool* patches, int64_t images, const MaskGeometry& g, Wanted wanted,
                    Workspace& w);

// The decisions of a mask of any dtype that checks.h accepts, as a contiguous bool tensor. Throws
// ValueError if it is not finite.
at::Tensor decisions(const at::Tensor& mask, const char* name = "mask");

}  // namespace las_mm::cpu
