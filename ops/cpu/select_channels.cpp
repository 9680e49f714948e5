#include "cpu/select_channels.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace las_mm::cpu {
namespace {

constexpr int64_t kTaskRows = 32;

void append_lanes(const uint8_t* on, int64_t channels, std::vector<uint16_t>& lanes) {
  for (int64_t first = 0; first < channels; first += kLanes) {
    uint16_t bits = 0;
    for (int64_t i = 0; i < std::min<int64_t>(kLanes, channels - first); ++i) {
      bits = static_cast<uint16_t>(bits | on[first + i] << i);
    }
    lanes.push_back(bits);
  }
}

// A packed convolution, in columns of 4 bytes: a float, or a pair of bfloat16 input channels.
struct Packed {
  char* data;
  int64_t rows;  // per tap
  int64_t taps;
  Panels panels;

  char* at(int64_t panel, int64_t tap, int64_t row) const {
    const int64_t width = panels.width(panel);
    return data + 4 * (rows * (panel * kPanel * taps + tap * width) + row * width);
  }
};

template <typename T>
int64_t packed_rows(int64_t depth) {
  return std::is_same_v<T, float> ? depth : ceil_div(depth, 2);
}

// Columns of row `row` as pointers to the panels.
const void** point_to(const Packed& from, int64_t tap, int64_t row, const void** panels) {
  for (int64_t p = 0; p < from.panels.count(); ++p) panels[p] = from.at(p, tap, row);
  return panels;
}

// Writes selected columns as a row; the last panel is filled up with zeros.
void put_row(const void* const* panels, const uint16_t* lanes, int64_t vectors, const Packed& to,
             int64_t tap, int64_t row) {
  const int64_t padded = ceil_div(to.panels.channels, kLanes) * kLanes;
  char* columns = scratch().output.get<char>(4 * (padded + kLanes));
  kernels().select(panels, lanes, vectors, columns);
  std::memset(columns + 4 * to.panels.channels, 0, 4 * (padded - to.panels.channels));
  for (int64_t p = 0; p < to.panels.count(); ++p) {
    std::memcpy(to.at(p, tap, row), columns + 4 * p * kPanel, 4 * to.panels.width(p));
  }
}

// A convolution of which some input and output channels are gathered.
struct Part {
  Packed from, to;
  const int32_t* inputs;  // the wanted ones, null: all
  int64_t input_count;
  const uint16_t* lanes;  // the wanted output channels, null: all

