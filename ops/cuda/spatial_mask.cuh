// The masker: a score per position, a decision per patch, and the mean rates.
#pragma once

#include "cuda/gemm_tile.cuh"
#include "cuda/platform.cuh"

namespace las_mm::cuda {

// scores[position] = sum over channels of x * (weight of logit 0 - weight of logit 1). One warp per
// position: the features are read once, in order.
template <typename T>
struct ScorePositions {
  struct Params {
    Global<const T> x;       // (positions, channels)
    Global<const T> weight;  // (2, channels)
    Global<float> scores;
    int64_t positions;
    int channels;
    bool vectors;  // rows allow 16-byte accesses
  };
  static constexpr int kThreads = 256;
  static constexpr int kSharedBytes = 0;
  static constexpr int kMinBlocks = 4;
  static constexpr int kWarps = kThreads / 32;

  LAS_MM_DEVICE static void run(const Params& p) {
    constexpr int kChunk = Chunk<T>::kCount;
    const int lane = thread_index() % 32;
    const int64_t first = block_index() * kWarps + thread_index() / 32;
    for (int64_t position = first; position < p.positions; position += block_count() * kWarps) {
      const int64_t row = position * p.channels;
      float sum = 0.f;
      if (p.vectors) {
        LAS_MM_UNROLL_TWICE  // more would not fit the registers
        for (int c = lane * kChunk; c < p.channels; c += 32 * kChunk) {
          const Words x = p.x.load16(row + c);
          const Words keep = p.weight.load16(c), drop = p.weight.load16(p.channels + c);
          LAS_MM_UNROLL
          for (int i = 0; i < kChunk; ++i) {
            sum += Chunk<T>::get(x, i) * (Chunk<T>::get(keep, i) - Chunk<T>::get(drop, i));
          }
        }
      } else {
        for (int c = lane; c < p.channels; c += 32) {
          sum += to_float(p.x.load(row + c)) *
                 (to_float(p.weight.load(c)) - to_float(p.weight.load(p.channels + c)));
        }
      }
      LAS_MM_UNROLL
      for (int lanes = 1; lanes < 32; lanes *= 2) sum += shuffle_xor(sum, lanes);
      if (lane == 0) p.scores.store(position, sum);
    }
  }
};

// What a decision is made of, beside the sum over its patch.
template <typename T>
struct Decisions {
  Global<const T> bias;        // (2)
  Global<const float> offset;  // absent, or (offset_images, rows, columns)
  Global<uint8_t> mask;        // (images, rows, columns)
  Global<int32_t> counts;      // absent, or set to zero for the kernels that follow
  int height, width;
  int side;  // of a patch, in input positions
  int images, rows, columns;
  int offset_images;  // 1 or `images`

  LAS_MM_DEVICE int64_t patches() const { return static_cast<int64_t>(images) * rows * columns; }
};

// A patch of the input.
struct Patch {
  int tall, wide;
  int64_t first;  // position

  template <typename T>
  LAS_MM_DEVICE Patch(const Decisions<T>& p, int64_t patch) {
    const int column = static_cast<int>(patch % p.columns);
    const int row = static_cast<int>(patch / p.columns % p.rows);
    const int64_t image = patch / p.columns / p.rows;
    const int top = row * p.side, left = column * p.side;
    tall = p.height - top < p.side ? p.height - top : p.side;
    wide = p.width - left < p.side ? p.width - left : p.side;
    first = (image * p.height + top) * p.width + left;
  }
};

// mask[patch] = mean of the patch's scores + bias + offset >= 0, where each thread of the block has
// a part of the sum. The sum has a fixed order.
template <int kWarps, typename T>
LAS_MM_DEVICE void decide_patch(const Decisions<T>& p, int64_t index, const Patch& patch,
                                float sum) {
  LAS_MM_UNROLL
  for (int lanes = 1; lanes < 32; lanes *= 2) sum += shuffle_xor(sum, lanes);
  if constexpr (kWarps > 1) {
    if (thread_index() % 32 == 0) shared_store(thread_index() / 32 * 4, sum);
    sync_block();
    sum = 0.f;
    LAS_MM_UNROLL
    for (int warp = 0; warp < kWarps; ++warp) sum += shared_load<float>(warp * 4);
    sync_block();  // the next patch's sums come to the same place
  }
  if (thread_index() == 0) {
    float keep = sum / (static_cast<float>(patch.tall) * static_cast<float>(patch.wide)) +
                 (to_float(p.bias.load(0)) - to_float(p.bias.load(1)));
    if (p.offset.data != nullptr) {
      const int64_t grid = static_cast<int64_t>(p.rows) * p.columns;
      keep += p.offset.load(p.offset_images == 1 ? index % grid : index);
    }
    p.mask.store(index, keep >= 0.f ? 1 : 0);  // NaN drops
  }
}

// Decisions from scores. A block per patch: of one warp, or of eight where patches are large, as in
// layer mode.
template <typename T, int kThreads_>
struct DecidePatches {
  struct Params {
    Decisions<T> to;
    Global<const float> scores;  // (images, height, width)
  };
  static constexpr int kThreads = kThreads_;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kSharedBytes = kWarps * 4;
  static constexpr int kMinBlocks = 4;

