// The multiplications of a tile: a thread's share of its sums, on tensor cores or without. Both
// read stages of shared memory as sparse_gemm.cuh fills them, and say which rows and runs of columns
// the thread owns.
#pragma once

#include "cuda/gemm_tile.cuh"
#include "cuda/platform.cuh"

namespace las_mm::cuda {

// The thread's part of the tile, and its product. Tensor cores: a warp has 32 rows in two
// fragments of 16; output column n of fragment j is column (j / 4) * 32 + n * 4 + j % 4, so that
// a thread reads its weights, and owns its outputs, in runs of consecutive columns.
template <class Tile>
struct TensorPart {
  using T = typename Tile::T;
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
