// Channel mask -> the channels that each image computes, and the weights of these alone.
//
// An image's wanted channels lie side by side, group by group of conv2, each group filled up to
// whole 16 bytes. Filling channels have no weights, so they are zero and add nothing. Where skipped
// channels hold constants, a group has one more channel that is 1: its weights are what the skipped
// channels add to a sum, and as it is a channel of the map, conv2's padding has none of it.
#pragma once

#include "cuda/gemm_tile.cuh"
#include "cuda/platform.cuh"
#include "cuda/positions.cuh"

namespace las_mm::cuda {

constexpr int kFill = 8;  // channels; whole 16 bytes of every type

// The block's hidden channels, their decisions, and what follows from these.
struct ChannelGeometry {
  int images, channels, groups;
  int together;  // channels of one decision

  LAS_MM_HOST_DEVICE int per_group() const { return channels / groups; }
  // The most that a group or an image may have.
  LAS_MM_HOST_DEVICE int group_room() const { return (per_group() + kFill - 1) / kFill * kFill; }
  LAS_MM_HOST_DEVICE int room() const { return groups * group_room(); }
};

LAS_MM_DEVICE bool is_wanted(const ChannelGeometry& g, const Global<const uint8_t>& mask,
                             int image, int channel) {
  return mask.load(image * (g.channels / g.together) + channel / g.together) != 0;
}

// One warp per image lists its channels, in order, with their biases.
struct ListChannels {
  enum { kFilling = -1, kOne = -2 };
  struct Params {
    ChannelGeometry geometry;
    Global<const uint8_t> mask;  // (images, channels / together)
    bool constants;              // whether skipped channels hold something
    Global<const float> biases[2];  // of conv1 and conv2
    Global<int32_t> indices;     // (images, room): the channel, kFilling or kOne
    Global<int32_t> firsts;      // (images, groups + 1)
    Global<int32_t> ones;        // (images, groups): the place of kOne, or -1
    Global<int32_t> places;      // absent, or (images, channels): the place of each, or -1
    Global<float> listed[2];     // (images, room): the biases
  };
  static constexpr int kThreads = 32;
  static constexpr int kSharedBytes = 0;
  static constexpr int kMinBlocks = 1;

  LAS_MM_DEVICE static void run(const Params& p) {
    for (int64_t i = block_index(); i < p.geometry.images; i += block_count()) {
      list(p, static_cast<int>(i));
    }
  }

  LAS_MM_DEVICE static void put(const Params& p, int at, int channel) {
    p.indices.store(at, channel);
    LAS_MM_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float rest = channel == kOne ? 1.f : 0.f;
      p.listed[i].store(at, channel >= 0 ? p.biases[i].load(channel) : rest);
    }
  }

  LAS_MM_DEVICE static void list(const Params& p, int image) {
    const ChannelGeometry& g = p.geometry;
    const int lane = thread_index(), begin = image * g.room();
    int next = 0;
    for (int group = 0; group < g.groups; ++group) {
      const int first = next;
      if (lane == 0) p.firsts.store(image * (g.groups + 1) + group, first);
      for (int start = 0; start < g.per_group(); start += 32) {
        const int channel = group * g.per_group() + start + lane;
        const bool valid = start + lane < g.per_group();
        const bool wanted = valid && is_wanted(g, p.mask, image, channel);
        const uint32_t lanes = ballot(wanted);
        const int at = next + count_bits(lanes & ((1u << lane) - 1u));
        if (wanted) put(p, begin + at, channel);
        if (valid && p.places.data != nullptr) {
          p.places.store(image * g.channels + channel, wanted ? at : -1);
        }
        next += count_bits(lanes);
      }
      const bool one = p.constants && next - first < g.per_group();
      if (lane == 0) {
        p.ones.store(image * g.groups + group, one ? next : -1);
        if (one) put(p, begin + next, kOne);
      }
      next += one;
      const int filled = first + (next - first + kFill - 1) / kFill * kFill;
      if (next + lane < filled) put(p, begin + next + lane, kFilling);
      next = filled;
    }
    if (lane == 0) p.firsts.store(image * (g.groups + 1) + g.groups, next);
  }
};

// Where a value of a packed convolution of one group lies; las_mm/ops/packing.py.
template <typename T>
LAS_MM_DEVICE int packed_at(int depth, int columns, int taps, int tap, int k, int column) {
  constexpr int kPair = sizeof(T) == 4 ? 1 : 2;
  const int rows = (depth + kPair - 1) / kPair;
  const int panel = column / kPanel * kPanel;
  const int left = (columns + kPanelPad - 1) / kPanelPad * kPanelPad - panel;
  const int width = left < kPanel ? left : kPanel;
  const int word = panel * taps * rows + (tap * rows + k / kPair) * width + column - panel;
  return word * kPair + k % kPair;
}

