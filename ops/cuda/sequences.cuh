// The kernels that each op launches, one after the other. Free of torch: `Device` allocates and
// launches, on a GPU (device.h) or in the emulator of the tests:
//
//   Gpu gpu                                     what tiles are chosen for
//   allocate<T>(count, name) -> Global<T>       uninitialised memory until the op ends
//   zero(Global<T>, count)
//   launch<Kernel>(blocks, params)              at most as many blocks as fit on the device at once
#pragma once

#include "cuda/excitation_sequences.cuh"
#include "cuda/platform.cuh"
#include "cuda/positions.cuh"
#include "cuda/rows.cuh"
#include "cuda/sparse_gemm.cuh"
#include "cuda/spatial_mask.cuh"
#include "cuda/tiles.cuh"

namespace las_mm::cuda {

// What DecidePatches needs beside the features.
template <typename T>
struct Masker {
  Global<const T> weight;      // (2, channels)
  Global<const T> bias;        // (2)
  Global<const float> offset;  // absent, or (offset_images, rows, columns)
  int offset_images;
};

// Lists of one mask, on the device. Without a mask all lists are absent and everything is kept.
struct Lists {
  Global<int32_t> kept, halo, dropped;
  Global<int32_t> counts;

  Global<const int32_t> count(int which) const {
    Global<int32_t> one = counts;
    if (one.data != nullptr) one.data += which;
    return one;
  }
};

// Whether rows of `channels` values, and parts of them, start at multiples of 16 bytes.
template <typename T>
bool fits_vectors(int64_t channels) {
  return channels * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

template <typename T>
bool aligned(const Global<T>& array) {
  return reinterpret_cast<uintptr_t>(array.data) % 16 == 0;
}

template <class Device>
void launch_list(Device& device, const ListPositions::Params& p) {
  const MaskGeometry& g = p.geometry;
  constexpr int kThreads = ListPositions::kThreads;
  const int64_t hidden = p.want_halo ? ceil_div(g.hidden() / p.sections, kThreads) : 0;
  const int64_t outputs = ceil_div(g.outputs() / p.sections, kThreads);
  device.template launch<ListPositions>(p.sections * (hidden + outputs), p);
}

// `sections`: 1, or the number of images for lists of each.
template <class Device>
Lists list_positions(Device& device, const MaskGeometry& g, const Global<const uint8_t>& mask,
                     bool halo, bool dropped, int sections = 1) {
  Lists lists;
  lists.kept = device.template allocate<int32_t>(g.outputs(), "kept");
  if (halo) lists.halo = device.template allocate<int32_t>(g.hidden(), "halo");
  if (dropped) lists.dropped = device.template allocate<int32_t>(g.outputs(), "dropped");
  const int64_t counts = 2 * int64_t{sections} + 1;
  lists.counts = device.template allocate<int32_t>(counts, "counts");
  device.zero(lists.counts, counts);
  launch_list(device, {g, mask, lists.kept, lists.halo, lists.dropped, lists.counts, sections, halo,
                       dropped});
  return lists;
}

template <bool kScores = false, typename T, class Device>
void gemm(Device& device, GemmParams<T> params) {
  params.vectors = fits_vectors<T>(params.columns) && aligned(params.out) &&
                   aligned(params.residual);
  for (int i = 0; i < params.source_count; ++i) {
    const Source<T>& source = params.sources[i];
    params.vectors = params.vectors && fits_vectors<T>(source.depth) && aligned(source.data);
  }
  const TileShape shape =
      device.choose_tile(params.positions, params.columns, params.groups);
  with_tile<T, kScores>(shape, device.gpu, [&](auto tile) {
    using Tile = decltype(tile);
    const int64_t tiles = ceil_div(params.positions, Tile::kRows) * params.groups *
                          ceil_div(params.columns, Tile::kColumns);
    device.template launch<SparseGemm<Tile>>(tiles, params);
  });
}

// A product of one source over listed rows of a (images, height, width) map.
template <typename T>
GemmParams<T> one_source(const Source<T>& source, int64_t images, int height, int width,
                         int groups, int columns, const Global<const float>& bias,
                         const Global<T>& out) {
  GemmParams<T> p{};
  p.sources[0] = source;
  p.source_count = 1;
  p.positions = images * height * width;
  p.height = height;
  p.width = width;
  p.groups = groups;
  p.columns = columns;
  p.bias = bias;
  p.out = out;
  p.relu = true;
  return p;
}

template <typename T>
Source<T> pointwise(const Global<const T>& data, const Global<const T>& weight, int height,
                    int width, int channels, int stride) {
  return {data, weight, height, width, channels, channels, 1, stride, 1};
}

// Patches of more positions get a block of eight warps.
inline bool is_large(int side) { return static_cast<int64_t>(side) * side > 2048; }

template <typename T>
Decisions<T> decisions_of(const MaskGeometry& g, const Masker<T>& masker, int height, int width,
                          int side, const Global<uint8_t>& mask, const Global<int32_t>& counts) {
  return {masker.bias, masker.offset, mask,   counts,    height,
          width,       side,          g.images, g.rows, g.columns, masker.offset_images};
}

template <class Device, typename T>
void decide(Device& device, const Decisions<T>& to, const Global<const float>& scores) {
  const int64_t patches = static_cast<int64_t>(to.images) * to.rows * to.columns;
  if (is_large(to.side)) {
    device.template launch<DecidePatches<T, 256>>(patches, {to, scores});
  } else {
    device.template launch<DecidePatches<T, 32>>(patches, {to, scores});
  }
}

// Counts kept outputs and read conv1 outputs of a mask, into `rates`.
template <class Device>
void mean_rates(Device& device, const MaskGeometry& g, const Global<const uint8_t>& mask,
                const Global<int32_t>& counts, const Global<float>& rates) {
  launch_list(device, {g, mask, {}, {}, {}, counts, 1, true, false});
  device.template launch<MeanRates>(1, MeanRates::Params{counts, rates, g.outputs(), g.hidden()});
}

// Side of a patch in positions of the block's input; one longer than the map is the whole map.
inline int patch_side(const MaskGeometry& g, int first_stride, int height, int width) {
  const int64_t side = static_cast<int64_t>(g.granularity) * first_stride * g.stride;
  const int64_t most = height > width ? height : width;
  return static_cast<int>(side < most ? side : most);
}

// las_mm::patch_mask and, with `rates`, las_mm::spatial_mask. `x` is (images, height, width,
// channels).
template <class Device, typename T>
void spatial_mask(Device& device, const MaskGeometry& g, const Masker<T>& masker,
                  const Global<const T>& x, int height, int width, int channels, int first_stride,
                  const Global<uint8_t>& mask, const Global<float>& rates) {
  const bool vectors = fits_vectors<T>(channels) && aligned(x) && aligned(masker.weight);
  const int side = patch_side(g, first_stride, height, width);
  Global<int32_t> counts;
  if (rates.data != nullptr) counts = device.template allocate<int32_t>(2, "counts");
  const Decisions<T> to = decisions_of(g, masker, height, width, side, mask, counts);
  // More would take a block too long: then all of the GPU scores the positions before.
  constexpr int64_t kMostChunks = 16384;
  if (int64_t{side} * side * ceil_div(channels, Chunk<T>::kCount) > kMostChunks) {
    const int64_t positions = static_cast<int64_t>(g.images) * height * width;
    const Global<float> scores = device.template allocate<float>(positions, "scores");
    device.template launch<ScorePositions<T>>(ceil_div(positions, ScorePositions<T>::kWarps),
                                              {x, masker.weight, scores, positions, channels,
                                               vectors});
    decide(device, to, Global<const float>(scores));
  } else {
    const int64_t patches = static_cast<int64_t>(g.images) * g.rows * g.columns;
    device.template launch<ScorePatches<T>>(patches, {to, x, masker.weight, channels, vectors});
  }
  if (rates.data != nullptr) mean_rates(device, g, mask, counts, rates);
}

// las_mm::masker_conv1x1: conv1 everywhere, with the scores as by-product of the pass over x, then
// zeros where no kept output reads. (With a stride the masker sees positions that conv1 does not.)
template <class Device, typename T>
void masker_conv1x1(Device& device, const MaskGeometry& g, const Masker<T>& masker,
                    const Global<const T>& x, int height, int width, int channels,
                    int first_stride, const Global<const T>& weight,
                    const Global<const float>& bias, int hidden_channels,
                    const Global<uint8_t>& mask, const Global<float>& rates,
                    const Global<T>& hidden) {
  auto conv1 = one_source(pointwise(x, weight, height, width, channels, first_stride), g.images,
                          g.height, g.width, 1, hidden_channels, bias, hidden);
  if (first_stride != 1) {
    spatial_mask(device, g, masker, x, height, width, channels, first_stride, mask, rates);
    gemm(device, conv1);
  } else {
    const Global<int32_t> counts = device.template allocate<int32_t>(2, "counts");
    conv1.scores = device.template allocate<float>(conv1.positions, "scores");
    conv1.masker_weight = masker.weight;
    gemm<true>(device, conv1);
    const int side = patch_side(g, 1, height, width);
    decide(device, decisions_of(g, masker, height, width, side, mask, counts),
           Global<const float>(conv1.scores));
    mean_rates(device, g, mask, counts, rates);
  }
  typename ClearUnread<T>::Params clear{g, mask, hidden, hidden_channels,
                                        fits_vectors<T>(hidden_channels) && aligned(hidden)};
  device.template launch<ClearUnread<T>>(ceil_div(g.hidden(), ClearUnread<T>::kWarps), clear);
}

// las_mm::gather_conv3x3; `out` is zero before.
template <class Device, typename T>
void gather_conv3x3(Device& device, const MaskGeometry& g, const Global<const uint8_t>& mask,
                    const Global<const T>& hidden, const Global<const T>& weight,
                    const Global<const float>& bias, int c_in, int c_out, int groups,
                    const Global<T>& out) {
  const Lists lists = list_positions(device, g, mask, false, false);
  const Source<T> source{hidden, weight, g.height, g.width, c_in, c_in / groups, 9, g.stride,
                         g.dilation};
  auto p = one_source(source, g.images, g.out_height, g.out_width, groups, c_out / groups, bias,
                      out);
  p.list = lists.kept;
  p.count = lists.count(ListPositions::kKept);
  gemm(device, p);
}

// las_mm::conv1x1_scatter_add_
template <class Device, typename T>
void conv1x1_scatter_add(Device& device, const MaskGeometry& g, const Global<const uint8_t>& mask,
                         const Global<T>& residual, const Global<const T>& x,
                         const Global<const T>& weight, const Global<const float>& bias, int c_in,
                         int c_out) {
  const Lists lists = list_positions(device, g, mask, false, false);
  auto p = one_source(pointwise(x, weight, g.out_height, g.out_width, c_in, 1), g.images,
                      g.out_height, g.out_width, 1, c_out, bias, residual);
  p.residual = residual;
  p.list = lists.kept;
  p.count = lists.count(ListPositions::kKept);
  gemm(device, p);
}

template <typename T>
struct Bottleneck {
  MaskGeometry geometry;
  Global<const uint8_t> mask;  // absent: everything is kept
  Global<const T> x;           // (images, height, width, c_in)
  int height, width, c_in, first_stride;
  int hidden, c_out, groups;
  Global<const T> weights[4];
  Global<const float> biases[4];
  bool downsample;
  Global<const T> shortcut;  // absent, or (images, out_height, out_width, shortcut_channels)
  int shortcut_channels;
  Excitation excitation;
  Global<T> out;  // may be x: then dropped positions stay as they are
};

// What conv3's product adds to the branch.
template <typename T>
void add_shortcut(const Bottleneck<T>& b, GemmParams<T>& conv3) {
  const MaskGeometry& g = b.geometry;
  if (!b.downsample) {
    conv3.residual = b.x;
    return;
  }
  const bool pooled = b.shortcut.data != nullptr;
  conv3.sources[1] =
      pooled ? pointwise(b.shortcut, b.weights[3], g.out_height, g.out_width,
                         b.shortcut_channels, 1)
             : pointwise(b.x, b.weights[3], b.height, b.width, b.c_in, b.first_stride * g.stride);
  conv3.source_count = 2;
  conv3.second_bias = b.biases[3];
}

// Dropped outputs, which are the shortcut alone.
template <class Device, typename T>
void write_dropped(Device& device, const Bottleneck<T>& b, const GemmParams<T>& conv3,
                   const Lists& lists, int which) {
  const MaskGeometry& g = b.geometry;
  const Global<const int32_t> count = lists.count(which);
  if (b.downsample) {
    auto side = one_source(conv3.sources[1], g.images, g.out_height, g.out_width, 1, b.c_out,
                           b.biases[3], b.out);
    side.list = lists.dropped;
    side.count = count;
    gemm(device, side);
  } else {
    const bool vectors = fits_vectors<T>(b.c_out) && aligned(b.x) && aligned(b.out);
    typename ReluRows<T>::Params rest{b.x, b.out, lists.dropped, count, b.c_out, vectors};
    device.template launch<ReluRows<T>>(
        ceil_div(g.outputs() * ceil_div(b.c_out, Chunk<T>::kCount), ReluRows<T>::kThreads), rest);
  }
}

// las_mm::sparse_bottleneck and, where `out` is `x`, las_mm::sparse_bottleneck_.
template <class Device, typename T>
void sparse_bottleneck(Device& device, const Bottleneck<T>& b) {
  const MaskGeometry& g = b.geometry;
  const bool masked = b.mask.data != nullptr, in_place = b.out.data == b.x.data;
  Lists lists;
  if (masked) lists = list_positions(device, g, b.mask, true, !in_place);
  const Global<T> hidden = device.template allocate<T>(g.hidden() * b.hidden, "hidden");
  const Global<T> gathered = device.template allocate<T>(g.outputs() * b.hidden, "gathered");

  auto conv1 = one_source(
      pointwise(b.x, b.weights[0], b.height, b.width, b.c_in, b.first_stride), g.images, g.height,
      g.width, 1, b.hidden, b.biases[0], hidden);
  const Source<T> source2{hidden,    b.weights[1],        g.height, g.width, b.hidden,
                          b.hidden / b.groups, 9, g.stride, g.dilation};
  auto conv2 = one_source(source2, g.images, g.out_height, g.out_width, b.groups,
                          b.hidden / b.groups, b.biases[1], gathered);
  auto conv3 = one_source(
      pointwise(Global<const T>(gathered), b.weights[2], g.out_height, g.out_width, b.hidden, 1),
      g.images, g.out_height, g.out_width, 1, b.c_out, b.biases[2], b.out);
  if (masked) {
    conv1.list = lists.halo;
    conv1.count = lists.count(ListPositions::kHalo);
    conv2.list = conv3.list = lists.kept;
    conv2.count = conv3.count = lists.count(ListPositions::kKept);
  }
  add_shortcut(b, conv3);
  gemm(device, conv1);
  gemm(device, conv2);
  if (b.excitation.weights[0].data != nullptr) {
    KeptRows<T> rows{};
    rows.geometry = g;
    rows.mask = b.mask;
    rows.data = gathered;
    rows.row = rows.channels = b.hidden;
    excite(device, b.excitation, rows, {}, b.hidden);
  }
  gemm(device, conv3);
  if (masked && !in_place) write_dropped(device, b, conv3, lists, ListPositions::kDropped);
}

}  // namespace las_mm::cuda
