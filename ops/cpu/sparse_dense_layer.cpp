// las_mm::sparse_dense_layer_: norm, ReLU, 1x1 convolution, ReLU, 3x3 convolution of the channels
// that a dense block has so far, written behind them.
//
// Rows of the block's map are normalised chunk by chunk on their way to conv1, which runs at the
// positions that a kept output reads.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <utility>

#include "common/checks.h"
#include "common/dense_layer_arguments.h"
#include "cpu/conv3x3.h"
#include "cpu/image_groups.h"

namespace las_mm::cpu {
namespace {

constexpr int64_t kNormalised = 1 << 18;  // bytes of a chunk, a quarter of the second-level cache
constexpr int64_t kRowsAhead = 4;         // that are fetched where a map is no smaller than this
constexpr int64_t kFarMap = 1 << 20;      // in bytes: the second-level cache
constexpr int64_t kFewestRows = 24;       // that a panel's weights are read for

MaskGeometry geometry(const DenseLayerArguments& a, const DenseLayerShape& s) {
  return {s.height, s.width, 1, 1, a.mask ? a.granularity : 1};
}

template <typename T>
Conv<T> convolution(const DenseLayerArguments& a, const DenseLayerShape& s) {
  const bool tiled = !a.winograd.empty() && a.winograd[0].numel() > 0;
  return {s.hidden,
          s.growth,
          a.weights[1].numel() > 0 ? values(a.weights[1], T{}) : nullptr,
          tiled ? a.winograd[0].const_data_ptr<float>() : nullptr,
          a.vectors[3].const_data_ptr<float>(),
          false};
}

template <typename T>
class DenseLayer {
 public:
  // `patches`: decisions, null: all are kept.
  DenseLayer(const DenseLayerArguments& a, const DenseLayerShape& s, const Rows<T>& map,
             const bool* patches)
      : a_(a),
        s_(s),
        map_(map),
        patches_(patches),
        g_(geometry(a, s)),
        w_(workspace()),
        conv2_(convolution<T>(a, s)) {}

  bool uses_tiles() {
    return prefers_tiles(conv2_, a_.winograd_cost, w_.tiles, w_.kept, [&] {
      list_positions(patches_, s_.images, g_, {false, false, true, false}, w_);
    });
  }

  void run(bool use_tiles) {
    list_positions(patches_, s_.images, g_, {true, true, use_tiles, false}, w_);
    for (const int32_t index : w_.dropped) {
      std::fill_n(map_.data + index * map_.pitch + s_.c_in, s_.growth, T{});
    }
    T* zeros = w_.zeros.template get<T>(s_.hidden);
    std::fill_n(zeros, s_.hidden, T{});
    const int64_t row = ceil_div(s_.hidden, kLanes) * kLanes;  // starts at a cache line
    T* hidden = w_.map.template get<T>(s_.images * s_.height * s_.width * row);
    conv1(hidden, row);

    const auto place = [&](int64_t image, int64_t y, int64_t x) {
      return Place<T>{nullptr, keeps(image, y, x) ? map_.at(image, y, x) + s_.c_in : nullptr};
    };
    Conv3x3<T>({hidden, s_.height, s_.width, row}, conv2_, 1, 1, zeros)
        .run({use_tiles ? w_.tiles : w_.kept, use_tiles, {s_.height, s_.width, 0}}, false, place);
  }

 private:
  const float* vector(size_t i) const { return a_.vectors[i].const_data_ptr<float>(); }

  bool keeps(int64_t image, int64_t y, int64_t x) const {
    if (!patches_) return true;
    const int64_t row = image * g_.rows.patches() + g_.rows.patch_of(y);
    return patches_[row * g_.columns.patches() + g_.columns.patch_of(x)];
  }

