// A packed convolution of which some input and output channels are gathered into a smaller one.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/sparse_conv.h"

namespace las_mm::cpu {

template <typename T>
class GatheredConv {
 public:
  // `from`: of `depth` inputs and `channels` outputs, packed. `inputs`: the `count` wanted ones, which
  // have to outlive this, null: all. `wanted`: of each output, null: all.
  GatheredConv(const T* from, int64_t depth, int64_t channels, int64_t taps, const int32_t* inputs,
               int64_t count, const uint8_t* wanted);

  int64_t outputs() const { return to_.panels.channels; }
  // Inputs that a tap of the smaller one has, pairs of them if bfloat16.
  int64_t rows() const { return to_.rows; }
  int64_t width(int64_t panel) const { return to_.panels.width(panel); }

  // Bytes of the smaller one, with room for what gathering may write too much.
  int64_t bytes() const;
  // Gathers it into `to` in so many independent tasks.
  int64_t tasks() const { return to_.taps * to_.panels.count(); }
  void gather(int64_t task, char* to) const;
  // Rows [first, last) of one tap's panel; writes up to 16 columns more.
  void gather_rows(int64_t panel, int64_t tap, int64_t first, int64_t last, char* out) const;

  // Weights of one more input of the smaller one: the products of `input`, a value per channel of
  // the whole, with tap `tap`. `to` as long as constant_bytes().
  int64_t constant_bytes() const;
  void sum(const T* input, int64_t tap, char* to) const;
  // The same product with a panel of the whole convolution.
  void multiply(const T* input, int64_t panel, int64_t tap, T* sums) const;

 private:
  // 16 source columns of which some go to byte `to` of a row.
  struct Step {
    int64_t column;
    int32_t to;
    uint16_t lanes;
  };
  // In columns of 4 bytes: a float, or a pair of bfloat16 input channels.
  struct Packed {
    int64_t rows;  // per tap
    int64_t taps;
    Panels panels;

    int64_t offset(int64_t panel, int64_t tap) const {
      return 4 * rows * (panel * kPanel * taps + tap * panels.width(panel));
    }
  };

  const char* const data_;
  const int64_t depth_;
  const Packed from_, to_;
  const int32_t* const inputs_;
  const int64_t input_count_;
  std::vector<std::vector<Step>> steps_;  // per panel of `to_`
};

}  // namespace las_mm::cpu
