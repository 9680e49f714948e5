// las_mm::fingerprint on the CPU: whether weights still are what packed forms were made from, at the
// cost of reading a small part of them. See las_mm/ops/contents.py.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

namespace las_mm::cpu {
namespace {

constexpr int64_t kWord = 8, kStreams = 8;
constexpr int64_t kWholeBytes = 2 << 10;  // up to this, all is read every time
constexpr int64_t kSamples = 16;           // of what is larger
constexpr int64_t kTaskBytes = 1 << 16;
constexpr int64_t kManyPositions = 2048;  // from which on all is read, as in las_mm/ops/contents.py
constexpr uint64_t kOdd = 0x9E3779B97F4A7C15u;

// A bijection of `hash` and of `word`: one changed word never goes unnoticed.
inline uint64_t mix(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * kOdd;
  return hash << 29 | hash >> 35;
}

inline uint64_t load(const char* from, int64_t bytes = kWord) {
  uint64_t word = 0;
  std::memcpy(&word, from, bytes);
  return word;
}

uint64_t hash_run(const char* data, int64_t bytes, uint64_t hash) {
  uint64_t lanes[kStreams];  // independent, so that products overlap
  for (int64_t lane = 0; lane < kStreams; ++lane) lanes[lane] = hash + lane;
  int64_t i = 0;
  for (; i + kStreams * kWord <= bytes; i += kStreams * kWord) {
    for (int64_t lane = 0; lane < kStreams; ++lane) {
      lanes[lane] = mix(lanes[lane], load(data + i + lane * kWord));
    }
  }
  for (; i < bytes; i += kWord) lanes[0] = mix(lanes[0], load(data + i, std::min(kWord, bytes - i)));
  for (const uint64_t lane : lanes) hash = mix(hash, lane);
  return hash;
}

struct Bytes {
  const char* data;
  int64_t size;

  bool whole() const { return size <= kWholeBytes; }
  int64_t words() const { return size / kWord; }
  int64_t begin(int64_t part, int64_t parts) const { return words() * part / parts * kWord; }
  int64_t end(int64_t part, int64_t parts) const {
    return part + 1 == parts ? size : begin(part + 1, parts);
  }

  uint64_t samples() const {
    uint64_t hash = static_cast<uint64_t>(size);
    if (whole()) return hash_run(data, size, hash);
    const int64_t step = words() / kSamples | 1;  // odd: meets every column of a matrix in turn
    for (int64_t i = 0; i < words(); i += step) hash = mix(hash, load(data + i * kWord));
    return hash;
  }

  uint64_t part(int64_t part, int64_t parts) const {
    if (whole()) return 0;
    const int64_t first = begin(part, parts);
    return hash_run(data + first, end(part, parts) - first, 0);
  }
};

using Hashes = std::tuple<int64_t, int64_t>;

Hashes fingerprint(std::vector<at::Tensor> tensors, int64_t part, int64_t parts) {
  TORCH_CHECK_VALUE(parts > 0 && part >= 0 && part < parts,
                    "part must be from 0 to parts - 1, got ", part, " of ", parts);
  std::vector<Bytes> bytes;
  int64_t read = 0;
  for (at::Tensor& tensor : tensors) {
    // In the order of memory, whatever the format.
    if (!tensor.is_non_overlapping_and_dense()) tensor = tensor.contiguous();
    const int64_t size = tensor.numel() * static_cast<int64_t>(tensor.element_size());
    bytes.push_back({static_cast<const char*>(tensor.const_data_ptr()), size});
    read += bytes.back().whole() ? size : size / parts;
  }
  const int64_t count = static_cast<int64_t>(bytes.size());
  std::vector<uint64_t> samples(count), values(count);
  const int64_t grain = std::max<int64_t>(1, count * kTaskBytes / std::max<int64_t>(read, 1));
  at::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      samples[i] = bytes[i].samples();
      values[i] = bytes[i].part(part, parts);
    }
  });
  uint64_t sampled = 0, read_whole = 0;
  for (const uint64_t hash : samples) sampled = mix(sampled, hash);
  for (const uint64_t hash : values) read_whole = mix(read_whole, hash);
  return {static_cast<int64_t>(sampled), static_cast<int64_t>(read_whole)};
}

// `expected`: samples, everything, and each part, as las_mm/ops/contents.py takes them.
at::Tensor unchanged(const at::Tensor& value, std::vector<at::Tensor> sources,
                     const at::Tensor& expected, int64_t positions) {
  const int64_t parts = expected.numel() - 2;
  TORCH_CHECK_VALUE(expected.dim() == 1 && expected.scalar_type() == at::kLong && parts > 0,
                    "expected must be int64 with one value for each part after the first two");
  // No state between calls: which part is read is drawn.
  static std::atomic<uint64_t> calls{0};
  const uint64_t drawn = mix(mix(++calls, kOdd), kOdd) >> 16;
  const bool all = positions >= kManyPositions;
  const int64_t part = all ? 0 : static_cast<int64_t>(drawn % parts);
  const auto [samples, values] = fingerprint(std::move(sources), part, all ? 1 : parts);
  const at::Tensor known = expected.contiguous();
  const int64_t* want = known.const_data_ptr<int64_t>();
  TORCH_CHECK(samples == want[0] && values == want[all ? 1 : 2 + part],
              "weights have changed since they were packed for torch.export, and the exported "
              "program does not follow: load them into the model, call las_mm.prepare(model) and "
              "export it again");
  return value.clone();
}

}  // namespace

TORCH_LIBRARY_IMPL(las_mm, CPU, m) {
  m.impl("fingerprint", &fingerprint);
  m.impl("unchanged", &unchanged);
}

}  // namespace las_mm::cpu
