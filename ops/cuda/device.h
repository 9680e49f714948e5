// The GPU as sequences.cuh wants it: PyTorch's current stream and caching allocator.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gt.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <vector>

#include "common/compat.h"
#include "cuda/channel_sequences.cuh"
#include "cuda/platform.cuh"
#include "cuda/sequences.cuh"
#include "cuda/tile_file.h"

namespace las_mm::cuda {

// Blocks per multiprocessor that a kernel must leave registers for: as many as it wants, but not more
// than this architecture's shared memory holds.
template <class Kernel>
constexpr int min_blocks() {
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
  constexpr int kShared = 228 << 10;
#elif __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870
  constexpr int kShared = 164 << 10;
#elif __CUDA_ARCH__ >= 860
  constexpr int kShared = 100 << 10;
#else
  constexpr int kShared = 64 << 10;
#endif
  constexpr int kReserved = 1 << 10;  // by the system, per block
  constexpr int kFitting = kShared / (Kernel::kSharedBytes + kReserved);
  constexpr int kWanted = kFitting < Kernel::kMinBlocks ? kFitting : Kernel::kMinBlocks;
  return kWanted > 0 ? kWanted : 1;
}

template <class Kernel>
struct Launched {
  static constexpr bool kLate = false;  // the next kernel's blocks may take their places at once
  static constexpr bool on(int) { return true; }
};
template <class Tile>
struct Launched<SparseGemm<Tile>> {
  static constexpr bool kLate = true;  // they would crowd where few of this one's blocks run
  static constexpr bool on(int capability) { return is_launched<Tile>(capability); }
};

// From 9.0 on a kernel is launched while the one before it runs, and waits for its end here: what a
// launch costs is hidden, and nothing else changes.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, min_blocks<Kernel>())
    entry(const typename Kernel::Params params) {
#ifdef __CUDA_ARCH__
#if __CUDA_ARCH__ >= 900
  if (!Launched<Kernel>::kLate) asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  if constexpr (Launched<Kernel>::on(__CUDA_ARCH__ / 10)) Kernel::run(params);
#if __CUDA_ARCH__ >= 900
  if (Launched<Kernel>::kLate) asm volatile("griddepcontrol.launch_dependents;");
#endif
#endif
}

class Device {
 public:
  // Of the current device; `like` lies there.
  explicit Device(const at::Tensor& like)
      : gpu(describe(like.get_device())),
        index_(like.get_device()),
        options_(like.options().memory_format(at::MemoryFormat::Contiguous)),
        stream_(c10::cuda::getCurrentCUDAStream(like.get_device())) {}

  const Gpu gpu;

  // Memory goes back to PyTorch when the op returns: later work on this stream comes after.
  template <class T>
  Global<T> allocate(int64_t count, const char*) {
    buffers_.push_back(
        at::empty({count * static_cast<int64_t>(sizeof(T))}, options_.dtype(at::kByte)));
    return {reinterpret_cast<T*>(buffers_.back().data_ptr())};
  }

  template <class T>
  void zero(const Global<T>& memory, int64_t count) {
    C10_CUDA_CHECK(cudaMemsetAsync(memory.data, 0, count * sizeof(T), stream_));
  }

  TileShape choose_tile(int64_t rows, int64_t columns, int64_t groups) const {
    return cuda::choose_tile(gpu, tile_rule(gpu.capability), rows, columns, groups);
  }

