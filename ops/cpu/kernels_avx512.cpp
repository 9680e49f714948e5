// Kernels for x86-64 with AVX-512; bfloat16 is widened to float32 in registers.
#include "cpu/isa.h"
#ifdef LAS_MM_HAS_X86

#ifndef __clang__  // GCC's own intrinsics trip it (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstring>

#include "cpu/kernels.h"

LAS_MM_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")

namespace las_mm::cpu {
namespace {

#include "cpu/avx512_vector.h"
#include "cpu/kernel_templates.h"

}  // namespace

const Kernels kAvx512Kernels = make_kernels<Avx512>();

}  // namespace las_mm::cpu

LAS_MM_TARGET_END
#endif
