#include "cpu/select_channels.h"

#include <algorithm>
#include <cstring>

namespace las_mm::cpu {
namespace {

float widened(float value) { return value; }
float widened(bf16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

}  // namespace

template <typename T>
SelectedWeights<T>::SelectedWeights(const Arguments& a, const Shape& s, const Selection& c,
                                    const Constants& constants, bool use_tiles,
                                    SelectedMemory& memory)
    : a_(a),
      s_(s),
      c_(c),
      constants_(constants),
      memory_(memory),
      taps_(use_tiles ? kTile : 9) {
  const int64_t n = c.count(), channels = s.hidden / a.groups;
  for (int64_t g = 0; g < a.groups; ++g) {
    for (int64_t i = c.first(g); i < c.first(g) + c.count(g); ++i) {
      whole_.push_back(static_cast<int32_t>(g * channels + c.channels[i]));
    }
  }
  parts_.add(values(a.weights[0], T{}), s.c_in, s.hidden, 1, nullptr, s.c_in, c.on.data());
  parts_.add(values(a.weights[2], T{}), s.hidden, s.c_out, 1, whole_.data(), n, nullptr);
  const T* conv2 = values(use_tiles ? *a.winograd : a.weights[1], T{});
  const int64_t numel = packed_numel(channels, channels, taps_, 1, std::is_same_v<T, float>);
  for (int64_t g = 0; g < a.groups; ++g) {
    parts_.add(conv2 + g * numel, channels, channels, taps_, c.channels.data() + c.first(g),
               c.count(g), c.on.data() + g * channels);
  }
}

// Biases of the wanted channels, and the constants of the others.
template <typename T>
void SelectedWeights<T>::set_vectors() {
  const int64_t n = c_.count(), width = s_.hidden;
  float* next = memory_.vectors.get<float>(2 * n + s_.c_out + 2 * width);
  for (int i = 0; i < 2; ++i) {
    weights_.biases[i] = next;
    const float* bias = a_.biases[i].const_data_ptr<float>();
    for (const int32_t channel : whole_) *next++ = bias[channel];
  }
  weights_.biases[2] = a_.biases[2].const_data_ptr<float>();
  if (s_.downsample) weights_.biases[3] = a_.biases[3].const_data_ptr<float>();
  shifted_ = next;
  if (constants_.conv2) weights_.biases[2] = shifted_;
  next += s_.c_out;
  const float* constants[2] = {constants_.conv1, constants_.conv2};
  for (int i = 0; i < 2; ++i, next += width) {
    skipped_[i] = reinterpret_cast<T*>(next);
    if (constants[i] == nullptr) continue;
    for (int64_t c = 0; c < width; ++c) assign(c_.on[c] ? 0.0f : constants[i][c], skipped_[i][c]);
  }
}

template <typename T>
Weights<T> SelectedWeights<T>::gather(bool at_once) {
  set_vectors();
  weights_.hidden = c_.count();
  weights_.downsample = s_.downsample ? values(a_.weights[3], T{}) : nullptr;
  weights_.source = at_once ? nullptr : this;
  int64_t bytes = 0, constant_bytes = 0, tasks = 0;
  for (size_t i = 0; i < parts_.count(); ++i) {
    bytes += parts_.bytes(i);
    if (at_once) tasks += parts_[i].to.taps * parts_[i].to.panels.count();
    if (i >= 2) constant_bytes += parts_.constant_bytes(i);
  }
  char* next = at_once ? memory_.weights.get<char>(bytes) : nullptr;
  char* constant = constants_.conv1 ? memory_.constant.get<char>(constant_bytes) : nullptr;
  std::vector<int64_t> ends;  // of the parts' tasks
  for (size_t i = 0; i < parts_.count(); ++i) {
    auto& part = parts_[i];
    const int64_t count = part.to.panels.count();
    if (at_once) {
      part.to.data = next;
      next += parts_.bytes(i);
      ends.push_back((ends.empty() ? 0 : ends.back()) + part.to.taps * count);
    }
    const T* data = reinterpret_cast<const T*>(part.to.data);
    if (i == 0) weights_.conv1 = data;
    if (i == 1) weights_.conv3 = data;
    if (i < 2) continue;
    weights_.conv2.push_back({c_.first(i - 2), part.to.panels.channels, data,
                              reinterpret_cast<const T*>(constant)});
    if (constant) constant += parts_.constant_bytes(i);
  }
  const int64_t sums = constants_.conv1 ? a_.groups * taps_ : 0;
  const int64_t shifts = constants_.conv2 ? Panels{s_.c_out}.count() : 0;
  parallel_tasks(tasks + sums + shifts, [&](int64_t task) {
    if (task >= tasks + sums) return shift(task - tasks - sums);
    if (task >= tasks) {
      const int64_t group = (task - tasks) / taps_, channels = s_.hidden / a_.groups;
      const T* to = weights_.conv2[group].constant;
      return parts_.sum_constants(2 + group, skipped_[0] + group * channels, channels,
                                  (task - tasks) % taps_,
                                  const_cast<char*>(reinterpret_cast<const char*>(to)));
    }
    const size_t i = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
    const int64_t rest = task - (i == 0 ? 0 : ends[i - 1]), taps = parts_[i].to.taps;
    parts_.gather_tap(i, rest / taps, rest % taps);
  });
  return weights_;
}

template <typename T>
const T* SelectedWeights<T>::panel(Convolution which, int64_t panel, int64_t tap, int64_t taps,
                                   int64_t first, int64_t last) const {
  const size_t i = which == Convolution::kFirst ? 0 : which == Convolution::kThird ? 1 : 2;
  const auto& part = parts_[i];
  last = std::min(last, part.to.rows);
  const int64_t size = 4 * (last - first) * part.to.panels.width(panel);
  char* memory = scratch().weights.template get<char>(size * taps + 4 * kLanes);
  for (int64_t t = 0; t < taps; ++t) {
    parts_.gather_rows(part, panel, tap + t, first, last, memory + t * size);
  }
  return reinterpret_cast<const T*>(memory);
}

// What conv2's skipped outputs add to conv3's bias.
template <typename T>
void SelectedWeights<T>::shift(int64_t panel) const {
  const auto& from = parts_[1].from;
  T* sums = scratch().hidden.template get<T>(from.panels.count() * kPanel);
  multiply_row(skipped_[1], s_.hidden, from.at(panel, 0), from.panels, panel, sums);
  const float* bias = a_.biases[2].const_data_ptr<float>();
  for (int64_t i = 0, c = panel * kPanel; i < from.panels.valid(panel); ++i, ++c) {
    shifted_[c] = bias[c] + widened(sums[c]);
  }
}

template class SelectedWeights<float>;
template class SelectedWeights<bf16>;

}  // namespace las_mm::cpu
