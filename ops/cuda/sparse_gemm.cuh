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

#include <type_traits>

#include "cuda/gemm_product.cuh"
#include "cuda/gemm_tile.cuh"
#include "cuda/platform.cuh"

namespace las_mm::cuda {

template <class Tile>
struct SparseGemm {
  using T = typename Tile::T;
  using Params = GemmParams<T>;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kSharedBytes = Tile::kSharedBytes;
  static constexpr int kMinBlocks =  // per multiprocessor
      kThreads > 128 || Tile::kWarpRows > 32 ? 2 : 3;

  static constexpr int kRowChunks = Tile::kStepWords / 4;  // of 16 bytes in shared memory
  static constexpr int kRowPasses = Tile::kRows * kRowChunks / kThreads;
  static constexpr int kWordRows = Tile::kConvert ? Tile::kStepWords / 2 : Tile::kStepWords;
  static constexpr int kPanelChunks = kWordRows * (kPanel / 4);
  static constexpr int kWeightPasses = (kPanelChunks + kThreads - 1) / kThreads;  // of a panel
  static_assert(Tile::kRows * kRowChunks % kThreads == 0, "threads must share the rows evenly");

  // The part of the product that a block works on.
  struct Place {
    int first_row;
    int rows;  // listed positions in this tile
    int group;
    int panel;  // the first one
    // Of Selected tiles.
    int image = 0;
    int first = 0;     // of the group's channels
    int selected = 0;  // how many there are
  };

  // Of one group at this place: output channels, and channels of a source.
  LAS_MM_DEVICE static int columns_of(const Params& p, const Place& place) {
    if constexpr (Tile::kSelected) return p.selection.columns ? place.selected : p.columns;
    return p.columns;
  }
  LAS_MM_DEVICE static int depth_of(const Source<T>& s, const Place& place) {
    if constexpr (Tile::kSelected) return s.selected ? place.selected : s.depth;
    return s.depth;
  }

  // The group's first channel in a row of the outputs, and where an output channel's bias is.
  LAS_MM_DEVICE static int first_output(const Params& p, const Place& place) {
    if constexpr (Tile::kSelected) return p.selection.columns ? place.first : 0;
    return place.group * p.columns;
  }
  LAS_MM_DEVICE static int bias_of(const Params& p, const Place& place, int channel) {
    if constexpr (Tile::kSelected) {
      return p.selection.columns ? place.image * p.selection.row + channel : channel;
    }
    return channel;
  }

  // Where in the depth the next step begins.
  struct Step {
    int source = 0, tap = 0, channel = 0;
  };

  // What fill() needs of the current source and tap, in registers: a kernel's parameters under a
  // computed index come slowly, and everything waits for them.
  struct Now {
    Global<const T> data;    // from the group's first channel on
    Global<const T> weight;  // from the tile's first panel on
    int depth, word_depth;   // of one group
    int panel_words;         // of a panel of all taps
    int channels;            // of all groups
    // Of the rows whose inputs a thread copies, in the source through the current tap; -1 in the
    // padding.
    int position[kRowPasses];

    LAS_MM_DEVICE int64_t at(int i, int k) const {
      return static_cast<int64_t>(position[i]) * channels + k;
    }
  };

  LAS_MM_DEVICE static int position_of(const Params& p, const Place& place, int row) {
    if constexpr (Tile::kSelected) row += place.image * p.height * p.width;
    return p.list.data == nullptr ? row : p.list.load(row);
  }

  // Image, y and x of each row, or image < 0, and its position: in shared memory, as registers are
  // scarce.
  static constexpr int kRowsAt = Tile::kStages * Tile::kStageBytes;
  LAS_MM_DEVICE static void find_rows(const Params& p, const Place& place) {
    for (int row = thread_index(); row < Tile::kRows; row += kThreads) {
      uint32_t image = ~0u, y = 0, x = 0, at = ~0u;
      if (row < place.rows) {
        const int position = position_of(p, place, place.first_row + row);
        at = static_cast<uint32_t>(position);
        x = static_cast<uint32_t>(position % p.width);
        y = static_cast<uint32_t>(position / p.width % p.height);
        image = static_cast<uint32_t>(position / p.width / p.height);
      }
      shared_store(kRowsAt + row * 16, Words{{image, y, x, at}});
    }
    sync_block();  // the rows are there
  }

