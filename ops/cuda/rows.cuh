// What is left to do at positions that a block does not compute.
#pragma once

#include "cuda/gemm_tile.cuh"
#include "cuda/platform.cuh"
#include "cuda/positions.cuh"

namespace las_mm::cuda {

// out[p] = relu(x[p]) at listed positions.
template <typename T>
struct ReluRows {
  struct Params {
    Global<const T> x;  // (positions, channels)
    Global<T> out;
    Global<const int32_t> list, count;
    int channels;
    bool vectors;
  };
  static constexpr int kThreads = 256;
  static constexpr int kSharedBytes = 0;
  static constexpr int kMinBlocks = 4;

  LAS_MM_DEVICE static void run(const Params& p) {
    constexpr int kChunk = Chunk<T>::kCount;
    const int64_t chunks = ceil_div(p.channels, kChunk), total = p.count.load(0) * chunks;
    const int64_t first = block_index() * kThreads + thread_index();
    for (int64_t i = first; i < total; i += block_count() * kThreads) {
      const int c = static_cast<int>(i % chunks) * kChunk;
      const int64_t at = static_cast<int64_t>(p.list.load(i / chunks)) * p.channels + c;
      if (p.vectors) {
        const Words words = p.x.load16(at);
        float values[kChunk];
        LAS_MM_UNROLL
        for (int k = 0; k < kChunk; ++k) values[k] = relu(Chunk<T>::get(words, k));
        p.out.store16(at, Chunk<T>::pack(values));
      } else {
        for (int k = 0; k < kChunk && c + k < p.channels; ++k) {
          p.out.store(at + k, from_float<T>(relu(to_float(p.x.load(at + k)))));
        }
      }
    }
  }
};

// hidden[p] = 0 wherever no kept output reads conv1's output.
template <typename T>
struct ClearUnread {
  struct Params {
    MaskGeometry geometry;
    Global<const uint8_t> mask;
    Global<T> hidden;  // (images, height, width, channels)
    int channels;
    bool vectors;
  };
  static constexpr int kThreads = 256;
  static constexpr int kSharedBytes = 0;
  static constexpr int kMinBlocks = 4;
  static constexpr int kWarps = kThreads / 32;

  LAS_MM_DEVICE static void run(const Params& p) {
    constexpr int kChunk = Chunk<T>::kCount;
    const MaskGeometry& g = p.geometry;
    const int lane = thread_index() % 32;
    const int64_t first = block_index() * kWarps + thread_index() / 32;
    for (int64_t i = first; i < g.hidden(); i += block_count() * kWarps) {  // a warp per position
      const int x = static_cast<int>(i % g.width);
      const int y = static_cast<int>(i / g.width % g.height);
      if (is_read(g, p.mask, static_cast<int>(i / g.width / g.height), y, x)) continue;
      if (p.vectors) {
        for (int c = lane * kChunk; c < p.channels; c += 32 * kChunk) {
          p.hidden.store16(i * p.channels + c, Words{});
        }
      } else {
        for (int c = lane; c < p.channels; c += 32) {
          p.hidden.store(i * p.channels + c, from_float<T>(0.f));
        }
      }
    }
  }
};

}  // namespace las_mm::cuda
