// Memory that the ops keep from call to call, so that a steady stream of images allocates nothing.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <deque>
#include <vector>

#include "cpu/kernels.h"

namespace las_mm::cpu {

// A block of memory that only grows; its contents do not survive a call of get().
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();

  // `count` uninitialised values, aligned to a cache line.
  template <typename T>
  T* get(int64_t count) {
    reserve(count * static_cast<int64_t>(sizeof(T)));
    return static_cast<T*>(data_);
  }

 private:
  void reserve(int64_t bytes);

  void* data_ = nullptr;
  int64_t capacity_ = 0;
};

// What one worker thread needs for a chunk of positions.
struct Scratch {
  Buffer pointers, values, hidden, output, weights;
};
Scratch& scratch();  // of the current thread

// Positions (image, y, x) as indices into N x H x W.
using Positions = std::vector<int32_t>;

// The gathered weights of the channels of one image.
struct SelectedMemory {
  Buffer weights, constant, vectors;
};

// What one call of an op needs; of the current thread, so threads may share a model.
struct Workspace {
  Buffer map, hidden, bias, zeros, bytes, spread, scores;
  Buffer scales;  // of squeeze-and-excitation
  std::deque<SelectedMemory> selected;  // of images that are computed together
  Positions kept, dropped, halo, tiles, halo_tiles;
};
Workspace& workspace();

// Values from position to position of a map whose positions lie in order, each with its channels
// side by side: a channels_last tensor or some channels of one. 0: `x` is no such map.
int64_t row_pitch(const at::Tensor& x);
// `x` if it is such a map, or else a channels_last copy.
at::Tensor as_rows(const at::Tensor& x);

// A channels_last (or else contiguous) tensor, taken from the ones returned before if no one holds these any more.
at::Tensor output_map(const at::Tensor& like, at::IntArrayRef sizes, bool channels_last = true);

// Pointers to the values of a float or bfloat16 tensor.
inline const float* values(const at::Tensor& x, float) { return x.const_data_ptr<float>(); }
inline const bf16* values(const at::Tensor& x, bf16) {
  return reinterpret_cast<const bf16*>(x.const_data_ptr<at::BFloat16>());
}
inline float* mutable_values(const at::Tensor& x, float) { return x.mutable_data_ptr<float>(); }
inline bf16* mutable_values(const at::Tensor& x, bf16) {
  return reinterpret_cast<bf16*>(x.mutable_data_ptr<at::BFloat16>());
}

// Conversion to the type of the features, rounded to nearest.
inline void assign(float value, float& out) { out = value; }
inline void assign(float value, bf16& out) { out.bits = c10::BFloat16(value).x; }

}  // namespace las_mm::cpu
