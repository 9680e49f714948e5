// las_mm::channel_bottleneck and channel_bottleneck_: a bottleneck of which every image computes
// the hidden channels that it wants, at the positions that it keeps.
//
// The weights of an image's channels are gathered into smaller convolutions, which then run like
// those of sparse_bottleneck: conv1 and conv3 cost the share of the channels, conv2 its square.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <deque>
#include <numeric>
#include <utility>

#include "cpu/image_groups.h"
#include "cpu/select_channels.h"

namespace las_mm::cpu {
namespace {

// Gathering a convolution's weights takes about as long as computing so many outputs with them: 16
// weights are a load, a compression and two stores, about five cycles, where their products with an
// output are one; and those of channels that are left out are loaded too. Estimated.
constexpr double kPacking = 8;
constexpr int64_t kTogetherRows = 512;  // outputs of images that run in step; 256 to 1024 tried

// Images that a thread computes together: a panel of weights is gathered for each of them while it
// lies in the cache. Only small maps need it; larger ones would no longer fit there themselves.
int64_t images_together(const Arguments& a, const Shape& s, const at::Tensor& patches) {
  if (a.groups > 1 || a.excitation) return 1;
  const std::vector<int64_t> outputs = outputs_of_images(geometry(a, s), s.images, patches);
  const int64_t kept = std::accumulate(outputs.begin(), outputs.end(), int64_t{0});
  const int64_t most = std::min(kTogetherRows * s.images / std::max<int64_t>(kept, 1),
                                ceil_div(s.images, free_threads()));
  return std::max<int64_t>(most, 1);
}

template <typename T>
void run_channels(const at::Tensor& x, const Arguments& a, const Shape& all,
                  const at::Tensor& patches, const at::Tensor& channels,
                  const Constants& constants, const at::Tensor& out) {
  const Batch<T> batch(a, all, x, patches, out);
  const int64_t decisions = channels.size(1);
  const auto run = [&](int64_t n, int64_t images) {
    Shape s = all;
    s.images = images;
    Bottleneck<T> block = batch.block(n, s);
    std::deque<Selection> selections;  // a deque: its elements stay where they are
    bool all_wanted = true;
    for (int64_t i = 0; i < images; ++i) {
      selections.emplace_back(channels.const_data_ptr<bool>() + (n + i) * decisions, decisions,
                              s.hidden, a.groups);
      all_wanted = all_wanted && selections.back().count() == s.hidden;
    }
    block.plan(kPacking);
    if (all_wanted || !block.keeps_any()) {
      return block.run({all_channels<T>(a, s, block.use_tiles())});
    }
    const bool at_once = a.groups > 1 || (images == 1 && !block.keeps_few());
    std::deque<SelectedMemory>& memory = workspace().selected;
    while (memory.size() < selections.size()) memory.emplace_back();
    std::deque<SelectedWeights<T>> sources;
    std::vector<Weights<T>> weights;
    for (size_t i = 0; i < selections.size(); ++i) {
      sources.emplace_back(a, s, selections[i], constants, block.use_tiles(), memory[i]);
      weights.push_back(sources.back().gather(at_once));
    }
    block.run(weights, &sources[0].wanted());
  };
  if (all.images < free_threads()) {
    for (int64_t n = 0; n < all.images; ++n) run(n, 1);
    return;
  }
  const int64_t together = images_together(a, all, patches);
  const int64_t tasks = ceil_div(all.images, together);
  parallel_tasks(tasks, [&](int64_t task) {
    const int64_t first = all.images * task / tasks;
    run(first, all.images * (task + 1) / tasks - first);
  });
}

struct ChannelCall {
  ChannelCall(const at::Tensor& x, Arguments arguments, const at::Tensor& channel_mask,
              Optional<std::vector<at::Tensor>> channel_constants)
      : a(std::move(arguments)), s(check(x, a)) {
    check_channels(channel_mask, channel_constants, x, s);
    TORCH_CHECK_VALUE(!channel_constants || !a.excitation,
                      "constants must be None with excitation");
    make_contiguous(a);
    if (a.mask) patches = decisions(*a.mask);
    channels = decisions(channel_mask, "channel_mask");
    if (channel_constants) {
      for (const at::Tensor& vector : *channel_constants) kept.push_back(vector.contiguous());
      constants = {kept[0].const_data_ptr<float>(), kept[1].const_data_ptr<float>()};
    }
    input = x.contiguous(at::MemoryFormat::ChannelsLast);
  }

  void run(const at::Tensor& out) const {
    if (input.scalar_type() == at::kFloat) {
      run_channels<float>(input, a, s, patches, channels, constants, out);
    } else {
      run_channels<bf16>(input, a, s, patches, channels, constants, out);
    }
  }

  Arguments a;
  const Shape s;
  at::Tensor patches, channels, input;
  std::vector<at::Tensor> kept;
  Constants constants;
};

using Tensors = std::vector<at::Tensor>;
using MaybeTensor = Optional<at::Tensor>;

at::Tensor channel_bottleneck(const at::Tensor& x, const MaybeTensor& mask,
                              const at::Tensor& channel_mask, Tensors weights, Tensors biases,
                              Optional<Tensors> constants, const MaybeTensor& winograd,
                              const MaybeTensor& shortcut, int64_t granularity,
                              at::IntArrayRef strides, int64_t dilation, int64_t groups,
                              double winograd_cost, Optional<Tensors> excitation) {
  const ChannelCall call(
      x,
      {mask, std::move(weights), std::move(biases), winograd, shortcut, granularity, strides.vec(),
       dilation, groups, winograd_cost, nullopt, 1.0, std::move(excitation)},
      channel_mask, std::move(constants));
  const Shape& s = call.s;
  at::Tensor out = output_map(x, {s.images, s.c_out, s.out_height, s.out_width});
  call.run(out);
  return out;
}

void channel_bottleneck_(const at::Tensor& x, const MaybeTensor& mask,
                         const at::Tensor& channel_mask, Tensors weights, Tensors biases,
                         Optional<Tensors> constants, const MaybeTensor& winograd,
                         const MaybeTensor& shortcut, int64_t granularity, at::IntArrayRef strides,
                         int64_t dilation, int64_t groups, double winograd_cost,
                         Optional<Tensors> excitation) {
  TORCH_CHECK_VALUE(weights.size() != 4,
                    "weights must have no downsample convolution to work in place");
  const ChannelCall call(
      x,
      {mask, std::move(weights), std::move(biases), winograd, shortcut, granularity, strides.vec(),
       dilation, groups, winograd_cost, nullopt, 1.0, std::move(excitation)},
      channel_mask, std::move(constants));
  call.run(call.input);
  if (!call.input.is_same(x)) x.copy_(call.input);
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CPU, m) {
  m.impl("channel_bottleneck", &channel_bottleneck);
  m.impl("channel_bottleneck_", &channel_bottleneck_);
}

}  // namespace las_mm::cpu
