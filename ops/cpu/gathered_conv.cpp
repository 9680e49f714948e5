#include "cpu/gathered_conv.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/workspace.h"

namespace las_mm::cpu {
namespace {

template <typename T>
int64_t packed_rows(int64_t depth) {
  return std::is_same_v<T, float> ? depth : ceil_div(depth, 2);
}

int64_t padded(int64_t channels) { return ceil_div(channels, kLanes) * kLanes; }

int64_t count_wanted(const uint8_t* wanted, int64_t channels) {
  if (wanted == nullptr) return channels;
  return std::count(wanted, wanted + channels, static_cast<uint8_t>(1));
}

}  // namespace

template <typename T>
GatheredConv<T>::GatheredConv(const T* from, int64_t depth, int64_t channels, int64_t taps,
                              const int32_t* inputs, int64_t count, const uint8_t* wanted)
    : data_(reinterpret_cast<const char*>(from)),
      depth_(depth),
      from_{packed_rows<T>(depth), taps, Panels{channels}},
      to_{packed_rows<T>(count), taps, Panels{count_wanted(wanted, channels)}},
      inputs_(inputs),
      input_count_(count),
      steps_(to_.panels.count()) {
  int64_t next = 0;  // gathered column
  for (int64_t first = 0; first < channels; first += kLanes) {
    for (int64_t i = 0; i < std::min<int64_t>(kLanes, channels - first); ++i) {
      if (wanted != nullptr && !wanted[first + i]) continue;
      std::vector<Step>& steps = steps_[next / kPanel];
      if (steps.empty() || steps.back().column != first) {
        steps.push_back({first, static_cast<int32_t>(4 * (next % kPanel)), 0});
      }
      steps.back().lanes = static_cast<uint16_t>(steps.back().lanes | 1 << i);
      ++next;
    }
  }
}

template <typename T>
int64_t GatheredConv<T>::bytes() const {
  return 4 * (to_.taps * to_.rows * padded(outputs()) + kLanes);
}

template <typename T>
int64_t GatheredConv<T>::constant_bytes() const {
  return 4 * (to_.taps * padded(outputs()) + kLanes);
}

template <typename T>
void GatheredConv<T>::gather(int64_t task, char* to) const {
  const int64_t panel = task / to_.taps, tap = task % to_.taps;
  if (rows() == 0) return;
  const int64_t last = rows() - 1, size = 4 * width(panel);
  char* out = to + to_.offset(panel, tap);
  gather_rows(panel, tap, 0, last, out);
  // The last row would spill into the next tap, which another thread may be writing.
  char* row = scratch().output.get<char>(size + 4 * kLanes);
  gather_rows(panel, tap, last, last + 1, row);
  std::memcpy(out + last * size, row, size);
}

template <typename T>
void GatheredConv<T>::gather_rows(int64_t panel, int64_t tap, int64_t first, int64_t last,
                                  char* out) const {
  const std::vector<Step>& steps = steps_[panel];
  const int64_t stride = 4 * width(panel), end = 4 * to_.panels.valid(panel);
  const int count = static_cast<int>(steps.size());
  Move moves[kPanel + 1];
  for (int i = 0; i < count; ++i) {
    const int64_t from = steps[i].column / kPanel, column = steps[i].column % kPanel;
    moves[i] = {data_ + from_.offset(from, tap) + 4 * column, 4 * from_.panels.width(from),
                steps[i].to, steps[i].lanes};
  }
  const auto select = kernels().select;
  if (inputs_ == nullptr) {
    for (int i = 0; i < count; ++i) moves[i].from += first * moves[i].stride;
    return select(moves, count, nullptr, last - first, end, out, stride);
  }
  if (std::is_same_v<T, float>) {
    return select(moves, count, inputs_ + first, last - first, end, out, stride);
  }
  // Pairs of input channels; those that do not lie side by side are put together first.
  for (int64_t row = first; row < last; ++row, out += stride) {
    const int64_t a = inputs_[2 * row];
    const bool paired = 2 * row + 1 < input_count_;
    const int64_t b = paired ? inputs_[2 * row + 1] : 0;
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

// The product of one row of values with a panel of a tap.
template <typename T>
void GatheredConv<T>::multiply(const T* input, int64_t panel, int64_t tap, T* sums) const {
  const Segment<T> segment{&input, 0, depth_,
                           reinterpret_cast<const T*>(data_ + from_.offset(panel, tap))};
  panel_kernel(T{})({1, &segment, 1, from_.panels.width(panel), from_.panels.valid(panel), nullptr,
                     nullptr, &sums, panel * kPanel, false});
}

template <typename T>
void GatheredConv<T>::sum(const T* input, int64_t tap, char* to) const {
  if (outputs() == 0) return;
  const int64_t columns = from_.panels.count() * kPanel;
  Scratch& memory = scratch();
  T* sums = memory.hidden.get<T>(columns);
  for (int64_t p = 0; p < from_.panels.count(); ++p) multiply(input, p, tap, sums);
  char* wide = memory.values.get<char>(4 * columns);
  std::memset(wide, 0, 4 * columns);
  for (int64_t i = 0; i < from_.panels.channels; ++i) {
    std::memcpy(wide + 4 * i, sums + i, sizeof(T));
  }
  char* row = memory.output.get<char>(4 * (kPanel + kLanes));
  for (int64_t p = 0; p < to_.panels.count(); ++p) {
    Move moves[kPanel + 1];
    const std::vector<Step>& steps = steps_[p];
    for (size_t i = 0; i < steps.size(); ++i) {
      moves[i] = {wide + 4 * steps[i].column, 0, steps[i].to, steps[i].lanes};
    }
    const int64_t size = 4 * width(p);
    kernels().select(moves, static_cast<int>(steps.size()), nullptr, 1, 4 * to_.panels.valid(p),
                     row, size);
    std::memcpy(to + 4 * p * kPanel * to_.taps + tap * size, row, size);
  }
}

template class GatheredConv<float>;
template class GatheredConv<bf16>;

}  // namespace las_mm::cpu
