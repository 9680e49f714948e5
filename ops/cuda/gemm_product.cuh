// The multiplications of a tile: a thread's share of its sums, on tensor cores or without. Both
// read stages of shared memory as sparse_gemm.cuh fills them, and say which rows and runs of columns
// the thread owns.
#pragma once

#include "cuda/gemm_tile.cuh"
#include "cuda/platform.cuh"

namespace las_mm::cuda {

// The thread's part of the tile, and its product. Tensor cores: a warp has fragments of 16 rows;
// output column n of fragment j is column (j / 4) * 32 + n * 4 + j % 4, so that a thread reads its
// weights, and owns its outputs, in runs of consecutive columns. Where several groups of warps share
// the depth, exchange() adds their sums, after which each group owns a share of the rows.
template <class Tile>
struct TensorPart {
  using T = typename Tile::T;
  static constexpr int kHeight = Tile::kWarpRows / 16;      // fragments
  static constexpr int kFragments = Tile::kWarpColumns / 8;
  static constexpr int kSplits = Tile::kSplits;
  static constexpr int kWarpRuns = 2 * kHeight;             // rows per thread before the exchange
  static constexpr int kRowRuns = kWarpRuns / kSplits;      // and after it
  static constexpr int kRuns = Tile::kWarpColumns / 32;     // runs of columns per row
  static constexpr int kRun = 8;                            // columns
  static_assert(kWarpRuns % kSplits == 0);
  float sums[kHeight][kFragments][4];
  float totals[kRowRuns][kRuns * kRun];  // if split

  LAS_MM_DEVICE static int lane() { return thread_index() % 32; }
  LAS_MM_DEVICE static int split() { return thread_index() / Tile::kGroupThreads; }
  LAS_MM_DEVICE static int warp() { return thread_index() % Tile::kGroupThreads / 32; }
  LAS_MM_DEVICE static int warp_row() {
    return warp() % (Tile::kRows / Tile::kWarpRows) * Tile::kWarpRows;
  }
  LAS_MM_DEVICE static int warp_column() {
    return warp() / (Tile::kRows / Tile::kWarpRows) * Tile::kWarpColumns;
  }

  LAS_MM_DEVICE void clear() {
    LAS_MM_UNROLL
    for (int m = 0; m < kHeight; ++m) {
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
    for (int turn = 0; turn < Tile::kStepWords / 8 / kSplits; ++turn) {
      const int first_word = (turn * kSplits + split()) * 8;
      uint32_t a[kHeight][4];
      LAS_MM_UNROLL
      for (int m = 0; m < kHeight; ++m) {
        const int row = warp_row() + m * 16 + lane() % 16;
        const int word = first_word + lane() / 16 * 4;
        load_matrices(a[m], base + (row * Tile::kRowStride + word) * 4);
        round(a[m]);
      }
      LAS_MM_UNROLL
      for (int run = 0; run < kRuns; ++run) {
        const int at = weights + ((first_word + lane() % 4) * Tile::kPanelStride + column +
                                  run * 32 + lane() / 4 * 4) *
                                     4;
        const Words low = shared_load<Words>(at);
        const Words high = shared_load<Words>(at + 4 * Tile::kPanelStride * 4);
        LAS_MM_UNROLL
        for (int j = 0; j < 4; ++j) {
          uint32_t b[2] = {low.w[j], high.w[j]};
          round(b);
          LAS_MM_UNROLL
          for (int m = 0; m < kHeight; ++m) {
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

  // Where four values of a row and of a group of warps are in shared memory, which the stages no
  // longer need.
  static constexpr int kChunks = kRuns * kRun / 4;
  static_assert(kSplits == 1 ||
                kSplits * kWarpRuns * kChunks * Tile::kGroupThreads * 16 <=
                                      Tile::kStages * Tile::kStageBytes);
  LAS_MM_DEVICE static int exchanged(int from, int row, int chunk) {
    return (((from * kWarpRuns + row) * kChunks + chunk) * Tile::kGroupThreads +
            thread_index() % Tile::kGroupThreads) *
           16;
  }
  LAS_MM_DEVICE void exchange() {
    if constexpr (kSplits > 1) {
      sync_block();  // no one reads the stages any more
      LAS_MM_UNROLL
      for (int i = 0; i < kWarpRuns; ++i) {
        LAS_MM_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          float values[4];
          LAS_MM_UNROLL
          for (int c = 0; c < 4; ++c) values[c] = sum(i, chunk / 2, chunk % 2 * 4 + c);
          shared_store(exchanged(split(), i, chunk), Chunk<float>::pack(values));
        }
      }
      sync_block();  // all sums are there
      LAS_MM_UNROLL
      for (int i = 0; i < kRowRuns; ++i) {
        LAS_MM_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          float total[4] = {};
          LAS_MM_UNROLL
          for (int from = 0; from < kSplits; ++from) {
            const Words words =
                shared_load<Words>(exchanged(from, split() * kRowRuns + i, chunk));
            LAS_MM_UNROLL
            for (int c = 0; c < 4; ++c) total[c] += bits_to_float(words.w[c]);
          }
          LAS_MM_UNROLL
          for (int c = 0; c < 4; ++c) totals[i][chunk * 4 + c] = total[c];
        }
      }
    }
  }

  // Row `i` of the thread, and its run `run` of kRun consecutive columns.
  LAS_MM_DEVICE static int row(int i) {
    const int of_warp = kSplits > 1 ? split() * kRowRuns + i : i;
    return warp_row() + of_warp / 2 * 16 + of_warp % 2 * 8 + lane() / 4;
  }
  LAS_MM_DEVICE static int column(int run) {
    return warp_column() + run * 32 + lane() % 4 * 8;
  }
  LAS_MM_DEVICE float sum(int i, int run, int c) const {
    return sums[i / 2][run * 4 + c % 4][i % 2 * 2 + c / 4];
  }
  LAS_MM_DEVICE float value(int i, int run, int c) const {
    if constexpr (kSplits > 1) return totals[i][run * kRun + c];
    return sum(i, run, c);
  }
};

// Without tensor cores a thread has 8 rows of 4 columns.
template <class Tile>
struct PlainPart {
  static constexpr int kRowRuns = 8;
  static constexpr int kRuns = 1;
  static constexpr int kRun = 4;
  float sums[kRowRuns][kRun];

  LAS_MM_DEVICE static int row(int i) {
    constexpr int kLines = Tile::kThreads / (Tile::kColumns / kRun);
    return thread_index() / (Tile::kColumns / kRun) + i * kLines;
  }
  LAS_MM_DEVICE static int column(int) {
    return thread_index() % (Tile::kColumns / kRun) * kRun;
  }
  LAS_MM_DEVICE float value(int i, int, int c) const { return sums[i][c]; }
  LAS_MM_DEVICE void exchange() {}

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

}  // namespace las_mm::cuda