  int64_t rows() const { return to.taps * to.rows; }
};

// Pairs up two bfloat16 input channels that do not lie side by side; the second may be missing.
void pair_channels(const Packed& from, int64_t tap, int64_t a, int64_t b, const void** panels) {
  const int64_t count = from.panels.count();
  char* pairs = scratch().values.get<char>(4 * kPanel * count);
  for (int64_t p = 0; p < count; ++p) {
    const char* low = from.at(p, tap, a / 2) + 2 * (a % 2);
    const char* high = from.at(p, tap, std::max<int64_t>(b, 0) / 2) + 2 * (b & 1);
    char* out = pairs + 4 * p * kPanel;
    panels[p] = out;
    for (int j = 0; j < from.panels.width(p); ++j) {
      std::memcpy(out + 4 * j, low + 4 * j, 2);
      if (b >= 0) {
        std::memcpy(out + 4 * j + 2, high + 4 * j, 2);
      } else {
        std::memset(out + 4 * j + 2, 0, 2);
      }
    }
  }
}

template <typename T>
void gather_row(const Part& part, int64_t index) {
  const int64_t tap = index / part.to.rows, row = index % part.to.rows;
  const void** panels = scratch().pointers.get<const void*>(part.from.panels.count());
  if (part.inputs == nullptr) {
    point_to(part.from, tap, row, panels);
  } else if constexpr (std::is_same_v<T, float>) {
    point_to(part.from, tap, part.inputs[row], panels);
  } else {
    const int64_t a = part.inputs[2 * row];
    const int64_t b = 2 * row + 1 < part.input_count ? part.inputs[2 * row + 1] : -1;
    if (a % 2 == 0 && b == a + 1) {
      point_to(part.from, tap, a / 2, panels);
    } else {
      pair_channels(part.from, tap, a, b, panels);
    }
  }
  if (part.lanes == nullptr) {
    for (int64_t p = 0; p < part.to.panels.count(); ++p) {
      std::memcpy(part.to.at(p, tap, row), panels[p], 4 * part.to.panels.width(p));
    }
  } else {
    const int64_t vectors = ceil_div(part.from.panels.channels, kLanes);
    put_row(panels, part.lanes, vectors, part.to, tap, row);
  }
}

// The product of one row of values with a tap of a packed convolution: out[column].
template <typename T>
void multiply_row(const T* row, int64_t depth, const Packed& weight, int64_t tap, int64_t panel,
                  T* out) {
  const Segment<T> segment{&row, 0, depth, reinterpret_cast<const T*>(weight.at(panel, tap, 0))};
  panel_kernel(T{})({1, &segment, 1, weight.panels.width(panel), weight.panels.valid(panel),
                     nullptr, nullptr, &out, panel * kPanel, false});
}

inline float widened(float value) { return value; }
inline float widened(bf16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
inline void assign(float value, float& out) { out = value; }
inline void assign(float value, bf16& out) { out.bits = c10::BFloat16(value).x; }

template <typename T>
class Gatherer {
 public:
  Gatherer(const Arguments& a, const Shape& s, const Selection& c, const Constants& constants,
           bool use_tiles)
      : a_(a), s_(s), c_(c), constants_(constants), w_(workspace()) {
    const int64_t n = c.count(), width = s.hidden, channels = width / a.groups;
    taps_ = use_tiles ? kTile : 9;
    weights_.conv1 = add(values(a.weights[0], T{}), s.c_in, Panels{width}, 1, nullptr, s.c_in,
                         c.lanes.data(), Panels{n}, memory(0, packed_rows<T>(s.c_in) * padded(n)));
    char* next = memory(1, conv2_columns());
    const T* from = values(use_tiles ? *a.winograd : a.weights[1], T{});
    const int64_t numel = packed_numel(channels, channels, taps_, 1, std::is_same_v<T, float>);
    constant_ = constants.conv1 ? w_.constant.get<char>(4 * taps_ * padded_groups()) : nullptr;
    char* constant = constant_;
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t count = c.count(g);
      const T* weights = add(from + g * numel, channels, Panels{channels}, taps_,
                             c.channels.data() + c.first(g), count,
                             c.group_lanes.data() + g * c.group_vectors, Panels{count}, next);
      weights_.conv2.push_back({c.first(g), count, weights, reinterpret_cast<const T*>(constant)});
      next += 4 * taps_ * packed_rows<T>(count) * padded(count);
      if (constant) constant += 4 * taps_ * padded(count);
    }
    whole_.resize(n);  // inputs of conv3 count from the first hidden channel
    for (int64_t g = 0; g < a.groups; ++g) {
      for (int64_t i = c.first(g); i < c.first(g) + c.count(g); ++i) {
        whole_[i] = static_cast<int32_t>(g * channels + c.channels[i]);
      }
    }
    weights_.conv3 = add(values(a.weights[2], T{}), width, Panels{s.c_out}, 1, whole_.data(), n,
                         nullptr, Panels{s.c_out},
                         memory(2, packed_rows<T>(n) * padded(s.c_out)));
    weights_.downsample = s.downsample ? values(a.weights[3], T{}) : nullptr;
    set_vectors();
  }

  Weights<T> run() {
    std::vector<int64_t> ends;  // in rows
    int64_t rows = 0;
    for (const Part& part : parts_) ends.push_back(rows += part.rows());
    const int64_t copies = ceil_div(rows, kTaskRows);
    const int64_t sums = constant_ ? a_.groups * taps_ : 0;
    const int64_t shifts = constants_.conv2 ? Panels{s_.c_out}.count() : 0;
    parallel_tasks(copies + sums + shifts, [&](int64_t task) {
      if (task >= copies + sums) return shift(task - copies - sums);
      if (task >= copies) return sum_constants((task - copies) / taps_, (task - copies) % taps_);
      const int64_t last = std::min(rows, (task + 1) * kTaskRows);
      size_t part = std::upper_bound(ends.begin(), ends.end(), task * kTaskRows) - ends.begin();
      for (int64_t row = task * kTaskRows; row < last; ++row) {
        while (row >= ends[part]) ++part;
        gather_row<T>(parts_[part], row - (ends[part] - parts_[part].rows()));
      }
    });
    return weights_;
  }

 private:
  static int64_t padded(int64_t channels) { return ceil_div(channels, kLanes) * kLanes; }

  int64_t padded_groups() const {
    int64_t sum = 0;
    for (int64_t g = 0; g < a_.groups; ++g) sum += padded(c_.count(g));
    return sum;
  }

  int64_t conv2_columns() const {
    int64_t sum = 0;
    for (int64_t g = 0; g < a_.groups; ++g) {
      sum += taps_ * packed_rows<T>(c_.count(g)) * padded(c_.count(g));
    }
    return sum;
  }

  char* memory(int which, int64_t columns) { return w_.selected[which].get<char>(4 * columns); }

  static Packed packed(const T* data, int64_t depth, int64_t taps, const Panels& panels) {
    char* bytes = const_cast<char*>(reinterpret_cast<const char*>(data));
    return {bytes, packed_rows<T>(depth), taps, panels};
  }

  const T* add(const T* from, int64_t depth, const Panels& panels, int64_t taps,
               const int32_t* inputs, int64_t count, const uint16_t* lanes, const Panels& to_panels,
               char* to) {
    parts_.push_back({packed(from, depth, taps, panels),
                      {to, packed_rows<T>(count), taps, to_panels},
                      inputs,
                      count,
                      lanes});
    return reinterpret_cast<const T*>(to);
  }

  // Biases of the wanted channels, and the constants of the others.
  void set_vectors() {
    const int64_t n = c_.count(), width = s_.hidden;
    float* next = w_.vectors.get<float>(2 * n + s_.c_out + 2 * width);
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
    for (int i = 0; i < 2; ++i) {
      skipped_[i] = reinterpret_cast<T*>(next);
      next += width;
      if (constants[i] == nullptr) continue;
      for (int64_t c = 0; c < width; ++c) assign(c_.on[c] ? 0.0f : constants[i][c], skipped_[i][c]);
    }
  }

  // What the skipped channels of a group add to conv2's wanted outputs through one tap.
  void sum_constants(int64_t group, int64_t tap) {
    const int64_t channels = s_.hidden / a_.groups, count = c_.count(group);
    if (count == 0) return;
    const Packed& from = parts_[1 + group].from;
    const int64_t panel_count = from.panels.count();
    Scratch& memory = scratch();
    T* sums = memory.hidden.template get<T>(panel_count * kPanel);
    char* columns = memory.values.template get<char>(4 * panel_count * kPanel);
    const void** panels = memory.pointers.template get<const void*>(panel_count);
    for (int64_t p = 0; p < panel_count; ++p) {
      multiply_row(skipped_[0] + group * channels, channels, from, tap, p, sums);
      panels[p] = columns + 4 * p * kPanel;
    }
    std::memset(columns, 0, 4 * panel_count * kPanel);
    for (int64_t i = 0; i < channels; ++i) std::memcpy(columns + 4 * i, sums + i, sizeof(T));
    char* to = const_cast<char*>(reinterpret_cast<const char*>(weights_.conv2[group].constant));
    put_row(panels, c_.group_lanes.data() + group * c_.group_vectors, c_.group_vectors,
            {to, 1, taps_, Panels{count}}, tap, 0);
  }

  // What conv2's skipped outputs add to conv3's bias.
  void shift(int64_t panel) {
    const Packed weight = packed(values(a_.weights[2], T{}), s_.hidden, 1, Panels{s_.c_out});
    T* sums = scratch().hidden.template get<T>(weight.panels.count() * kPanel);
    multiply_row(skipped_[1], s_.hidden, weight, 0, panel, sums);
    const float* bias = a_.biases[2].const_data_ptr<float>();
    for (int64_t i = 0, c = panel * kPanel; i < weight.panels.valid(panel); ++i, ++c) {
      shifted_[c] = bias[c] + widened(sums[c]);
    }
  }

  const Arguments& a_;
  const Shape& s_;
  const Selection& c_;
  const Constants constants_;
  Workspace& w_;
  int64_t taps_ = 9;
  Weights<T> weights_{};
  std::vector<Part> parts_;  // conv1, conv2's groups, conv3
  std::vector<int32_t> whole_;
  char* constant_ = nullptr;
  float* shifted_ = nullptr;
  T* skipped_[2] = {};
};

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
    append_lanes(on.data() + g * channels_per_group, channels_per_group, group_lanes);
  }
  firsts.push_back(count());
  group_vectors = ceil_div(channels_per_group, kLanes);
  append_lanes(on.data(), width, lanes);
}

template <typename T>
Weights<T> select_channels(const Arguments& a, const Shape& s, const Selection& selection,
                           const Constants& constants, bool use_tiles) {
  return Gatherer<T>(a, s, selection, constants, use_tiles).run();
}

template Weights<float> select_channels(const Arguments&, const Shape&, const Selection&,
                                        const Constants&, bool);
template Weights<bf16> select_channels(const Arguments&, const Shape&, const Selection&,
                                       const Constants&, bool);

}  // namespace las_mm::cpu
