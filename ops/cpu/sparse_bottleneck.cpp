// las_mm::sparse_bottleneck and sparse_bottleneck_: a bottleneck at kept positions.
//
// conv1 runs at the positions that a kept output reads and writes into a map with a zero border, so
// that conv2 needs no padding logic. conv2 and conv3 then run chunk by chunk: the chunk's hidden
// values never leave the cache. Nothing is copied to gather: the kernels take row pointers.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <optional>
#include <utility>

#include "common/checks.h"
#include "common/bottleneck_arguments.h"
#include "cpu/excitation.h"
#include "cpu/positions.h"
#include "cpu/sparse_conv.h"
#include "cpu/workspace.h"

namespace las_mm::cpu {
namespace {

constexpr int64_t kChunkTiles = 48;  // Winograd tiles of 2x2 outputs; measured: 36 to 60 are alike

template <typename T>
class Bottleneck {
 public:
  // `patches`: decisions of all images, null: all are kept.
  Bottleneck(const Arguments& a, const Shape& s, const at::Tensor& x, const bool* patches, T* out)
      : a_(a),
        s_(s),
        g_(s.hidden_height, s.hidden_width, a.strides[1], a.dilation,
           a.mask ? a.granularity : 1),
        w_(workspace()),
        x_(values(x, T{})),
        patches_(patches),
        out_(out),
        in_place_(static_cast<const T*>(out) == x_),
        border_(g_.conv_rows.dilation),
        map_height_(s.hidden_height + 2 * border_ + 1),
        map_width_(s.hidden_width + 2 * border_ + 1),
        hidden_panels_{s.hidden / a.groups},
        out_panels_{s.c_out} {
    for (const at::Tensor& weight : a.weights) weights_.push_back(values(weight, T{}));
    for (const at::Tensor& bias : a.biases) biases_.push_back(bias.const_data_ptr<float>());
    if (a.shortcut) {
      contiguous_shortcut_ = a.shortcut->contiguous(at::MemoryFormat::ChannelsLast);
      shortcut_ = values(contiguous_shortcut_, T{});
      shortcut_channels_ = a.shortcut->size(1);
    } else {
      shortcut_ = x_;
      shortcut_channels_ = s.c_in;
      shortcut_stride_ = a.strides[0] * a.strides[1];
    }
    check_positions(s.images * std::max(s.height * s.width, map_height_ * map_width_), "x");
  }

  void run() {
    Wanted wanted;
    wanted.dropped = !in_place_;
    wanted.halo = true;
    wanted.tiles = a_.winograd.has_value();
    list_positions(patches_, s_.images, g_, wanted, w_);
    if (s_.downsample) add_biases();
    pass_dropped();
    if (w_.kept.empty()) return;
    map_ = w_.map.template get<T>(s_.images * map_height_ * map_width_ * s_.hidden);
    clear_border();
    conv1();
    const bool has_direct = a_.weights[1].numel() > 0;
    // 16 products per tile against 9 per output.
    use_tiles_ = a_.winograd && (!has_direct || a_.winograd_cost * 16.0 * w_.tiles.size() <
                                                    9.0 * w_.kept.size());
    if (use_tiles_) clear_blank();
    const int64_t units = use_tiles_ ? w_.tiles.size() : w_.kept.size();
    const int64_t chunk = use_tiles_ ? kChunkTiles : kChunkRows;
    if (a_.excitation) {
      excited(units, chunk);
    } else if (ceil_div(units, chunk) >= at::get_num_threads()) {
      parallel_chunks(units, chunk, 1, [&](int64_t lo, int64_t hi, int64_t, int64_t) {
        T* hidden = scratch().hidden.template get<T>((hi - lo) * (use_tiles_ ? 4 : 1) * s_.hidden);
        conv2(lo, hi, 0, conv2_panels(), hidden);
        conv3(lo, hi, 0, out_panels_.count(), hidden);
      });
    } else {  // few positions: the weights dominate, so the threads share them out
      T* hidden = w_.hidden.template get<T>(units * (use_tiles_ ? 4 : 1) * s_.hidden);
      const int64_t values = (use_tiles_ ? 4 : 1) * s_.hidden;
      parallel_chunks(units, chunk, conv2_panels(),
                      [&](int64_t lo, int64_t hi, int64_t first, int64_t last) {
                        conv2(lo, hi, first, last, hidden + lo * values);
                      });
      parallel_chunks(units, chunk, out_panels_.count(),
                      [&](int64_t lo, int64_t hi, int64_t first, int64_t last) {
                        conv3(lo, hi, first, last, hidden + lo * values);
                      });
    }
  }