  void conv1(T* hidden, int64_t pitch) const {
    const Panels panels{s_.hidden};
    // Not a multiple of 4 KiB, which the same few sets of the first-level cache would have to hold.
    const int64_t row = (ceil_div(s_.c_in * sizeof(T), 128) * 128 + 64) / sizeof(T);
    const int64_t chunk =
        std::clamp<int64_t>(kNormalised / (row * sizeof(T)), kFewestRows, kChunkRows);
    const auto normalise = norm_relu_kernel(T{});
    const bool far = s_.height * s_.width * map_.pitch >= kFarMap / static_cast<int64_t>(sizeof(T));
    parallel_chunks(w_.halo.size(), chunk, panels.count(),
                    [&](int64_t lo, int64_t hi, int64_t first, int64_t last) {
                      Scratch& memory = scratch();
                      T* normalised = memory.values.template get<T>((hi - lo) * row);
                      const T** in = memory.pointers.template get<const T*>(2 * (hi - lo));
                      T** out = const_cast<T**>(in) + (hi - lo);
                      for (int64_t i = 0; i < hi - lo; ++i) {
                        const int64_t index = w_.halo[lo + i];
                        const T* from = map_.data + index * map_.pitch;
                        if (far) {
                          const int64_t next = w_.halo[std::min(lo + i + kRowsAhead, hi - 1)];
                          prefetch(map_.data + next * map_.pitch, s_.c_in);
                        }
                        normalise(&from, 1, vector(0), vector(1), s_.c_in, normalised + i * row);
                        in[i] = normalised + i * row;
                        out[i] = hidden + index * pitch;
                      }
                      const Tap<T> tap{in, 0, s_.c_in, values(a_.weights[0], T{}), 0, 1};
                      run_panels<T>(hi - lo, &tap, 1, panels, first, last,
                                    {vector(2), nullptr, out, 0, true});
                    });
  }

  const DenseLayerArguments& a_;
  const DenseLayerShape& s_;
  const Rows<T> map_;
  const bool* patches_;
  const MaskGeometry g_;
  Workspace& w_;
  const Conv<T> conv2_;
};

template <typename T>
void run(const at::Tensor& map, const DenseLayerArguments& a, const DenseLayerShape& s,
         const at::Tensor& patches) {
  const Rows<T> all{mutable_values(map, T{}), s.height, s.width, row_pitch(map)};
  const bool* decided = patches.defined() ? patches.const_data_ptr<bool>() : nullptr;
  const bool use_tiles = DenseLayer<T>(a, s, all, decided).uses_tiles();
  for_images(outputs_of_images(geometry(a, s), s.images, patches),
             [&](int64_t first, int64_t images) {
               DenseLayerShape part = s;
               part.images = images;
               Rows<T> rows = all;
               rows.data = all.at(first, 0, 0);
               DenseLayer<T>(a, part, rows, decided ? decided + first * patches.stride(0) : nullptr)
                   .run(use_tiles);
             });
}

using Tensors = std::vector<at::Tensor>;

void sparse_dense_layer_(const at::Tensor& buffer, const Optional<at::Tensor>& mask,
                         Tensors weights, Tensors vectors, Tensors winograd, int64_t granularity,
                         double winograd_cost) {
  DenseLayerArguments a{mask,        std::move(weights), std::move(vectors), std::move(winograd),
                        granularity, winograd_cost};
  const DenseLayerShape s = check(buffer, a);
  for (Tensors* list : {&a.weights, &a.vectors, &a.winograd}) {
    for (at::Tensor& tensor : *list) tensor = tensor.contiguous();
  }
  at::Tensor patches;
  if (mask) patches = decisions(*mask);
  const at::Tensor map = as_rows(buffer);
  if (buffer.scalar_type() == at::kFloat) {
    run<float>(map, a, s, patches);
  } else {
    run<bf16>(map, a, s, patches);
  }
  if (!map.is_same(buffer)) buffer.copy_(map);
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CPU, m) { m.impl("sparse_dense_layer_", &sparse_dense_layer_); }

}  // namespace las_mm::cpu
