// las_mm::sparse_bottleneck and sparse_bottleneck_: checks, the dense form, and registration.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <numeric>
#include <utility>

#include "common/checks.h"
#include "cpu/bottleneck.h"
#include "cpu/image_groups.h"

namespace las_mm::cpu {
namespace {

// Squeeze-and-excitation of a whole map, pooled over the positions where `kept` is 1.
at::Tensor excite(const at::Tensor& x, const at::Tensor& kept, const std::vector<at::Tensor>& se) {
  at::Tensor mean;
  if (kept.defined()) {
    const at::Tensor count = kept.sum({2, 3}, false, at::kFloat).clamp_min_(1);
    mean = (x * kept).sum({2, 3}, false, at::kFloat).div_(count);
  } else {
    mean = x.mean(at::IntArrayRef{2, 3}, false, at::kFloat);
  }
  const at::Tensor hidden = at::linear(mean, se[0], se[1]).relu_();
  const at::Tensor scale = at::linear(hidden, se[2], se[3]).sigmoid_();
  return (x * scale.unsqueeze(2).unsqueeze(3)).to(x.scalar_type());
}

// The same with dense convolutions; equals sparse execution.
at::Tensor run_dense(const at::Tensor& x, const Arguments& a, const Shape& s,
                     const at::Tensor& patches) {
  const std::vector<at::Tensor>& dense = *a.dense;
  const int64_t dilation = std::min(a.dilation, std::max(s.hidden_height, s.hidden_width));
  const auto bias = [&](int i) { return a.biases[i].to(x.scalar_type()); };
  at::Tensor out = at::conv2d(x, dense[0], bias(0), a.strides[0]).relu_();
  out = at::conv2d(out, dense[1], bias(1), a.strides[1], dilation, dilation, a.groups);
  out = out.relu_();
  const auto expanded = [&](int64_t size) {
    return at::arange(size, patches.options().dtype(at::kLong)).floor_divide(a.granularity);
  };
  at::Tensor kept;
  if (patches.defined()) {
    kept = patches.index_select(2, expanded(s.out_height))
               .index_select(3, expanded(s.out_width))
               .to(x.scalar_type());
  }
  if (a.excitation) out = excite(out, kept, *a.excitation);
  out = at::conv2d(out, dense[2], bias(2));
  at::Tensor side = x;
  if (s.downsample) {
    side = a.shortcut ? at::conv2d(*a.shortcut, dense[3], bias(3))
                      : at::conv2d(x, dense[3], bias(3), a.strides[0] * a.strides[1]);
  }
  if (!patches.defined()) return out.add_(side).relu_();
  return at::addcmul(side, out, kept).relu_();
}

// Where the share of kept outputs makes dense convolutions faster on this machine.
bool prefers_dense(const Arguments& a, const Shape& s, const at::Tensor& patches) {
  if (!a.dense) return false;
  if (!patches.defined()) return 1.0 > a.dense_above;
  const std::vector<int64_t> kept = outputs_of_images(geometry(a, s), s.images, patches);
  return std::accumulate(kept.begin(), kept.end(), int64_t{0}) >
         a.dense_above * static_cast<double>(s.images * s.out_height * s.out_width);
}

template <typename T>
void run_sparse(const at::Tensor& x, const Arguments& a, const Shape& s, const at::Tensor& patches,
                const at::Tensor& out) {
  const Batch<T> batch(a, s, x, patches, out);
  const auto run = [&](int64_t first, int64_t images) {
    Shape part = s;
    part.images = images;
    Bottleneck<T> block = batch.block(first, part);
    block.plan();
    block.run({all_channels<T>(a, part, block.use_tiles())});
  };
  for_images(outputs_of_images(geometry(a, s), s.images, patches), run);
}

void run_sparse(const at::Tensor& x, const Arguments& a, const Shape& s, const at::Tensor& patches,
                const at::Tensor& out) {
  if (x.scalar_type() == at::kFloat) {
    run_sparse<float>(x, a, s, patches, out);
  } else {
    run_sparse<bf16>(x, a, s, patches, out);
  }
}

// What both forms of the op do before they compute: checks, and everything in plain arrays.
struct Call {
  Call(const at::Tensor& x, Arguments arguments) : a(std::move(arguments)), s(check(x, a)) {
    make_contiguous(a);
    if (a.mask) patches = decisions(*a.mask);
    input = x.contiguous(at::MemoryFormat::ChannelsLast);
  }

  bool dense() const { return prefers_dense(a, s, patches); }

  const at::AutoDispatchBelowADInplaceOrView no_gradients;  // of the dense form's convolutions
  Arguments a;
  const Shape s;
  at::Tensor patches, input;
};

using Tensors = std::vector<at::Tensor>;
using MaybeTensor = Optional<at::Tensor>;

at::Tensor sparse_bottleneck(const at::Tensor& x, const MaybeTensor& mask, Tensors weights,
                             Tensors biases, const MaybeTensor& winograd,
                             const MaybeTensor& shortcut, int64_t granularity,
                             at::IntArrayRef strides, int64_t dilation, int64_t groups,
                             double winograd_cost, Optional<Tensors> dense, double dense_above,
                             Optional<Tensors> excitation) {
  const Call call(x, {mask, std::move(weights), std::move(biases), winograd, shortcut, granularity,
                      strides.vec(), dilation, groups, winograd_cost, std::move(dense),
                      dense_above, std::move(excitation)});
  if (call.dense()) {
    return run_dense(call.input, call.a, call.s, call.patches)
        .contiguous(at::MemoryFormat::ChannelsLast);
  }
  const Shape& s = call.s;
  at::Tensor out = output_map(x, {s.images, s.c_out, s.out_height, s.out_width});
  run_sparse(call.input, call.a, s, call.patches, out);
  return out;
}

void sparse_bottleneck_(const at::Tensor& x, const MaybeTensor& mask, Tensors weights,
                        Tensors biases, const MaybeTensor& winograd, const MaybeTensor& shortcut,
                        int64_t granularity, at::IntArrayRef strides, int64_t dilation,
                        int64_t groups, double winograd_cost, Optional<Tensors> dense,
                        double dense_above, Optional<Tensors> excitation) {
  TORCH_CHECK_VALUE(weights.size() != 4,
                    "weights must have no downsample convolution to work in place");
  const Call call(x, {mask, std::move(weights), std::move(biases), winograd, shortcut, granularity,
                      strides.vec(), dilation, groups, winograd_cost, std::move(dense),
                      dense_above, std::move(excitation)});
  if (call.dense()) {
    x.copy_(run_dense(call.input, call.a, call.s, call.patches));
    return;
  }
  run_sparse(call.input, call.a, call.s, call.patches, call.input);
  if (!call.input.is_same(x)) x.copy_(call.input);
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CPU, m) {
  m.impl("sparse_bottleneck", &sparse_bottleneck);
  m.impl("sparse_bottleneck_", &sparse_bottleneck_);
}

}  // namespace las_mm::cpu