 private:
  struct Point {
    int64_t image, y, x;
  };
  static Point point(int64_t index, int64_t height, int64_t width) {
    return {index / (height * width), index / width % height, index % width};
  }
  // The map's row of conv1's output (image, y, x); y and x may reach into the border.
  T* map_row(int64_t image, int64_t y, int64_t x) const {
    return map_ + ((image * map_height_ + y + border_) * map_width_ + x + border_) * s_.hidden;
  }
  const T* shortcut_row(int64_t position) const {
    if (shortcut_stride_ == 1) return shortcut_ + position * shortcut_channels_;
    const Point p = point(position, s_.out_height, s_.out_width);
    const int64_t row = (p.image * s_.height + p.y * shortcut_stride_) * s_.width;
    return shortcut_ + (row + p.x * shortcut_stride_) * shortcut_channels_;
  }
  int64_t conv2_panels() const { return a_.groups * hidden_panels_.count(); }

  void add_biases() {
    float* sum = w_.bias.template get<float>(s_.c_out);
    for (int64_t c = 0; c < s_.c_out; ++c) sum[c] = biases_[2][c] + biases_[3][c];
    summed_bias_ = sum;
  }

  // Dropped outputs: the shortcut's value.
  void pass_dropped() {
    const Positions& list = w_.dropped;
    const int64_t rows = static_cast<int64_t>(list.size());
    const int64_t panels = s_.downsample ? out_panels_.count() : 1;
    T* zeros = w_.zeros.template get<T>(s_.c_in);
    std::fill_n(zeros, s_.c_in, T{});
    parallel_chunks(rows, kChunkRows, panels, [&](int64_t lo, int64_t hi, int64_t first,
                                                  int64_t last) {
      if (!s_.downsample) {
        for (int64_t i = lo; i < hi; ++i) {
          const T* rows[2] = {zeros, x_ + list[i] * s_.c_in};  // a NaN stays one
          max_kernel(T{})(rows, 2, s_.c_in, out_ + list[i] * s_.c_in);
        }
        return;
      }
      Scratch& memory = scratch();
      const T** in = memory.pointers.template get<const T*>(2 * (hi - lo));
      T** out = const_cast<T**>(in) + (hi - lo);
      for (int64_t i = lo; i < hi; ++i) {
        in[i - lo] = shortcut_row(list[i]);
        out[i - lo] = out_ + list[i] * s_.c_out;
      }
      const Tap<T> tap{in, 0, shortcut_channels_, weights_[3], 0, 1};
      run_panels<T>(hi - lo, &tap, 1, out_panels_, first, last,
                    {biases_[3], nullptr, out, 0, true});
    });
  }

  // With squeeze-and-excitation, whose scales need all kept outputs of conv2 first.
  void excited(int64_t rows, int64_t chunk) {
    T* hidden = w_.hidden.template get<T>(rows * s_.hidden);
    parallel_chunks(rows, chunk, conv2_panels(),
                    [&](int64_t lo, int64_t hi, int64_t first, int64_t last) {
                      conv2(lo, hi, first, last, hidden + lo * s_.hidden);
                    });
    Excitation excitation(*a_.excitation);
    excitation.squeeze(hidden, w_.kept, s_.images, s_.out_height * s_.out_width);
    const auto excite = [&](int64_t lo, int64_t hi) {
      excitation.excite(hidden + lo * s_.hidden, w_.kept, lo, hi);
    };
    // Where threads share out the panels, several read the same rows.
    const bool apart = ceil_div(rows, chunk) < at::get_num_threads();
    if (apart) at::parallel_for(0, rows, 8, excite);
    parallel_chunks(rows, chunk, out_panels_.count(),
                    [&](int64_t lo, int64_t hi, int64_t first, int64_t last) {
                      if (!apart) excite(lo, hi);
                      conv3(lo, hi, first, last, hidden + lo * s_.hidden);
                    });
  }