  template <class Kernel>
  void launch(int64_t blocks, const typename Kernel::Params& params) {
    if (blocks <= 0) return;
    const int64_t most = static_cast<int64_t>(resident<Kernel>()) * gpu.multiprocessors;
    const unsigned count = static_cast<unsigned>(std::min(blocks, most));
#if CUDART_VERSION >= 12030  // earlier ones cannot capture such launches
    if (gpu.capability >= 90) {
      cudaLaunchAttribute early{};
      early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      early.val.programmaticStreamSerializationAllowed = 1;
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(count);
      config.blockDim = dim3(Kernel::kThreads);
      config.dynamicSmemBytes = Kernel::kSharedBytes;
      config.stream = stream_;
      config.attrs = &early;
      config.numAttrs = 1;
      C10_CUDA_CHECK(cudaLaunchKernelEx(&config, entry<Kernel>, params));
      return;
    }
#endif
    entry<Kernel><<<count, Kernel::kThreads, Kernel::kSharedBytes, stream_>>>(params);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  static constexpr int kMaxGpus = 64;  // PyTorch's own limit

  static Gpu describe(int index) {
    static std::array<std::atomic<int>, kMaxGpus> capabilities{}, multiprocessors{}, shared{};
    if (multiprocessors[index] == 0) {
      int major = 0, minor = 0, count = 0;
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index));
      // Code compiled for an older architecture has none of the newer one's instructions, also
      // where the driver translates it for a newer GPU.
      cudaFuncAttributes compiled{};
      C10_CUDA_CHECK(cudaFuncGetAttributes(&compiled, entry<MeanRates>));
      capabilities[index] = std::min(10 * major + minor, compiled.ptxVersion);
      int bytes = 0;
      C10_CUDA_CHECK(
          cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
      shared[index] = bytes;
      multiprocessors[index] = count;
    }
    const bool deep = is_deep(capabilities[index]) && shared[index] >= 160 << 10;
    TORCH_CHECK(deep || !is_deep(capabilities[index]) || capabilities[index] < 90,
                "las_mm's kernels were compiled for sm_", capabilities[index].load(),
                ", and this GPU, newer, has less shared memory: build them for it "
                "(TORCH_CUDA_ARCH_LIST)");
    return {capabilities[index], multiprocessors[index],
            allows_tf32(&at::Context::allowTF32CuDNN), deep};
  }

  // Blocks that one multiprocessor of this GPU holds; asked for once per GPU.
  template <class Kernel>
  int resident() const {
    static std::array<std::atomic<int>, kMaxGpus> known{};
    std::atomic<int>& mine = known[index_];
    if (mine == 0) {
      constexpr int kDefaultLimit = 48 << 10;
      if (Kernel::kSharedBytes > kDefaultLimit) {
        C10_CUDA_CHECK(cudaFuncSetAttribute(
            entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::kSharedBytes));
      }
      int blocks = 0;
      C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &blocks, entry<Kernel>, Kernel::kThreads, Kernel::kSharedBytes));
      mine = std::max(blocks, 1);
    }
    return mine;
  }

  const int index_;
  at::TensorOptions options_;
  cudaStream_t stream_;
  std::vector<at::Tensor> buffers_;
};

// Arguments of the ops as the kernels want them.

template <typename T>
Global<const T> input(const at::Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr())};
}
template <typename T>
Global<T> output(const at::Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr())};
}
template <typename T>
Global<const T> optional_input(const Optional<at::Tensor>& x) {
  return x ? input<T>(*x) : Global<const T>{};
}

// A packed weight; its sixteen-byte chunks have to be aligned, which a view may not be.
inline at::Tensor packed_weight(const at::Tensor& weight) {
  const at::Tensor packed = weight.contiguous();
  const bool aligned = reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0;
  return aligned ? packed : packed.clone();
}

// Decision per patch, one byte each. Looking for NaN would mean waiting for the GPU: it drops.
inline at::Tensor decisions(const at::Tensor& mask) {
  return mask.scalar_type() == at::kBool ? mask.contiguous() : mask.gt(0.5).contiguous();
}

inline at::Tensor empty_map(const at::Tensor& like, at::IntArrayRef sizes) {
  return at::empty(sizes, like.options().memory_format(at::MemoryFormat::ChannelsLast));
}

// Calls `use` with a zero of the kernels' type.
template <class Use>
void with_type(at::ScalarType type, const Use& use) {
  if (type == at::kFloat) {
    use(float{});
  } else if (type == at::kHalf) {
    use(half{});
  } else {
    use(bf16{});
  }
}

// Compiled in gemm_*.cu, once.
#define LAS_MM_DECLARE_GEMM(T)                                             \
  extern template void gemm<false, T, Device>(Device&, GemmParams<T>); \
  extern template void gemm<true, T, Device>(Device&, GemmParams<T>);  \
  extern template void selected_gemm<T, Device>(Device&, GemmParams<T>)
LAS_MM_DECLARE_GEMM(float);
LAS_MM_DECLARE_GEMM(half);
LAS_MM_DECLARE_GEMM(bf16);
#undef LAS_MM_DECLARE_GEMM

}  // namespace las_mm::cuda
