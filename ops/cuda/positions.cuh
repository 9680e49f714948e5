// Mask -> lists of positions, built and counted on the device: no one waits for a count.
#pragma once

#include "cuda/platform.cuh"

namespace las_mm::cuda {

// conv1's map, conv2's geometry and the patches of its outputs.
struct MaskGeometry {
  int images;
  int height, width;          // of conv1's output
  int out_height, out_width;  // of conv2's
  int stride, dilation;
  int granularity;    // at most the larger side of the outputs
  int rows, columns;  // of the patch grid

  LAS_MM_HOST_DEVICE int64_t hidden() const { return static_cast<int64_t>(images) * height * width; }
  LAS_MM_HOST_DEVICE int64_t outputs() const {
    return static_cast<int64_t>(images) * out_height * out_width;
  }
};

// `height` and `width` of conv1's output, `stride` and `dilation` of conv2.
inline MaskGeometry mask_geometry(int64_t images, int64_t height, int64_t width, int64_t stride,
                                  int64_t dilation, int64_t granularity) {
  const int64_t out_height = ceil_div(height, stride), out_width = ceil_div(width, stride);
  // Longer patches and farther taps mean the same.
  const int64_t outputs = out_height > out_width ? out_height : out_width;
  const int64_t inputs = height > width ? height : width;
  const int64_t side = granularity < outputs ? granularity : outputs;
  MaskGeometry g;
  g.images = static_cast<int>(images);
  g.height = static_cast<int>(height);
  g.width = static_cast<int>(width);
  g.out_height = static_cast<int>(out_height);
  g.out_width = static_cast<int>(out_width);
  g.stride = static_cast<int>(stride);
  g.dilation = static_cast<int>(dilation < inputs ? dilation : inputs);
  g.granularity = static_cast<int>(side);
  g.rows = static_cast<int>(ceil_div(out_height, side));
  g.columns = static_cast<int>(ceil_div(out_width, side));
  return g;
}

LAS_MM_DEVICE bool is_kept(const MaskGeometry& g, const Global<const uint8_t>& mask, int image,
                           int y, int x) {
  return mask.load((static_cast<int64_t>(image) * g.rows + y / g.granularity) * g.columns +
                   x / g.granularity) != 0;
}

// Whether a kept output reads conv1's output at (y, x).
LAS_MM_DEVICE bool is_read(const MaskGeometry& g, const Global<const uint8_t>& mask, int image,
                           int y, int x) {
  const ConvAxis rows{g.height, g.stride, g.dilation}, columns{g.width, g.stride, g.dilation};
  for (int down = -1; down <= 1; ++down) {
    const int out_y = static_cast<int>(rows.output_of(y, down));
    if (out_y < 0) continue;
    for (int right = -1; right <= 1; ++right) {
      const int out_x = static_cast<int>(columns.output_of(x, right));
      if (out_x >= 0 && is_kept(g, mask, image, out_y, out_x)) return true;
    }
  }
  return false;
}

// Appends `position` where `wanted`; all lanes of a warp call it. The order of a list is that of the
// warps' arrival, which no result depends on.
LAS_MM_DEVICE void append(const Global<int32_t>& list, const Global<int32_t>& counts, int which,
                          bool wanted, int64_t position) {
  const uint32_t lanes = ballot(wanted);
  if (lanes == 0) return;
  const int lane = thread_index() % 32;
  int first = 0;
  if (lane == 0) first = counts.atomic_add(which, count_bits(lanes));
  first = shuffle(first, 0);
  if (wanted && list.data != nullptr) {
    const uint32_t before = lanes & ((1u << lane) - 1u);
    list.store(first + count_bits(before), static_cast<int32_t>(position));
  }
}

// Lists kept outputs, conv1 outputs that they read, and dropped outputs. An absent list is only
// counted; `counts` has to be zero before.
struct ListPositions {
  enum { kKept, kHalo, kDropped, kCounts };
  struct Params {
    MaskGeometry geometry;
    Global<const uint8_t> mask;  // (images, rows, columns)
    Global<int32_t> kept, halo, dropped;
    Global<int32_t> counts;
    bool want_halo, want_dropped;
  };
  static constexpr int kThreads = 256;
  static constexpr int kSharedBytes = 0;
  static constexpr int kMinBlocks = 2;

