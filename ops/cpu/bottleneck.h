// The work of sparse_bottleneck and channel_bottleneck: a bottleneck at kept positions.
//
// conv1 runs at the positions that a kept output reads and writes into a map with a zero border, so
// that conv2 needs no padding logic. conv2 and conv3 then run chunk by chunk: the chunk's hidden
// values never leave the cache. Nothing is copied to gather: the kernels take row pointers.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "common/bottleneck_arguments.h"
#include "common/checks.h"
#include "cpu/excitation.h"
#include "cpu/positions.h"
#include "cpu/sparse_conv.h"
#include "cpu/workspace.h"

namespace las_mm::cpu {

constexpr int64_t kChunkTiles = 48;  // Winograd tiles of 2x2 outputs; measured: 36 to 60 are alike
constexpr int64_t kFewRows = 256;    // that share weights which are gathered panel by panel

enum class Convolution { kFirst, kSecond, kThird };

// Weights that are made when a panel of a convolution needs them.
template <typename T>
struct PanelSource {
  virtual ~PanelSource() = default;
  // The taps [tap, tap + taps) of a panel, one after the other; until this thread's next call.
  virtual const T* panel(Convolution which, int64_t panel, int64_t tap, int64_t taps) const = 0;
};

// A group of conv2: which hidden channels it reads and writes, and its packed weights.
template <typename T>
struct Group {
  int64_t first, channels;
  const T* weights;
  // Weights of one more input, 1 inside the map and 0 in the padding: the sum over the channels
  // that are the same everywhere. Null: there are none.
  const T* constant = nullptr;
};

template <typename T>
struct Weights {
  const T* conv1;
  std::vector<Group<T>> conv2;  // in Winograd form (one group) where use_tiles() says so
  const T* conv3;
  const T* downsample;
  const float* biases[4];  // of conv1, conv2, conv3 and the downsample convolution
  const PanelSource<T>* source = nullptr;  // of conv1, conv2 (of one group) and conv3, or null
};

// The weights as they were packed.
template <typename T>
Weights<T> all_channels(const Arguments& a, const Shape& s, bool use_tiles) {
  Weights<T> w{values(a.weights[0], T{}), {}, values(a.weights[2], T{}), nullptr, {}};
  for (size_t i = 0; i < a.biases.size(); ++i) w.biases[i] = a.biases[i].const_data_ptr<float>();
  if (s.downsample) w.downsample = values(a.weights[3], T{});
  const int64_t channels = s.hidden / a.groups;
  const int64_t numel = packed_numel(channels, channels, 9, 1, std::is_same_v<T, float>);
  const T* first = values(use_tiles ? *a.winograd : a.weights[1], T{});
  for (int64_t group = 0; group < a.groups; ++group) {
    w.conv2.push_back({group * channels, channels, first + group * numel});
  }
  return w;
}

template <typename T>
class Bottleneck {
 public:
  // x, shortcut and out are channels_last. `shortcut`: what the downsample convolution reads if
  // that is not x. `patches`: decisions of all images, null: all are kept.
  Bottleneck(const Arguments& a, const Shape& s, const T* x, const T* shortcut,
             int64_t shortcut_channels, const bool* patches, T* out)
      : a_(a),
        s_(s),
        g_(s.hidden_height, s.hidden_width, a.strides[1], a.dilation,
           a.mask ? a.granularity : 1),
        w_(workspace()),
        x_(x),
        shortcut_(shortcut ? shortcut : x),
        shortcut_channels_(shortcut ? shortcut_channels : s.c_in),
        shortcut_stride_(shortcut ? 1 : a.strides[0] * a.strides[1]),
        patches_(patches),
        out_(out),
        in_place_(static_cast<const T*>(out) == x),
        border_(g_.conv_rows.dilation),
        map_height_(s.hidden_height + 2 * border_ + 1),
        map_width_(s.hidden_width + 2 * border_ + 1),
        out_panels_{s.c_out} {
    check_positions(s.images * std::max(s.height * s.width, map_height_ * map_width_), "x");
  }

