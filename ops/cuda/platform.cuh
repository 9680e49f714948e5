// What the kernels use of a GPU: coordinates, barriers, global and shared memory, tensor cores.
//
// Kernels touch memory only through Global and Shared, and other threads only through the functions
// here, so that the same headers compile with a plain C++ compiler against an emulator
// (LAS_MM_EMULATE; tests/ops/emulator/) that checks every access. On a GPU all of this is inlined
// to one instruction or a few.
#pragma once

#include <cstdint>

#include "common/patch_geometry.h"

#ifdef LAS_MM_EMULATE
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define LAS_MM_DEVICE __device__ __forceinline__
#define LAS_MM_UNROLL _Pragma("unroll")
#define LAS_MM_UNROLL_TWICE _Pragma("unroll 2")
#define LAS_MM_UNROLL_FOUR _Pragma("unroll 4")
#define LAS_MM_NO_UNROLL _Pragma("unroll 1")

namespace las_mm::cuda {

using half = __half;
using bf16 = __nv_bfloat16;

// Sixteen bytes, what one instruction moves.
struct alignas(16) Words {
  uint32_t w[4];
};

// Coordinates: blocks and threads are numbered in one dimension.
LAS_MM_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
// The same, read here and now: what follows from it is computed again instead of being kept in
// registers through a loop that has none to spare.
LAS_MM_DEVICE int thread_index_again() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
LAS_MM_DEVICE int64_t block_index() { return blockIdx.x; }
LAS_MM_DEVICE int64_t block_count() { return gridDim.x; }

// All threads of the block meet here; what they wrote to shared memory before is visible after.
LAS_MM_DEVICE void sync_block() { __syncthreads(); }

// All 32 lanes of a warp call these together; lanes are numbered from 0 to 31.
LAS_MM_DEVICE uint32_t ballot(bool value) { return __ballot_sync(0xffffffffu, value); }
template <typename T>
LAS_MM_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <typename T>
LAS_MM_DEVICE T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}
LAS_MM_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }

// An array in global memory; `T` may be const. Sixteen-byte accesses need aligned addresses.
template <typename T>
struct Global {
  T* data = nullptr;

  Global() = default;
  LAS_MM_HOST_DEVICE Global(T* memory) : data(memory) {}
  template <typename U>  // of a const T from a plain one
  LAS_MM_HOST_DEVICE Global(const Global<U>& other) : data(other.data) {}

  LAS_MM_DEVICE T load(int64_t i) const { return data[i]; }
  LAS_MM_DEVICE void store(int64_t i, T value) const { data[i] = value; }
  LAS_MM_DEVICE Words load16(int64_t i) const { return *reinterpret_cast<const Words*>(data + i); }
  LAS_MM_DEVICE void store16(int64_t i, Words value) const {
    *reinterpret_cast<Words*>(data + i) = value;
  }
  // Start bringing the value's neighbourhood to L2.
  LAS_MM_DEVICE void prefetch(int64_t i) const {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(data + i));
  }
  // Returns the value before.
  LAS_MM_DEVICE T atomic_add(int64_t i, T value) const { return atomicAdd(data + i, value); }
};

// The block's shared memory, addressed in bytes.
extern __shared__ __align__(16) unsigned char shared_bytes[];

template <typename T>
LAS_MM_DEVICE T shared_load(int at) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16);
  return *reinterpret_cast<const T*>(shared_bytes + at);
}
template <typename T>
LAS_MM_DEVICE void shared_store(int at, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16);
  *reinterpret_cast<T*>(shared_bytes + at) = value;
}

LAS_MM_DEVICE uint32_t shared_address(int at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_bytes + at));
}

// Start copying 16 bytes from `from` + i to shared memory, or write zeros if not `valid` (`i` is
// then not read). They are there, for this thread, after wait_copies<n>() if at most n calls of
// commit_copies() came after; for other threads after the next barrier. A kernel ends with
// wait_copies<0>(). kReused: by this multiprocessor, so keep a copy in L1.
template <bool kReused = false, typename T>
LAS_MM_DEVICE void copy16_async(int at, const Global<T>& from, int64_t i, bool valid) {
#if __CUDA_ARCH__ >= 800
  const void* source = from.data + (valid ? i : 0);
  const int bytes = valid ? 16 : 0;
  if constexpr (kReused) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(at)),
                 "l"(source), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(at)),
                 "l"(source), "r"(bytes)
                 : "memory");
  }
#else
  shared_store(at, valid ? from.load16(i) : Words{});
#endif
}
LAS_MM_DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}
template <int kPending>
LAS_MM_DEVICE void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit values: lane l names row l % 8 of matrix l / 8 (16 aligned bytes) and
// receives in r[m] the word l % 4 of row l / 4 of matrix m.
LAS_MM_DEVICE void load_matrices(uint32_t (&r)[4], int at) {
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(at))
               : "memory");
#endif
}

// c += a * b on the tensor cores, for a warp; fragments as in the PTX manual for
// mma.m16n8k16 (16-bit types) and mma.m16n8k8 (tf32). Sums are float32.
template <typename T>
struct TensorCore;

template <>
struct TensorCore<half> {
  LAS_MM_DEVICE static void multiply_add(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif __CUDA_ARCH__ >= 750
    LAS_MM_UNROLL
    for (int k = 0; k < 2; ++k) {  // two steps of depth 8
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
          "{%0, %1, %2, %3};\n"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[2 * k]), "r"(a[2 * k + 1]), "r"(b[k]));
    }
#endif
  }
};

template <>
struct TensorCore<bf16> {
  LAS_MM_DEVICE static void multiply_add(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
  }
};

template <>
struct TensorCore<float> {
  // The fragments hold what round_to_tf32() returned.
  LAS_MM_DEVICE static void multiply_add(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
  }
};

// float32 to the nearest tf32, both as the bits of a float32.
LAS_MM_DEVICE uint32_t round_to_tf32(uint32_t bits) {
#if __CUDA_ARCH__ >= 800
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
#else
  return bits;
#endif
}

LAS_MM_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
LAS_MM_DEVICE uint32_t float_to_bits(float value) { return __float_as_uint(value); }

LAS_MM_DEVICE float exponential(float value) { return expf(value); }

LAS_MM_DEVICE float to_float(float value) { return value; }
LAS_MM_DEVICE float to_float(half value) { return __half2float(value); }
LAS_MM_DEVICE float to_float(bf16 value) { return __bfloat162float(value); }

template <typename T>
LAS_MM_DEVICE T from_float(float value);
template <>
LAS_MM_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
LAS_MM_DEVICE half from_float<half>(float value) {
  return __float2half_rn(value);
}
template <>
LAS_MM_DEVICE bf16 from_float<bf16>(float value) {
  return __float2bfloat16_rn(value);
}

// The bits of a 16-bit value.
LAS_MM_DEVICE uint32_t bits16(half value) { return __half_as_ushort(value); }
LAS_MM_DEVICE uint32_t bits16(bf16 value) { return static_cast<__nv_bfloat16_raw>(value).x; }
template <typename T>
LAS_MM_DEVICE T from_bits16(uint32_t bits);
template <>
LAS_MM_DEVICE half from_bits16<half>(uint32_t bits) {
  return __ushort_as_half(static_cast<unsigned short>(bits));
}
template <>
LAS_MM_DEVICE bf16 from_bits16<bf16>(uint32_t bits) {
  __nv_bfloat16_raw raw;  // what all versions of CUDA have for all architectures
  raw.x = static_cast<unsigned short>(bits);
  return raw;
}

}  // namespace las_mm::cuda

#endif  // LAS_MM_EMULATE
