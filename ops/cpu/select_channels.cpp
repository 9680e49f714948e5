#include "cpu/select_channels.h"

#include <algorithm>
#include <cstring>

namespace las_mm::cpu {
namespace {

template <typename T>
int64_t packed_rows(int64_t depth) {
  return std::is_same_v<T, float> ? depth : ceil_div(depth, 2);
}

int64_t padded(int64_t channels) { return ceil_div(channels, kLanes) * kLanes; }

// The product of one row of values with a panel of a tap: out[column].
template <typename T>
void multiply_row(const T* row, int64_t depth, const char* weights, const Panels& panels,
                  int64_t panel, T* out) {
  const Segment<T> segment{&row, 0, depth, reinterpret_cast<const T*>(weights)};
  panel_kernel(T{})({1, &segment, 1, panels.width(panel), panels.valid(panel), nullptr, nullptr,
                     &out, panel * kPanel, false});
}

float widened(float value) { return value; }
float widened(bf16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
void assign(float value, float& out) { out = value; }
void assign(float value, bf16& out) { out.bits = c10::BFloat16(value).x; }

}  // namespace

Selection::Selection(const bool* wanted, int64_t decisions, int64_t width, int64_t groups)
    : on(width) {
  const int64_t together = width / decisions, channels_per_group = width / groups;
  for (int64_t g = 0; g < groups; ++g) {
    firsts.push_back(count());
    for (int64_t i = 0; i < channels_per_group; ++i) {
      const int64_t c = g * channels_per_group + i;
      on[c] = wanted[c / together];
      if (on[c]) channels.push_back(static_cast<int32_t>(i));
    }
  }
  firsts.push_back(count());
}

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
  add(values(a.weights[0], T{}), s.c_in, s.hidden, 1, nullptr, s.c_in, c.on.data());
  add(values(a.weights[2], T{}), s.hidden, s.c_out, 1, whole_.data(), n, nullptr);
  const T* conv2 = values(use_tiles ? *a.winograd : a.weights[1], T{});
  const int64_t numel = packed_numel(channels, channels, taps_, 1, std::is_same_v<T, float>);
  for (int64_t g = 0; g < a.groups; ++g) {
    add(conv2 + g * numel, channels, channels, taps_, c.channels.data() + c.first(g), c.count(g),
        c.on.data() + g * channels);
  }
}

// `channels` outputs, of which some are wanted (null: all).
template <typename T>
void SelectedWeights<T>::add(const T* from, int64_t depth, int64_t channels, int64_t taps,
                             const int32_t* inputs, int64_t count, const uint8_t* wanted) {
  const int64_t kept = wanted == nullptr
                           ? channels
                           : std::count(wanted, wanted + channels, static_cast<uint8_t>(1));
  char* data = const_cast<char*>(reinterpret_cast<const char*>(from));
  Part part{{data, packed_rows<T>(depth), taps, Panels{channels}},
            {nullptr, packed_rows<T>(count), taps, Panels{kept}},
            inputs,
            count,
            {}};
  part.steps.resize(part.to.panels.count());
  int64_t next = 0;  // gathered column
  for (int64_t first = 0; first < channels; first += kLanes) {
    for (int64_t i = 0; i < std::min<int64_t>(kLanes, channels - first); ++i) {
      if (wanted != nullptr && !wanted[first + i]) continue;
      std::vector<Step>& steps = part.steps[next / kPanel];
      if (steps.empty() || steps.back().column != first) {
        steps.push_back({first, static_cast<int32_t>(4 * (next % kPanel)), 0});
      }
      steps.back().lanes = static_cast<uint16_t>(steps.back().lanes | 1 << i);
      ++next;
    }
  }
  parts_.push_back(std::move(part));
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
  for (const Part& part : parts_) {
    // Every part is followed by room for what select may write too much.
    bytes += 4 * (part.to.taps * part.to.rows * padded(part.to.panels.channels) + kLanes);
    if (at_once) tasks += part.to.taps * part.to.panels.count();
  }
  for (size_t i = 2; i < parts_.size(); ++i) {
    constant_bytes += 4 * (taps_ * padded(parts_[i].to.panels.channels) + kLanes);
  }
  char* next = at_once ? memory_.weights.get<char>(bytes) : nullptr;
  char* constant = constants_.conv1 ? memory_.constant.get<char>(constant_bytes) : nullptr;
  std::vector<int64_t> ends;  // of the parts' tasks
  for (size_t i = 0; i < parts_.size(); ++i) {
    Part& part = parts_[i];
    const int64_t count = part.to.panels.count();
    if (at_once) {
      part.to.data = next;
      next += 4 * (part.to.taps * part.to.rows * padded(part.to.panels.channels) + kLanes);
      ends.push_back((ends.empty() ? 0 : ends.back()) + part.to.taps * count);
    }
    const T* data = reinterpret_cast<const T*>(part.to.data);
    if (i == 0) weights_.conv1 = data;
    if (i == 1) weights_.conv3 = data;
    if (i < 2) continue;
    weights_.conv2.push_back({c_.first(i - 2), part.to.panels.channels, data,
                              reinterpret_cast<const T*>(constant)});
    if (constant) constant += 4 * (taps_ * padded(part.to.panels.channels) + kLanes);
  }
  const int64_t sums = constants_.conv1 ? a_.groups * taps_ : 0;
  const int64_t shifts = constants_.conv2 ? Panels{s_.c_out}.count() : 0;
  parallel_tasks(tasks + sums + shifts, [&](int64_t task) {
    if (task >= tasks + sums) return shift(task - tasks - sums);
    if (task >= tasks) return sum_constants((task - tasks) / taps_, (task - tasks) % taps_);
    const size_t i = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
    const Part& part = parts_[i];
    const int64_t rest = task - (i == 0 ? 0 : ends[i - 1]);
    const int64_t panel = rest / part.to.taps, tap = rest % part.to.taps;
    if (part.to.rows == 0) return;
    const int64_t last = part.to.rows - 1, size = 4 * part.to.panels.width(panel);
    char* out = part.to.at(panel, tap);
    gather_rows(part, panel, tap, 0, last, out);
    // The last row would spill into the next tap, which another thread may be writing.
    char* row = scratch().output.template get<char>(size + 4 * kLanes);
    gather_rows(part, panel, tap, last, last + 1, row);
    std::memcpy(out + last * size, row, size);
  });
  return weights_;
}

template <typename T>
const T* SelectedWeights<T>::panel(Convolution which, int64_t panel, int64_t tap, int64_t taps,
                                   int64_t first, int64_t last) const {
  const Part& part = parts_[which == Convolution::kFirst ? 0 : which == Convolution::kThird ? 1 : 2];
  last = std::min(last, part.to.rows);
  const int64_t size = 4 * (last - first) * part.to.panels.width(panel);
  char* memory = scratch().weights.template get<char>(size * taps + 4 * kLanes);
  for (int64_t t = 0; t < taps; ++t) {
    gather_rows(part, panel, tap + t, first, last, memory + t * size);
  }
  return reinterpret_cast<const T*>(memory);
}

// Rows [first, last) of one tap's panel of the gathered convolution; writes up to 16 columns more.
template <typename T>
void SelectedWeights<T>::gather_rows(const Part& part, int64_t panel, int64_t tap, int64_t first,
                                     int64_t last, char* out) const {
  const std::vector<Step>& steps = part.steps[panel];
  const int64_t stride = 4 * part.to.panels.width(panel), end = 4 * part.to.panels.valid(panel);
  const int count = static_cast<int>(steps.size());
  Move moves[kPanel + 1];
  for (int i = 0; i < count; ++i) {
    const int64_t from = steps[i].column / kPanel, column = steps[i].column % kPanel;
    moves[i] = {part.from.at(from, tap) + 4 * column, 4 * part.from.panels.width(from),
                steps[i].to, steps[i].lanes};
  }
  const auto select = kernels().select;
  if (part.inputs == nullptr) {
    for (int i = 0; i < count; ++i) moves[i].from += first * moves[i].stride;
    return select(moves, count, nullptr, last - first, end, out, stride);
  }
  if (std::is_same_v<T, float>) {
    return select(moves, count, part.inputs + first, last - first, end, out, stride);
  }
  // Pairs of input channels; those that do not lie side by side are put together first.
  for (int64_t row = first; row < last; ++row, out += stride) {
    const int64_t a = part.inputs[2 * row];
    const bool paired = 2 * row + 1 < part.input_count;
    const int64_t b = paired ? part.inputs[2 * row + 1] : 0;
    if (a % 2 == 0 && b == a + 1) {
      const int32_t index = static_cast<int32_t>(a / 2);
      select(moves, count, &index, 1, end, out, stride);
      continue;
    }
    char pairs[(kPanel + 1) * 4 * kLanes];
    Move placed[kPanel + 1];
    for (int i = 0; i < count; ++i) {
      const char* low = moves[i].from + a / 2 * moves[i].stride + 2 * (a % 2);
      const char* high = moves[i].from + b / 2 * moves[i].stride + 2 * (b % 2);
      char* pair = pairs + 4 * kLanes * i;
      for (int j = 0; j < kLanes; ++j) {
        uint16_t values[2] = {0, 0};
        std::memcpy(values, low + 4 * j, 2);
        if (paired) std::memcpy(values + 1, high + 4 * j, 2);
        std::memcpy(pair + 4 * j, values, 4);
      }
      placed[i] = {pair, 0, moves[i].to, moves[i].lanes};
    }
    select(placed, count, nullptr, 1, end, out, stride);
  }
}

// What the skipped channels of a group add to conv2's wanted outputs through one tap.
template <typename T>
void SelectedWeights<T>::sum_constants(int64_t group, int64_t tap) const {
  const int64_t channels = s_.hidden / a_.groups;
  const Part& part = parts_[2 + group];
  if (part.to.panels.channels == 0) return;
  const int64_t columns = part.from.panels.count() * kPanel;
  Scratch& memory = scratch();
  T* sums = memory.hidden.template get<T>(columns);
  for (int64_t p = 0; p < part.from.panels.count(); ++p) {
    multiply_row(skipped_[0] + group * channels, channels, part.from.at(p, tap), part.from.panels,
                 p, sums);
  }
  char* wide = memory.values.template get<char>(4 * columns);
  std::memset(wide, 0, 4 * columns);
  for (int64_t i = 0; i < channels; ++i) std::memcpy(wide + 4 * i, sums + i, sizeof(T));
  char* to = const_cast<char*>(reinterpret_cast<const char*>(weights_.conv2[group].constant));
  char* row = memory.output.template get<char>(4 * (kPanel + kLanes));
  for (int64_t p = 0; p < part.to.panels.count(); ++p) {
    Move moves[kPanel + 1];
    const std::vector<Step>& steps = part.steps[p];
    for (size_t i = 0; i < steps.size(); ++i) {
      moves[i] = {wide + 4 * steps[i].column, 0, steps[i].to, steps[i].lanes};
    }
    const int64_t size = 4 * part.to.panels.width(p);
    kernels().select(moves, static_cast<int>(steps.size()), nullptr, 1, 4 * part.to.panels.valid(p),
                     row, size);
    std::memcpy(to + 4 * p * kPanel * taps_ + tap * size, row, size);
  }
}

// What conv2's skipped outputs add to conv3's bias.
template <typename T>
void SelectedWeights<T>::shift(int64_t panel) const {
  const Packed& from = parts_[1].from;
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