// One convolution of the block, whole and with an image's channels.
template <typename T>
struct SelectedConv {
  Global<const T> from;
  Global<T> to;
  int groups;          // conv2's, or 1
  int depth, columns;  // of one group of `from`
  int taps;
  bool inputs, outputs;  // which of the two are selected
  int64_t group_values;  // of `to`; room for one group
  // Of skipped inputs, or absent.
  Global<const float> constants;

  LAS_MM_HOST_DEVICE int64_t from_values() const {
    return packed_numel(columns, depth, taps, 1, sizeof(T) == 4);
  }
};

// The channels of an image, of a group or of all: where they begin and how many they are.
struct Range {
  int first, count;
};
template <typename T>
LAS_MM_DEVICE Range range_of(const ChannelGeometry& g, const SelectedConv<T>& conv,
                             const Global<const int32_t>& firsts, int image, int group) {
  const int at = image * (g.groups + 1);
  const bool all = conv.groups != g.groups;
  const int first = all ? 0 : firsts.load(at + group);
  return {first, firsts.load(at + (all ? g.groups : group + 1)) - first};
}

// Gathers the packed weights of all convolutions, 16 bytes per thread: four columns of one row of
// words.
template <typename T>
struct SelectWeights {
  struct Params {
    ChannelGeometry geometry;
    Global<const int32_t> indices, firsts;
    SelectedConv<T> convs[3];
  };
  static constexpr int kThreads = 256;
  static constexpr int kSharedBytes = 0;
  static constexpr int kMinBlocks = 4;
  static constexpr int kPair = sizeof(T) == 4 ? 1 : 2;
  static constexpr int kChunk = 4 * kPair;       // values
  static constexpr int kSlice = 2 * kThreads;    // chunks that a block gathers at a time

  // Slices of a group of a convolution.
  LAS_MM_HOST_DEVICE static int64_t slices(const SelectedConv<T>& conv) {
    return ceil_div(conv.group_values / kChunk, kSlice);
  }

  LAS_MM_DEVICE static void run(const Params& p) {
    LAS_MM_NO_UNROLL
    for (int i = 0; i < 3; ++i) {
      const SelectedConv<T>& conv = p.convs[i];
      const int64_t each = slices(conv), tasks = each * p.geometry.images * conv.groups;
      for (int64_t task = block_index(); task < tasks; task += block_count()) {
        const int section = static_cast<int>(task / each);
        gather(p, conv, section / conv.groups, section % conv.groups,
               static_cast<int>(task % each) * kSlice);
      }
    }
  }

  LAS_MM_DEVICE static void gather(const Params& p, const SelectedConv<T>& conv, int image,
                                   int group, int begin) {
    const ChannelGeometry& g = p.geometry;
    const Range range = range_of(g, conv, p.firsts, image, group);
    const int depth = conv.inputs ? range.count : conv.depth;
    const int columns = conv.outputs ? range.count : conv.columns;
    const int rows = (depth + kPair - 1) / kPair;
    const int padded = (columns + kPanelPad - 1) / kPanelPad * kPanelPad;
    const int total = conv.taps * rows * (padded / 4);
    const int end = begin + kSlice < total ? begin + kSlice : total;
    const int panel_chunks = conv.taps * rows * (kPanel / 4);
    const int64_t list = static_cast<int64_t>(image) * g.room() + range.first;
    const int base = conv.groups == 1 ? 0 : group * g.per_group();
    const int64_t to = (static_cast<int64_t>(image) * conv.groups + group) * conv.group_values;
    Global<const T> from = conv.from;
    from.data += group * conv.from_values();
    for (int i = begin + thread_index(); i < end; i += kThreads) {
      const int panel = i / panel_chunks, left = padded - panel * kPanel;
      const int width = (left < kPanel ? left : kPanel) / 4;  // in chunks
      const int rest = i - panel * panel_chunks, row = rest / width;  // of all taps
      const int column = panel * kPanel + (rest - row * width) * 4;
      const int tap = row / rows;
      T values[kChunk];
      LAS_MM_UNROLL
      for (int half = 0; half < kPair; ++half) {
        const int k = (row - tap * rows) * kPair + half;
        int in = k < conv.depth ? k : -1;
        if (conv.inputs) in = wanted(p, list + k, base);
        LAS_MM_UNROLL
        for (int c = 0; c < 4; ++c) {
          int out = column + c < columns ? column + c : -1;
          if (conv.outputs && out >= 0) out = wanted(p, list + out, base);
          values[c * kPair + half] =
              in >= 0 && out >= 0
                  ? from.load(packed_at<T>(conv.depth, conv.columns, conv.taps, tap, in, out))
                  : from_float<T>(0.f);
        }
      }
      conv.to.store16(to + static_cast<int64_t>(i) * kChunk, words_of(values));
    }
  }

