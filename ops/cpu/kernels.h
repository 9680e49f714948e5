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

struct Kernels {
  void (*panel_f32)(const Panel<float>&);
  void (*panel_bf16)(const Panel<bf16>&);
  // Input transform of F(2x2, 3x3): the 4x4 positions from `tile` on (row and column strides in
  // values) of `channels` -> out[16][.], `out_stride` values apart.
  void (*winograd_input)(const float* tile, int64_t row_stride, int64_t column_stride,
                         int64_t channels, float* out, int64_t out_stride);
  // Output transform: in[16][.] (`in_stride` apart) of `channels`, + bias, ReLU -> 4 rows of `out`.
  void (*winograd_output)(const float* in, int64_t in_stride, int64_t channels, const float* bias,
                          float* out, int64_t out_stride);
  // Sum over `positions` consecutive positions of the inner product with `weight`.
  float (*dot_f32)(const float* x, int64_t positions, int64_t channels, const float* weight);
  float (*dot_bf16)(const bf16* x, int64_t positions, int64_t channels, const float* weight);
  // out[i] = max over `count` rows.
  void (*max_f32)(const float* const* rows, int count, int64_t channels, float* out);
  void (*max_bf16)(const bf16* const* rows, int count, int64_t channels, bf16* out);
  // Moves the wanted columns of a row of a packed weight together: panels[i] has columns 64 * i to
  // 64 * i + 63, bit j of lanes[v] wants column 16 * v + j. A column has 4 bytes. Writes up to
  // kLanes columns more than wanted.
  void (*select)(const void* const* panels, const uint16_t* lanes, int64_t vectors, void* out);
  // sum[c] += sum over `positions` consecutive positions.
  void (*sum_f32)(const float* x, int64_t positions, int64_t channels, float* sum);
  void (*sum_bf16)(const bf16* x, int64_t positions, int64_t channels, float* sum);
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

}  // namespace las_mm::cpu
