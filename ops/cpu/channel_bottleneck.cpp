// las_mm::channel_bottleneck and channel_bottleneck_: a bottleneck of which every image computes
// the hidden channels that it wants, at the positions that it keeps.
//
// The weights of an image's channels are gathered into smaller convolutions, which then run like
// those of sparse_bottleneck: conv1 and conv3 cost the share of the channels, conv2 its square.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <utility>

#include "cpu/select_channels.h"

namespace las_mm::cpu {
namespace {

// Gathering takes about as long as computing so many outputs; measured.
constexpr double kPacking = 8;

template <typename T>
void run_channels(const at::Tensor& x, const Arguments& a, const Shape& all,
                  const at::Tensor& patches, const at::Tensor& channels,
                  const Constants& constants, const at::Tensor& out) {
  Shape s = all;
  s.images = 1;
  const at::Tensor shortcut =
      a.shortcut ? a.shortcut->contiguous(at::MemoryFormat::ChannelsLast) : at::Tensor();
  const int64_t shortcut_channels = a.shortcut ? shortcut.size(1) : 0;
  const int64_t outputs = s.out_height * s.out_width, decisions = channels.size(1);
  const auto run = [&](int64_t n) {
    Bottleneck<T> block(
        a, s, values(x, T{}) + n * s.height * s.width * s.c_in,
        a.shortcut ? values(shortcut, T{}) + n * outputs * shortcut_channels : nullptr,
        shortcut_channels,
        patches.defined() ? patches.const_data_ptr<bool>() + n * patches.stride(0) : nullptr,
        mutable_values(out, T{}) + n * outputs * s.c_out);
    const Selection selection(channels.const_data_ptr<bool>() + n * decisions, decisions, s.hidden,
                              a.groups);
    block.plan(kPacking);
    if (selection.count() == s.hidden || !block.keeps_any()) {
      return block.run(all_channels<T>(a, s, block.use_tiles()), s.hidden, nullptr);
    }
    SelectedWeights<T> weights(a, s, selection, constants, block.use_tiles());
    const bool at_once = a.groups > 1 || !block.keeps_few();
    std::vector<int32_t> channels_of_image;
    for (int64_t c = 0; c < s.hidden; ++c) {
      if (selection.on[c]) channels_of_image.push_back(static_cast<int32_t>(c));
    }
    block.run(weights.gather(at_once), selection.count(), &channels_of_image);
  };
  if (all.images >= free_threads()) {
    parallel_tasks(all.images, run);
  } else {
    for (int64_t n = 0; n < all.images; ++n) run(n);
  }
}

struct Call {
  Call(const at::Tensor& x, Arguments arguments, const at::Tensor& channel_mask,
       std::optional<std::vector<at::Tensor>> channel_constants)
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
using MaybeTensor = std::optional<at::Tensor>;

at::Tensor channel_bottleneck(const at::Tensor& x, const MaybeTensor& mask,
                              const at::Tensor& channel_mask, Tensors weights, Tensors biases,
                              std::optional<Tensors> constants, const MaybeTensor& winograd,
                              const MaybeTensor& shortcut, int64_t granularity,
                              at::IntArrayRef strides, int64_t dilation, int64_t groups,
                              double winograd_cost, std::optional<Tensors> excitation) {
  const Call call(x,
                  {mask, std::move(weights), std::move(biases), winograd, shortcut, granularity,
                   strides.vec(), dilation, groups, winograd_cost, std::nullopt, 1.0,
                   std::move(excitation)},
                  channel_mask, std::move(constants));
  const Shape& s = call.s;
  at::Tensor out = output_map(x, {s.images, s.c_out, s.out_height, s.out_width});
  call.run(out);
  return out;
}

void channel_bottleneck_(const at::Tensor& x, const MaybeTensor& mask,
                         const at::Tensor& channel_mask, Tensors weights, Tensors biases,
                         std::optional<Tensors> constants, const MaybeTensor& winograd,
                         const MaybeTensor& shortcut, int64_t granularity,
                         at::IntArrayRef strides, int64_t dilation, int64_t groups,
                         double winograd_cost, std::optional<Tensors> excitation) {
  TORCH_CHECK_VALUE(weights.size() != 4,
                    "weights must have no downsample convolution to work in place");
  const Call call(x,
                  {mask, std::move(weights), std::move(biases), winograd, shortcut, granularity,
                   strides.vec(), dilation, groups, winograd_cost, std::nullopt, 1.0,
                   std::move(excitation)},
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
