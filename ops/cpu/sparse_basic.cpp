// las_mm::sparse_basic and sparse_basic_: the dense form, and registration.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <numeric>
#include <utility>

#include "cpu/basic.h"
#include "cpu/image_groups.h"

namespace las_mm::cpu {
namespace {

// The same with dense convolutions; equals sparse execution.
at::Tensor run_dense(const at::Tensor& x, const BasicArguments& a, const BasicShape& s,
                     const at::Tensor& patches) {
  const int64_t dilation = std::min(a.dilation, std::max(s.height, s.width));
  const auto bias = [&](int i) { return a.biases[i].to(x.scalar_type()); };
  at::Tensor out = at::conv2d(x, a.dense[0], bias(0), a.stride, dilation, dilation).relu_();
  out = at::conv2d(out, a.dense[1], bias(1), 1, 1);
  at::Tensor side = x;
  if (s.downsample) {
    side = at::conv2d(a.shortcut ? *a.shortcut : x, a.dense[2], bias(2), a.shortcut ? 1 : a.stride);
  }
  if (!patches.defined()) return out.add_(side).relu_();
  const auto expanded = [&](int64_t size) {
    return at::arange(size, patches.options().dtype(at::kLong)).floor_divide(a.granularity);
  };
  const at::Tensor kept = patches.index_select(2, expanded(s.out_height))
                              .index_select(3, expanded(s.out_width))
                              .to(x.scalar_type());
  return at::addcmul(side, out, kept).relu_();
}

template <typename T>
void run_sparse(const at::Tensor& x, const BasicArguments& a, const BasicShape& s,
                const at::Tensor& patches, const at::Tensor& out) {
  const at::Tensor side = side_of(x, a);
  const Maps<T> all = maps_of<T>(x, side, a, patches, out);
  const MaskGeometry g = geometry(a, s);
  const Forms forms = Basic<T>(a, s, all).forms();
  for_images(outputs_of_images(g, s.images, patches), [&](int64_t first, int64_t images) {
    BasicShape part = s;
    part.images = images;
    Basic<T> block(a, part, from_image(all, first, s, g));
    block.run(forms, block.conv1(), block.conv2());
  });
}

// Into x itself or into a new map, which it returns.
at::Tensor run(const at::Tensor& x, const BasicArguments& a, bool in_place) {
  const at::AutoDispatchBelowADInplaceOrView no_gradients;  // of the dense form's convolutions
  const BasicShape s = check(x, a);
  at::Tensor patches;
  if (a.mask) patches = decisions(*a.mask);
  const at::Tensor input = x.contiguous(at::MemoryFormat::ChannelsLast);
  if (!a.dense.empty()) {
    const auto kept = outputs_of_images(geometry(a, s), s.images, patches);
    if (std::accumulate(kept.begin(), kept.end(), int64_t{0}) >
        a.dense_above * static_cast<double>(s.images * s.out_height * s.out_width)) {
      return run_dense(input, a, s, patches).contiguous(at::MemoryFormat::ChannelsLast);
    }
  }
  const at::Tensor out =
      in_place ? input : output_map(x, {s.images, s.c_out, s.out_height, s.out_width});
  if (x.scalar_type() == at::kFloat) {
    run_sparse<float>(input, a, s, patches, out);
  } else {
    run_sparse<bf16>(input, a, s, patches, out);
  }
  return out;
}

using Tensors = std::vector<at::Tensor>;
using MaybeTensor = Optional<at::Tensor>;

at::Tensor sparse_basic(const at::Tensor& x, const MaybeTensor& mask, const MaybeTensor& shortcut,
                        Tensors weights, Tensors biases, Tensors winograd, Tensors dense,
                        at::IntArrayRef geometry, at::ArrayRef<double> plan) {
  return run(x,
             {mask, shortcut, std::move(weights), std::move(biases), std::move(winograd),
              std::move(dense), geometry, plan},
             false);
}

void sparse_basic_(const at::Tensor& x, const MaybeTensor& mask, const MaybeTensor& shortcut,
                   Tensors weights, Tensors biases, Tensors winograd, Tensors dense,
                   at::IntArrayRef geometry, at::ArrayRef<double> plan) {
  check_in_place(weights.size());
  const at::Tensor out = run(x,
                             {mask, shortcut, std::move(weights), std::move(biases),
                              std::move(winograd), std::move(dense), geometry, plan},
                             true);
  if (!out.is_same(x)) x.copy_(out);
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CPU, m) {
  m.impl("sparse_basic", &sparse_basic);
  m.impl("sparse_basic_", &sparse_basic_);
}

}  // namespace las_mm::cpu