  // Zeros around conv1's output: the padding of conv2, and one line more for tiles that reach over
  // the edge of an odd-sized map.
  void clear_border() {
    const int64_t before = border_, after = border_ + 1;
    at::parallel_for(0, s_.images * map_height_, 16, [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line) {
        T* row = map_ + line * map_width_ * s_.hidden;
        const int64_t y = line % map_height_;
        if (y < before || y >= before + s_.hidden_height) {
          std::fill_n(row, map_width_ * s_.hidden, T{});
        } else {
          std::fill_n(row, before * s_.hidden, T{});
          std::fill_n(row + (before + s_.hidden_width) * s_.hidden, after * s_.hidden, T{});
        }
      }
    });
  }

  // Tiles mix all of their 4x4 inputs. Those that no kept output reads get the weight zero in the
  // end, which takes finite values.
  void clear_blank() {
    for (const int32_t index : w_.blank) {
      const Point p = point(index, s_.hidden_height, s_.hidden_width);
      std::fill_n(map_row(p.image, p.y, p.x), s_.hidden, T{});
    }
  }

  void conv1() {
    const Positions& list = w_.halo;
    const Panels panels{s_.hidden};
    const int64_t stride = a_.strides[0];
    parallel_chunks(
        list.size(), kChunkRows, panels.count(),
        [&](int64_t lo, int64_t hi, int64_t first, int64_t last) {
          const T** in = scratch().pointers.template get<const T*>(2 * (hi - lo));
          T** out = const_cast<T**>(in) + (hi - lo);
          for (int64_t i = lo; i < hi; ++i) {
            const Point p = point(list[i], s_.hidden_height, s_.hidden_width);
            const int64_t row = (p.image * s_.height + p.y * stride) * s_.width + p.x * stride;
            in[i - lo] = x_ + row * s_.c_in;
            out[i - lo] = map_row(p.image, p.y, p.x);
          }
          const Tap<T> tap{in, 0, s_.c_in, weights_[0], 0, 1};
          run_panels<T>(hi - lo, &tap, 1, panels, first, last, {biases_[0], nullptr, out, 0, true});
        });
  }

  // Kept outputs (or tiles) [lo, hi), conv2's panels [first, last) of all groups -> hidden.
  void conv2(int64_t lo, int64_t hi, int64_t first, int64_t last, T* hidden) {
    if constexpr (std::is_same_v<T, float>) {
      if (use_tiles_) return conv2_tiles(lo, hi, first, last, hidden);
    }
    const int64_t rows = hi - lo, stride = a_.strides[1];
    const T** in = scratch().pointers.template get<const T*>(2 * rows);
    T** out = const_cast<T**>(in) + rows;
    for (int64_t i = 0; i < rows; ++i) {
      const Point p = point(w_.kept[lo + i], s_.out_height, s_.out_width);
      in[i] = map_row(p.image, p.y * stride, p.x * stride);
      out[i] = hidden + i * s_.hidden;
    }
    const int64_t per_group = hidden_panels_.count(), depth = s_.hidden / a_.groups;
    const int64_t group_weights =
        packed_numel(depth, depth, 9, 1, std::is_same_v<T, float>);
    for (int64_t group = first / per_group; group * per_group < last; ++group) {
      Tap<T> taps[9];
      for (int t = 0; t < 9; ++t) {
        const int64_t step = (t / 3 - 1) * map_width_ + (t % 3 - 1);
        taps[t] = {in,    step * border_ * s_.hidden + group * depth, depth,
                   weights_[1] + group * group_weights, t, 9};
      }
      const int64_t begin = std::max<int64_t>(first - group * per_group, 0);
      const int64_t end = std::min(last - group * per_group, per_group);
      run_panels<T>(rows, taps, 9, hidden_panels_, begin, end,
                    {biases_[1] + group * depth, nullptr, out, group * depth, true});
    }
  }

