// Kernels for every CPU (plain C++ over the compiler's vector type), and the choice among all sets.
#include "cpu/kernels.h"

#include <cstring>

#include "cpu/isa.h"

namespace las_mm::cpu {
namespace {

inline float widen(bf16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline bf16 narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return {static_cast<uint16_t>((bits >> 16) | 0x40)};  // NaN stays NaN
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest even
}

struct Vector {
  static constexpr int kLanes = 4, kRows = 2, kVectors = 4;
#ifdef __GNUC__
  typedef float Reg __attribute__((vector_size(16)));
#else
  struct Reg {
    float v[4];
    float& operator[](int i) { return v[i]; }
    float operator[](int i) const { return v[i]; }
    friend Reg operator+(Reg a, Reg b) { return {a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]}; }
    friend Reg operator-(Reg a, Reg b) { return {a[0] - b[0], a[1] - b[1], a[2] - b[2], a[3] - b[3]}; }
    friend Reg operator*(Reg a, Reg b) { return {a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3]}; }
  };
#endif
  static inline Reg zero() { return Reg{}; }
  static inline Reg set1(float v) { return Reg{v, v, v, v}; }
  static inline Reg load(const float* p) {
    Reg r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  static inline Reg load(const bf16* p) {
    return Reg{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
  }
  template <typename T>
  static inline Reg load_part(const T* p, int n) {
    T values[kLanes] = {};
    std::memcpy(values, p, n * sizeof(T));
    return load(values);
  }
  static inline void store(float* p, Reg r) { std::memcpy(p, &r, sizeof r); }
  static inline void store(bf16* p, Reg r) {
    for (int i = 0; i < kLanes; ++i) p[i] = narrow(r[i]);
  }
  template <typename T>
  static inline void store_part(T* p, Reg r, int n) {
    T values[kLanes];
    store(values, r);
    std::memcpy(p, values, n * sizeof(T));
  }
  static inline Reg add(Reg a, Reg b) { return a + b; }
  static inline Reg sub(Reg a, Reg b) { return a - b; }
  static inline Reg mul(Reg a, Reg b) { return a * b; }
  static inline Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static inline Reg max(Reg a, Reg b) {
    // b is kept where a is NaN, as maxps does.
    return Reg{a[0] > b[0] ? a[0] : b[0], a[1] > b[1] ? a[1] : b[1], a[2] > b[2] ? a[2] : b[2],
               a[3] > b[3] ? a[3] : b[3]};
  }
  static inline Reg max_nan(Reg a, Reg b) {  // a NaN in a is lost in max
    const Reg most = max(a, b);
    Reg result;
    for (int i = 0; i < kLanes; ++i) result[i] = a[i] != a[i] ? a[i] : most[i];
    return result;
  }
  static inline float sum(Reg r) { return (r[0] + r[1]) + (r[2] + r[3]); }
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
    static inline A load_a(const bf16* p) { return {set1(widen(p[0])), set1(widen(p[1]))}; }
    static inline A load_a_last(const bf16* p) { return {set1(widen(p[0])), zero()}; }
    static inline B load_b(const bf16* p) {
      return {Reg{widen(p[0]), widen(p[2]), widen(p[4]), widen(p[6])},
              Reg{widen(p[1]), widen(p[3]), widen(p[5]), widen(p[7])}};
    }
    static inline Reg multiply(const A& a, const B& b, Reg sum) {
      return a.high * b.high + (a.low * b.low + sum);
    }
  };
};

#include "cpu/kernel_templates.h"

}  // namespace

const Kernels kGenericKernels = make_kernels<Vector>();

const Kernels& kernels() {
  switch (isa()) {
#ifdef LAS_MM_HAS_X86
    case Isa::kAvx2: return kAvx2Kernels;
    case Isa::kAvx512: return kAvx512Kernels;
    case Isa::kAvx512Bf16: return kAvx512Bf16Kernels;
#endif
    default: return kGenericKernels;
  }
}

}  // namespace las_mm::cpu
