// The kernels of las_mm::channel_bottleneck, one after the other; `Device` as in sequences.cuh.
#pragma once

#include "cuda/channels.cuh"
#include "cuda/sequences.cuh"

namespace las_mm::cuda {

struct ChannelSkipping {
  Global<const uint8_t> mask;      // (images, channels / together)
  int together;                    // channels of one decision
  Global<const float> constants[2];  // what skipped channels hold; absent: zero
};

// What follows from a channel mask, on the device.
template <typename T>
struct ImageChannels {
  ChannelGeometry geometry;
  Global<int32_t> indices, firsts, ones, places;
  Global<float> biases[2];
  SelectedConv<T> convs[3];
};

// A product whose images have different channels.
template <typename T, class Device>
void selected_gemm(Device& device, GemmParams<T> params) {
  params.vectors = fits_vectors<T>(params.selection.row) && aligned(params.out) &&
                   aligned(params.residual);
  for (int i = 0; i < params.source_count; ++i) {
    const Source<T>& source = params.sources[i];
    params.vectors = params.vectors && fits_vectors<T>(source.channels) && aligned(source.data);
  }
  TileShape shape = device.choose_tile(params.positions, params.columns, params.groups);
  if (shape == TileShape::kLarge) shape = TileShape::kMedium;  // no registers left for more
  with_tile<T, false>(shape, device.gpu, [&](auto tile) {
    using Tile = decltype(tile);
    if constexpr (Tile::kPanels == 1) {
      const int64_t positions = static_cast<int64_t>(params.height) * params.width;
      const int64_t tiles = ceil_div(positions, Tile::kRows) * params.selection.images *
                            params.groups * ceil_div(params.columns, Tile::kColumns);
      device.template launch<SparseGemm<Selected<Tile>>>(tiles, params);
    }
  });
}

// Lists the channels and gathers their weights and biases.
template <class Device, typename T>
ImageChannels<T> select_channels(Device& device, const Bottleneck<T>& b,
                                 const ChannelSkipping& skip) {
  const int64_t images = b.geometry.images;
  ImageChannels<T> c{};
  c.geometry = {b.geometry.images, b.hidden, b.groups, skip.together};
  const int room = c.geometry.room(), group_room = c.geometry.group_room();
  c.indices = device.template allocate<int32_t>(images * room, "indices");
  c.firsts = device.template allocate<int32_t>(images * (b.groups + 1), "firsts");
  c.ones = device.template allocate<int32_t>(images * b.groups, "ones");
  if (b.excitation.weights[0].data != nullptr) {
    c.places = device.template allocate<int32_t>(images * b.hidden, "places");
  }
  for (auto& bias : c.biases) bias = device.template allocate<float>(images * room, "bias");
  const bool constants = skip.constants[0].data != nullptr;
  device.template launch<ListChannels>(
      images, {c.geometry, skip.mask, constants, {b.biases[0], b.biases[1]}, c.indices, c.firsts,
               c.ones, c.places, {c.biases[0], c.biases[1]}});

  const int each = c.geometry.per_group();
  constexpr bool kFloat = sizeof(T) == 4;
  const auto conv = [&](int i, int groups, int depth, int columns, int taps, bool inputs,
                        bool outputs) {
    const int most_in = !inputs ? depth : groups == 1 ? room : group_room;
    const int most_out = !outputs ? columns : groups == 1 ? room : group_room;
    const int64_t values = packed_numel(most_out, most_in, taps, 1, kFloat);
    const auto to = device.template allocate<T>(images * groups * values, "selected weights");
    c.convs[i] = {b.weights[i], to, groups, depth, columns, taps, inputs, outputs, values,
                  i == 0 ? Global<const float>{} : skip.constants[i - 1]};
  };
  conv(0, 1, b.c_in, b.hidden, 1, false, true);
  conv(1, b.groups, each, each, 9, true, true);
  conv(2, 1, b.hidden, b.c_out, 1, true, false);
  typename SelectWeights<T>::Params select{
      c.geometry, c.indices, c.firsts, {c.convs[0], c.convs[1], c.convs[2]}};
  int64_t slices = 0, sums = 0;
  for (const SelectedConv<T>& one : c.convs) {
    const int64_t sections = images * one.groups;
    const int64_t mine = sections * SelectWeights<T>::slices(one);
    if (mine > slices) slices = mine;
    const int64_t columns = images * b.groups * one.taps *
                            ceil_div(one.outputs ? group_room : one.columns, 32);
    if (one.inputs && columns > sums) sums = columns;
  }
  device.template launch<SelectWeights<T>>(slices, select);
  if (constants) {
    device.template launch<SumConstants<T>>(
        sums, {c.geometry, skip.mask, c.indices, c.firsts, c.ones, {c.convs[1], c.convs[2]}});
  }
  return c;
}

// las_mm::channel_bottleneck and, where `out` is `x`, las_mm::channel_bottleneck_.
template <class Device, typename T>
void channel_bottleneck(Device& device, const Bottleneck<T>& b, const ChannelSkipping& skip) {
  const MaskGeometry& g = b.geometry;
  const bool masked = b.mask.data != nullptr, in_place = b.out.data == b.x.data;
  Lists lists;
  if (masked) lists = list_positions(device, g, b.mask, true, !in_place, g.images);
  const ImageChannels<T> c = select_channels(device, b, skip);
  const int room = c.geometry.room();
  const Global<T> hidden = device.template allocate<T>(g.hidden() * room, "hidden");
  const Global<T> gathered = device.template allocate<T>(g.outputs() * room, "gathered");

  const auto product = [&](int i, const Source<T>& source, int height, int width,
                           const Global<const float>& bias, const Global<T>& out) {
    const SelectedConv<T>& conv = c.convs[i];
    const int most = conv.outputs ? (conv.groups == 1 ? room : c.geometry.group_room())
                                  : conv.columns;
    auto p = one_source(source, g.images, height, width, conv.groups, most, bias, out);
    p.sources[0].selected = conv.inputs;
    p.sources[0].image_values = conv.groups * conv.group_values;
    p.sources[0].group_values = conv.group_values;
    p.selection = {c.firsts, g.images, b.groups, conv.outputs, conv.outputs ? room : b.c_out};
    return p;
  };
  auto conv1 = product(0, pointwise(b.x, Global<const T>(c.convs[0].to), b.height, b.width, b.c_in,
                                    b.first_stride),
                       g.height, g.width, c.biases[0], hidden);
  const Source<T> source2{hidden, c.convs[1].to, g.height, g.width, room, 0, 9, g.stride,
                          g.dilation};
  auto conv2 = product(1, source2, g.out_height, g.out_width, c.biases[1], gathered);
  auto conv3 = product(2, pointwise(Global<const T>(gathered), Global<const T>(c.convs[2].to),
                                    g.out_height, g.out_width, room, 1),
                       g.out_height, g.out_width, b.biases[2], b.out);
  if (masked) {
    conv1.list = lists.halo;
    conv1.count = lists.count(g.images);
    conv2.list = conv3.list = lists.kept;
    conv2.count = conv3.count = lists.count(0);
  }
  add_shortcut(b, conv3);
  selected_gemm(device, conv1);
  selected_gemm(device, conv2);
  if (b.excitation.weights[0].data != nullptr) {
    Global<const int32_t> count = c.firsts;
    count.data += b.groups;
    const KeptRows<T> rows{g, b.mask, gathered, room, room, count, b.groups + 1};
    excite(device, b.excitation, rows, {c.places, c.indices}, b.hidden);
  }
  selected_gemm(device, conv3);
  if (masked && !in_place) write_dropped(device, b, conv3, lists, 2 * g.images);
}

}  // namespace las_mm::cuda