  void conv2_tiles(int64_t lo, int64_t hi, int64_t first, int64_t last, float* hidden) {
    const int64_t tiles = hi - lo, channels = s_.hidden;
    const int64_t tile_height = ceil_div(s_.out_height, 2), tile_width = ceil_div(s_.out_width, 2);
    Scratch& memory = scratch();
    const float** in = memory.pointers.template get<const float*>(2 * tiles);
    float** out = const_cast<float**>(in) + tiles;
    float* transformed = memory.values.template get<float>(kTile * tiles * channels);
    float* products = memory.output.template get<float>(kTile * tiles * kPanel);
    const Kernels& k = kernels();
    for (int64_t i = 0; i < tiles; ++i) {
      const Point p = point(w_.tiles[lo + i], tile_height, tile_width);
      in[i] = transformed + i * channels;
      out[i] = products + i * kPanel;
      k.winograd_input(map_row(p.image, 2 * p.y - 1, 2 * p.x - 1), map_width_ * channels, channels,
                       channels, transformed + i * channels, tiles * channels);
    }
    const float* weights = a_.winograd->const_data_ptr<float>();
    const Panels panels{channels};
    for (int64_t p = first; p < last; ++p) {
      for (int t = 0; t < kTile; ++t) {
        const Tap<float> tap{in, t * tiles * channels, channels, weights, t, kTile};
        run_panels<float>(tiles, &tap, 1, panels, p, p + 1,
                          {nullptr, nullptr, out, t * tiles * kPanel - p * kPanel, false});
        const int64_t part = (p - first) * kTile + t, parts = (last - first) * kTile;
        prefetch_outputs(lo + tiles * part / parts, lo + tiles * (part + 1) / parts);
      }
      for (int64_t i = 0; i < tiles; ++i) {
        k.winograd_output(products + i * kPanel, tiles * kPanel, panels.valid(p),
                          biases_[1] + p * kPanel, hidden + 4 * i * channels + p * kPanel,
                          channels);
      }
    }
  }

  // Brings the outputs of tiles [lo, hi), which conv3 will add to, into the second-level cache
  // while conv2 computes.
  void prefetch_outputs(int64_t lo, int64_t hi) const {
    constexpr int64_t kLineValues = 64 / sizeof(T);
    const int64_t tile_height = ceil_div(s_.out_height, 2), tile_width = ceil_div(s_.out_width, 2);
    for (int64_t i = lo; i < hi; ++i) {
      const Point p = point(w_.tiles[i], tile_height, tile_width);
      for (int64_t y = 2 * p.y; y < std::min(2 * p.y + 2, s_.out_height); ++y) {
        const int64_t x = 2 * p.x, columns = std::min<int64_t>(2, s_.out_width - x);
        const T* row = out_ + ((p.image * s_.out_height + y) * s_.out_width + x) * s_.c_out;
        for (int64_t j = 0; j < columns * s_.c_out; j += kLineValues) {
          __builtin_prefetch(row + j, 1, 2);
        }
      }
    }
  }

