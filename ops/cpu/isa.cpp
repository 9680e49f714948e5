#include "cpu/isa.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>

namespace las_mm::cpu {
namespace {

constexpr Isa kLevels[] = {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

Isa best_isa() {
#ifdef LAS_MM_HAS_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kGeneric;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return Isa::kAvx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kGeneric;
#endif
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("LAS_MM_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (const Isa level : kLevels) {
    if (std::string(wanted) != isa_name(level)) continue;
    TORCH_CHECK_VALUE(level <= best, "LAS_MM_CPU_ISA=", wanted, " is not supported by this CPU, ",
                      "the best level here is ", isa_name(best));
    return level;
  }
  TORCH_CHECK_VALUE(false, "LAS_MM_CPU_ISA must be generic, avx2, avx512 or avx512_bf16, got ",
                    wanted);
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kGeneric: return "generic";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512_bf16";
  }
  return "unknown";
}

TORCH_LIBRARY_FRAGMENT(las_mm, m) {
  m.def("cpu_isa() -> str", []() { return std::string(isa_name(isa())); });
}

}  // namespace las_mm::cpu
