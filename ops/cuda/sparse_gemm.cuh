// The convolutions of a sparse block as one kernel: a matrix product whose rows are gathered through
// a list of positions and written back to the same positions (implicit GEMM; no im2col in memory).
//
//   out[p] = activation(bias + residual[p] + sum over sources, taps: source[p through tap] * weight)
//
// A row of the product is a listed position, a column an output channel, the depth runs over input
// channels of all taps. One block of threads computes a tile of rows x columns; depth comes in
// steps through a ring of stages in shared memory that asynchronous copies fill ahead.
//
// Weights are packed as las_mm/ops/packing.py says. Its 32-bit words (one float32, or a pair of
// 16-bit values of neighbouring input channels) are just what a tensor-core fragment holds, so a
// tile of packed weights is used as it lies in memory.
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
};

// The shape of a tile and who computes what of it.
//   T             type of features and weights
//   kRows_        listed positions
//   kPanels_      panels of 64 output channels
//   kWarpColumns  columns of a warp, of 32 rows; 32 or 64 (tensor cores)
//   kTensorCores  or else plain float32 arithmetic
//   kScores_      also compute the masker's scores
template <typename T_, int kRows_, int kPanels_, int kWarpColumns_, bool kTensorCores_,
          bool kScores_ = false>
struct Tile {
  using T = T_;
  static constexpr int kRows = kRows_;
  static constexpr int kPanels = kPanels_;
  static constexpr int kWarpColumns = kWarpColumns_;
  static constexpr bool kTensorCores = kTensorCores_;
  static constexpr bool kScores = kScores_;
  static constexpr int kStages = 3;

  static constexpr int kColumns = kPanels * kPanel;
  static constexpr int kPair = sizeof(T) == 4 ? 1 : 2;  // values in a packed word
  static constexpr bool kConvert = !kTensorCores && kPair == 2;  // to float32 in shared memory
  static constexpr int kStepWords = 16;                          // depth of a step, in words
  static constexpr int kStep = kTensorCores ? kStepWords * kPair : kStepWords;  // in channels
  static constexpr int kThreads =
      kTensorCores ? kRows / 32 * (kColumns / kWarpColumns) * 32 : kRows * kColumns / 32;

  // Strides in words that keep the accesses below free of bank conflicts, and 16-byte aligned.
  static constexpr int kRowStride = kStepWords + 4;
  static constexpr int kPanelStride = kPanel + 8;
  static constexpr int kInputBytes = kRows * kRowStride * 4;
  static constexpr int kPanelBytes = kStepWords * kPanelStride * 4;
  static constexpr int kStageBytes = kInputBytes + kPanels * kPanelBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
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

template <class Tile>
struct SparseGemm {
  using T = typename Tile::T;
  using Params = GemmParams<T>;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kSharedBytes = Tile::kSharedBytes;
  static constexpr int kMinBlocks = kThreads > 128 ? 2 : 3;  // per multiprocessor

  static constexpr int kRowChunks = Tile::kStepWords / 4;  // of 16 bytes in shared memory
  static constexpr int kRowPasses = Tile::kRows * kRowChunks / kThreads;
  static constexpr int kWordRows = Tile::kConvert ? Tile::kStepWords / 2 : Tile::kStepWords;
  static constexpr int kPanelChunks = kWordRows * (kPanel / 4);
  static constexpr int kWeightChunks = Tile::kPanels * kPanelChunks;
  static constexpr int kWeightPasses = (kWeightChunks + kThreads - 1) / kThreads;
  static_assert(Tile::kRows * kRowChunks % kThreads == 0, "threads must share the rows evenly");

  // The part of the product that a block works on.
  struct Place {
    int first_row;
    int rows;  // listed positions in this tile
    int group;
    int panel;  // the first one
  };

  // Where in the depth the next step begins.
  struct Step {
    int source = 0, tap = 0, channel = 0;
  };

  // The rows whose inputs a thread copies: image, y and x of each, or image < 0.
  struct Rows {
    int image[kRowPasses], y[kRowPasses], x[kRowPasses];
    int position[kRowPasses];  // in the source through the current tap, or -1 in the padding
  };

  LAS_MM_DEVICE static int position_of(const Params& p, int row) {
    return p.list.data == nullptr ? row : p.list.load(row);
  }