  // Adds conv3 of the chunk's hidden values to the shortcut, at kept positions.
  void conv3(int64_t lo, int64_t hi, int64_t first, int64_t last, const T* hidden) {
    const int64_t most = (hi - lo) * (use_tiles_ ? 4 : 1);
    const T** in = scratch().pointers.template get<const T*>(3 * most);
    const T** side = in + most;
    T** out = const_cast<T**>(side) + most;
    int64_t rows = 0;
    const auto add = [&](const T* value, int64_t position) {
      in[rows] = value;
      side[rows] = s_.downsample ? shortcut_row(position) : x_ + position * s_.c_in;
      out[rows] = out_ + position * s_.c_out;
      ++rows;
    };
    if (use_tiles_) {
      const int64_t tile_height = ceil_div(s_.out_height, 2);
      const int64_t tile_width = ceil_div(s_.out_width, 2);
      for (int64_t i = lo; i < hi; ++i) {
        const Point p = point(w_.tiles[i], tile_height, tile_width);
        for (int64_t q = 0; q < 4; ++q) {
          const int64_t y = 2 * p.y + q / 2, x = 2 * p.x + q % 2;
          if (y < s_.out_height && x < s_.out_width && is_kept(p.image, y, x)) {
            add(hidden + (4 * (i - lo) + q) * s_.hidden,
                (p.image * s_.out_height + y) * s_.out_width + x);
          }
        }
      }
    } else {
      for (int64_t i = lo; i < hi; ++i) add(hidden + (i - lo) * s_.hidden, w_.kept[i]);
    }
    const Tap<T> taps[2] = {{in, 0, s_.hidden, weights_[2], 0, 1},
                            {side, 0, shortcut_channels_, s_.downsample ? weights_[3] : nullptr, 0, 1}};
    run_panels<T>(rows, taps, s_.downsample ? 2 : 1, out_panels_, first, last,
                  {s_.downsample ? summed_bias_ : biases_[2], s_.downsample ? nullptr : side, out,
                   0, true});
  }

  bool is_kept(int64_t image, int64_t y, int64_t x) const {
    if (!patches_) return true;
    const int64_t row = image * g_.rows.patches() + g_.rows.patch_of(y);
    return patches_[row * g_.columns.patches() + g_.columns.patch_of(x)];
  }

  const Arguments& a_;
  const Shape& s_;
  const MaskGeometry g_;
  Workspace& w_;
  const T* x_;
  const bool* patches_;
  T* out_;
  const bool in_place_;
  const int64_t border_, map_height_, map_width_;
  const Panels hidden_panels_, out_panels_;
  std::vector<const T*> weights_;
  std::vector<const float*> biases_;
  const float* summed_bias_ = nullptr;
  at::Tensor contiguous_shortcut_;
  const T* shortcut_ = nullptr;
  int64_t shortcut_channels_ = 0, shortcut_stride_ = 1;
  T* map_ = nullptr;
  bool use_tiles_ = false;
};

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
  const MaskGeometry g(s.hidden_height, s.hidden_width, a.strides[1], a.dilation, a.granularity);
  int64_t kept = 0;
  for (int64_t n = 0; n < s.images; ++n) {
    kept += count_outputs(g, patches.const_data_ptr<bool>() + n * patches.stride(0));
  }
  return kept > a.dense_above * static_cast<double>(s.images * s.out_height * s.out_width);
}

void run_sparse(const at::Tensor& x, const Arguments& a, const Shape& s, const at::Tensor& patches,
                const at::Tensor& out) {
  const bool* data = patches.defined() ? patches.const_data_ptr<bool>() : nullptr;
  if (x.scalar_type() == at::kFloat) {
    Bottleneck<float>(a, s, x, data, mutable_values(out, float{})).run();
  } else {
    Bottleneck<bf16>(a, s, x, data, mutable_values(out, bf16{})).run();
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
using MaybeTensor = std::optional<at::Tensor>;

at::Tensor sparse_bottleneck(const at::Tensor& x, const MaybeTensor& mask, Tensors weights,
                             Tensors biases, const MaybeTensor& winograd,
                             const MaybeTensor& shortcut, int64_t granularity,
                             at::IntArrayRef strides, int64_t dilation, int64_t groups,
                             double winograd_cost, std::optional<Tensors> dense,
                             double dense_above, std::optional<Tensors> excitation) {
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
                        int64_t groups, double winograd_cost, std::optional<Tensors> dense,
                        double dense_above, std::optional<Tensors> excitation) {
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