  LAS_MM_DEVICE static void run(const Params& p) {
    if (block_index() == 0 && thread_index() < 2 && p.to.counts.data != nullptr) {
      p.to.counts.store(thread_index(), 0);
    }
    for (int64_t i = block_index(); i < p.to.patches(); i += block_count()) {
      const Patch patch(p.to, i);
      float sum = 0.f;
      for (int64_t k = thread_index(); k < static_cast<int64_t>(patch.tall) * patch.wide;
           k += kThreads) {
        sum += p.scores.load(patch.first + k / patch.wide * p.to.width + k % patch.wide);
      }
      decide_patch<kWarps>(p.to, i, patch, sum);
    }
  }
};

// Decisions from features: a block per patch reads all of it. Threads that share a chunk of channels
// share the patch's positions.
template <typename T>
struct ScorePatches {
  struct Params {
    Decisions<T> to;
    Global<const T> x;       // (images, height, width, channels)
    Global<const T> weight;  // (2, channels)
    int channels;
    bool vectors;  // rows allow 16-byte accesses
  };
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kSharedBytes = kWarps * 4;
  static constexpr int kMinBlocks = 4;
  static constexpr int kChunk = Chunk<T>::kCount;

  LAS_MM_DEVICE static void run(const Params& p) {
    if (block_index() == 0 && thread_index() < 2 && p.to.counts.data != nullptr) {
      p.to.counts.store(thread_index(), 0);
    }
    const int chunks = (p.channels + kChunk - 1) / kChunk;
    int across = 1;  // threads side by side
    while (across < chunks && across < kThreads) across *= 2;
    const int first = thread_index() / across;
    for (int64_t i = block_index(); i < p.to.patches(); i += block_count()) {
      const Patch patch(p.to, i);
      float sum = 0.f;
      for (int chunk = thread_index() % across; chunk < chunks; chunk += across) {
        sum += score(p, patch, chunk * kChunk, first, kThreads / across);
      }
      decide_patch<kWarps>(p.to, i, patch, sum);
    }
  }

  // Of one chunk of channels, every `step`th position.
  LAS_MM_DEVICE static float score(const Params& p, const Patch& patch, int channel, int first,
                                   int step) {
    float weight[kChunk];
    LAS_MM_UNROLL
    for (int k = 0; k < kChunk; ++k) {
      weight[k] = channel + k < p.channels
                      ? to_float(p.weight.load(channel + k)) -
                            to_float(p.weight.load(p.channels + channel + k))
                      : 0.f;
    }
    float sum = 0.f;
    const int positions = patch.tall * patch.wide;
    LAS_MM_UNROLL_FOUR
    for (int k = first; k < positions; k += step) {
      const int64_t position = patch.first + k / patch.wide * p.to.width + k % patch.wide;
      const int64_t at = position * p.channels + channel;
      if (p.vectors) {
        const Words x = p.x.load16(at);
        LAS_MM_UNROLL
        for (int c = 0; c < kChunk; ++c) sum += Chunk<T>::get(x, c) * weight[c];
      } else {
        LAS_MM_UNROLL
        for (int c = 0; c < kChunk; ++c) {
          if (channel + c < p.channels) sum += to_float(p.x.load(at + c)) * weight[c];
        }
      }
    }
    return sum;
  }
};

// rates = kept outputs and conv1 outputs that they read, as shares of all.
struct MeanRates {
  struct Params {
    Global<const int32_t> counts;  // kept, halo
    Global<float> rates;
    int64_t outputs, hidden;  // positions of all images
  };
  static constexpr int kThreads = 32;
  static constexpr int kSharedBytes = 0;
  static constexpr int kMinBlocks = 1;

  LAS_MM_DEVICE static void run(const Params& p) {
    if (thread_index() == 0) {
      p.rates.store(0, static_cast<float>(p.counts.load(0)) / static_cast<float>(p.outputs));
    } else if (thread_index() == 1) {
      p.rates.store(1, static_cast<float>(p.counts.load(1)) / static_cast<float>(p.hidden));
    }
  }
};

}  // namespace las_mm::cuda