  // Lists the positions and chooses the form of conv2. `packing`: cost of making its weights, in
  // outputs that take as long.
  void plan(double packing = 0) {
    Wanted wanted;
    wanted.dropped = !in_place_;
    wanted.halo = true;
    wanted.tiles = a_.winograd.has_value();
    list_positions(patches_, s_.images, g_, wanted, w_);
    const bool has_direct = a_.weights[1].numel() > 0;
    // 16 products per tile against 9 per output.
    use_tiles_ = a_.winograd &&
                 (!has_direct || 16.0 * (a_.winograd_cost * w_.tiles.size() + packing) <
                                     9.0 * (w_.kept.size() + packing));
  }

  bool keeps_any() const { return !w_.kept.empty(); }
  // Whether all outputs fit one chunk, so that gathered weights are used once.
  bool keeps_few() const {
    return 4 * static_cast<int64_t>(use_tiles_ ? w_.tiles.size() : 0) <= kFewRows &&
           static_cast<int64_t>(w_.kept.size()) <= kFewRows;
  }
  bool use_tiles() const { return use_tiles_; }

  // `hidden`: channels of conv1's and conv2's outputs that the weights are for; `channels`: which
  // ones, null: all.
  void run(const Weights<T>& weights, int64_t hidden,
           const std::vector<int32_t>* channels = nullptr) {
    weights_ = &weights;
    hidden_ = hidden;
    has_constant_ = !weights.conv2.empty() && weights.conv2[0].constant != nullptr;
    // Rows start at a cache line.
    row_ = ceil_div(hidden + has_constant_, kLanes) * kLanes;
    conv2_panels_ = 0;
    for (const Group<T>& group : weights.conv2) conv2_panels_ += Panels{group.channels}.count();
    if (s_.downsample) add_biases();
    pass_dropped();
    if (!keeps_any()) return;
    if (hidden > 0) {
      map_ = w_.map.template get<T>(s_.images * map_height_ * map_width_ * row_);
      clear_border();
      conv1();
      if (use_tiles_) clear_blank();
    }
    const int64_t units = use_tiles_ ? w_.tiles.size() : w_.kept.size();
    const int64_t chunk = use_tiles_ ? (weights.source ? kFewRows / 4 : kChunkTiles)
                                     : (weights.source ? kFewRows : kChunkRows);
    const int64_t values = (use_tiles_ ? 4 : 1) * row_;  // of a unit
    if (a_.excitation && hidden > 0) {
      excited(units, chunk, channels);
    } else if (ceil_div(units, chunk) >= free_threads()) {
      parallel_chunks(units, chunk, 1, [&](int64_t lo, int64_t hi, int64_t, int64_t) {
        T* chunk_hidden = scratch().hidden.template get<T>((hi - lo) * values);
        if (hidden > 0) conv2(lo, hi, 0, conv2_panels_, chunk_hidden);
        conv3(lo, hi, 0, out_panels_.count(), chunk_hidden);
      });
    } else {  // few positions: the weights dominate, so the threads share them out
      T* all_hidden = w_.hidden.template get<T>(units * values);
      if (conv2_panels_ > 0) {
        parallel_chunks(units, chunk, conv2_panels_,
                        [&](int64_t lo, int64_t hi, int64_t first, int64_t last) {
                          conv2(lo, hi, first, last, all_hidden + lo * values);
                        });
      }
      parallel_chunks(units, chunk, out_panels_.count(),
                      [&](int64_t lo, int64_t hi, int64_t first, int64_t last) {
                        conv3(lo, hi, first, last, all_hidden + lo * values);
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
    return map_ + ((image * map_height_ + y + border_) * map_width_ + x + border_) * row_;
  }
  const T* shortcut_row(int64_t position) const {
    if (shortcut_stride_ == 1) return shortcut_ + position * shortcut_channels_;
    const Point p = point(position, s_.out_height, s_.out_width);
    const int64_t row = (p.image * s_.height + p.y * shortcut_stride_) * s_.width;
    return shortcut_ + (row + p.x * shortcut_stride_) * shortcut_channels_;
  }

  void add_biases() {
    float* sum = w_.bias.template get<float>(s_.c_out);
    for (int64_t c = 0; c < s_.c_out; ++c) sum[c] = weights_->biases[2][c] + weights_->biases[3][c];
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
      const Tap<T> tap{in, 0, shortcut_channels_, weights_->downsample, 0, 1};
      run_panels<T>(hi - lo, &tap, 1, out_panels_, first, last,
                    {weights_->biases[3], nullptr, out, 0, true});
    });
  }

  // With squeeze-and-excitation, whose scales need all kept outputs of conv2 first.
  void excited(int64_t rows, int64_t chunk, const std::vector<int32_t>* channels) {
    T* hidden = w_.hidden.template get<T>(rows * row_);
    parallel_chunks(rows, chunk, conv2_panels_,
                    [&](int64_t lo, int64_t hi, int64_t first, int64_t last) {
                      conv2(lo, hi, first, last, hidden + lo * row_);
                    });
    Excitation excitation(*a_.excitation, channels, row_);
    excitation.squeeze(hidden, w_.kept, s_.images, s_.out_height * s_.out_width);
    const auto excite = [&](int64_t lo, int64_t hi) {
      excitation.excite(hidden + lo * row_, w_.kept, lo, hi);
    };
    // Where threads share out the panels, several read the same rows.
    const bool apart = ceil_div(rows, chunk) < free_threads();
    if (apart) at::parallel_for(0, rows, 8, excite);
    parallel_chunks(rows, chunk, out_panels_.count(),
                    [&](int64_t lo, int64_t hi, int64_t first, int64_t last) {
                      if (!apart) excite(lo, hi);
                      conv3(lo, hi, first, last, hidden + lo * row_);
                    });
  }

  // Zeros around conv1's output: the padding of conv2, and one line more for tiles that reach over
  // the edge of an odd-sized map.
  void clear_border() {
    const int64_t before = border_, after = border_ + 1;
    at::parallel_for(0, s_.images * map_height_, 16, [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line) {
        T* row = map_ + line * map_width_ * row_;
        const int64_t y = line % map_height_;
        if (y < before || y >= before + s_.hidden_height) {
          std::fill_n(row, map_width_ * row_, T{});
        } else {
          std::fill_n(row, before * row_, T{});
          std::fill_n(row + (before + s_.hidden_width) * row_, after * row_, T{});
        }
      }
    });
  }

