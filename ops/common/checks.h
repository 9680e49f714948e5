// Argument checks shared by all back ends. They raise ValueError in Python and name the argument;
// las_mm/ops/ states the same conditions for the reference implementations.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <limits>
#include <string>

#include "common/patch_geometry.h"

namespace las_mm {

inline void check_positive(int64_t value, const char* name) {
  TORCH_CHECK_VALUE(value > 0, name, " must be positive, got ", value);
}

constexpr int64_t kMaxStride = 1 << 15;  // products of strides and sizes stay in range

inline void check_stride(int64_t stride, const char* name) {
  TORCH_CHECK_VALUE(stride > 0 && stride <= kMaxStride, name, " must be 1 to ", kMaxStride,
                    ", got ", stride);
}

inline void check_size(at::IntArrayRef size, const char* name) {
  TORCH_CHECK_VALUE(size.size() == 2 && size[0] > 0 && size[1] > 0, name,
                    " must be a positive (height, width), got ", size);
}

inline void check_mask_dtype(const at::Tensor& mask, const char* name) {
  const at::ScalarType dtype = mask.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kBool || dtype == at::kByte || dtype == at::kFloat ||
                        dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
                    name, " must be bool, uint8 or floating point, got ", dtype);
}

inline void check_mask(const at::Tensor& mask, const char* name) {
  TORCH_CHECK_VALUE(mask.dim() == 4 && mask.size(1) == 1, name,
                    " must have shape (N, 1, h, w), got ", mask.sizes());
  check_mask_dtype(mask, name);
}

inline void check_grid(const at::Tensor& mask, const PatchAxis& rows, const PatchAxis& columns,
                       const char* name) {
  TORCH_CHECK_VALUE(mask.size(2) == rows.patches() && mask.size(3) == columns.patches(), name,
                    " must cover ", rows.size, "x", columns.size, " outputs with a grid of ",
                    rows.patches(), "x", columns.patches(), " patches (granularity ",
                    rows.granularity, "), got ", mask.size(2), "x", mask.size(3));
}

// A non-empty map of features that the sparse ops compute on.
inline void check_map(const at::Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, name,
                    " must have shape (N, C, H, W), got ", x.sizes());
  const at::ScalarType dtype = x.scalar_type();
  const bool half = dtype == at::kHalf && x.is_cuda();  // CPUs have no arithmetic for it
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16 || half, name,
                    " must be float32 or bfloat16 (on a GPU also float16), got ", dtype);
}

inline void check_channels(const at::Tensor& x, int64_t channels, const char* name) {
  TORCH_CHECK_VALUE(x.size(1) == channels, name, " must have ", channels, " channels, got ",
                    x.size(1));
}

inline void check_same(const at::Tensor& x, const at::Tensor& like, const char* name) {
  TORCH_CHECK_VALUE(x.scalar_type() == like.scalar_type() && x.device() == like.device(), name,
                    " must be ", like.scalar_type(), " on ", like.device(), ", got ",
                    x.scalar_type(), " on ", x.device());
}

inline void check_vector(const at::Tensor& v, const std::string& name, int64_t size,
                         at::ScalarType dtype, const at::Tensor& like) {
  TORCH_CHECK_VALUE(v.dim() == 1 && v.numel() == size, name, " must have shape [", size,
                    "], got ", v.sizes());
  TORCH_CHECK_VALUE(v.scalar_type() == dtype, name, " must be ", dtype, ", got ",
                    v.scalar_type());
  TORCH_CHECK_VALUE(v.device() == like.device(), name, " must be on ", like.device(), ", got ",
                    v.device());
}

// A weight in the order of las_mm/ops/packing.py.
inline void check_packed(const at::Tensor& packed, const std::string& name, int64_t out,
                         int64_t depth, int64_t taps, int64_t groups, const at::Tensor& like) {
  const int64_t numel = packed_numel(out, depth, taps, groups, like.scalar_type() == at::kFloat);
  TORCH_CHECK_VALUE(packed.dim() == 1 && packed.numel() == numel, name,
                    " must be packed by pack_conv for ", depth, " -> ", out, " channels, ", taps,
                    " taps and ", groups, " groups (", numel, " values), got ", packed.sizes());
  check_vector(packed, name, numel, like.scalar_type(), like);
}

inline void check_strides(at::IntArrayRef strides, int64_t dilation) {
  TORCH_CHECK_VALUE(strides.size() == 2, "strides must be (stride of conv1, stride of conv2), got ",
                    strides);
  for (const int64_t stride : strides) check_stride(stride, "strides");
  check_positive(dilation, "dilation");
}

inline void check_groups(int64_t groups, int64_t in, int64_t out) {
  TORCH_CHECK_VALUE(groups > 0 && in % groups == 0 && out % groups == 0,
                    "groups must be positive and divide ", in, " input and ", out,
                    " output channels, got ", groups);
}

// Positions are indexed with 32 bits.
inline void check_positions(int64_t count, const char* name) {
  TORCH_CHECK_VALUE(count < std::numeric_limits<int32_t>::max(), name,
                    " must have fewer than 2^31 positions (images * height * width), got ", count);
}

// A mask for height x width outputs of `images` images.
inline void check_mask_for(const at::Tensor& mask, const char* name, const at::Tensor& like,
                           int64_t height, int64_t width, int64_t granularity) {
  check_mask(mask, name);
  check_positive(granularity, "granularity");
  TORCH_CHECK_VALUE(mask.device() == like.device(), name, " must be on ", like.device(), ", got ",
                    mask.device());
  const PatchAxis rows{height, granularity}, columns{width, granularity};
  TORCH_CHECK_VALUE(mask.size(0) == like.size(0) && mask.size(2) == rows.patches() &&
                        mask.size(3) == columns.patches(),
                    name, " must have shape [", like.size(0), ", 1, ", rows.patches(), ", ",
                    columns.patches(), "] (", height, "x", width, " outputs, granularity ",
                    granularity, "), got ", mask.sizes());
}

}  // namespace las_mm
