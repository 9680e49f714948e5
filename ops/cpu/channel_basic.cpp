// las_mm::channel_basic and channel_basic_: a basic block of which every image computes the channels
// of conv1's output that it wants, at the positions that it keeps.
//
// The weights of an image's channels are gathered into smaller convolutions, which then run like
// those of sparse_basic: both cost the share of the channels.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <utility>

#include "common/checks.h"
#include "cpu/basic.h"
#include "cpu/image_groups.h"
#include "cpu/select_channels.h"

namespace las_mm::cpu {
namespace {

// The weights of one image's channels, in the given forms.
template <typename T>
class SelectedBasic {
 public:
  SelectedBasic(const BasicArguments& a, const BasicShape& s, const Selection& c,
                const Forms& forms, const float* constants, SelectedMemory& memory) {
    const bool tiles[2] = {forms.conv1_tiles, forms.conv2_tiles};
    const auto packed = [&](size_t i) {
      return values(tiles[i] ? a.winograd[i] : a.weights[i], T{});
    };
    const int64_t taps[2] = {tiles[0] ? kTile : 9, tiles[1] ? kTile : 9};
    const GatheredConv<T> parts[2] = {
        {packed(0), s.c_in, s.hidden, taps[0], nullptr, s.c_in, c.on.data()},
        {packed(1), s.hidden, s.c_out, taps[1], c.channels.data(), c.count(), nullptr}};
    char* to[2] = {memory.weights.get<char>(parts[0].bytes() + parts[1].bytes())};
    to[1] = to[0] + parts[0].bytes();
    const int64_t tasks[2] = {parts[0].tasks(), parts[1].tasks()};
    float* bias = memory.vectors.get<float>(c.count() + s.hidden);
    T* skipped = reinterpret_cast<T*>(bias + c.count());
    for (int64_t i = 0; i < s.hidden; ++i) {
      assign(constants == nullptr || c.on[i] ? 0.0f : constants[i], skipped[i]);
    }
    char* sums = constants ? memory.constant.get<char>(parts[1].constant_bytes()) : nullptr;
    parallel_tasks(tasks[0] + tasks[1] + (constants ? taps[1] : 0), [&](int64_t task) {
      if (task < tasks[0]) return parts[0].gather(task, to[0]);
      if (task < tasks[0] + tasks[1]) return parts[1].gather(task - tasks[0], to[1]);
      parts[1].sum(skipped, task - tasks[0] - tasks[1], sums);
    });
    for (int64_t i = 0; i < c.count(); ++i) {
      bias[i] = a.biases[0].const_data_ptr<float>()[c.channels[i]];
    }
    for (int i = 0; i < 2; ++i) {
      convs_[i] = {i == 0 ? s.c_in : c.count(),
                   parts[i].outputs(),
                   reinterpret_cast<const T*>(to[i]),
                   reinterpret_cast<const float*>(to[i]),
                   i == 0 ? bias : a.biases[1].const_data_ptr<float>(),
                   true,
                   i == 0 ? nullptr : reinterpret_cast<const T*>(sums)};
    }
  }

  const Conv<T>& conv(int i) const { return convs_[i]; }

 private:
  Conv<T> convs_[2];
};

template <typename T>
void run_channels(const at::Tensor& x, const BasicArguments& a, const BasicShape& all,
                  const at::Tensor& patches, const at::Tensor& channels, const float* constants,
                  const at::Tensor& out) {
  const at::Tensor side = shortcut_map(x, a);
  const Maps<T> maps(x, side, a, patches, out);
  const std::vector<int64_t> kept = outputs_of_images(geometry(a, all), all.images, patches);
  const Forms forms = Basic<T>(a, all, maps).forms();
  const auto run = [&](int64_t n) {
    BasicShape s = all;
    s.images = 1;
    const Selection selection(channels.const_data_ptr<bool>() + n * channels.size(1),
                              channels.size(1), s.hidden, 1);
    Basic<T> block(a, s, maps.from(n, all));
    if (selection.count() == s.hidden || kept[n] == 0) return block.run(forms);
    std::deque<SelectedMemory>& memory = workspace().selected;
    if (memory.empty()) memory.emplace_back();
    const SelectedBasic<T> weights(a, s, selection, forms, constants, memory[0]);
    block.run(forms, weights.conv(0), weights.conv(1));
  };
  if (all.images < free_threads()) {
    for (int64_t n = 0; n < all.images; ++n) run(n);
  } else {
    parallel_tasks(all.images, run);
  }
}

// Runs into `x` or into a new map; returns it.
at::Tensor run(const at::Tensor& x, const BasicArguments& a, const at::Tensor& channel_mask,
               const Optional<at::Tensor>& constants, bool in_place) {
  const BasicShape s = check(x, a);
  check_channel_mask(channel_mask, x, s.hidden);
  if (constants) check_vector(*constants, "constants", s.hidden, at::kFloat, x);
  const at::Tensor patches = a.mask ? decisions(*a.mask) : at::Tensor();
  const at::Tensor channels = decisions(channel_mask, "channel_mask");
  const at::Tensor skipped = constants ? constants->contiguous() : at::Tensor();
  const float* values = constants ? skipped.const_data_ptr<float>() : nullptr;
  const at::Tensor input = x.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor out =
      in_place ? input : output_map(x, {s.images, s.c_out, s.out_height, s.out_width});
  if (x.scalar_type() == at::kFloat) {
    run_channels<float>(input, a, s, patches, channels, values, out);
  } else {
    run_channels<bf16>(input, a, s, patches, channels, values, out);
  }
  return out;
}

using Tensors = std::vector<at::Tensor>;
using MaybeTensor = Optional<at::Tensor>;

at::Tensor channel_basic(const at::Tensor& x, const MaybeTensor& mask,
                         const at::Tensor& channel_mask, const MaybeTensor& shortcut,
                         Tensors weights, Tensors biases, Tensors winograd,
                         const MaybeTensor& constants, at::IntArrayRef geometry,
                         double winograd_cost) {
  return run(x, {mask, shortcut, std::move(weights), std::move(biases), std::move(winograd), {},
                 geometry, {winograd_cost, 1.0}}, channel_mask, constants, false);
}

void channel_basic_(const at::Tensor& x, const MaybeTensor& mask, const at::Tensor& channel_mask,
                    const MaybeTensor& shortcut, Tensors weights, Tensors biases, Tensors winograd,
                    const MaybeTensor& constants, at::IntArrayRef geometry,
                    double winograd_cost) {
  TORCH_CHECK_VALUE(weights.size() != 3,
                    "weights must have no downsample convolution to work in place");
  const at::Tensor out =
      run(x, {mask, shortcut, std::move(weights), std::move(biases), std::move(winograd), {},
              geometry, {winograd_cost, 1.0}}, channel_mask, constants, true);
  if (!out.is_same(x)) x.copy_(out);
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CPU, m) {
  m.impl("channel_basic", &channel_basic);
  m.impl("channel_basic_", &channel_basic_);
}

}  // namespace las_mm::cpu