  // The channel of a place in the group that begins with channel `base`, or -1.
  LAS_MM_DEVICE static int wanted(const Params& p, int64_t at, int base) {
    const int channel = p.indices.load(at);
    return channel >= 0 ? channel - base : -1;
  }

  LAS_MM_DEVICE static Words words_of(const T (&values)[kChunk]) {
    Words words;
    LAS_MM_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (kPair == 1) {
        words.w[i] = float_to_bits(values[i]);
      } else {
        words.w[i] = bits16(values[2 * i]) | bits16(values[2 * i + 1]) << 16;
      }
    }
    return words;
  }
};

// What skipped channels add through the channel that is 1: its weights, after SelectWeights. A
// block sums 32 columns of one tap; lanes are columns, warps share the channels.
template <typename T>
struct SumConstants {
  struct Params {
    ChannelGeometry geometry;
    Global<const uint8_t> mask;
    Global<const int32_t> indices, firsts, ones;
    SelectedConv<T> convs[2];
  };
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kSharedBytes = kThreads * 4;
  static constexpr int kMinBlocks = 4;

  LAS_MM_DEVICE static void run(const Params& p) {
    const ChannelGeometry& g = p.geometry;
    LAS_MM_NO_UNROLL
    for (int i = 0; i < 2; ++i) {
      const SelectedConv<T>& conv = p.convs[i];
      const int most = conv.outputs ? g.group_room() : conv.columns;
      const int64_t slices = ceil_div(most, 32) * conv.taps;
      const int64_t tasks = slices * g.images * g.groups;
      for (int64_t task = block_index(); task < tasks; task += block_count()) {
        const int section = static_cast<int>(task / slices);
        const int slice = static_cast<int>(task % slices);
        sum(p, conv, section / g.groups, section % g.groups, slice / conv.taps * 32,
            slice % conv.taps);
      }
    }
  }

  LAS_MM_DEVICE static void sum(const Params& p, const SelectedConv<T>& conv, int image, int group,
                                int first_column, int tap) {
    const ChannelGeometry& g = p.geometry;
    const int product = conv.groups == 1 ? 0 : group;
    const Range range = range_of(g, conv, p.firsts, image, product);
    const int columns = conv.outputs ? range.count : conv.columns;
    const int one = p.ones.load(image * g.groups + group);
    if (one < 0 || first_column >= columns) return;  // the whole block
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int column = first_column + lane;
    int out = column < columns ? column : -1;
    if (conv.outputs && out >= 0) {
      out = p.indices.load(static_cast<int64_t>(image) * g.room() + range.first + column);
      if (out >= 0 && conv.groups != 1) out -= group * g.per_group();
    }
    float part = 0.f;
    if (out >= 0) {
      const int64_t from = product * conv.from_values();
      const int before = conv.groups == 1 ? group * g.per_group() : 0;
      for (int i = warp; i < g.per_group(); i += kWarps) {
        const int channel = group * g.per_group() + i;
        if (is_wanted(g, p.mask, image, channel)) continue;
        const float constant = to_float(from_float<T>(conv.constants.load(channel)));
        part += constant * to_float(conv.from.load(from + packed_at<T>(conv.depth, conv.columns,
                                                                       conv.taps, tap, before + i,
                                                                       out)));
      }
    }
    shared_store(thread_index() * 4, part);
    sync_block();
    if (warp == 0 && out >= 0) {
      float total = 0.f;
      LAS_MM_UNROLL
      for (int i = 0; i < kWarps; ++i) total += shared_load<float>((i * 32 + lane) * 4);
      const int64_t to =
          (static_cast<int64_t>(image) * conv.groups + product) * conv.group_values;
      conv.to.store(to + packed_at<T>(range.count, columns, conv.taps, tap, one - range.first,
                                      column),
                    from_float<T>(total));
    }
    sync_block();  // the next sums come to the same place
  }
};

}  // namespace las_mm::cuda
