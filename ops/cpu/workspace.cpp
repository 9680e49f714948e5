#include "cpu/workspace.h"

#include <ATen/ATen.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <new>

namespace las_mm::cpu {
namespace {

constexpr size_t kCacheLine = 64;
// Stage outputs of two forward passes: while the next one runs, its caller still holds the last.
constexpr size_t kKeptOutputs = 14;

constexpr size_t kHugePage = size_t{1} << 21;

// Large blocks lie on huge pages where the system has them: scattered rows of a large map miss the
// TLB otherwise, and its first use takes a page fault every 4 KiB.
void* allocate(size_t bytes) {
#ifdef _WIN32
  void* memory = _aligned_malloc(bytes, kCacheLine);
  if (memory == nullptr) throw std::bad_alloc();
#else
  const size_t alignment = bytes >= kHugePage ? kHugePage : kCacheLine;
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes) != 0) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (bytes >= kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);  // only a hint
#endif
#endif
  return memory;
}

void release(void* memory) {
#ifdef _WIN32
  _aligned_free(memory);
#else
  std::free(memory);
#endif
}

}  // namespace

Buffer::~Buffer() { release(data_); }

void Buffer::reserve(int64_t bytes) {
  if (bytes <= capacity_) return;
  release(data_);  // before the new one is taken: peak memory matters more than its contents
  data_ = nullptr;
  capacity_ = 0;
  data_ = allocate(bytes);
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

int64_t row_pitch(const at::Tensor& x) {
  if (x.size(1) > 1 && x.stride(1) != 1) return 0;
  int64_t pitch = 0, positions = 1;  // of the axes so far
  for (const int64_t axis : {3, 2, 0}) {
    if (x.size(axis) <= 1) continue;  // may have any stride
    if (pitch == 0) pitch = x.stride(axis);
    if (pitch < x.size(1) || x.stride(axis) != pitch * positions) return 0;
    positions *= x.size(axis);
  }
  return pitch == 0 ? x.size(1) : pitch;
}

at::Tensor as_rows(const at::Tensor& x) {
  return row_pitch(x) > 0 ? x : x.contiguous(at::MemoryFormat::ChannelsLast);
}

at::Tensor output_map(const at::Tensor& like, at::IntArrayRef sizes, bool channels_last) {
  // Storages, not tensors: a tensor that Python has seen keeps its Python object alive.
  struct Kept {
    c10::Storage storage;
    const void* memory;  // elsewhere once it went to shared memory, which other processes may read
  };
  thread_local std::deque<Kept> kept;
  const size_t bytes = c10::multiply_integers(sizes) * like.element_size();
  const auto free = std::find_if(kept.begin(), kept.end(), [&](const Kept& one) {
    return one.storage.use_count() == 1 && one.storage.nbytes() == bytes &&
           one.storage.data() == one.memory;
  });
  c10::Storage storage;
  if (free == kept.end()) {
    void* memory = allocate(std::max(bytes, kCacheLine));
    storage = c10::Storage(c10::Storage::use_byte_size_t(), bytes,
                           c10::DataPtr(memory, memory, &release, c10::Device(c10::kCPU)));
    if (kept.size() == kKeptOutputs) kept.pop_front();
  } else {
    storage = std::move(free->storage);
    kept.erase(free);
  }
  kept.push_back({storage, storage.data()});  // the least recently used one is dropped first
  const int64_t c = sizes[1], h = sizes[2], w = sizes[3];
  at::Tensor out = at::empty({0}, like.options().memory_format(at::MemoryFormat::Contiguous));
  if (channels_last) return out.set_(storage, 0, sizes, {h * w * c, 1, w * c, c});
  return out.set_(storage, 0, sizes, {c * h * w, h * w, w, 1});
}

}  // namespace las_mm::cpu
