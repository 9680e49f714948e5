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

  LAS_MM_DEVICE int patches() const { return images * rows * columns; }

  // What is added to the mean of a patch.
  LAS_MM_DEVICE float shift(int patch) const {
    const float difference = to_float(bias.load(0)) - to_float(bias.load(1));
    if (offset.data == nullptr) return difference;
    return difference + offset.load(offset_images == 1 ? patch % (rows * columns) : patch);
  }
};

// A patch of the input.
struct Patch {
  int tall, wide;
  int64_t first;  // position

  template <typename T>
  LAS_MM_DEVICE Patch(const Decisions<T>& p, int patch) {
    const int line = patch / p.columns, column = patch - line * p.columns;
    const int64_t image = line / p.rows;
    const int row = line % p.rows;
    const int top = row * p.side, left = column * p.side;
    tall = p.height - top < p.side ? p.height - top : p.side;
    wide = p.width - left < p.side ? p.width - left : p.side;
    first = (image * p.height + top) * p.width + left;
  }

  // From the first position to the `k`th.
  LAS_MM_DEVICE int offset(int width, int k) const { return k / wide * width + k % wide; }
};

// mask[patch] = mean of the patch's scores + bias + offset >= 0, where each thread of the block has
// a part of the sum, which has a fixed order. `shift` was fetched before the scores by the first.
template <int kWarps, typename T>
LAS_MM_DEVICE void decide_patch(const Decisions<T>& p, int index, const Patch& patch, float shift,
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
    const float keep =
        sum / (static_cast<float>(patch.tall) * static_cast<float>(patch.wide)) + shift;
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
    const int step = static_cast<int>(block_count());
    for (int i = static_cast<int>(block_index()); i < p.to.patches(); i += step) {
      const Patch patch(p.to, i);
      const float shift = thread_index() == 0 ? p.to.shift(i) : 0.f;
      float sum = 0.f;
      for (int k = thread_index(); k < patch.tall * patch.wide; k += kThreads) {
        sum += p.scores.load(patch.first + patch.offset(p.to.width, k));
      }
      decide_patch<kWarps>(p.to, i, patch, shift, sum);
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
    const int step = static_cast<int>(block_count());
    for (int i = static_cast<int>(block_index()); i < p.to.patches(); i += step) {
      const Patch patch(p.to, i);
      const float shift = thread_index() == 0 ? p.to.shift(i) : 0.f;
      float sum = 0.f;
      for (int chunk = thread_index() % across; chunk < chunks; chunk += across) {
        sum += score(p, patch, chunk * kChunk, first, kThreads / across);
      }
      decide_patch<kWarps>(p.to, i, patch, shift, sum);
    }
  }

  // Of one chunk of channels, every `step`th position.
  LAS_MM_DEVICE static float score(const Params& p, const Patch& patch, int channel, int first,
                                   int step) {
    const int positions = patch.tall * patch.wide;
    float sum = 0.f;
    if (p.vectors) {
      const Words keep = p.weight.load16(channel), drop = p.weight.load16(p.channels + channel);
      LAS_MM_UNROLL_FOUR
      for (int k = first; k < positions; k += step) {
        const int64_t position = patch.first + patch.offset(p.to.width, k);
        const Words x = p.x.load16(position * p.channels + channel);
        LAS_MM_UNROLL
        for (int c = 0; c < kChunk; ++c) {
          sum += Chunk<T>::get(x, c) * (Chunk<T>::get(keep, c) - Chunk<T>::get(drop, c));
        }
      }
      return sum;
    }
    for (int k = first; k < positions; k += step) {
      const int64_t position = patch.first + patch.offset(p.to.width, k);
      for (int c = channel; c < p.channels && c < channel + kChunk; ++c) {
        sum += to_float(p.x.load(position * p.channels + c)) *
               (to_float(p.weight.load(c)) - to_float(p.weight.load(p.channels + c)));
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