  LAS_MM_DEVICE static void find_source(const Params& p, const Place& place, int source,
                                        Now& now) {
    const Source<T>& s = p.sources[source];
    now.data = s.data;
    now.weight = s.weight;
    now.depth = depth_of(s, place);
    now.channels = s.channels;
    int first_channel = place.group * s.depth;
    if constexpr (Tile::kSelected) first_channel = s.selected ? place.first : 0;
    now.data.data += first_channel;
    now.word_depth = (now.depth + Tile::kPair - 1) / Tile::kPair;
    int group = place.group;
    if constexpr (Tile::kSelected) {
      now.weight.data += place.image * s.image_values + place.group * s.group_values;
      group = 0;
    }
    // In words: groups, then panels, taps, depth, columns.
    const int words = s.taps * now.word_depth;
    now.panel_words = kPanel * words;
    now.weight.data +=
        (group * padded_columns(p, place) * words + place.panel * now.panel_words) * Tile::kPair;
  }

  LAS_MM_DEVICE static void find_positions(const Params& p, const Place& place, const Step& step,
                                           Now& now) {
    const Source<T>& s = p.sources[step.source];
    const int down = s.taps == 1 ? 0 : (step.tap / 3 - 1) * s.dilation;
    const int right = s.taps == 1 ? 0 : (step.tap % 3 - 1) * s.dilation;
    LAS_MM_UNROLL
    for (int i = 0; i < kRowPasses; ++i) {
      const int row = thread_index() / kRowChunks + i * (kThreads / kRowChunks);
      const Words at = shared_load<Words>(kRowsAt + row * 16);
      const int image = static_cast<int>(at.w[0]);
      const int y = static_cast<int>(at.w[1]) * s.stride + down;
      const int x = static_cast<int>(at.w[2]) * s.stride + right;
      const bool inside = image >= 0 && y >= 0 && y < s.height && x >= 0 && x < s.width;
      now.position[i] = inside ? (image * s.height + y) * s.width + x : -1;
    }
  }

  LAS_MM_DEVICE static int padded_columns(const Params& p, const Place& place) {
    return (columns_of(p, place) + kPanelPad - 1) / kPanelPad * kPanelPad;
  }

  // Fill a stage: inputs of `kRows` rows and weights of `kPanels` panels for one step of depth.
  LAS_MM_DEVICE static void fill(const Params& p, const Place& place, const Step& step,
                                 const Now& now, int stage) {
    const int base = stage * Tile::kStageBytes;
    fill_inputs(p, step, now, base);
    const int padded = padded_columns(p, place);
    LAS_MM_UNROLL
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const int left = padded - (place.panel + panel) * kPanel;
      const int width = left < kPanel ? left : kPanel;
      LAS_MM_UNROLL
      for (int i = 0; i < kWeightPasses; ++i) {
        const int index = thread_index() + i * kThreads;
        if (kPanelChunks % kThreads != 0 && index >= kPanelChunks) break;
        const int word_row = index / (kPanel / 4), column = index % (kPanel / 4) * 4;
        const int k = step.channel / Tile::kPair + word_row;
        const bool valid = column < width && k < now.word_depth;
        const int word =
            panel * now.panel_words + (step.tap * now.word_depth + k) * width + column;
        fill_weight(now.weight, word * Tile::kPair, valid, word_row, column,
                    base + Tile::kInputBytes + panel * Tile::kPanelBytes);
      }
    }
  }

