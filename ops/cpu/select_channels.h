// The weights of those hidden channels that one image wants, gathered into smaller convolutions.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/bottleneck.h"

namespace las_mm::cpu {

struct Selection {
  // `wanted`: `decisions` of them, each for width / decisions consecutive channels.
  Selection(const bool* wanted, int64_t decisions, int64_t width, int64_t groups);

  int64_t count() const { return static_cast<int64_t>(channels.size()); }
  int64_t first(int64_t group) const { return firsts[group]; }
  int64_t count(int64_t group) const { return firsts[group + 1] - firsts[group]; }

  std::vector<int32_t> channels;  // the wanted ones, ascending, numbered inside their group
  std::vector<int64_t> firsts;    // of each group in `channels`, and the end
  std::vector<uint8_t> on;        // per hidden channel
  std::vector<uint16_t> lanes, group_lanes;  // 16 channels each; conv2's groups are rounded up
  int64_t group_vectors;
};

// What skipped channels of conv1's and conv2's outputs hold, or null: zero.
struct Constants {
  const float* conv1 = nullptr;
  const float* conv2 = nullptr;
};

// The weights for `selection`, in memory of this thread's workspace until the next call.
template <typename T>
Weights<T> select_channels(const Arguments& a, const Shape& s, const Selection& selection,
                           const Constants& constants, bool use_tiles);

}  // namespace las_mm::cpu
