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
  thread_local std::deque<at::Tensor> kept;
  for (auto it = kept.begin(); it != kept.end(); ++it) {
    if (it->use_count() == 1 && it->storage().use_count() == 1 && it->sizes() == sizes &&
        it->scalar_type() == like.scalar_type()) {
      at::Tensor found = std::move(*it);
      kept.erase(it);
      kept.push_back(found);
      return found;
    }
  }
  if (kept.size() == kKeptOutputs) kept.pop_front();
  at::Tensor fresh = at::empty(sizes, like.options().memory_format(at::MemoryFormat::ChannelsLast));
  kept.push_back(fresh);
  return fresh;
}

}  // namespace las_mm::cpu