  LAS_MM_DEVICE static void fill_inputs(const Params& p, const Step& step, const Now& now,
                                        int base) {
    const int chunk = thread_index_again() % kRowChunks;
    const int at = base + (thread_index() / kRowChunks * Tile::kRowStride + chunk * 4) * 4;
    constexpr int kPassBytes = kThreads / kRowChunks * Tile::kRowStride * 4;
    if constexpr (!Tile::kConvert) {
      const int k = step.channel + chunk * 4 * Tile::kPair;
      if (p.vectors) {
        LAS_MM_UNROLL
        for (int i = 0; i < kRowPasses; ++i) {
          // Neighbouring taps read the same rows: through L1, where the weights do not go.
          copy16_async<true>(at + i * kPassBytes, now.data, now.at(i, k),
                             now.position[i] >= 0 && k < now.depth);
        }
        return;
      }
    }
    LAS_MM_UNROLL
    for (int i = 0; i < kRowPasses; ++i) {
      const int64_t first = now.position[i] < 0 ? -1 : now.at(i, 0);
      fill_input(now.data, now.depth, first, step.channel, chunk, at + i * kPassBytes);
    }
  }

  // Sixteen bytes, value by value.
  LAS_MM_DEVICE static void fill_input(const Global<const T>& data, int depth, int64_t first,
                                       int channel, int chunk, int at) {
    const bool inside = first >= 0;
    if constexpr (Tile::kConvert) {
      const int k = channel + chunk * 4;  // four channels become 16 bytes
      float values[4] = {};
      LAS_MM_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (inside && k + i < depth) values[i] = to_float(data.load(first + k + i));
      }
      shared_store(at, Chunk<float>::pack(values));
    } else {
      const int k = channel + chunk * 4 * Tile::kPair;
      Words words{};
      LAS_MM_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (inside) {
          words.w[i] = gather_word<T, Tile::kPair>(data, first, k + i * Tile::kPair, depth);
        }
      }
      shared_store(at, words);
    }
  }

  LAS_MM_DEVICE static void fill_weight(const Global<const T>& weight, int first, bool valid,
                                        int word_row, int column, int at) {
    if constexpr (Tile::kConvert) {
      const Words words = valid ? weight.load16(first) : Words{};
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
      copy16_async(at + (word_row * Tile::kPanelStride + column) * 4, weight, first, valid);
    }
  }

  // To the next step, of which `now` then knows.
  LAS_MM_DEVICE static void advance(const Params& p, const Place& place, Step& step, Now& now) {
    step.channel += Tile::kStep;
    if (step.channel < now.depth) return;
    step.channel = 0;
    if (++step.tap == p.sources[step.source].taps) {
      step.tap = 0;
      if (++step.source == p.source_count) return;
      find_source(p, place, step.source, now);
    }
    find_positions(p, place, step, now);
  }

  using Part =
      std::conditional_t<Tile::kTensorCores, TensorPart<Tile>, PlainPart<Tile>>;

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
      p.scores.store(position_of(p, place, place.first_row + row), sum);
    }
  }

  // Where row `i` of the thread has its outputs from column `at` of the tile on; < 0: it has none.
  LAS_MM_DEVICE static int64_t output_at(const Params& p, const Place& place, int i, int at) {
    const int position = shared_load<int>(kRowsAt + Part::row(i) * 16 + 12);
    const int channels = Tile::kSelected ? p.selection.row : p.groups * p.columns;
    const int64_t first = static_cast<int64_t>(position) * channels + first_output(p, place) +
                          place.panel * kPanel + at;
    return Part::row(i) < place.rows ? first : -1;
  }

  // Outputs that the thread has from column `at` of the tile on, of kRun.
  LAS_MM_DEVICE static int valid_columns(const Params& p, const Place& place, int at) {
    const int left = columns_of(p, place) - place.panel * kPanel - at;
    return left < Part::kRun ? left : Part::kRun;
  }

  // While the product is computed, the residual comes near.
  LAS_MM_DEVICE static void prefetch(const Params& p, const Place& place) {
    if (p.residual.data == nullptr) return;
    LAS_MM_UNROLL
    for (int i = 0; i < Part::kRowRuns; ++i) {
      LAS_MM_UNROLL
      for (int run = 0; run < Part::kRuns; ++run) {
        const int at = Part::column(run);
        const int64_t to = output_at(p, place, i, at);
        if (to >= 0 && valid_columns(p, place, at) > 0) p.residual.prefetch(to);
      }
    }
  }

  LAS_MM_DEVICE static void write(const Params& p, const Place& place, const Part& part) {
    LAS_MM_UNROLL
    for (int run = 0; run < Part::kRuns; ++run) {
      const int at = Part::column(run), valid = valid_columns(p, place, at);
      if (valid <= 0) continue;
      const int channel = first_output(p, place) + place.panel * kPanel + at;
      float bias[Part::kRun];
      LAS_MM_UNROLL
      for (int c = 0; c < Part::kRun; ++c) {
        bias[c] = 0.f;
        if (c < valid) {
          bias[c] = p.bias.load(bias_of(p, place, channel) + c);
          if (p.second_bias.data != nullptr) bias[c] += p.second_bias.load(channel + c);
        }
      }
      if constexpr (Part::kRun % Chunk<T>::kCount == 0) {
        if (p.vectors && valid == Part::kRun) {
          write_vectors(p, place, part, run, at, bias);
          continue;
        }
      }
      LAS_MM_UNROLL
      for (int i = 0; i < Part::kRowRuns; ++i) {
        const int64_t to = output_at(p, place, i, at);
        if (to < 0) continue;
        LAS_MM_UNROLL
        for (int c = 0; c < Part::kRun; ++c) {
          if (c >= valid) break;
          float value = part.value(i, run, c) + bias[c];
          if (p.residual.data != nullptr) value += to_float(p.residual.load(to + c));
          p.out.store(to + c, from_float<T>(p.relu ? relu(value) : value));
        }
      }
    }
  }

  // A run of all rows. Several residuals are asked for before the first is used: as they may be
  // what is written, the compiler cannot move a load before a store.
  LAS_MM_DEVICE static void write_vectors(const Params& p, const Place& place, const Part& part,
                                          int run, int at, const float (&bias)[Part::kRun]) {
    constexpr int kChunk = Chunk<T>::kCount, kChunks = Part::kRun / kChunk;
    constexpr int kMost = 4 / kChunks;  // as many rows as there are registers for
    constexpr int kBatch = Part::kRowRuns < kMost ? Part::kRowRuns : kMost;
    LAS_MM_UNROLL
    for (int first = 0; first < Part::kRowRuns; first += kBatch) {
      Words residual[kBatch][kChunks];
      LAS_MM_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        const int64_t from = output_at(p, place, first + i, at);
        LAS_MM_UNROLL
        for (int c = 0; c < kChunks; ++c) {
          residual[i][c] = Words{};
          if (p.residual.data != nullptr && from >= 0) {
            residual[i][c] = p.residual.load16(from + c * kChunk);
          }
        }
      }
      LAS_MM_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        const int64_t to = output_at(p, place, first + i, at);
        if (to < 0) continue;
        LAS_MM_UNROLL
        for (int c = 0; c < kChunks; ++c) {
          float values[kChunk];
          LAS_MM_UNROLL
          for (int k = 0; k < kChunk; ++k) {
            const float value = part.value(first + i, run, c * kChunk + k) +
                                bias[c * kChunk + k] + Chunk<T>::get(residual[i][c], k);
            values[k] = p.relu ? relu(value) : value;
          }
          p.out.store16(to + c * kChunk, Chunk<T>::pack(values));
        }
      }
    }
  }

  LAS_MM_DEVICE static int steps(const Params& p, const Place& place) {
    int count = 0;
    for (int i = 0; i < p.source_count; ++i) {
      const int depth = depth_of(p.sources[i], place);
      count += p.sources[i].taps * ((depth + Tile::kStep - 1) / Tile::kStep);
    }
    return count;
  }

  LAS_MM_DEVICE static void compute(const Params& p, const Place& place, int step_count) {
    find_rows(p, place);
    Now now;
    Step next;
    if constexpr (Tile::kSelected) {
      if (depth_of(p.sources[0], place) == 0) next.source = 1;
    }
    if (next.source < p.source_count) {
      find_source(p, place, next.source, now);
      find_positions(p, place, next, now);
    }
    const auto fill_next = [&](int step) {
      if (step < step_count) {
        fill(p, place, next, now, step % Tile::kStages);
        advance(p, place, next, now);
      }
      commit_copies();  // also an empty group, so that counting them stays simple
    };
    for (int i = 0; i < Tile::kStages - 1; ++i) fill_next(i);
    prefetch(p, place);
    Part part;
    part.clear();
    float score = 0.f;
    LAS_MM_NO_UNROLL
    for (int step = 0; step < step_count; ++step) {
      wait_copies<Tile::kStages - 2>();
      sync_block();  // this stage is complete, and no one reads the one that is filled next
      fill_next(step + Tile::kStages - 1);
      const int stage = step % Tile::kStages;
      part.multiply(stage);
      if constexpr (Tile::kScores) {
        if (place.panel == 0) score += score_step(p, step * Tile::kStep, stage);
      }
    }
    if constexpr (Tile::kScores) {
      if (place.panel == 0) write_scores(p, place, score);
    }
    part.exchange();
    write(p, place, part);
  }

  LAS_MM_DEVICE static void run(const Params& p) {
    if constexpr (Tile::kSelected) {
      run_selected(p);
    } else {
      run_all(p);
    }
  }

  LAS_MM_DEVICE static void run_all(const Params& p) {
    const int rows = p.list.data == nullptr ? static_cast<int>(p.positions) : p.count.load(0);
    const int panels = (p.columns + Tile::kColumns - 1) / Tile::kColumns;
    // All counts of tiles fit 32 bits as long as the outputs fit a GPU's memory.
    const int tiles = (rows + Tile::kRows - 1) / Tile::kRows * p.groups * panels;
    const int step_count = steps(p, {});
    // Blocks that run at the same time share rows, which then come out of the L2 cache.
    LAS_MM_NO_UNROLL
    for (int tile = static_cast<int>(block_index()); tile < tiles;
         tile += static_cast<int>(block_count())) {
      const int first_row = tile / (p.groups * panels) * Tile::kRows;
      const int left = rows - first_row;
      const Place place{first_row, left < Tile::kRows ? left : Tile::kRows,
                        tile / panels % p.groups, tile % panels * Tile::kPanels};
      finish(p, place, step_count);
    }
  }

  // Tiles of all that there may be, of which those beyond an image's rows or channels are passed
  // over. As the ones to compute come first within a panel, all blocks get their share of them, and
  // of the images, which are dealt out anew for each tile of rows.
  LAS_MM_DEVICE static void run_selected(const Params& p) {
    const Selection& s = p.selection;
    const int positions = p.height * p.width;
    const int row_tiles = (positions + Tile::kRows - 1) / Tile::kRows;
    const int panels = (p.columns + Tile::kColumns - 1) / Tile::kColumns;
    const int sections = s.images * p.groups;
    LAS_MM_NO_UNROLL
    for (int tile = static_cast<int>(block_index()); tile < panels * row_tiles * sections;
         tile += static_cast<int>(block_count())) {
      const int turn = tile / sections;
      const int section = (tile + turn) % sections;
      Place place{turn % row_tiles * Tile::kRows, 0, section % p.groups,
                  turn / row_tiles * Tile::kPanels, section / p.groups};
      const int rows = p.list.data == nullptr ? positions : p.count.load(place.image);
      const int left = rows - place.first_row;
      place.rows = left < Tile::kRows ? left : Tile::kRows;
      const int64_t firsts = static_cast<int64_t>(place.image) * (s.groups + 1);
      const bool all = p.groups != s.groups;
      place.first = all ? 0 : s.firsts.load(firsts + place.group);
      place.selected = s.firsts.load(firsts + (all ? s.groups : place.group + 1)) - place.first;
      if (left <= 0 || place.panel * kPanel >= columns_of(p, place)) continue;
      finish(p, place, steps(p, place));
    }
  }

  LAS_MM_DEVICE static void finish(const Params& p, const Place& place, int step_count) {
    compute(p, place, step_count);
    wait_copies<0>();
    sync_block();  // the next tile overwrites the stages
  }
};

}  // namespace las_mm::cuda
