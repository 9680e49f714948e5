// The work of sparse_bottleneck and channel_bottleneck: a bottleneck at kept positions.
//
// conv1 runs at the positions that a kept output reads and writes into a map with a zero border, so
// that conv2 needs no padding logic. conv2 and conv3 then run chunk by chunk: the chunk's hidden
// values never leave the cache. Nothing is copied to gather: the kernels take row pointers.
#pragma once

#include <ATen/Parallel.h>

#include <limits>
#include <vector>

#include "common/bottleneck_arguments.h"
#include "common/checks.h"
#include "cpu/conv3x3.h"
#include "cpu/excitation.h"
#include "cpu/workspace.h"

namespace las_mm::cpu {

constexpr int64_t kFewRows = 256;    // of an image, whose weights are gathered panel by panel
constexpr int64_t kGatheredDepth = 512;  // input channels of such a panel: 128 KiB, for L2

enum class Convolution { kFirst, kSecond, kThird };

// Weights that are made when a panel of a convolution needs them.
template <typename T>
struct PanelSource {
  virtual ~PanelSource() = default;
  // The input channels [first, last) (or up to the last one) of the taps [tap, tap + taps) of a
  // panel, tap after tap; until this thread's next call.
  virtual const T* panel(Convolution which, int64_t panel, int64_t tap, int64_t taps,
                         int64_t first, int64_t last) const = 0;
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
  int64_t hidden;  // channels of conv1's and conv2's outputs that these are for
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
  Weights<T> w{s.hidden, values(a.weights[0], T{}), {}, values(a.weights[2], T{}), nullptr, {}};
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

inline MaskGeometry geometry(const Arguments& a, const Shape& s) {
  return {s.hidden_height, s.hidden_width, a.strides[1], a.dilation, a.mask ? a.granularity : 1};
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
        g_(geometry(a, s)),
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

  // Lists the positions and chooses the form of conv2. `packing`: cost of making the weights of
  // an image, in outputs that take as long.
  void plan(double packing = 0) {
    Wanted wanted;
    wanted.dropped = !in_place_;
    wanted.halo = true;
    wanted.tiles = a_.winograd.has_value();
    list_positions(patches_, s_.images, g_, wanted, w_);
    const bool has_direct = a_.weights[1].numel() > 0;
    // 16 products per tile against 9 per output.
    packing *= static_cast<double>(s_.images);
    use_tiles_ = a_.winograd &&
                 (!has_direct || 16.0 * (a_.winograd_cost * w_.tiles.size() + packing) <
                                     9.0 * (w_.kept.size() + packing));
  }

  bool keeps_any() const { return !w_.kept.empty(); }
  // Whether an image's outputs fit one chunk, so that gathered weights are used once.
  bool keeps_few() const {
    return 4 * static_cast<int64_t>(use_tiles_ ? w_.tiles.size() : 0) <= s_.images * kFewRows &&
           static_cast<int64_t>(w_.kept.size()) <= s_.images * kFewRows;
  }
  bool use_tiles() const { return use_tiles_; }

  // `weights`: one for all images, or those of each; then all have a source or none has, and
  // conv2 has one group. `channels`: which hidden ones the only weights are for, null: all.
  void run(const std::vector<Weights<T>>& weights,
           const std::vector<int32_t>* channels = nullptr) {
    weights_ = &weights;
    hidden_ = 0;
    for (const Weights<T>& w : weights) hidden_ = std::max(hidden_, w.hidden);
    const int64_t hidden = hidden_;
    const bool gathered = weights[0].source != nullptr;
    has_constant_ = !weights[0].conv2.empty() && weights[0].conv2[0].constant != nullptr;
    // Rows start at a cache line.
    row_ = ceil_div(hidden + has_constant_, kLanes) * kLanes;
    conv2_panels_ = 0;
    for (int64_t g = 0; g < a_.groups; ++g) conv2_panels_ += group_panels(g);
    if (s_.downsample) add_biases();
    pass_dropped();
    if (!keeps_any()) return;
    if (hidden > 0) {
      map_ = w_.map.template get<T>(s_.images * map_height_ * map_width_ * row_);
      clear_border();
      conv1();
    }
    const int64_t units = use_tiles_ ? w_.tiles.size() : w_.kept.size();
    const int64_t chunk = gathered ? kAllRows : use_tiles_ ? kChunkTiles : kChunkRows;
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
  static constexpr int64_t kAllRows = std::numeric_limits<int64_t>::max() / 2;
  // Rows of a chunk that share weights.
  struct Part {
    size_t weights;
    int64_t begin, end;
  };
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

  // list[lo] to list[hi - 1], where an image has `positions`, cut into images if these differ.
  std::vector<Part> parts(const Positions& list, int64_t lo, int64_t hi, int64_t positions) const {
    if (weights_->size() == 1) return {{0, 0, hi - lo}};
    std::vector<Part> result;
    for (int64_t begin = lo; begin < hi;) {
      const int64_t image = list[begin] / positions;
      const auto end = std::lower_bound(list.begin() + begin, list.begin() + hi,
                                        (image + 1) * positions) - list.begin();
      result.push_back({static_cast<size_t>(image), begin - lo, end - lo});
      begin = end;
    }
    return result;
  }
  // Panels of a group of conv2, of that image which has most.
  int64_t group_panels(int64_t group) const {
    int64_t most = 0;
    for (const Weights<T>& w : *weights_) {
      if (!w.conv2.empty()) most = std::max(most, Panels{w.conv2[group].channels}.count());
    }
    return most;
  }

  void add_biases() {
    float* sum = w_.bias.template get<float>(weights_->size() * s_.c_out);
    summed_bias_ = sum;
    for (const Weights<T>& w : *weights_) {
      for (int64_t c = 0; c < s_.c_out; ++c) *sum++ = w.biases[2][c] + w.biases[3][c];
    }
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
      const Weights<T>& w = (*weights_)[0];
      const Tap<T> tap{in, 0, shortcut_channels_, w.downsample, 0, 1};
      run_panels<T>(hi - lo, &tap, 1, out_panels_, first, last,
                    {w.biases[3], nullptr, out, 0, true});
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

  void conv1() {
    const Positions& list = w_.halo;
    const Panels panels{hidden_};
    const int64_t stride = a_.strides[0];
    const bool gathered = (*weights_)[0].source != nullptr;
    // A panel's sums over parts of the input channels are added up in the output.
    const int64_t depth = gathered && std::is_same_v<T, float> ? kGatheredDepth : s_.c_in;
    parallel_chunks(
        list.size(), gathered ? kAllRows : kChunkRows, panels.count(),
        [&](int64_t lo, int64_t hi, int64_t first, int64_t last) {
          const T** in = scratch().pointers.template get<const T*>(2 * (hi - lo));
          T** out = const_cast<T**>(in) + (hi - lo);
          for (int64_t i = lo; i < hi; ++i) {
            const Point p = point(list[i], s_.hidden_height, s_.hidden_width);
            const int64_t row = (p.image * s_.height + p.y * stride) * s_.width + p.x * stride;
            in[i - lo] = x_ + row * s_.c_in;
            out[i - lo] = map_row(p.image, p.y, p.x);
          }
          const std::vector<Part> images =
              parts(list, lo, hi, s_.hidden_height * s_.hidden_width);
          for (int64_t p = first; p < last; ++p) {
            for (int64_t from = 0; from < s_.c_in; from += depth) {
              const int64_t to = std::min(from + depth, s_.c_in);
              for (const Part& part : images) {
                const Weights<T>& w = (*weights_)[part.weights];
                const Tap<T> tap{in + part.begin, from, to - from, w.conv1, 0, 1};
                run(w, Convolution::kFirst, 0, 1, part, &tap, 1, Panels{w.hidden}, p,
                    {from == 0 ? w.biases[0] : nullptr, from == 0 ? nullptr : out + part.begin,
                     out + part.begin, 0, to == s_.c_in},
                    from, to);
              }
            }
          }
          if (!has_constant_ || last != panels.count()) return;
          for (const Part& part : images) {
            const int64_t column = (*weights_)[part.weights].hidden;
            for (int64_t i = part.begin; i < part.end; ++i) out[i][column] = one(T{});
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
    const std::vector<Part> images = parts(w_.kept, lo, hi, s_.out_height * s_.out_width);
    int64_t next = 0;  // panel
    for (int64_t g = 0; g < a_.groups; ++g) {
      const int64_t count = group_panels(g), begin = std::max<int64_t>(first - next, 0);
      const int64_t end = std::min(last - next, count);
      next += count;
      for (int64_t p = begin; p < end; ++p) {
        for (const Part& part : images) {
          const Weights<T>& w = (*weights_)[part.weights];
          const Group<T>& group = w.conv2[g];
          const T* const* from = in + part.begin;
          Tap<T> taps[kMaxTaps];
          for (int t = 0; t < 9; ++t) {
            const int64_t step = ((t / 3 - 1) * map_width_ + (t % 3 - 1)) * border_ * row_;
            taps[t] = {from, step + group.first, group.channels, group.weights, t, 9};
            taps[9 + t] = {from, step + w.hidden, 1, group.constant, t, 9};
          }
          run(w, Convolution::kSecond, 0, 9, part, taps, has_constant_ ? 18 : 9,
              Panels{group.channels}, p,
              {w.biases[1] + group.first, nullptr, out + part.begin, group.first, true});
        }
      }
    }
  }

  void conv2_tiles(int64_t lo, int64_t hi, int64_t first, int64_t last, float* hidden) {
    const int64_t tiles = hi - lo;
    const int64_t tile_height = ceil_div(s_.out_height, 2), tile_width = ceil_div(s_.out_width, 2);
    const TileChunk chunk(tiles, row_);
    const std::vector<Part> images = parts(w_.tiles, lo, hi, tile_height * tile_width);
    for (const Part& part : images) {
      const int64_t channels = (*weights_)[part.weights].hidden + has_constant_;
      for (int64_t i = part.begin; i < part.end; ++i) {
        const Point p = point(w_.tiles[lo + i], tile_height, tile_width);
        chunk.transform(i, map_row(p.image, 2 * p.y - 1, 2 * p.x - 1), map_width_ * row_, row_,
                        channels);
      }
    }
    const bool gathered = (*weights_)[0].source != nullptr;
    for (int64_t p = first; p < last; ++p) {
      for (int t = 0; t < kTile; ++t) {
        const int64_t offset = chunk.offset(t);
        for (const Part& part : images) {
          const Weights<T>& w = (*weights_)[part.weights];
          const Group<float>& group = w.conv2[0];
          const float* const* from = chunk.in() + part.begin;
          const Tap<float> taps[2] = {{from, offset, w.hidden, group.weights, t, kTile},
                                      {from, offset + w.hidden, 1, group.constant, t, kTile}};
          run(w, Convolution::kSecond, t, 1, part, taps, has_constant_ ? 2 : 1, Panels{w.hidden},
              p, {nullptr, nullptr, chunk.out() + part.begin, chunk.column(t, p), false});
        }
        if (gathered) continue;  // what a whole image needs would take the weights' place
        const int64_t step = (p - first) * kTile + t, steps = (last - first) * kTile;
        prefetch_outputs(lo + tiles * step / steps, lo + tiles * (step + 1) / steps);
      }
      for (const Part& part : images) {
        const Weights<T>& w = (*weights_)[part.weights];
        const Panels panels{w.hidden};
        if (p >= panels.count()) continue;
        for (int64_t i = part.begin; i < part.end; ++i) {
          float* const first_row = hidden + 4 * i * row_;
          float* const to[] = {first_row, first_row + row_, first_row + 2 * row_,
                               first_row + 3 * row_};
          chunk.finish(i, panels.valid(p), w.biases[1] + p * kPanel,
                       {nullptr, to, p * kPanel, true});
        }
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
    std::vector<Part> images;
    if (use_tiles_) {
      const int64_t tile_height = ceil_div(s_.out_height, 2);
      const int64_t tile_width = ceil_div(s_.out_width, 2);
      images = parts(w_.tiles, lo, hi, tile_height * tile_width);
      for (Part& part : images) {
        const int64_t begin = rows;
        for (int64_t i = lo + part.begin; i < lo + part.end; ++i) {
          const Point p = point(w_.tiles[i], tile_height, tile_width);
          for (int64_t q = 0; q < 4; ++q) {
            const int64_t y = 2 * p.y + q / 2, x = 2 * p.x + q % 2;
            if (y < s_.out_height && x < s_.out_width && is_kept(p.image, y, x)) {
              add(hidden + (4 * (i - lo) + q) * row_,
                  (p.image * s_.out_height + y) * s_.out_width + x);
            }
          }
        }
        part = {part.weights, begin, rows};
      }
    } else {
      images = parts(w_.kept, lo, hi, s_.out_height * s_.out_width);
      for (int64_t i = lo; i < hi; ++i) add(hidden + (i - lo) * row_, w_.kept[i]);
    }
    for (int64_t p = first; p < last; ++p) {
      for (const Part& part : images) {
        const Weights<T>& w = (*weights_)[part.weights];
        const float* bias =
            s_.downsample ? summed_bias_ + part.weights * s_.c_out : w.biases[2];
        const Tap<T> taps[2] = {{in + part.begin, 0, w.hidden, w.conv3, 0, 1},
                                {side + part.begin, 0, shortcut_channels_, w.downsample, 0, 1}};
        run(w, Convolution::kThird, 0, 1, part, taps, s_.downsample ? 2 : 1, out_panels_, p,
            {bias, s_.downsample ? nullptr : side + part.begin, out + part.begin, 0, true});
      }
    }
  }

  // A panel for the rows of a part, if its weights have it; where there is a source, the weights
  // of the first `own_taps` (their input channels [from, to)) come from there.
  void run(const Weights<T>& w, Convolution which, int64_t tap, int own_taps, const Part& part,
           const Tap<T>* taps, int tap_count, const Panels& panels, int64_t p,
           const Target<T>& target, int64_t from = 0, int64_t to = kAllRows) const {
    if (p >= panels.count() || part.begin == part.end) return;
    const T* gathered =
        w.source ? w.source->panel(which, p, tap, own_taps, from, to) : nullptr;
    run_panel<T>(part.end - part.begin, taps, tap_count, panels, p, target, gathered,
                 w.source ? own_taps : 0);
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
  const std::vector<Weights<T>>* weights_ = nullptr;
  const float* summed_bias_ = nullptr;  // of each weights
  int64_t hidden_ = 0;  // of those weights that have most
  int64_t row_ = 0, conv2_panels_ = 0;  // row_: values from row to row of the map
  bool has_constant_ = false;
  T* map_ = nullptr;
};

// The maps of a call, of which any images may be computed by themselves.
template <typename T>
class Batch {
 public:
  // x and out are channels_last; `patches`: decisions, undefined: all are kept.
  Batch(const Arguments& a, const Shape& s, const at::Tensor& x, const at::Tensor& patches,
        const at::Tensor& out)
      : a_(a), x_(values(x, T{})), out_(mutable_values(out, T{})) {
    x_step_ = s.height * s.width * s.c_in;
    const int64_t outputs = s.out_height * s.out_width;
    out_step_ = outputs * s.c_out;
    if (a.shortcut) {
      kept_ = a.shortcut->contiguous(at::MemoryFormat::ChannelsLast);
      shortcut_ = values(kept_, T{});
      shortcut_channels_ = kept_.size(1);
    }
    shortcut_step_ = outputs * shortcut_channels_;
    if (patches.defined()) {
      patches_ = patches.const_data_ptr<bool>();
      patches_step_ = patches.stride(0);
    }
  }

  // The block for the images from `first` on, as many as `part` has, which has to outlive it.
  Bottleneck<T> block(int64_t first, const Shape& part) const {
    return Bottleneck<T>(a_, part, x_ + first * x_step_,
                         shortcut_ ? shortcut_ + first * shortcut_step_ : nullptr,
                         shortcut_channels_, patches_ ? patches_ + first * patches_step_ : nullptr,
                         out_ + first * out_step_);
  }

 private:
  const Arguments& a_;
  at::Tensor kept_;
  const T *x_, *shortcut_ = nullptr;
  const bool* patches_ = nullptr;
  T* out_;
  int64_t shortcut_channels_ = 0;
  int64_t x_step_, out_step_, shortcut_step_, patches_step_ = 0;  // from image to image
};

}  // namespace las_mm::cpu
