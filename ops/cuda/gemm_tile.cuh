// What a product of gathered rows works on, and the shape of its tiles; see sparse_gemm.cuh.
#pragma once

#include "cuda/platform.cuh"

namespace las_mm::cuda {

constexpr int kPanel = 64;     // output channels of a full panel of packed weights
constexpr int kPanelPad = 16;  // the last panel's width is a multiple of this
constexpr int kMaxSources = 2;

// What one convolution reads.
template <typename T>
struct Source {
  Global<const T> data;    // (images, height, width, channels)
  Global<const T> weight;  // packed
  int height, width;
  int channels;  // of all groups
  int depth;     // input channels of one group
  int taps;      // 1, or 9 for a 3x3 kernel with padding == dilation
  int stride, dilation;
  // Tiles of Selected only.
  bool selected = false;         // `data` and the depth of `weight` are the image's channels
  int64_t image_values = 0;      // of `weight`, from image to image
  int64_t group_values = 0;      // and from group to group
};

// The channels that each image computes, group by group in memory, see channels.cuh. A product of
// one group takes those of all.
struct Selection {
  Global<const int32_t> firsts;  // (images, groups + 1): where a group's begin; the last: all
  int images, groups;
  bool columns;  // the outputs are such channels, and so are the biases; else only depths
  int row;       // values from row to row of `out`; of selected outputs also of biases
};

template <typename T>
struct GemmParams {
  Source<T> sources[kMaxSources];
  int source_count;
  // Rows: positions in (images, height, width); without a list, all of them.
  Global<const int32_t> list;
  Global<const int32_t> count;  // one value; on the device, as no one waits for it
  int64_t positions;            // images * height * width
  int height, width;
  int groups;
  int columns;  // output channels of one group
  Global<const float> bias, second_bias;  // the second may be absent
  Global<const T> residual;               // absent, or as `out`
  Global<T> out;                          // (images, height, width, groups * columns)
  bool relu;
  bool vectors;  // all rows of sources and outputs allow 16-byte accesses
  // Masker (kScores): the difference of its two logits, without bias, per position.
  Global<const T> masker_weight;  // (2, channels)
  Global<float> scores;
  // Selected tiles: images have lists of their own, one behind the other with room for all of the
  // image's positions, counts, and weights; `columns` is the most that a group may have.
  Selection selection;
};

// The shape of a tile and who computes what of it.
//   T             type of features and weights
//   kRows_        listed positions
//   kPanels_      panels of 64 output channels
//   kWarpRows_,   of a warp (tensor cores): 32 or 64 rows, 32 or 64 columns
//   kWarpColumns
//   kTensorCores  or else plain float32 arithmetic
//   kScores_      also compute the masker's scores
//   kDeep_        for GPUs with much shared memory: twice the depth per step, more of them in flight,
//                 and warps that share a step's depth, so that few rows still make many warps
template <typename T_, int kRows_, int kPanels_, int kWarpRows_, int kWarpColumns_,
          bool kTensorCores_, bool kScores_ = false, bool kDeep_ = false>
struct Tile {
  using T = T_;
  static constexpr int kRows = kRows_;
  static constexpr int kPanels = kPanels_;
  static constexpr int kWarpRows = kWarpRows_;
  static constexpr int kWarpColumns = kWarpColumns_;
  static constexpr bool kTensorCores = kTensorCores_;
  static constexpr bool kScores = kScores_;
  static constexpr bool kDeep = kDeep_;
  static constexpr bool kSelected = false;
  static constexpr int kStages = kDeep && kPanels == 1 ? 4 : 3;

  static constexpr int kColumns = kPanels * kPanel;
  static constexpr int kPair = sizeof(T) == 4 ? 1 : 2;  // values in a packed word
  static constexpr bool kConvert = !kTensorCores && kPair == 2;  // to float32 in shared memory
  static constexpr int kStepWords = kDeep ? 32 : 16;             // depth of a step, in words
  static constexpr int kStep = kTensorCores ? kStepWords * kPair : kStepWords;  // in channels
  // Groups of warps that each multiply a share of a step's depth.
  static constexpr int kSplits = kDeep && kRows == 64 ? 2 : 1;
  static constexpr int kGroupThreads =
      kTensorCores ? kRows / kWarpRows * (kColumns / kWarpColumns) * 32 : kRows * kColumns / 32;
  static constexpr int kThreads = kSplits * kGroupThreads;

  // Strides in words that keep the accesses below free of bank conflicts, and 16-byte aligned.
  static constexpr int kRowStride = kStepWords + 4;
  static constexpr int kPanelStride = kPanel + 8;
  static constexpr int kInputBytes = kRows * kRowStride * 4;
  static constexpr int kPanelBytes = kStepWords * kPanelStride * 4;
  static constexpr int kStageBytes = kInputBytes + kPanels * kPanelBytes;
  static constexpr int kRowBytes = kRows * 16;  // where the rows are, after the stages
  static constexpr int kSharedBytes = kStages * kStageBytes + kRowBytes;
};

// The same tile of a product whose images have different channels.
template <class Tile>
struct Selected : Tile {
  static constexpr bool kSelected = true;
};

// Two packed 16-bit values as float32.
template <typename T>
LAS_MM_DEVICE float low_half(uint32_t word) {
  return to_float(from_bits16<T>(word & 0xffffu));
}
template <typename T>
LAS_MM_DEVICE float high_half(uint32_t word) {
  return to_float(from_bits16<T>(word >> 16));
}

// Values of 16 bytes.
template <typename T>
struct Chunk;
template <>
struct Chunk<float> {
  static constexpr int kCount = 4;
  LAS_MM_DEVICE static float get(const Words& words, int i) { return bits_to_float(words.w[i]); }
  LAS_MM_DEVICE static Words pack(const float* values) {
    Words words;
    LAS_MM_UNROLL
    for (int i = 0; i < 4; ++i) words.w[i] = float_to_bits(values[i]);
    return words;
  }
};
template <typename T>
struct Chunk {
  static constexpr int kCount = 8;
  LAS_MM_DEVICE static float get(const Words& words, int i) {
    return i % 2 ? high_half<T>(words.w[i / 2]) : low_half<T>(words.w[i / 2]);
  }
  LAS_MM_DEVICE static Words pack(const float* values) {
    Words words;
    LAS_MM_UNROLL
    for (int i = 0; i < 4; ++i) {
      words.w[i] = bits16(from_float<T>(values[2 * i])) |
                   bits16(from_float<T>(values[2 * i + 1])) << 16;
    }
    return words;
  }
};

// max(value, 0) that keeps NaN.
LAS_MM_DEVICE float relu(float value) { return value < 0.f ? 0.f : value; }

// The value of a source as a word of a fragment or of shared memory, channel by channel: for maps
// whose rows are not made of whole 16-byte chunks.
template <typename T, int kPair>
LAS_MM_DEVICE uint32_t gather_word(const Global<const T>& data, int64_t first, int k, int depth) {
  if constexpr (kPair == 1) {
    return k < depth ? float_to_bits(to_float(data.load(first + k))) : 0u;
  } else {
    const uint32_t low = k < depth ? bits16(data.load(first + k)) : 0u;
    const uint32_t high = k + 1 < depth ? bits16(data.load(first + k + 1)) : 0u;
    return low | high << 16;
  }
}

}  // namespace las_mm::cuda
