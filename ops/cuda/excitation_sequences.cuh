// The kernels of excitation.cuh, one after the other; `Device` as in sequences.cuh.
#pragma once

#include "cuda/excitation.cuh"

namespace las_mm::cuda {

struct Excitation {
  Global<const float> weights[4];  // weight and bias of fc1 and of fc2; absent: none
  int squeezed;                    // width of fc1's output
};

// A channel's place in the rows of each image, and back; absent where all channels are there.
struct Places {
  Global<const int32_t> of_channels;  // (images, width)
  Global<const int32_t> channels;     // (images, row)
};

// means: (images, width)
template <class Device, typename T>
void mean_rows(Device& device, const KeptRows<T>& rows, const Global<const int32_t>& places,
               int width, const Global<float>& means) {
  constexpr int kPositions = 256, kParts = 64;  // at least and at most
  const MaskGeometry& g = rows.geometry;
  const int64_t positions = static_cast<int64_t>(g.out_height) * g.out_width;
  const int64_t share = ceil_div(positions, kParts);
  const int part = static_cast<int>(share < kPositions ? kPositions : share);
  const int parts = static_cast<int>(ceil_div(positions, part));
  const int64_t images = g.images;
  const auto sums = device.template allocate<float>(images * parts * rows.channels, "sums");
  const auto kept = device.template allocate<int32_t>(images * parts, "kept rows");
  device.template launch<SumRows<T>>(images * parts * ceil_div(rows.channels, 32),
                                     {rows, parts, part, sums, kept});
  device.template launch<MeanRows>(
      ceil_div(images * width, MeanRows::kThreads),
      {sums, kept, g.images, parts, rows.channels, places, width, means});
}

// Squeezes and excites the kept rows of conv2's output.
template <class Device, typename T>
void excite(Device& device, const Excitation& e, const KeptRows<T>& rows, const Places& places,
            int width) {
  const int images = rows.geometry.images;
  const auto means = device.template allocate<float>(int64_t{images} * width, "means");
  const auto hidden = device.template allocate<float>(int64_t{images} * e.squeezed, "squeezed");
  const auto scales = device.template allocate<float>(int64_t{images} * width, "scales");
  mean_rows(device, rows, places.of_channels, width, means);
  const auto connect = [&](const Global<const float>& in, int layer, const Global<float>& out,
                           int depth, int outputs) {
    device.template launch<Connect>(
        ceil_div(int64_t{images} * outputs, Connect::kWarps),
        {in, e.weights[2 * layer], e.weights[2 * layer + 1], out, images, depth, outputs,
         layer == 1});
  };
  connect(means, 0, hidden, width, e.squeezed);
  connect(hidden, 1, scales, e.squeezed, width);
  device.template launch<ScaleRows<T>>(
      ceil_div(rows.geometry.outputs(), ScaleRows<T>::kWarps),
      {rows, scales, places.channels, width});
}

// las_mm::channel_mean. `x` is (images, height, width, channels).
template <class Device, typename T>
void channel_mean(Device& device, const Global<T>& x, int images, int height, int width,
                  int channels, const Global<float>& means) {
  KeptRows<T> rows{};
  rows.geometry = mask_geometry(images, height, width, 1, 1, 1);
  rows.data = x;
  rows.row = rows.channels = channels;
  mean_rows(device, rows, {}, channels, means);
}

}  // namespace las_mm::cuda
