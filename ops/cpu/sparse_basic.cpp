// las_mm::sparse_basic and sparse_basic_: two 3x3 convolutions and a shortcut at kept positions.
//
// conv1 runs at the positions that a kept output reads, then conv2 adds to the shortcut.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <numeric>
#include <utility>

#include "common/basic_arguments.h"
#include "common/checks.h"
#include "cpu/conv3x3.h"
#include "cpu/image_groups.h"

namespace las_mm::cpu {
namespace {

MaskGeometry geometry(const BasicArguments& a, const BasicShape& s) {
  return {s.out_height, s.out_width, 1, 1, a.mask ? a.granularity : 1};
}

template <typename T>
Conv<T> convolution(const BasicArguments& a, size_t i, int64_t depth, int64_t channels) {
  const at::Tensor& direct = a.weights[i];
  const bool tiled = !a.winograd.empty() && a.winograd[i].numel() > 0;
  return {depth, channels, direct.numel() > 0 ? values(direct, T{}) : nullptr,
          tiled ? a.winograd[i].const_data_ptr<float>() : nullptr,
          a.biases[i].const_data_ptr<float>(), true};
}

// The maps of images, all channels_last. `shortcut`: what the downsample convolution reads.
template <typename T>
struct Maps {
  const T* x;
  Rows<const T> shortcut;
  int64_t shortcut_stride;
  const bool* patches;  // null: all are kept
  T* out;
};

// Which convolutions run in Winograd form.
struct Forms {
  bool conv1_tiles, conv2_tiles;
};

template <typename T>
class Basic {
 public:
  Basic(const BasicArguments& a, const BasicShape& s, const Maps<T>& maps)
      : a_(a),
        s_(s),
        maps_(maps),
        g_(geometry(a, s)),
        w_(workspace()),
        conv1_(convolution<T>(a, 0, s.c_in, s.hidden)),
        conv2_(convolution<T>(a, 1, s.hidden, s.c_out)) {}

  Forms forms() {
    const auto list = [&] { list_positions(maps_.patches, s_.images, g_, {false, true, true, true}, w_); };
    const double cost = a_.winograd_cost;
    return {prefers_tiles(conv1_, cost, w_.halo_tiles, w_.halo, list),
            prefers_tiles(conv2_, cost, w_.tiles, w_.kept, list)};
  }

  void run(const Forms& forms) {
    const bool in_place = static_cast<const T*>(maps_.out) == maps_.x;
    Wanted wanted;
    wanted.dropped = !in_place;
    wanted.halo = !forms.conv1_tiles;
    wanted.halo_tiles = forms.conv1_tiles;
    wanted.tiles = forms.conv2_tiles;
    list_positions(maps_.patches, s_.images, g_, wanted, w_);
    T* zeros = w_.zeros.template get<T>(std::max(s_.c_in, s_.hidden));
    std::fill_n(zeros, std::max(s_.c_in, s_.hidden), T{});

    if (s_.downsample) downsample(w_.kept, false);
    if (s_.downsample) downsample(w_.dropped, true);
    if (!s_.downsample) pass(w_.dropped, zeros);

    const int64_t row = ceil_div(s_.hidden, kLanes) * kLanes;  // starts at a cache line
    const Rows<T> hidden{w_.map.template get<T>(s_.images * s_.out_height * s_.out_width * row),
                         s_.out_height, s_.out_width, row};
    const Rows<const T> x{maps_.x, s_.height, s_.width, s_.c_in};
    const auto to_hidden = [&](int64_t image, int64_t y, int64_t x) {
      return Place<T>{nullptr, hidden.at(image, y, x)};
    };
    const TileGrid halo{s_.out_height, s_.out_width, halo_origin(g_)};
    const bool tiles1 = forms.conv1_tiles, tiles2 = forms.conv2_tiles;
    Conv3x3<T>(x, conv1_, a_.stride, a_.dilation, zeros)
        .run({tiles1 ? w_.halo_tiles : w_.halo, tiles1, halo}, false, to_hidden);

    const auto to_out = [&](int64_t image, int64_t y, int64_t x) {
      if (!is_kept(image, y, x)) return Place<T>{nullptr, nullptr};
      const int64_t at = ((image * s_.out_height + y) * s_.out_width + x) * s_.c_out;
      return Place<T>{s_.downsample ? maps_.out + at : maps_.x + at, maps_.out + at};
    };
    Conv3x3<T>({hidden.data, hidden.height, hidden.width, hidden.pitch}, conv2_, 1, 1, zeros)
        .run({tiles2 ? w_.tiles : w_.kept, tiles2, {s_.out_height, s_.out_width, 0}}, true, to_out);
  }

