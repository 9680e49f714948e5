// Convolutions of which an image wants some input and output channels, gathered into smaller ones.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/sparse_conv.h"
#include "cpu/workspace.h"

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
};

// The product of one row of values with a panel of a packed convolution: out[column].
template <typename T>
void multiply_row(const T* row, int64_t depth, const char* weights, const Panels& panels,
                  int64_t panel, T* out) {
  const Segment<T> segment{&row, 0, depth, reinterpret_cast<const T*>(weights)};
  panel_kernel(T{})({1, &segment, 1, panels.width(panel), panels.valid(panel), nullptr, nullptr,
                     &out, panel * kPanel, false});
}

template <typename T>
class GatheredConvs {
 public:
  // 16 source columns of which some go to byte `to` of a row.
  struct Step {
    int64_t column;
    int32_t to;
    uint16_t lanes;
  };
  // A convolution, packed, in columns of 4 bytes: a float, or a pair of bfloat16 input channels.
  struct Packed {
    char* data;
    int64_t rows;  // per tap
    int64_t taps;
    Panels panels;

    char* at(int64_t panel, int64_t tap) const {
      return data + 4 * rows * (panel * kPanel * taps + tap * panels.width(panel));
    }
  };
  // A convolution of which some input and output channels are gathered.
  struct Part {
    Packed from, to;
    const int32_t* inputs;  // the wanted ones, null: all
    int64_t input_count;
    std::vector<std::vector<Step>> steps;  // per panel of `to`
  };

  // A convolution of `depth` inputs, of which `count` are wanted (`inputs`, null: all), and
  // `channels` outputs (`wanted`, null: all). Returns its number.
  size_t add(const T* from, int64_t depth, int64_t channels, int64_t taps, const int32_t* inputs,
             int64_t count, const uint8_t* wanted);
  Part& operator[](size_t i) { return parts_[i]; }
  const Part& operator[](size_t i) const { return parts_[i]; }
  size_t count() const { return parts_.size(); }

  // Of a gathered convolution, with room for what select may write too much.
  int64_t bytes(size_t i) const;
  // Gathers a tap's panel into `to.data`.
  void gather_tap(size_t i, int64_t panel, int64_t tap) const;
  // Rows [first, last) of it; writes up to 16 columns more.
  void gather_rows(const Part& part, int64_t panel, int64_t tap, int64_t first, int64_t last,
                   char* out) const;
  // What inputs of these `values` add to the wanted outputs through one tap, as packed weights of
  // one more input that is 1.
  void sum_constants(size_t i, const T* values, int64_t depth, int64_t tap, char* to) const;
  // Bytes of those weights.
  int64_t constant_bytes(size_t i) const {
    const Packed& to = parts_[i].to;
    return 4 * (to.taps * ceil_div(to.panels.channels, kLanes) * kLanes + kLanes);
  }

 private:
  std::vector<Part> parts_;
};

}  // namespace las_mm::cpu
