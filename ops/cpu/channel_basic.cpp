// las_mm::channel_basic and channel_basic_: a basic block of which every image computes the hidden
// channels that it wants, at the positions that it keeps.
//
// The weights of an image's channels are gathered into smaller convolutions, which then run like
// those of sparse_basic: both cost the share of the channels.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <utility>

#include "common/arguments.h"
#include "common/checks.h"
#include "cpu/basic.h"
#include "cpu/gather_channels.h"

namespace las_mm::cpu {
namespace {

// The convolutions of the hidden channels that one image wants, in `memory`.
template <typename T>
class SelectedBasic {
 public:
  // Of the whole block's convolutions, in the forms that are used. `constant`: what skipped
  // channels hold, null: zero.
  SelectedBasic(Conv<T> conv1, Conv<T> conv2, const Forms& forms, const Selection& c,
                const float* constant, SelectedMemory& memory)
      : conv1_(conv1), conv2_(conv2) {
    const int64_t taps[2] = {forms.conv1_tiles ? kTile : 9, forms.conv2_tiles ? kTile : 9};
    parts_.add(used(conv1, forms.conv1_tiles), conv1.depth, conv1.channels, taps[0], nullptr,
               conv1.depth, c.on.data());
    parts_.add(used(conv2, forms.conv2_tiles), conv2.depth, conv2.channels, taps[1],
               c.channels.data(), c.count(), nullptr);
    char* next = memory.weights.template get<char>(parts_.bytes(0) + parts_.bytes(1));
    parts_[0].to.data = next;
    parts_[1].to.data = next + parts_.bytes(0);
    set(conv1_, forms.conv1_tiles, parts_[0].to.data);
    set(conv2_, forms.conv2_tiles, parts_[1].to.data);
    conv1_.channels = conv2_.depth = c.count();

    const int64_t hidden = conv1.channels;
    float* bias = memory.vectors.template get<float>(2 * hidden);
    T* skipped = reinterpret_cast<T*>(bias + hidden);
    for (int64_t i = 0; i < c.count(); ++i) bias[i] = conv1.bias[c.channels[i]];
    conv1_.bias = bias;
    char* sums = nullptr;
    if (constant) {
      for (int64_t i = 0; i < hidden; ++i) assign(c.on[i] ? 0.0f : constant[i], skipped[i]);
      sums = memory.constant.template get<char>(parts_.constant_bytes(1));
      conv2_.constant = reinterpret_cast<const T*>(sums);
    }
    const int64_t first = taps[0] * parts_[0].to.panels.count();
    const int64_t second = first + taps[1] * parts_[1].to.panels.count();
    parallel_tasks(second + (constant ? taps[1] : 0), [&](int64_t task) {
      if (task >= second) return parts_.sum_constants(1, skipped, hidden, task - second, sums);
      const size_t i = task >= first ? 1 : 0;
      const int64_t rest = task - (i ? first : 0);
      parts_.gather_tap(i, rest / taps[i], rest % taps[i]);
    });
  }

  const Conv<T>& conv1() const { return conv1_; }
  const Conv<T>& conv2() const { return conv2_; }

 private:
  static const T* used(const Conv<T>& conv, bool tiles) {
    return tiles ? reinterpret_cast<const T*>(conv.winograd) : conv.direct;
  }
  static void set(Conv<T>& conv, bool tiles, const char* data) {
    if (tiles) {
      conv.winograd = reinterpret_cast<const float*>(data);
    } else {
      conv.direct = reinterpret_cast<const T*>(data);
    }
  }

  GatheredConvs<T> parts_;
  Conv<T> conv1_, conv2_;
};

template <typename T>
void run_channels(const at::Tensor& x, const BasicArguments& a, const BasicShape& s,
                  const at::Tensor& patches, const at::Tensor& channels, const float* constant,
                  const at::Tensor& out) {
  const at::Tensor side = side_of(x, a);
  const Maps<T> all = maps_of<T>(x, side, a, patches, out);
  const MaskGeometry g = geometry(a, s);
  const Forms forms = Basic<T>(a, s, all).forms();
  const int64_t decisions = channels.size(1);
  const auto run = [&](int64_t n) {
    BasicShape part = s;
    part.images = 1;
    Basic<T> block(a, part, from_image(all, n, s, g));
    const Selection selection(channels.const_data_ptr<bool>() + n * decisions, decisions, s.hidden,
                              1);
    if (selection.count() == s.hidden) return block.run(forms, block.conv1(), block.conv2());
    std::deque<SelectedMemory>& memory = workspace().selected;
    if (memory.empty()) memory.emplace_back();
    const SelectedBasic<T> selected(block.conv1(), block.conv2(), forms, selection, constant,
                                    memory[0]);
    block.run(forms, selected.conv1(), selected.conv2());
  };
  if (s.images < free_threads()) {
    for (int64_t n = 0; n < s.images; ++n) run(n);
  } else {
    parallel_tasks(s.images, run);
  }
}

// Into x itself or into a new map, which it returns.
at::Tensor run(const at::Tensor& x, const at::Tensor& channel_mask,
               const Optional<at::Tensor>& constant, const BasicArguments& a, bool in_place) {
  const BasicShape s = check(x, a);
  check_channel_mask(channel_mask, x, s.hidden);
  if (constant) check_vector(*constant, "constant", s.hidden, at::kFloat, x);
  at::Tensor patches, vector;
  if (a.mask) patches = decisions(*a.mask);
  if (constant) vector = constant->contiguous();
  const at::Tensor channels = decisions(channel_mask, "channel_mask");
  const float* values = constant ? vector.const_data_ptr<float>() : nullptr;
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

at::Tensor channel_basic(const at::Tensor& x, const at::Tensor& channel_mask,
                         const MaybeTensor& constant, const MaybeTensor& mask,
                         const MaybeTensor& shortcut, Tensors weights, Tensors biases,
                         Tensors winograd, at::IntArrayRef geometry, double winograd_cost) {
  const double plan[] = {winograd_cost, 1};
  return run(x, channel_mask, constant,
             {mask,
              shortcut,
              std::move(weights),
              std::move(biases),
              std::move(winograd),
              {},
              geometry,
              plan},
             false);
}

void channel_basic_(const at::Tensor& x, const at::Tensor& channel_mask,
                    const MaybeTensor& constant, const MaybeTensor& mask,
                    const MaybeTensor& shortcut, Tensors weights, Tensors biases, Tensors winograd,
                    at::IntArrayRef geometry, double winograd_cost) {
  check_in_place(weights.size());
  const double plan[] = {winograd_cost, 1};
  const at::Tensor out = run(x, channel_mask, constant,
                             {mask,
                              shortcut,
                              std::move(weights),
                              std::move(biases),
                              std::move(winograd),
                              {},
                              geometry,
                              plan},
                             true);
  if (!out.is_same(x)) x.copy_(out);
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CPU, m) {
  m.impl("channel_basic", &channel_basic);
  m.impl("channel_basic_", &channel_basic_);
}

}  // namespace las_mm::cpu