  LAS_MM_DEVICE static void find_rows(const Params& p, const Place& place, Rows& rows) {
    LAS_MM_UNROLL
    for (int i = 0; i < kRowPasses; ++i) {
      const int row = thread_index() / kRowChunks + i * (kThreads / kRowChunks);
      rows.image[i] = -1;
      rows.y[i] = rows.x[i] = 0;
      if (row < place.rows) {
        const int position = position_of(p, place.first_row + row);
        rows.x[i] = position % p.width;
        rows.y[i] = position / p.width % p.height;
        rows.image[i] = position / p.width / p.height;
      }
    }
  }

  LAS_MM_DEVICE static void find_positions(const Params& p, const Step& step, Rows& rows) {
    const Source<T>& s = p.sources[step.source];
    const int down = s.taps == 1 ? 0 : (step.tap / 3 - 1) * s.dilation;
    const int right = s.taps == 1 ? 0 : (step.tap % 3 - 1) * s.dilation;
    LAS_MM_UNROLL
    for (int i = 0; i < kRowPasses; ++i) {
      const int y = rows.y[i] * s.stride + down, x = rows.x[i] * s.stride + right;
      const bool inside =
          rows.image[i] >= 0 && y >= 0 && y < s.height && x >= 0 && x < s.width;
      rows.position[i] = inside ? (rows.image[i] * s.height + y) * s.width + x : -1;
    }
  }

  // Fill a stage: inputs of `kRows` rows and weights of `kPanels` panels for one step of depth.
  LAS_MM_DEVICE static void fill(const Params& p, const Place& place, const Step& step,
                                 const Rows& rows, int stage) {
    const Source<T>& s = p.sources[step.source];
    const int base = stage * Tile::kStageBytes;
    const int chunk = thread_index() % kRowChunks;
    LAS_MM_UNROLL
    for (int i = 0; i < kRowPasses; ++i) {
      const int row = thread_index() / kRowChunks + i * (kThreads / kRowChunks);
      const int at = base + (row * Tile::kRowStride + chunk * 4) * 4;
      const int64_t first =
          static_cast<int64_t>(rows.position[i]) * s.channels + place.group * s.depth;
      fill_input(p, s, first, rows.position[i] >= 0, step.channel, chunk, at);
    }
    const int padded = (p.columns + kPanelPad - 1) / kPanelPad * kPanelPad;
    const int word_depth = (s.depth + Tile::kPair - 1) / Tile::kPair;
    LAS_MM_UNROLL
    for (int i = 0; i < kWeightPasses; ++i) {
      const int index = thread_index() + i * kThreads;
      if (kWeightChunks % kThreads != 0 && index >= kWeightChunks) break;
      const int panel = index / kPanelChunks, rest = index % kPanelChunks;
      const int word_row = rest / (kPanel / 4), column = rest % (kPanel / 4) * 4;
      const int first_column = (place.panel + panel) * kPanel;
      const int left = padded - first_column;
      const int width = left < kPanel ? left : kPanel;
      const int k = step.channel / Tile::kPair + word_row;
      const bool valid = column < width && k < word_depth;
      // In words: groups, then panels, taps, depth, columns.
      const int word = (place.group * padded + first_column) * s.taps * word_depth +
                       (step.tap * word_depth + k) * width + column;
      fill_weight(s, word * Tile::kPair, valid, word_row, column,
                  base + Tile::kInputBytes + panel * Tile::kPanelBytes);
    }
  }

