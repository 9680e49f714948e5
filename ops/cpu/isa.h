// Which instructions the kernels may use, decided once per process from the CPU.
#pragma once

// Functions between BEGIN and END may use the given instruction sets; the rest of the build stays
// baseline, so one binary runs on every CPU of its architecture. Include headers before BEGIN.
#if defined(__x86_64__) && defined(__clang__)
#define LAS_MM_PRAGMA(text) _Pragma(#text)
#define LAS_MM_TARGET_BEGIN(isa) \
  LAS_MM_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define LAS_MM_TARGET_END _Pragma("clang attribute pop")
#define LAS_MM_HAS_X86 1
#elif defined(__x86_64__) && defined(__GNUC__)
#define LAS_MM_PRAGMA(text) _Pragma(#text)
#define LAS_MM_TARGET_BEGIN(isa) _Pragma("GCC push_options") LAS_MM_PRAGMA(GCC target(isa))
#define LAS_MM_TARGET_END _Pragma("GCC pop_options")
#define LAS_MM_HAS_X86 1
#endif

namespace las_mm::cpu {

enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Bf16 };

// The best level of this CPU, or the one that LAS_MM_CPU_ISA names (generic, avx2, avx512,
// avx512_bf16). Throws ValueError if that is unknown or not supported here.
Isa isa();
const char* isa_name(Isa isa);

}  // namespace las_mm::cpu
