// Which tile serves which product on which GPU; the one place to tune on a card.
#pragma once

#include <cstdint>

#include "cuda/sparse_gemm.cuh"

namespace las_mm::cuda {

struct Gpu {
  int capability;        // e.g. 80 for 8.0
  int multiprocessors;
  bool allow_tf32;       // float32 products may round their factors to tf32
  bool deep;             // has the shared memory that deep tiles take
};

// Architectures whose multiprocessors have 164 KiB of shared memory or more.
constexpr bool is_deep(int capability) {
  return capability == 80 || capability == 87 || (capability >= 90 && capability < 120);
}

// 16-bit tensor cores exist from 7.5 on (fp16; 7.0's need other instructions than these kernels
// use, so it computes in plain float32) and 8.0 on (bf16, tf32).
template <typename T>
constexpr bool has_tensor_cores(const Gpu&);
template <>
constexpr bool has_tensor_cores<half>(const Gpu& gpu) {
  return gpu.capability >= 75;
}
template <>
constexpr bool has_tensor_cores<bf16>(const Gpu& gpu) {
  return gpu.capability >= 80;
}
template <>
constexpr bool has_tensor_cores<float>(const Gpu& gpu) {
  return gpu.capability >= 80 && gpu.allow_tf32;
}

// Whether a kernel compiled for this architecture is ever launched; where not, it is left empty.
// Code for 8.0 may run on 8.6, which is not deep; later architectures do not mix like this.
template <class Tile>
constexpr bool is_launched(int capability) {
  const Gpu gpu{capability, 0, true, false};
  if (!Tile::kTensorCores) return sizeof(typename Tile::T) == 4 || !has_tensor_cores<typename Tile::T>(gpu);
  if (!has_tensor_cores<typename Tile::T>(gpu)) return false;
  return Tile::kDeep ? is_deep(capability) : !is_deep(capability) || capability < 90;
}

enum class TileShape { kLarge, kMedium, kSmall };  // 128x128, 128x64 and 64x64

// Larger tiles read less from L2 per multiplication; smaller ones occupy more multiprocessors and
// waste less at the end of a short list. `rows` is the number of possible positions: half of them
// are expected to be listed.
struct TileRule {
  int capability;       // from here on
  double least_rows;    // listed; with fewer, half a tile more at the end of the list counts
  double large_waves;   // least number of 128x128 tiles per multiprocessor
  double medium_waves;  // and of 128x64 tiles
};
constexpr TileRule kTileRules[] = {
    {90, 2101, 0.62, 1.24},  // dev/tune_tiles.py on an H200
    {80, 1024, 2.0, 1.0},
    {0, 1024, 1e30, 1.0},  // 64 KiB of shared memory hold one large tile only
};

inline const TileRule* built_in_rule(int capability) {
  const TileRule* rule = kTileRules;
  while (capability < rule->capability) ++rule;
  return rule;
}

inline TileShape choose_tile(const Gpu& gpu, const TileRule* rule, int64_t rows, int64_t columns,
                             int64_t groups) {
  if (static_cast<double>(rows / 2) < rule->least_rows) return TileShape::kSmall;
  const double listed = static_cast<double>(rows) / 2 * static_cast<double>(groups);
  const double large =
      listed / 128 * static_cast<double>(ceil_div(columns, 128)) / gpu.multiprocessors;
  const double medium =
      listed / 128 * static_cast<double>(ceil_div(columns, 64)) / gpu.multiprocessors;
  if (columns > 64 && large >= rule->large_waves) return TileShape::kLarge;
  return medium >= rule->medium_waves ? TileShape::kMedium : TileShape::kSmall;
}

// Calls `use` with the tile, as a type.
template <typename T, bool kScores, bool kDeep, class Use>
void with_tensor_tile(TileShape shape, const Use& use) {
  if (shape == TileShape::kSmall) {
    use(Tile<T, 64, 1, 32, 32, true, kScores, kDeep>{});
  } else if (kScores || shape == TileShape::kMedium) {
    // The scores' registers would not fit beside a large tile's; conv1 is narrow anyway.
    use(Tile<T, 128, 1, 32, 64, true, kScores, kDeep>{});
  } else {
    use(Tile<T, 128, 2, 64, 64, true, false, kDeep>{});
  }
}

template <typename T, bool kScores, class Use>
void with_tile(TileShape shape, const Gpu& gpu, const Use& use) {
  if (has_tensor_cores<T>(gpu)) {
    if (gpu.deep) {
      with_tensor_tile<T, kScores, true>(shape, use);
    } else {
      with_tensor_tile<T, kScores, false>(shape, use);
    }
  } else if (shape == TileShape::kSmall) {
    use(Tile<T, 64, 1, 0, 0, false, kScores>{});
  } else {
    use(Tile<T, 128, 1, 0, 0, false, kScores>{});
  }
}

}  // namespace las_mm::cuda
