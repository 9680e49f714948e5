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

// The patches, along one axis, of the outputs that read an input through each tap, or -1.
struct Readers {
  int patch[3];

  LAS_MM_DEVICE Readers(int i, int inputs, int stride, int dilation, int granularity) {
    LAS_MM_UNROLL
    for (int tap = 0; tap < 3; ++tap) {
      const int center = i + (1 - tap) * dilation;
      const int output = stride == 1 ? center : center / stride;
      const bool reads = center >= 0 && center < inputs && output * stride == center;
      patch[tap] = reads ? output / granularity : -1;
    }
  }
  // Of a tap that none before it has.
  LAS_MM_DEVICE int different(int tap) const {
    return tap > 0 && patch[tap] == patch[tap - 1] ? -1 : patch[tap];
  }
};

// Whether a kept output reads conv1's output at (y, x).
LAS_MM_DEVICE bool is_read(const MaskGeometry& g, const Global<const uint8_t>& mask, int image,
                           int y, int x) {
  const Readers rows(y, g.height, g.stride, g.dilation, g.granularity);
  const Readers columns(x, g.width, g.stride, g.dilation, g.granularity);
  uint32_t kept = 0;  // all patches at once: leaving early would mean waiting for each
  LAS_MM_UNROLL
  for (int down = 0; down < 3; ++down) {
    LAS_MM_UNROLL
    for (int right = 0; right < 3; ++right) {
      const int row = rows.different(down), column = columns.different(right);
      if (row >= 0 && column >= 0) {
        kept |= mask.load((static_cast<int64_t>(image) * g.rows + row) * g.columns + column);
      }
    }
  }
  return kept != 0;
}

// Lists kept outputs, conv1 outputs that they read, and dropped outputs of all images. The first two
// in `sections` lists, one behind the other with room for all positions: 1 for all images, or one
// per image. An absent list is only counted; `counts` has to be zero before. The order of a list is
// that of the blocks' arrival, which no result depends on.
struct ListPositions {
  enum { kKept, kHalo, kDropped };  // counts of one section
  struct Params {
    MaskGeometry geometry;
    Global<const uint8_t> mask;  // (images, rows, columns)
    Global<int32_t> kept, halo, dropped;
    Global<int32_t> counts;  // kept of each section, halo of each section, dropped
    int sections;
    bool want_halo, want_dropped;
  };
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kSharedBytes = (kWarps + 2) * 4;
  static constexpr int kMinBlocks = 4;

  // A block works on one map of one section at a time.
  LAS_MM_DEVICE static void run(const Params& p) {
    const MaskGeometry& g = p.geometry;
    const int hidden = static_cast<int>(g.hidden() / p.sections);
    const int outputs = static_cast<int>(g.outputs() / p.sections);
    const int hidden_blocks = p.want_halo ? static_cast<int>(ceil_div(hidden, kThreads)) : 0;
    const int blocks = hidden_blocks + static_cast<int>(ceil_div(outputs, kThreads));
    const int64_t tasks = static_cast<int64_t>(blocks) * p.sections;
    for (int64_t task = block_index(); task < tasks; task += block_count()) {
      const int section = static_cast<int>(task / blocks);
      const int part = static_cast<int>(task % blocks);
      if (part < hidden_blocks) {
        list_halo(p, section, hidden, int64_t{part} * kThreads + thread_index());
      } else {
        list_outputs(p, section, outputs,
                     int64_t{part - hidden_blocks} * kThreads + thread_index());
      }
    }
  }

  LAS_MM_DEVICE static void list_halo(const Params& p, int section, int hidden, int64_t i) {
    const MaskGeometry& g = p.geometry;
    const int position = section * hidden + static_cast<int>(i < hidden ? i : 0);
    const int line = position / g.width, image = line / g.height;
    const bool read = i < hidden && is_read(g, p.mask, image, line - image * g.height,
                                            position - line * g.width);
    append(p, {p.halo, p.sections + section, section * hidden, read}, {}, position);
  }

  LAS_MM_DEVICE static void list_outputs(const Params& p, int section, int outputs, int64_t i) {
    const MaskGeometry& g = p.geometry;
    const bool valid = i < outputs;
    const int position = section * outputs + static_cast<int>(valid ? i : 0);
    const int line = position / g.out_width, image = line / g.out_height;
    const bool kept = valid && is_kept(g, p.mask, image, line - image * g.out_height,
                                       position - line * g.out_width);
    append(p, {p.kept, section, section * outputs, kept},
           {p.dropped, 2 * p.sections, 0, p.want_dropped && valid && !kept}, position);
  }

  struct List {
    Global<int32_t> data;
    int count, begin;  // which count is the list's, and where the list begins
    bool wanted;       // the thread's position is on it
  };

  // Appends to two lists; the block's threads call it together. One atomic operation per list.
  LAS_MM_DEVICE static void append(const Params& p, const List& first, const List& second,
                                   int position) {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const uint32_t lanes[2] = {ballot(first.wanted), ballot(second.wanted)};
    if (lane == 0) shared_store(warp * 4, count_bits(lanes[0]) | count_bits(lanes[1]) << 16);
    sync_block();  // all warps' counts are there
    int before = 0, all = 0;
    LAS_MM_UNROLL
    for (int w = 0; w < kWarps; ++w) {
      const int count = shared_load<int>(w * 4);
      if (w < warp) before += count;
      all += count;
    }
    if (thread_index() < 2) {
      const int total = thread_index() == 0 ? all & 0xffff : all >> 16;
      const int which = thread_index() == 0 ? first.count : second.count;
      shared_store((kWarps + thread_index()) * 4,
                   total > 0 ? p.counts.atomic_add(which, total) : 0);
    }
    sync_block();  // where the block's positions begin
    put(first, shared_load<int>(kWarps * 4) + (before & 0xffff), lanes[0], position);
    put(second, shared_load<int>((kWarps + 1) * 4) + (before >> 16), lanes[1], position);
  }

  LAS_MM_DEVICE static void put(const List& list, int at, uint32_t lanes, int position) {
    if (!list.wanted || list.data.data == nullptr) return;
    const uint32_t before = lanes & ((1u << thread_index() % 32) - 1u);
    list.data.store(static_cast<int64_t>(list.begin) + at + count_bits(before), position);
  }
};

}  // namespace las_mm::cuda
