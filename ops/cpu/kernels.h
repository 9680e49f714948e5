// The inner loops, one set per instruction set, free of torch headers.
#pragma once

#include <cstdint>

namespace las_mm::cpu {

struct bf16 {
  uint16_t bits;
};

inline float one(float) { return 1; }
inline bf16 one(bf16) { return {0x3f80}; }

constexpr int kPanel = 64;  // output channels computed together; las_mm/ops/packing.py: PANEL
constexpr int kLanes = 16;  // packed panels are multiples of this; packing.py: LANES

// Part of the sum over input channels: `depth` values from `offset` on in every row, times packed
// weights of depth x panel width.
template <typename T>
struct Segment {
  const T* const* rows;
  int64_t offset;
  int64_t depth;
  const T* weights;
};

// out[row][column + j] = relu(bias[j] + residual[row][column + j] + sum over segments) for one
// panel of output channels. Rows are pointers, so that gathering and scattering copy nothing.
template <typename T>
struct Panel {
  int64_t rows;
  const Segment<T>* segments;
  int segment_count;
  int width;          // packed: a multiple of kLanes, at most kPanel
  int valid;          // columns that exist, at most width
  const float* bias;  // `valid` values, or null
  const T* const* residual;  // or null; may equal `out`
  T* const* out;
  int64_t column;
  bool relu;
};

// The 2x2 outputs of a Winograd tile: out[q][column + c] = relu(residual[q][column + c] + ...).
struct TileTarget {
  const float* const* residual;  // or null; may equal `out`
  float* const* out;             // null rows are left out
  int64_t column;
  bool relu;
};

// 16 columns of a row of a packed weight: those whose bit is set in `lanes` go to byte `to` of the
// gathered row.
struct Move {
  const char* from;  // in row 0
  int64_t stride;    // bytes from row to row
  int32_t to;
  uint16_t lanes;
};

struct Kernels {
  void (*panel_f32)(const Panel<float>&);
  void (*panel_bf16)(const Panel<bf16>&);
  // Input transform of F(2x2, 3x3): the 4x4 positions from `tile` on (row and column strides in
  // values) of `channels` -> out[16][.], `out_stride` values apart.
  void (*winograd_input)(const float* tile, int64_t row_stride, int64_t column_stride,
                         int64_t channels, float* out, int64_t out_stride);
  // Output transform: in[16][.] (`in_stride` apart) of `channels`, + bias -> `to`.
  void (*winograd_output)(const float* in, int64_t in_stride, int64_t channels, const float* bias,
                          const TileTarget& to);
  // Sum over `positions` positions, `stride` values apart, of the inner product with `weight`.
  float (*dot_f32)(const float* x, int64_t positions, int64_t stride, int64_t channels,
                   const float* weight);
  float (*dot_bf16)(const bf16* x, int64_t positions, int64_t stride, int64_t channels,
                    const float* weight);
  // out[i] = max over `count` rows.
  void (*max_f32)(const float* const* rows, int count, int64_t channels, float* out);
  void (*max_bf16)(const bf16* const* rows, int count, int64_t channels, bf16* out);
  // Gathers `count` rows of columns of 4 bytes: out row i gets the wanted columns of row rows[i]
  // (null: i) of every move, then zeros from byte `end` to the end of the row, whose size is
  // `stride` bytes. May write up to kLanes columns after the last row.
  void (*select)(const Move* moves, int move_count, const int32_t* rows, int64_t count,
                 int64_t end, char* out, int64_t stride);
  // sum[c] += sum over `positions` rows of x, `stride` values apart.
  void (*sum_f32)(const float* x, int64_t positions, int64_t stride, int64_t channels, float* sum);
  void (*sum_bf16)(const bf16* x, int64_t positions, int64_t stride, int64_t channels, float* sum);
  // x[c] *= scale[c].
  void (*scale_f32)(float* x, const float* scale, int64_t channels);
  void (*scale_bf16)(bf16* x, const float* scale, int64_t channels);
  // out[c] = mean over `count` rows of relu(row[c] * scale[c] + shift[c]).
  void (*norm_relu_f32)(const float* const* rows, int count, const float* scale,
                        const float* shift, int64_t channels, float* out);
  void (*norm_relu_bf16)(const bf16* const* rows, int count, const float* scale,
                         const float* shift, int64_t channels, bf16* out);
};

extern const Kernels kGenericKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;

const Kernels& kernels();  // the set for isa()

inline auto panel_kernel(float) { return kernels().panel_f32; }
inline auto panel_kernel(bf16) { return kernels().panel_bf16; }
inline auto dot_kernel(float) { return kernels().dot_f32; }
inline auto dot_kernel(bf16) { return kernels().dot_bf16; }
inline auto max_kernel(float) { return kernels().max_f32; }
inline auto max_kernel(bf16) { return kernels().max_bf16; }
inline auto sum_kernel(float) { return kernels().sum_f32; }
inline auto sum_kernel(bf16) { return kernels().sum_bf16; }
inline auto scale_kernel(float) { return kernels().scale_f32; }
inline auto scale_kernel(bf16) { return kernels().scale_bf16; }
inline auto norm_relu_kernel(float) { return kernels().norm_relu_f32; }
inline auto norm_relu_kernel(bf16) { return kernels().norm_relu_bf16; }

}  // namespace las_mm::cpu
