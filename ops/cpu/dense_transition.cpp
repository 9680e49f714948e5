// las_mm::dense_transition_: norm, ReLU, 1x1 convolution and 2x2 mean, from the map of one dense
// block into the next one's.
//
// The mean comes first: both are linear, and the convolution then has a quarter of the work.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "common/arguments.h"
#include "cpu/conv3x3.h"

namespace las_mm::cpu {
namespace {

template <typename T>
void transition(const at::Tensor& out, const at::Tensor& buffer, const at::Tensor& weight,
                const std::vector<at::Tensor>& vectors) {
  const int64_t height = out.size(2), width = out.size(3), to_pitch = row_pitch(out);
  const Rows<const T> from{values(buffer, T{}), buffer.size(2), buffer.size(3),
                           row_pitch(buffer)};
  const int64_t c_in = vectors[0].numel(), row = ceil_div(c_in, kLanes) * kLanes;
  const float* vector[3];
  for (int i = 0; i < 3; ++i) vector[i] = vectors[i].const_data_ptr<float>();
  T* to = mutable_values(out, T{});
  const Panels panels{vectors[2].numel()};
  parallel_chunks(out.size(0) * height * width, kChunkRows, panels.count(),
                  [&](int64_t lo, int64_t hi, int64_t first, int64_t last) {
                    Scratch& memory = scratch();
                    T* means = memory.values.template get<T>((hi - lo) * row);
                    const T** in = memory.pointers.template get<const T*>(2 * (hi - lo));
                    T** results = const_cast<T**>(in) + (hi - lo);
                    for (int64_t i = 0; i < hi - lo; ++i) {
                      const Point p = point(lo + i, height, width);
                      const T* rows[4];
                      for (int q = 0; q < 4; ++q) {
                        rows[q] = from.at(p.image, 2 * p.y + q / 2, 2 * p.x + q % 2);
                      }
                      norm_relu_kernel(T{})(rows, 4, vector[0], vector[1], c_in, means + i * row);
                      in[i] = means + i * row;
                      results[i] = to + (lo + i) * to_pitch;
                    }
                    const Tap<T> tap{in, 0, c_in, values(weight, T{}), 0, 1};
                    run_panels<T>(hi - lo, &tap, 1, panels, first, last,
                                  {vector[2], nullptr, results, 0, false});
                  });
}

void dense_transition_(const at::Tensor& out, const at::Tensor& buffer, const at::Tensor& weight,
                       std::vector<at::Tensor> vectors) {
  check_dense_transition(out, buffer, weight, vectors);
  for (at::Tensor& vector : vectors) vector = vector.contiguous();
  const at::Tensor from = as_rows(buffer), to = as_rows(out);
  if (buffer.scalar_type() == at::kFloat) {
    transition<float>(to, from, weight.contiguous(), vectors);
  } else {
    transition<bf16>(to, from, weight.contiguous(), vectors);
  }
  if (!to.is_same(out)) out.copy_(to);
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CPU, m) { m.impl("dense_transition_", &dense_transition_); }

}  // namespace las_mm::cpu