 private:
  bool is_kept(int64_t image, int64_t y, int64_t x) const {
    if (!maps_.patches) return true;
    const int64_t row = image * g_.rows.patches() + g_.rows.patch_of(y);
    return maps_.patches[row * g_.columns.patches() + g_.columns.patch_of(x)];
  }

  // ReLU of x, where a NaN stays one.
  void pass(const Positions& list, const T* zeros) const {
    parallel_chunks(list.size(), kChunkRows, 1, [&](int64_t lo, int64_t hi, int64_t, int64_t) {
      for (int64_t i = lo; i < hi; ++i) {
        const T* rows[2] = {zeros, maps_.x + list[i] * s_.c_in};
        max_kernel(T{})(rows, 2, s_.c_in, maps_.out + list[i] * s_.c_in);
      }
    });
  }

  void downsample(const Positions& list, bool relu) const {
    const Panels panels{s_.c_out};
    parallel_chunks(
        list.size(), kChunkRows, panels.count(),
        [&](int64_t lo, int64_t hi, int64_t first, int64_t last) {
          const T** in = scratch().pointers.template get<const T*>(2 * (hi - lo));
          T** out = const_cast<T**>(in) + (hi - lo);
          for (int64_t i = lo; i < hi; ++i) {
            const Point p = point(list[i], s_.out_height, s_.out_width);
            const int64_t stride = maps_.shortcut_stride;
            in[i - lo] = maps_.shortcut.at(p.image, p.y * stride, p.x * stride);
            out[i - lo] = maps_.out + list[i] * s_.c_out;
          }
          const Tap<T> tap{in, 0, maps_.shortcut.pitch, values(a_.weights[2], T{}), 0, 1};
          run_panels<T>(hi - lo, &tap, 1, panels, first, last,
                        {a_.biases[2].const_data_ptr<float>(), nullptr, out, 0, relu});
        });
  }

  const BasicArguments& a_;
  const BasicShape& s_;
  const Maps<T> maps_;
  const MaskGeometry g_;
  Workspace& w_;
  const Conv<T> conv1_, conv2_;
};

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
  const at::Tensor side =
      a.shortcut ? a.shortcut->contiguous(at::MemoryFormat::ChannelsLast) : x;
  Maps<T> all{values(x, T{}),
              {values(side, T{}), side.size(2), side.size(3), side.size(1)},
              a.shortcut ? 1 : a.stride,
              patches.defined() ? patches.const_data_ptr<bool>() : nullptr,
              mutable_values(out, T{})};
  const Forms forms = Basic<T>(a, s, all).forms();
  for_images(outputs_of_images(geometry(a, s), s.images, patches),
             [&](int64_t first, int64_t images) {
               BasicShape part = s;
               part.images = images;
               Maps<T> maps = all;
               maps.x += first * s.height * s.width * s.c_in;
               maps.shortcut.data = all.shortcut.at(first, 0, 0);
               if (patches.defined()) maps.patches += first * patches.stride(0);
               maps.out += first * s.out_height * s.out_width * s.c_out;
               Basic<T>(a, part, maps).run(forms);
             });
}

// Runs into `out` or, if that is undefined, into a new map; returns it.
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
  return run(x, {mask, shortcut, std::move(weights), std::move(biases), std::move(winograd),
                 std::move(dense), geometry, plan}, false);
}

void sparse_basic_(const at::Tensor& x, const MaybeTensor& mask, const MaybeTensor& shortcut,
                   Tensors weights, Tensors biases, Tensors winograd, Tensors dense,
                   at::IntArrayRef geometry, at::ArrayRef<double> plan) {
  TORCH_CHECK_VALUE(weights.size() != 3,
                    "weights must have no downsample convolution to work in place");
  const at::Tensor out = run(x, {mask, shortcut, std::move(weights), std::move(biases),
                                 std::move(winograd), std::move(dense), geometry, plan}, true);
  if (!out.is_same(x)) x.copy_(out);
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CPU, m) {
  m.impl("sparse_basic", &sparse_basic);
  m.impl("sparse_basic_", &sparse_basic_);
}

}  // namespace las_mm::cpu
