#include "cpu/workspace.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <deque>

namespace las_mm::cpu {
namespace {

constexpr int64_t kCacheLine = 64;
// Stage outputs of two forward passes: while the next one runs, its caller still holds the last.
constexpr size_t kKeptOutputs = 10;

}  // namespace

void Buffer::reserve(int64_t bytes) {
  if (bytes <= capacity_) return;
  data_ = nullptr;
  capacity_ = 0;
  memory_.reset();  // before the new one is taken: peak memory matters more than its contents
  memory_.reset(new char[bytes + kCacheLine]);
  const auto address = reinterpret_cast<uintptr_t>(memory_.get());
  data_ = memory_.get() + (kCacheLine - address % kCacheLine) % kCacheLine;
  capacity_ = bytes;
}

Scratch& scratch() {
  thread_local Scratch instance;
  return instance;
}

Workspace& workspace() {
  thread_local Workspace instance;
  return instance;
}

at::Tensor output_map(const at::Tensor& like, at::IntArrayRef sizes) {
  // Storages, not tensors: a tensor that Python has seen keeps its Python object alive.
  thread_local std::deque<c10::Storage> kept;
  const size_t bytes = c10::multiply_integers(sizes) * like.element_size();
  const auto free = std::find_if(kept.begin(), kept.end(), [&](const c10::Storage& storage) {
    return storage.use_count() == 1 && storage.nbytes() == bytes;
  });
  if (free == kept.end()) {
    at::Tensor fresh =
        at::empty(sizes, like.options().memory_format(at::MemoryFormat::ChannelsLast));
    if (kept.size() == kKeptOutputs) kept.pop_front();
    kept.push_back(fresh.storage());
    return fresh;
  }
  c10::Storage storage = std::move(*free);
  kept.erase(free);
  kept.push_back(storage);  // the least recently used one is dropped first
  const int64_t c = sizes[1], h = sizes[2], w = sizes[3];
  at::Tensor reused = at::empty({0}, like.options().memory_format(at::MemoryFormat::Contiguous));
  return reused.set_(storage, 0, sizes, {h * w * c, 1, w * c, c});
}

}  // namespace las_mm::cpu