  LAS_MM_DEVICE static void run(const Params& p) {
    const MaskGeometry& g = p.geometry;
    const int64_t hidden = g.hidden(), outputs = g.outputs();
    // Whole warps belong to one of the two maps.
    const int64_t hidden_threads = p.want_halo ? ceil_div(hidden, 32) * 32 : 0;
    const int64_t threads = hidden_threads + ceil_div(outputs, 32) * 32;
    const int64_t stride = block_count() * kThreads;
    const int64_t begin = block_index() * kThreads + thread_index() / 32 * 32;
    for (int64_t warp = begin; warp < threads; warp += stride) {
      const int64_t i = warp + thread_index() % 32;
      if (warp < hidden_threads) {
        const int x = static_cast<int>(i % g.width);
        const int y = static_cast<int>(i / g.width % g.height);
        const int image = static_cast<int>(i / g.width / g.height);
        append(p.halo, p.counts, kHalo, i < hidden && is_read(g, p.mask, image, y, x), i);
      } else {
        const int64_t o = i - hidden_threads;
        const int x = static_cast<int>(o % g.out_width);
        const int y = static_cast<int>(o / g.out_width % g.out_height);
        const int image = static_cast<int>(o / g.out_width / g.out_height);
        const bool kept = o < outputs && is_kept(g, p.mask, image, y, x);
        append(p.kept, p.counts, kKept, kept, o);
        if (p.want_dropped) append(p.dropped, p.counts, kDropped, o < outputs && !kept, o);
      }
    }
  }
};

// Lists kept outputs and conv1 outputs that they read, image by image, and dropped outputs of all.
// `counts` has to be zero before.
struct ListImages {
  struct Params {
    MaskGeometry geometry;
    Global<const uint8_t> mask;  // (images, rows, columns)
    Global<int32_t> kept, halo, dropped;  // the last may be absent
    Global<int32_t> counts;  // kept and halo of each image, then dropped
  };
  static constexpr int kThreads = 256;
  static constexpr int kSharedBytes = 0;
  static constexpr int kMinBlocks = 2;

  LAS_MM_DEVICE static void run(const Params& p) {
    const MaskGeometry& g = p.geometry;
    const int hidden = g.height * g.width, outputs = g.out_height * g.out_width;
    // Whole warps belong to one map of one image.
    const int64_t hidden_threads = ceil_div(hidden, 32) * 32;
    const int64_t threads = hidden_threads + ceil_div(outputs, 32) * 32;
    const int64_t begin = block_index() * kThreads + thread_index() / 32 * 32;
    for (int64_t warp = begin; warp < g.images * threads; warp += block_count() * kThreads) {
      const int image = static_cast<int>(warp / threads);
      const int64_t in_image = warp % threads;
      const int i = static_cast<int>(in_image) + thread_index() % 32;
      if (in_image < hidden_threads) {
        const bool read = i < hidden && is_read(g, p.mask, image, i / g.width, i % g.width);
        append_of(p.halo, p.counts, g.images, image, read, hidden, i);
      } else {
        const int o = i - static_cast<int>(hidden_threads);
        const bool valid = o < outputs;
        const bool kept = valid && is_kept(g, p.mask, image, o / g.out_width, o % g.out_width);
        append_of(p.kept, p.counts, 0, image, kept, outputs, o);
        if (p.dropped.data != nullptr) {
          append(p.dropped, p.counts, 2 * g.images, valid && !kept,
                 static_cast<int64_t>(image) * outputs + o);
        }
      }
    }
  }

  LAS_MM_DEVICE static void append_of(Global<int32_t> list, const Global<int32_t>& counts,
                                      int which, int image, bool wanted, int positions, int i) {
    const int64_t begin = static_cast<int64_t>(image) * positions;
    list.data += begin;
    append(list, counts, which + image, wanted, begin + i);
  }
};

}  // namespace las_mm::cuda
