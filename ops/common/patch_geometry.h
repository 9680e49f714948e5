// Geometry shared by all back ends; free of torch headers so that CUDA kernels can include it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define LAS_MM_HOST_DEVICE __host__ __device__
#else
#define LAS_MM_HOST_DEVICE
#endif

namespace las_mm {

// Rounds up for numerator >= 0 and denominator > 0; cannot overflow.
LAS_MM_HOST_DEVICE constexpr int64_t ceil_div(int64_t numerator, int64_t denominator) {
  return numerator / denominator + (numerator % denominator != 0);
}

constexpr int kTile = 16;  // values of a transformed 4x4 input of Winograd's F(2x2, 3x3)

// Values of a packed convolution; las_mm/ops/packing.py states the layout. `depth` is the number of
// input channels of one group, packed in pairs unless the weights are float32.
LAS_MM_HOST_DEVICE constexpr int64_t packed_numel(int64_t out, int64_t depth, int64_t taps,
                                                  int64_t groups, bool is_float) {
  const int64_t rows = is_float ? depth : 2 * ceil_div(depth, 2);
  return groups * taps * rows * ceil_div(out / groups, 16) * 16;
}

// One axis of a map cut into patches of `granularity` positions; the last patch may be shorter.
struct PatchAxis {
  int64_t size;
  int64_t granularity;

  LAS_MM_HOST_DEVICE constexpr int64_t patches() const { return ceil_div(size, granularity); }
  LAS_MM_HOST_DEVICE constexpr int64_t patch_of(int64_t position) const {
    return position / granularity;
  }
  // Real positions in `patch`, 0 <= patch < patches().
  LAS_MM_HOST_DEVICE constexpr int64_t extent(int64_t patch) const {
    const int64_t rest = size - patch * granularity;
    return rest < granularity ? rest : granularity;
  }
};

// One axis of a 3x3 convolution with padding == dilation: ceil(input / stride) outputs, and output
// o reads the inputs stride * o + {-dilation, 0, dilation}.
struct ConvAxis {
  int64_t input;
  int64_t stride;
  int64_t dilation;

  LAS_MM_HOST_DEVICE constexpr int64_t output() const { return ceil_div(input, stride); }
  // The input that output `o` reads through `tap` in {-1, 0, 1}, or -1 in the padding.
  LAS_MM_HOST_DEVICE constexpr int64_t input_of(int64_t o, int tap) const {
    const int64_t i = stride * o + tap * dilation;
    return i >= 0 && i < input ? i : -1;
  }
  // The output that reads input `i` through `tap`, or -1 if there is none.
  LAS_MM_HOST_DEVICE constexpr int64_t output_of(int64_t i, int tap) const {
    const int64_t center = i - tap * dilation;
    return center >= 0 && center < input && center % stride == 0 ? center / stride : -1;
  }
};

}  // namespace las_mm