  // Tiles mix all of their 4x4 inputs. Those that no kept output reads get the weight zero in the
  // end, which takes finite values.
  void clear_blank() {
    for (const int32_t index : w_.blank) {
      const Point p = point(index, s_.hidden_height, s_.hidden_width);
      std::fill_n(map_row(p.image, p.y, p.x), row_, T{});
    }
  }

  void conv1() {
    const Positions& list = w_.halo;
    const Panels panels{hidden_};
    const int64_t stride = a_.strides[0];
    parallel_chunks(
        list.size(), weights_->source ? kFewRows : kChunkRows, panels.count(),
        [&](int64_t lo, int64_t hi, int64_t first, int64_t last) {
          const T** in = scratch().pointers.template get<const T*>(2 * (hi - lo));
          T** out = const_cast<T**>(in) + (hi - lo);
          for (int64_t i = lo; i < hi; ++i) {
            const Point p = point(list[i], s_.hidden_height, s_.hidden_width);
            const int64_t row = (p.image * s_.height + p.y * stride) * s_.width + p.x * stride;
            in[i - lo] = x_ + row * s_.c_in;
            out[i - lo] = map_row(p.image, p.y, p.x);
          }
          const Tap<T> tap{in, 0, s_.c_in, weights_->conv1, 0, 1};
          run(Convolution::kFirst, 0, 1, hi - lo, &tap, 1, panels, first, last,
              {weights_->biases[0], nullptr, out, 0, true});
          if (has_constant_ && last == panels.count()) {
            for (int64_t i = 0; i < hi - lo; ++i) out[i][hidden_] = one(T{});
          }
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
      out[i] = hidden + i * row_;
    }
    int64_t next = 0;  // panel
    for (const Group<T>& group : weights_->conv2) {
      const Panels panels{group.channels};
      const int64_t begin = std::max<int64_t>(first - next, 0);
      const int64_t end = std::min(last - next, panels.count());
      next += panels.count();
      if (begin >= end) continue;
      Tap<T> taps[kMaxTaps];
      for (int t = 0; t < 9; ++t) {
        const int64_t step = ((t / 3 - 1) * map_width_ + (t % 3 - 1)) * border_ * row_;
        taps[t] = {in, step + group.first, group.channels, group.weights, t, 9};
        taps[9 + t] = {in, step + hidden_, 1, group.constant, t, 9};
      }
      run(Convolution::kSecond, 0, 9, rows, taps, has_constant_ ? 18 : 9, panels, begin, end,
          {weights_->biases[1] + group.first, nullptr, out, group.first, true});
    }
  }

  void conv2_tiles(int64_t lo, int64_t hi, int64_t first, int64_t last, float* hidden) {
    const int64_t tiles = hi - lo;
    const int64_t tile_height = ceil_div(s_.out_height, 2), tile_width = ceil_div(s_.out_width, 2);
    Scratch& memory = scratch();
    const float** in = memory.pointers.template get<const float*>(2 * tiles);
    float** out = const_cast<float**>(in) + tiles;
    float* transformed = memory.values.template get<float>(kTile * tiles * row_);
    float* products = memory.output.template get<float>(kTile * tiles * kPanel);
    const Kernels& k = kernels();
    for (int64_t i = 0; i < tiles; ++i) {
      const Point p = point(w_.tiles[lo + i], tile_height, tile_width);
      in[i] = transformed + i * row_;
      out[i] = products + i * kPanel;
      k.winograd_input(map_row(p.image, 2 * p.y - 1, 2 * p.x - 1), map_width_ * row_, row_,
                       hidden_ + has_constant_, transformed + i * row_, tiles * row_);
    }
    const Group<float>& group = weights_->conv2[0];
    const Panels panels{hidden_};
    for (int64_t p = first; p < last; ++p) {
      for (int t = 0; t < kTile; ++t) {
        const int64_t offset = t * tiles * row_;
        const Tap<float> taps[2] = {{in, offset, hidden_, group.weights, t, kTile},
                                    {in, offset + hidden_, 1, group.constant, t, kTile}};
        run(Convolution::kSecond, t, 1, tiles, taps, has_constant_ ? 2 : 1, panels, p, p + 1,
            {nullptr, nullptr, out, t * tiles * kPanel - p * kPanel, false});
        const int64_t part = (p - first) * kTile + t, parts = (last - first) * kTile;
        prefetch_outputs(lo + tiles * part / parts, lo + tiles * (part + 1) / parts);
      }
      for (int64_t i = 0; i < tiles; ++i) {
        k.winograd_output(products + i * kPanel, tiles * kPanel, panels.valid(p),
                          weights_->biases[1] + p * kPanel,
                          hidden + 4 * i * row_ + p * kPanel, row_);
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
            add(hidden + (4 * (i - lo) + q) * row_,
                (p.image * s_.out_height + y) * s_.out_width + x);
          }
        }
      }
    } else {
      for (int64_t i = lo; i < hi; ++i) add(hidden + (i - lo) * row_, w_.kept[i]);
    }
    const Tap<T> taps[2] = {{in, 0, hidden_, weights_->conv3, 0, 1},
                            {side, 0, shortcut_channels_, weights_->downsample, 0, 1}};
    run(Convolution::kThird, 0, 1, rows, taps, s_.downsample ? 2 : 1, out_panels_, first, last,
        {s_.downsample ? summed_bias_ : weights_->biases[2], s_.downsample ? nullptr : side, out,
         0, true});
  }

  // run_panels; where there is a source, the weights of the first `own_taps` come from there.
  void run(Convolution which, int64_t tap, int own_taps, int64_t rows, const Tap<T>* taps,
           int tap_count, const Panels& panels, int64_t first, int64_t last,
           const Target<T>& target) const {
    if (weights_->source == nullptr) {
      return run_panels<T>(rows, taps, tap_count, panels, first, last, target);
    }
    for (int64_t p = first; p < last; ++p) {
      run_panel<T>(rows, taps, tap_count, panels, p, target,
                   weights_->source->panel(which, p, tap, own_taps), own_taps);
    }
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
  const T* shortcut_;
  const int64_t shortcut_channels_, shortcut_stride_;
  const bool* patches_;
  T* out_;
  const bool in_place_;
  const int64_t border_, map_height_, map_width_;
  const Panels out_panels_;
  bool use_tiles_ = false;
  // Of run():
  const Weights<T>* weights_ = nullptr;
  const float* summed_bias_ = nullptr;
  int64_t hidden_ = 0, row_ = 0, conv2_panels_ = 0;  // row_: values from row to row of the map
  bool has_constant_ = false;
  T* map_ = nullptr;
};

}  // namespace las_mm::cpu
