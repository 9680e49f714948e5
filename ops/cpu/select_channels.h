// The weights of those hidden channels that one image wants, gathered into smaller convolutions.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/bottleneck.h"
#include "cpu/gather_channels.h"

namespace las_mm::cpu {

// What skipped channels of conv1's and conv2's outputs hold, or null: zero.
struct Constants {
  const float* conv1 = nullptr;
  const float* conv2 = nullptr;
};

// Gathers the weights for one image, all at once or panel by panel.
template <typename T>
class SelectedWeights : public PanelSource<T> {
 public:
  // `use_tiles`: conv2's weights in Winograd form.
  SelectedWeights(const Arguments& a, const Shape& s, const Selection& selection,
                  const Constants& constants, bool use_tiles, SelectedMemory& memory);

  // The weights, in `memory`. With `at_once` false those of the convolutions are null and come
  // from panel().
  Weights<T> gather(bool at_once);

  // The wanted channels, numbered from the first one.
  const std::vector<int32_t>& wanted() const { return whole_; }

  const T* panel(Convolution which, int64_t panel, int64_t tap, int64_t taps, int64_t first,
                 int64_t last) const override;

 private:
  void set_vectors();
  void shift(int64_t panel) const;

  const Arguments& a_;
  const Shape& s_;
  const Selection& c_;
  const Constants constants_;
  SelectedMemory& memory_;
  const int64_t taps_;
  Weights<T> weights_{};
  GatheredConvs<T> parts_;      // conv1, conv3, conv2's groups
  std::vector<int32_t> whole_;  // see wanted()
  float* shifted_ = nullptr;
  T* skipped_[2] = {};  // constants of the channels that are not wanted
};

}  // namespace las_mm::cpu
