// Argument checks shared by all back ends. They raise ValueError in Python and name the argument;
// las_mm/ops.py states the same conditions for the reference implementations.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "common/patch_geometry.h"

namespace las_mm {

inline void check_positive(int64_t value, const char* name) {
  TORCH_CHECK_VALUE(value > 0, name, " must be positive, got ", value);
}

inline void check_size(at::IntArrayRef size, const char* name) {
  TORCH_CHECK_VALUE(size.size() == 2 && size[0] > 0 && size[1] > 0, name,
                    " must be a positive (height, width), got ", size);
}

inline void check_mask(const at::Tensor& mask, const char* name) {
  TORCH_CHECK_VALUE(mask.dim() == 4 && mask.size(1) == 1, name,
                    " must have shape (N, 1, h, w), got ", mask.sizes());
  const at::ScalarType dtype = mask.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kBool || dtype == at::kByte || dtype == at::kFloat ||
                        dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
                    name, " must be bool, uint8 or floating point, got ", dtype);
}

inline void check_grid(const at::Tensor& mask, const PatchAxis& rows, const PatchAxis& columns,
                       const char* name) {
  TORCH_CHECK_VALUE(mask.size(2) == rows.patches() && mask.size(3) == columns.patches(), name,
                    " must cover ", rows.size, "x", columns.size, " outputs with a grid of ",
                    rows.patches(), "x", columns.patches(), " patches (granularity ",
                    rows.granularity, "), got ", mask.size(2), "x", mask.size(3));
}

}  // namespace las_mm
