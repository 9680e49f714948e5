// Kernels for x86-64 with AVX-512 and its bfloat16 products (two channels per instruction).
#include "cpu/isa.h"
#ifdef LAS_MM_HAS_X86

#ifndef __clang__  // GCC's own intrinsics trip it (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstring>

#include "cpu/kernels.h"

LAS_MM_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")

namespace las_mm::cpu {
namespace {

#include "cpu/avx512_vector.h"

struct Avx512Bf16 : Avx512 {
  struct Bf16Step {
    using A = __m512i;
    using B = __m512i;
    static inline A load_a(const bf16* p) {
      int32_t pair;
      std::memcpy(&pair, p, sizeof pair);
      return _mm512_set1_epi32(pair);
    }
    static inline A load_a_last(const bf16* p) { return _mm512_set1_epi32(p->bits); }
    static inline B load_b(const bf16* p) { return _mm512_loadu_si512(p); }
    static inline Reg multiply(A a, B b, Reg sum) {
      return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
  };
};

#include "cpu/kernel_templates.h"

}  // namespace

const Kernels kAvx512Bf16Kernels = make_kernels<Avx512Bf16>();

}  // namespace las_mm::cpu

LAS_MM_TARGET_END
#endif
