// Means of channels over positions, and squeeze-and-excitation: each channel of each image times
// sigmoid(fc2(relu(fc1(mean over the kept positions)))). All sums have a fixed order.
#pragma once

#include "cuda/gemm_tile.cuh"
#include "cuda/platform.cuh"
#include "cuda/positions.cuh"

namespace las_mm::cuda {

// Rows of a map (images, out_height, out_width, row), of which the first channels hold values: as
// many as `count` says per image, or, without it, `channels`. Without a mask all rows are kept.
template <typename T>
struct KeptRows {
  MaskGeometry geometry;
  Global<const uint8_t> mask;
  Global<T> data;
  int row, channels;
  Global<const int32_t> count;
  int count_step;  // from an image's count to the next one's

  LAS_MM_DEVICE int channels_of(int image) const {
    return count.data == nullptr ? channels
                                 : count.load(static_cast<int64_t>(image) * count_step);
  }
  LAS_MM_DEVICE bool kept(int image, int position) const {
    return mask.data == nullptr || is_kept(geometry, mask, image, position / geometry.out_width,
                                           position % geometry.out_width);
  }
};

// Sums over the kept rows of a part of the positions. A block per image, part and 32 channels; lanes
// are channels, warps share the positions.
template <typename T>
struct SumRows {
  struct Params {
    KeptRows<T> rows;
    int parts, part_positions;
    Global<float> sums;    // (images, parts, channels)
    Global<int32_t> kept;  // (images, parts): how many rows
  };
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kSharedBytes = (kThreads + kWarps) * 4;
  static constexpr int kMinBlocks = 4;

  LAS_MM_DEVICE static void run(const Params& p) {
    const int slices = static_cast<int>(ceil_div(p.rows.channels, 32));
    const int64_t tasks = static_cast<int64_t>(p.rows.geometry.images) * p.parts * slices;
    for (int64_t task = block_index(); task < tasks; task += block_count()) {
      sum(p, static_cast<int>(task / slices), static_cast<int>(task % slices));
    }
  }

  LAS_MM_DEVICE static void sum(const Params& p, int image_part, int slice) {
    const MaskGeometry& g = p.rows.geometry;
    const int image = image_part / p.parts, first = image_part % p.parts * p.part_positions;
    const int positions = g.out_height * g.out_width, left = positions - first;
    const int last = first + (left < p.part_positions ? left : p.part_positions);
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int channel = slice * 32 + lane;
    const bool valid = channel < p.rows.channels_of(image);
    float part = 0.f;
    int kept = 0;
    for (int i = first + warp; i < last; i += kWarps) {
      if (!p.rows.kept(image, i)) continue;
      ++kept;
      if (valid) {
        part += to_float(p.rows.data.load(
            (static_cast<int64_t>(image) * positions + i) * p.rows.row + channel));
      }
    }
    shared_store(thread_index() * 4, part);
    if (lane == 0) shared_store((kThreads + warp) * 4, kept);
    sync_block();
    if (warp == 0) {
      float total = 0.f;
      int count = 0;
      LAS_MM_UNROLL
      for (int i = 0; i < kWarps; ++i) {
        total += shared_load<float>((i * 32 + lane) * 4);
        count += shared_load<int>((kThreads + i) * 4);
      }
      if (valid) p.sums.store(static_cast<int64_t>(image_part) * p.rows.channels + channel, total);
      if (slice == 0 && lane == 0) p.kept.store(image_part, count);
    }
    sync_block();  // the next sums come to the same place
  }
};

// means[image][c] = the sums of all parts / their rows; 0 without rows, and of channels that the map
// does not have.
struct MeanRows {
  struct Params {
    Global<const float> sums;
    Global<const int32_t> kept;
    int images, parts, channels;
    Global<const int32_t> places;  // absent, or (images, width): where a channel is, or -1
    int width;
    Global<float> means;  // (images, width)
  };
  static constexpr int kThreads = 128;
  static constexpr int kSharedBytes = 0;
  static constexpr int kMinBlocks = 4;

  LAS_MM_DEVICE static void run(const Params& p) {
    const int64_t total = static_cast<int64_t>(p.images) * p.width;
    const int64_t first = block_index() * kThreads + thread_index();
    for (int64_t i = first; i < total; i += block_count() * kThreads) {
      const int64_t image = i / p.width;
      const int channel = p.places.data == nullptr ? static_cast<int>(i % p.width)
                                                   : p.places.load(i);
      float sum = 0.f;
      int kept = 0;
      if (channel >= 0) {
        for (int64_t part = image * p.parts; part < (image + 1) * p.parts; ++part) {
          sum += p.sums.load(part * p.channels + channel);
          kept += p.kept.load(part);
        }
      }
      p.means.store(i, kept == 0 ? 0.f : sum / static_cast<float>(kept));
    }
  }
};

// out[image][j] = activation(bias[j] + weight[j] . in[image]); a warp per value.
struct Connect {
  struct Params {
    Global<const float> in;      // (images, depth)
    Global<const float> weight;  // (width, depth)
    Global<const float> bias;
    Global<float> out;  // (images, width)
    int images, depth, width;
    bool sigmoid;  // or else ReLU
  };
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kSharedBytes = 0;
  static constexpr int kMinBlocks = 4;

  LAS_MM_DEVICE static void run(const Params& p) {
    const int lane = thread_index() % 32;
    const int64_t total = static_cast<int64_t>(p.images) * p.width;
    const int64_t first = block_index() * kWarps + thread_index() / 32;
    for (int64_t i = first; i < total; i += block_count() * kWarps) {
      const int64_t image = i / p.width, j = i % p.width;
      float sum = 0.f;
      for (int k = lane; k < p.depth; k += 32) {
        sum += p.weight.load(j * p.depth + k) * p.in.load(image * p.depth + k);
      }
      LAS_MM_UNROLL
      for (int lanes = 1; lanes < 32; lanes *= 2) sum += shuffle_xor(sum, lanes);
      if (lane == 0) {
        sum += p.bias.load(j);
        p.out.store(i, p.sigmoid ? 1.f / (1.f + exponential(-sum)) : relu(sum));
      }
    }
  }
};

// Kept rows times the scales of their image. A warp per position.
template <typename T>
struct ScaleRows {
  struct Params {
    KeptRows<T> rows;
    Global<const float> scales;     // (images, width)
    Global<const int32_t> indices;  // absent, or (images, row): the channel at each place, or < 0
    int width;
  };
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kSharedBytes = 0;
  static constexpr int kMinBlocks = 4;

  LAS_MM_DEVICE static void run(const Params& p) {
    const MaskGeometry& g = p.rows.geometry;
    const int lane = thread_index() % 32, positions = g.out_height * g.out_width;
    const int64_t first = block_index() * kWarps + thread_index() / 32;
    for (int64_t i = first; i < g.outputs(); i += block_count() * kWarps) {
      const int image = static_cast<int>(i / positions);
      if (!p.rows.kept(image, static_cast<int>(i % positions))) continue;
      const int channels = p.rows.channels_of(image);
      for (int c = lane; c < channels; c += 32) {
        int channel = c;
        if (p.indices.data != nullptr) {
          channel = p.indices.load(static_cast<int64_t>(image) * p.rows.row + c);
          if (channel < 0) continue;
        }
        const float scale = p.scales.load(static_cast<int64_t>(image) * p.width + channel);
        const int64_t at = i * p.rows.row + c;
        p.rows.data.store(at, from_float<T>(to_float(p.rows.data.load(at)) * scale));
      }
    }
  }
};

}  // namespace las_mm::cuda