  LAS_MM_DEVICE static void fill_input(const Params& p, const Source<T>& s, int64_t first,
                                       bool inside, int channel, int chunk, int at) {
    if constexpr (Tile::kConvert) {
      const int k = channel + chunk * 4;  // four channels become 16 bytes
      float values[4] = {};
      LAS_MM_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (inside && k + i < s.depth) values[i] = to_float(s.data.load(first + k + i));
      }
      shared_store(at, Chunk<float>::pack(values));
    } else {
      const int k = channel + chunk * 4 * Tile::kPair;
      if (p.vectors) {
        copy16_async(at, s.data, first + k, inside && k < s.depth);
      } else {
        Words words{};
        LAS_MM_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int word = k + i * Tile::kPair;
          if (inside) words.w[i] = gather_word<T, Tile::kPair>(s.data, first, word, s.depth);
        }
        shared_store(at, words);
      }
    }
  }

  LAS_MM_DEVICE static void fill_weight(const Source<T>& s, int first, bool valid, int word_row,
                                        int column, int at) {
    if constexpr (Tile::kConvert) {
      const Words words = valid ? s.weight.load16(first) : Words{};
      float low[4], high[4];
      LAS_MM_UNROLL
      for (int i = 0; i < 4; ++i) {
        low[i] = low_half<T>(words.w[i]);
        high[i] = high_half<T>(words.w[i]);
      }
      const int row = at + (2 * word_row * Tile::kPanelStride + column) * 4;
      shared_store(row, Chunk<float>::pack(low));
      shared_store(row + Tile::kPanelStride * 4, Chunk<float>::pack(high));
    } else {
      copy16_async(at + (word_row * Tile::kPanelStride + column) * 4, s.weight, first, valid);
    }
  }

  LAS_MM_DEVICE static void advance(const Params& p, Step& step) {
    step.channel += Tile::kStep;
    const Source<T>& s = p.sources[step.source];
    if (step.channel < s.depth) return;
    step.channel = 0;
    if (++step.tap < s.taps) return;
    step.tap = 0;
    ++step.source;
  }

  // The thread's part of the tile, and its product. Tensor cores: a warp has 32 rows in two
  // fragments of 16; output column n of fragment j is column (j / 4) * 32 + n * 4 + j % 4, so that
  // a thread reads its weights, and owns its outputs, in runs of consecutive columns.
  struct TensorPart {
    static constexpr int kFragments = Tile::kWarpColumns / 8;
    static constexpr int kRowRuns = 4;                        // rows per thread
    static constexpr int kRuns = Tile::kWarpColumns / 32;     // runs of columns per row
    static constexpr int kRun = 8;                            // columns
    float sums[2][kFragments][4];

    LAS_MM_DEVICE static int lane() { return thread_index() % 32; }
    LAS_MM_DEVICE static int warp_row() {
      return thread_index() / 32 % (Tile::kRows / 32) * 32;
    }
    LAS_MM_DEVICE static int warp_column() {
      return thread_index() / 32 / (Tile::kRows / 32) * Tile::kWarpColumns;
    }

    LAS_MM_DEVICE void clear() {
      LAS_MM_UNROLL
      for (int m = 0; m < 2; ++m) {
        LAS_MM_UNROLL
        for (int j = 0; j < kFragments; ++j) {
          LAS_MM_UNROLL
          for (int i = 0; i < 4; ++i) sums[m][j][i] = 0.f;
        }
      }
    }

    LAS_MM_DEVICE void multiply(int stage) {
      const int base = stage * Tile::kStageBytes;
      const int panel = warp_column() / kPanel, column = warp_column() % kPanel;
      const int weights = base + Tile::kInputBytes + panel * Tile::kPanelBytes;
      LAS_MM_UNROLL
      for (int half_step = 0; half_step < 2; ++half_step) {
        uint32_t a[2][4];
        LAS_MM_UNROLL
        for (int m = 0; m < 2; ++m) {
          const int row = warp_row() + m * 16 + lane() % 16;
          const int word = half_step * 8 + lane() / 16 * 4;
          load_matrices(a[m], base + (row * Tile::kRowStride + word) * 4);
          round(a[m]);
        }
        LAS_MM_UNROLL
        for (int run = 0; run < kRuns; ++run) {
          const int at = weights + ((half_step * 8 + lane() % 4) * Tile::kPanelStride + column +
                                    run * 32 + lane() / 4 * 4) *
                                       4;
          const Words low = shared_load<Words>(at);
          const Words high = shared_load<Words>(at + 4 * Tile::kPanelStride * 4);
          LAS_MM_UNROLL
          for (int j = 0; j < 4; ++j) {
            uint32_t b[2] = {low.w[j], high.w[j]};
            round(b);
            LAS_MM_UNROLL
            for (int m = 0; m < 2; ++m) {
              TensorCore<T>::multiply_add(sums[m][run * 4 + j], a[m], b);
            }
          }
        }
      }
    }

    template <int kCount>
    LAS_MM_DEVICE static void round(uint32_t (&words)[kCount]) {
      if constexpr (Tile::kPair == 1) {
        LAS_MM_UNROLL
        for (int i = 0; i < kCount; ++i) words[i] = round_to_tf32(words[i]);
      }
    }

    // Row `i` of the thread, and its run `run` of kRun consecutive columns.
    LAS_MM_DEVICE static int row(int i) {
      return warp_row() + i / 2 * 16 + i % 2 * 8 + lane() / 4;
    }
    LAS_MM_DEVICE static int column(int run) {
      return warp_column() + run * 32 + lane() % 4 * 8;
    }
    LAS_MM_DEVICE float value(int i, int run, int c) const {
      return sums[i / 2][run * 4 + c % 4][i % 2 * 2 + c / 4];
    }
  };

  // Without tensor cores a thread has 8 rows of 4 columns.
  struct PlainPart {
    static constexpr int kRowRuns = 8;
    static constexpr int kRuns = 1;
    static constexpr int kRun = 4;
    float sums[kRowRuns][kRun];

    LAS_MM_DEVICE static int row(int i) {
      constexpr int kLines = kThreads / (Tile::kColumns / kRun);
      return thread_index() / (Tile::kColumns / kRun) + i * kLines;
    }
    LAS_MM_DEVICE static int column(int) {
      return thread_index() % (Tile::kColumns / kRun) * kRun;
    }
    LAS_MM_DEVICE float value(int i, int, int c) const { return sums[i][c]; }

    LAS_MM_DEVICE void clear() {
      LAS_MM_UNROLL
      for (int i = 0; i < kRowRuns; ++i) {
        LAS_MM_UNROLL
        for (int c = 0; c < kRun; ++c) sums[i][c] = 0.f;
      }
    }

    LAS_MM_DEVICE void multiply(int stage) {
      const int base = stage * Tile::kStageBytes;
      const int panel = column(0) / kPanel;
      const int weights = base + Tile::kInputBytes + panel * Tile::kPanelBytes +
                          column(0) % kPanel * 4;
      LAS_MM_UNROLL
      for (int k = 0; k < Tile::kStepWords; k += 4) {
        Words b[4];
        LAS_MM_UNROLL
        for (int i = 0; i < 4; ++i) {
          b[i] = shared_load<Words>(weights + (k + i) * Tile::kPanelStride * 4);
        }
        LAS_MM_UNROLL
        for (int r = 0; r < kRowRuns; ++r) {
          const Words a = shared_load<Words>(base + (row(r) * Tile::kRowStride + k) * 4);
          LAS_MM_UNROLL
          for (int i = 0; i < 4; ++i) {
            LAS_MM_UNROLL
            for (int c = 0; c < kRun; ++c) {
              sums[r][c] += bits_to_float(a.w[i]) * bits_to_float(b[i].w[c]);
            }
          }
        }
      }
    }
  };

  template <bool kTensor, class Dummy = void>
  struct PartOf {
    using type = TensorPart;
  };
  template <class Dummy>
  struct PartOf<false, Dummy> {
    using type = PlainPart;
  };
  using Part = typename PartOf<Tile::kTensorCores>::type;

  // The masker reads what conv1 reads: the same rows in shared memory, in float32.
  static constexpr int kThreadsPerRow = kThreads / Tile::kRows;
  LAS_MM_DEVICE static float score_step(const Params& p, int channel, int stage) {
    constexpr int kWords = Tile::kStepWords / kThreadsPerRow;
    const int depth = p.sources[0].depth;
    const int row = thread_index() / kThreadsPerRow;
    const int first = thread_index() % kThreadsPerRow * kWords;
    const int at = stage * Tile::kStageBytes + (row * Tile::kRowStride + first) * 4;
    constexpr int kValues = Tile::kTensorCores ? Tile::kPair : 1;  // in a word
    float sum = 0.f;
    LAS_MM_UNROLL
    for (int i = 0; i < kWords; i += 4) {
      const Words words = shared_load<Words>(at + i * 4);
      LAS_MM_UNROLL
      for (int j = 0; j < 4 * kValues; ++j) {
        const int k = channel + (first + i) * kValues + j;
        if (k < depth) {
          float value;
          if constexpr (kValues == 2) {
            value = Chunk<T>::get(words, j);
          } else {
            value = bits_to_float(words.w[j]);
          }
          sum += value *
                 (to_float(p.masker_weight.load(k)) - to_float(p.masker_weight.load(depth + k)));
        }
      }
    }
    return sum;
  }

  LAS_MM_DEVICE static void write_scores(const Params& p, const Place& place, float sum) {
    LAS_MM_UNROLL
    for (int lanes = 1; lanes < kThreadsPerRow; lanes *= 2) sum += shuffle_xor(sum, lanes);
    const int row = thread_index() / kThreadsPerRow;
    if (thread_index() % kThreadsPerRow == 0 && row < place.rows) {
      p.scores.store(position_of(p, place.first_row + row), sum);
    }
  }

  LAS_MM_DEVICE static void write(const Params& p, const Place& place, const Part& part) {
    const int channels = p.groups * p.columns;
    LAS_MM_UNROLL
    for (int i = 0; i < Part::kRowRuns; ++i) {
      const int row = Part::row(i);
      if (row >= place.rows) continue;
      const int64_t start = static_cast<int64_t>(position_of(p, place.first_row + row)) * channels;
      LAS_MM_UNROLL
      for (int run = 0; run < Part::kRuns; ++run) {
        const int first = place.panel * kPanel + Part::column(run);  // in the group
        const int valid = p.columns - first < Part::kRun ? p.columns - first : Part::kRun;
        if (valid <= 0) continue;
        const int channel = place.group * p.columns + first;
        float values[Part::kRun];
        LAS_MM_UNROLL
        for (int c = 0; c < Part::kRun; ++c) {
          float value = part.value(i, run, c);
          if (c < valid) {
            value += p.bias.load(channel + c);
            if (p.second_bias.data != nullptr) value += p.second_bias.load(channel + c);
          }
          values[c] = value;
        }
        write_run(p, start + channel, valid, values);
      }
    }
  }

  LAS_MM_DEVICE static void write_run(const Params& p, int64_t at, int valid,
                                      float (&values)[Part::kRun]) {
    constexpr int kChunk = Chunk<T>::kCount;
    if constexpr (Part::kRun % kChunk == 0) {
      if (p.vectors && valid == Part::kRun) {
        LAS_MM_UNROLL
        for (int first = 0; first < Part::kRun; first += kChunk) {
          if (p.residual.data != nullptr) {
            const Words residual = p.residual.load16(at + first);
            LAS_MM_UNROLL
            for (int c = 0; c < kChunk; ++c) values[first + c] += Chunk<T>::get(residual, c);
          }
          if (p.relu) {
            LAS_MM_UNROLL
            for (int c = 0; c < kChunk; ++c) values[first + c] = relu(values[first + c]);
          }
          p.out.store16(at + first, Chunk<T>::pack(values + first));
        }
        return;
      }
    }
    LAS_MM_UNROLL
    for (int c = 0; c < Part::kRun; ++c) {
      if (c >= valid) break;
      float value = values[c];
      if (p.residual.data != nullptr) value += to_float(p.residual.load(at + c));
      p.out.store(at + c, from_float<T>(p.relu ? relu(value) : value));
    }
  }

  LAS_MM_DEVICE static int steps(const Params& p) {
    int count = 0;
    for (int i = 0; i < p.source_count; ++i) {
      count += p.sources[i].taps * ((p.sources[i].depth + Tile::kStep - 1) / Tile::kStep);
    }
    return count;
  }

  LAS_MM_DEVICE static void compute(const Params& p, const Place& place, int step_count) {
    Rows rows;
    find_rows(p, place, rows);
    Step next;
    int filled = 0;
    const auto fill_next = [&] {
      if (filled < step_count) {
        if (next.channel == 0) find_positions(p, next, rows);
        fill(p, place, next, rows, filled % Tile::kStages);
        advance(p, next);
        ++filled;
      }
      commit_copies();  // also an empty group, so that counting them stays simple
    };
    for (int i = 0; i < Tile::kStages - 1; ++i) fill_next();
    Part part;
    part.clear();
    float score = 0.f;
    LAS_MM_NO_UNROLL
    for (int step = 0; step < step_count; ++step) {
      wait_copies<Tile::kStages - 2>();
      sync_block();  // this stage is complete, and no one reads the one that is filled next
      fill_next();
      const int stage = step % Tile::kStages;
      part.multiply(stage);
      if constexpr (Tile::kScores) {
        if (place.panel == 0) score += score_step(p, step * Tile::kStep, stage);
      }
    }
    if constexpr (Tile::kScores) {
      if (place.panel == 0) write_scores(p, place, score);
    }
    write(p, place, part);
  }

  LAS_MM_DEVICE static void run(const Params& p) {
    const int rows = p.list.data == nullptr ? static_cast<int>(p.positions) : p.count.load(0);
    const int panels = (p.columns + Tile::kColumns - 1) / Tile::kColumns;
    const int64_t tiles = ceil_div(rows, Tile::kRows) * p.groups * panels;
    const int step_count = steps(p);
    // Blocks that run at the same time share rows, which then come out of the L2 cache.
    LAS_MM_NO_UNROLL
    for (int64_t tile = block_index(); tile < tiles; tile += block_count()) {
      const int first_row = static_cast<int>(tile / (p.groups * panels)) * Tile::kRows;
      const int left = rows - first_row;
      const Place place{first_row, left < Tile::kRows ? left : Tile::kRows,
                        static_cast<int>(tile / panels % p.groups),
                        static_cast<int>(tile % panels) * Tile::kPanels};
      compute(p, place, step_count);
      wait_copies<0>();
      sync_block();  // the next tile overwrites the stages
    }
  }
};

}  // namespace las_mm::cuda
