// The work of sparse_basic and channel_basic: two 3x3 convolutions and a shortcut at kept
// positions.
//
// conv1 runs at the positions that a kept output reads, then conv2 adds to the shortcut.
#pragma once

#include <algorithm>

#include "common/basic_arguments.h"
#include "cpu/conv3x3.h"

namespace las_mm::cpu {

inline MaskGeometry geometry(const BasicArguments& a, const BasicShape& s) {
  return {s.out_height, s.out_width, 1, 1, a.mask ? a.granularity : 1};
}

template <typename T>
Conv<T> convolution(const BasicArguments& a, size_t i, int64_t depth, int64_t channels) {
  const at::Tensor& direct = a.weights[i];
  const bool tiled = !a.winograd.empty() && a.winograd[i].numel() > 0;
  return {depth,
          channels,
          direct.numel() > 0 ? values(direct, T{}) : nullptr,
          tiled ? a.winograd[i].const_data_ptr<float>() : nullptr,
          a.biases[i].const_data_ptr<float>(),
          true};
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

// What the downsample convolution reads.
inline at::Tensor side_of(const at::Tensor& x, const BasicArguments& a) {
  return a.shortcut ? a.shortcut->contiguous(at::MemoryFormat::ChannelsLast) : x;
}

template <typename T>
Maps<T> maps_of(const at::Tensor& x, const at::Tensor& side, const BasicArguments& a,
                const at::Tensor& patches, const at::Tensor& out) {
  return {values(x, T{}),
          {values(side, T{}), side.size(2), side.size(3), side.size(1)},
          a.shortcut ? 1 : a.stride,
          patches.defined() ? patches.const_data_ptr<bool>() : nullptr,
          mutable_values(out, T{})};
}

// Those of the images from `first` on.
template <typename T>
Maps<T> from_image(Maps<T> maps, int64_t first, const BasicShape& s, const MaskGeometry& g) {
  maps.x += first * s.height * s.width * s.c_in;
  maps.shortcut.data = maps.shortcut.at(first, 0, 0);
  if (maps.patches) maps.patches += first * g.rows.patches() * g.columns.patches();
  maps.out += first * s.out_height * s.out_width * s.c_out;
  return maps;
}

// Which convolutions run in Winograd form.
struct Forms {
  bool conv1_tiles, conv2_tiles;
};

template <typename T>
class Basic {
 public:
  Basic(const BasicArguments& a, const BasicShape& s, const Maps<T>& maps)
      : a_(a), s_(s), maps_(maps), g_(geometry(a, s)), w_(workspace()) {}

  Conv<T> conv1() const { return convolution<T>(a_, 0, s_.c_in, s_.hidden); }
  Conv<T> conv2() const { return convolution<T>(a_, 1, s_.hidden, s_.c_out); }

  Forms forms() {
    const auto list = [&] {
      list_positions(maps_.patches, s_.images, g_, {false, true, true, true}, w_);
    };
    const double cost = a_.winograd_cost;
    return {prefers_tiles(conv1(), cost, w_.halo_tiles, w_.halo, list),
            prefers_tiles(conv2(), cost, w_.tiles, w_.kept, list)};
  }

  // The convolutions may be those of some hidden channels.
  void run(const Forms& forms, const Conv<T>& conv1, const Conv<T>& conv2) {
    const bool in_place = static_cast<const T*>(maps_.out) == maps_.x;
    Wanted wanted;
    wanted.dropped = !in_place;
    wanted.halo = !forms.conv1_tiles;
    wanted.halo_tiles = forms.conv1_tiles;
    wanted.tiles = forms.conv2_tiles;
    list_positions(maps_.patches, s_.images, g_, wanted, w_);
    T* zeros = w_.zeros.template get<T>(std::max(s_.c_in, conv2.inputs()));
    std::fill_n(zeros, std::max(s_.c_in, conv2.inputs()), T{});

    if (s_.downsample) downsample(w_.kept, false);
    if (s_.downsample) downsample(w_.dropped, true);
    if (!s_.downsample) pass(w_.dropped, zeros);

    const int64_t row = ceil_div(conv2.inputs(), kLanes) * kLanes;  // starts at a cache line
    const int64_t positions = s_.images * s_.out_height * s_.out_width;
    const Rows<T> hidden{w_.map.template get<T>(positions * row), s_.out_height, s_.out_width, row};
    const Rows<const T> x{maps_.x, s_.height, s_.width, s_.c_in};
    const auto to_hidden = [&](int64_t image, int64_t y, int64_t x) {
      return Place<T>{nullptr, hidden.at(image, y, x)};
    };
    const TileGrid halo{s_.out_height, s_.out_width, halo_origin(g_)};
    const bool tiles1 = forms.conv1_tiles, tiles2 = forms.conv2_tiles;
    Conv3x3<T>(x, conv1, a_.stride, a_.dilation, zeros)
        .run({tiles1 ? w_.halo_tiles : w_.halo, tiles1, halo}, false, to_hidden);
    for (int64_t i = 0; conv2.constant && i < positions; ++i) {
      hidden.data[i * row + conv2.depth] = one(T{});
    }

    const auto to_out = [&](int64_t image, int64_t y, int64_t x) {
      if (!is_kept(image, y, x)) return Place<T>{nullptr, nullptr};
      const int64_t at = ((image * s_.out_height + y) * s_.out_width + x) * s_.c_out;
      return Place<T>{s_.downsample ? maps_.out + at : maps_.x + at, maps_.out + at};
    };
    Conv3x3<T>({hidden.data, hidden.height, hidden.width, hidden.pitch}, conv2, 1, 1, zeros)
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
    parallel_chunks(list.size(), kChunkRows, panels.count(),
                    [&](int64_t lo, int64_t hi, int64_t first, int64_t last) {
                      const T** in = scratch().pointers.template get<const T*>(2 * (hi - lo));
                      T** out = const_cast<T**>(in) + (hi - lo);
                      for (int64_t i = lo; i < hi; ++i) {
                        const Point p = point(list[i], s_.out_height, s_.out_width);
                        const int64_t stride = maps_.shortcut_stride;
                        in[i - lo] = maps_.shortcut.at(p.image, p.y * stride, p.x * stride);
                        out[i - lo] = maps_.out + list[i] * s_.c_out;
                      }
                      const Tap<T> tap{in, 0, maps_.shortcut.pitch, values(a_.weights[2], T{}),
                                       0,  1};
                      run_panels<T>(hi - lo, &tap, 1, panels, first, last,
                                    {a_.biases[2].const_data_ptr<float>(), nullptr, out, 0, relu});
                    });
  }

  const BasicArguments& a_;
  const BasicShape& s_;
  const Maps<T> maps_;
  const MaskGeometry g_;
  Workspace& w_;
};

}  // namespace las_mm::cpu
