// las_mm::pack_conv: the layout that las_mm/ops/packing.py documents.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "common/checks.h"
#include "cpu/sparse_conv.h"

namespace las_mm::cpu {
namespace {

template <typename T>
void pack(const T* weight, int64_t groups, int64_t out, int64_t depth, int64_t taps, T* packed) {
  const int64_t pair = sizeof(T) == sizeof(float) ? 1 : 2;
  const Panels panels{out};
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t p = 0; p < panels.count(); ++p) {
      const int width = panels.width(p), valid = panels.valid(p);
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t k = 0; k < packed_depth<T>(depth); k += pair) {
          for (int column = 0; column < width; ++column) {
            for (int64_t i = 0; i < pair; ++i) {
              const int64_t o = group * out + p * kPanel + column;
              const bool exists = column < valid && k + i < depth;
              *packed++ = exists ? weight[(o * depth + k + i) * taps + tap] : T(0);
            }
          }
        }
      }
    }
  }
}

at::Tensor pack_conv(const at::Tensor& weight, int64_t groups) {
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.numel() > 0,
                    "weight must have shape (O, I, kh, kw), got ", weight.sizes());
  const bool is_float = weight.scalar_type() == at::kFloat;
  TORCH_CHECK_VALUE(is_float || weight.scalar_type() == at::kBFloat16,
                    "weight must be float32 or bfloat16 (on a GPU also float16), got ", weight.scalar_type());
  TORCH_CHECK_VALUE(groups > 0 && weight.size(0) % groups == 0,
                    "groups must be positive and divide ", weight.size(0),
                    " output channels, got ", groups);
  const int64_t out = weight.size(0), depth = weight.size(1);
  const int64_t taps = weight.size(2) * weight.size(3);
  const at::Tensor dense = weight.contiguous();
  at::Tensor packed = at::empty({packed_numel(out, depth, taps, groups, is_float)},
                                weight.options().memory_format(at::MemoryFormat::Contiguous));
  if (is_float) {
    pack(dense.const_data_ptr<float>(), groups, out / groups, depth, taps,
         packed.mutable_data_ptr<float>());
  } else {
    pack(dense.const_data_ptr<at::BFloat16>(), groups, out / groups, depth, taps,
         packed.mutable_data_ptr<at::BFloat16>());
  }
  return packed;
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CPU, m) { m.impl("pack_conv", &pack_conv); }

}  // namespace las_mm::cpu
