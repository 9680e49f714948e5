#include "cpu/gather_channels.h"

#include <algorithm>
#include <cstring>

namespace las_mm::cpu {
namespace {

template <typename T>
int64_t packed_rows(int64_t depth) {
  return std::is_same_v<T, float> ? depth : ceil_div(depth, 2);
}

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
size_t GatheredConvs<T>::add(const T* from, int64_t depth, int64_t channels, int64_t taps,
                             const int32_t* inputs, int64_t count, const uint8_t* wanted) {
  const int64_t kept =
      wanted == nullptr ? channels : std::count(wanted, wanted + channels, static_cast<uint8_t>(1));
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
  return parts_.size() - 1;
}

template <typename T>
int64_t GatheredConvs<T>::bytes(size_t i) const {
  const Packed& to = parts_[i].to;
  return 4 * (to.taps * to.rows * ceil_div(to.panels.channels, kLanes) * kLanes + kLanes);
}

template <typename T>
void GatheredConvs<T>::gather_tap(size_t i, int64_t panel, int64_t tap) const {
  const Part& part = parts_[i];
  if (part.to.rows == 0) return;
  const int64_t last = part.to.rows - 1, size = 4 * part.to.panels.width(panel);
  char* out = part.to.at(panel, tap);
  gather_rows(part, panel, tap, 0, last, out);
  // The last row would spill into the next tap, which another thread may be writing.
  char* row = scratch().output.template get<char>(size + 4 * kLanes);
  gather_rows(part, panel, tap, last, last + 1, row);
  std::memcpy(out + last * size, row, size);
}

// Rows [first, last) of one tap's panel of the gathered convolution; writes up to 16 columns more.
template <typename T>
void GatheredConvs<T>::gather_rows(const Part& part, int64_t panel, int64_t tap, int64_t first,
                                   int64_t last, char* out) const {
  const std::vector<Step>& steps = part.steps[panel];
  const int64_t stride = 4 * part.to.panels.width(panel), end = 4 * part.to.panels.valid(panel);
  const int count = static_cast<int>(steps.size());
  Move moves[kPanel + 1];
  for (int i = 0; i < count; ++i) {
    const int64_t from = steps[i].column / kPanel, column = steps[i].column % kPanel;
    moves[i] = {part.from.at(from, tap) + 4 * column, 4 * part.from.panels.width(from), steps[i].to,
                steps[i].lanes};
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

template <typename T>
void GatheredConvs<T>::sum_constants(size_t i, const T* values, int64_t depth, int64_t tap,
                                     char* to) const {
  const Part& part = parts_[i];
  if (part.to.panels.channels == 0) return;
  const int64_t columns = part.from.panels.count() * kPanel;
  Scratch& memory = scratch();
  T* sums = memory.hidden.template get<T>(columns);
  for (int64_t p = 0; p < part.from.panels.count(); ++p) {
    multiply_row(values, depth, part.from.at(p, tap), part.from.panels, p, sums);
  }
  char* wide = memory.values.template get<char>(4 * columns);
  std::memset(wide, 0, 4 * columns);
  for (int64_t c = 0; c < part.from.panels.channels; ++c) {
    std::memcpy(wide + 4 * c, sums + c, sizeof(T));
  }
  char* row = memory.output.template get<char>(4 * (kPanel + kLanes));
  for (int64_t p = 0; p < part.to.panels.count(); ++p) {
    Move moves[kPanel + 1];
    const std::vector<Step>& steps = part.steps[p];
    for (size_t j = 0; j < steps.size(); ++j) {
      moves[j] = {wide + 4 * steps[j].column, 0, steps[j].to, steps[j].lanes};
    }
    const int64_t size = 4 * part.to.panels.width(p);
    kernels().select(moves, static_cast<int>(steps.size()), nullptr, 1, 4 * part.to.panels.valid(p),
                     row, size);
    std::memcpy(to + 4 * p * kPanel * part.to.taps + tap * size, row, size);
  }
}

template class GatheredConvs<float>;
template class GatheredConvs<bf16>;

}  // namespace las_mm::cpu
