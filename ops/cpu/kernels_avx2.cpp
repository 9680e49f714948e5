// Kernels for x86-64 with AVX2 and FMA.
#include "cpu/isa.h"
#ifdef LAS_MM_HAS_X86

#ifndef __clang__  // GCC's own intrinsics trip it (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstring>

#include "cpu/kernels.h"

LAS_MM_TARGET_BEGIN("avx2,fma")

namespace las_mm::cpu {
namespace {

struct Vector {
  static constexpr int kLanes = 8, kRows = 6, kVectors = 2;
  using Reg = __m256;
  static inline Reg zero() { return _mm256_setzero_ps(); }
  static inline Reg set1(float v) { return _mm256_set1_ps(v); }
  static inline Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static inline Reg load(const bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  template <typename T>
  static inline Reg load_part(const T* p, int n) {
    T values[kLanes] = {};
    std::memcpy(values, p, n * sizeof(T));
    return load(values);
  }
  static inline void store(float* p, Reg r) { _mm256_storeu_ps(p, r); }
  static inline void store(bf16* p, Reg r) {
    const __m256i bits = _mm256_castps_si256(r);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounding = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i nearest = _mm256_srli_epi32(_mm256_add_epi32(bits, rounding), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(r, r, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(nearest, quiet, is_nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  template <typename T>
  static inline void store_part(T* p, Reg r, int n) {
    T values[kLanes];
    store(values, r);
    std::memcpy(p, values, n * sizeof(T));
  }
  static inline Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static inline Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static inline Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static inline Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static inline Reg max_nan(Reg a, Reg b) {  // a NaN in a is lost in max
    return _mm256_blendv_ps(max(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }
  static inline Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static inline float sum(Reg r) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  static inline void compress(const char* in, uint16_t wanted, char* out) {
    for (int i = 0; i < cpu::kLanes; ++i) {  // without a branch: masks are not predictable
      std::memcpy(out, in + 4 * i, 4);
      out += 4 * (wanted >> i & 1);
    }
  }

  struct Bf16Step {
    struct A {
      Reg low, high;
    };
    using B = A;
    static inline A split(__m256i pairs) {
      return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
              _mm256_castsi256_ps(
                  _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))))};
    }
    static inline A load_a(const bf16* p) {
      int32_t pair;
      std::memcpy(&pair, p, sizeof pair);
      return split(_mm256_set1_epi32(pair));
    }
    static inline A load_a_last(const bf16* p) { return split(_mm256_set1_epi32(p->bits)); }
    static inline B load_b(const bf16* p) {
      return split(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static inline Reg multiply(const A& a, const B& b, Reg sum) {
      return _mm256_fmadd_ps(a.high, b.high, _mm256_fmadd_ps(a.low, b.low, sum));
    }
  };
};

#include "cpu/kernel_templates.h"

}  // namespace

const Kernels kAvx2Kernels = make_kernels<Vector>();

}  // namespace las_mm::cpu

LAS_MM_TARGET_END
#endif
