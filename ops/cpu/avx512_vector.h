// The vector type of AVX-512F/BW/VL/DQ; included between LAS_MM_TARGET_BEGIN and END, in an
// anonymous namespace, by kernels_avx512.cpp and kernels_avx512_bf16.cpp.

struct Avx512 {
  static constexpr int kLanes = 16, kRows = 6, kVectors = 4;
  using Reg = __m512;
  static inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static inline Reg zero() { return _mm512_setzero_ps(); }
  static inline Reg set1(float v) { return _mm512_set1_ps(v); }
  static inline Reg widen(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static inline __m256i narrow(Reg r) {
    const __m512i bits = _mm512_castps_si512(r);
    const __m512i upper = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i rounding = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i nearest = _mm512_srli_epi32(_mm512_add_epi32(bits, rounding), 16);
    const __m512i quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(r, r, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(is_nan, nearest, quiet));
  }
  static inline Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static inline Reg load(const bf16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static inline Reg load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static inline Reg load_part(const bf16* p, int n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static inline void store(float* p, Reg r) { _mm512_storeu_ps(p, r); }
  static inline void store(bf16* p, Reg r) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(r));
  }
  static inline void store_part(float* p, Reg r, int n) {
    _mm512_mask_storeu_ps(p, first(n), r);
  }
  static inline void store_part(bf16* p, Reg r, int n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow(r));
  }
  static inline Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static inline Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static inline Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static inline Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static inline Reg max_nan(Reg a, Reg b) {  // a NaN in a is lost in max
    return _mm512_mask_mov_ps(max(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  }
  static inline Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static inline float sum(Reg r) { return _mm512_reduce_add_ps(r); }
  static inline void compress(const char* in, uint16_t wanted, char* out) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(wanted, _mm512_loadu_si512(in)));
  }

  struct Bf16Step {
    struct A {
      Reg low, high;
    };
    using B = A;
    static inline A split(__m512i pairs) {
      return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
              _mm512_castsi512_ps(
                  _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
    }
    static inline A load_a(const bf16* p) {
      int32_t pair;
      std::memcpy(&pair, p, sizeof pair);
      return split(_mm512_set1_epi32(pair));
    }
    static inline A load_a_last(const bf16* p) { return split(_mm512_set1_epi32(p->bits)); }
    static inline B load_b(const bf16* p) { return split(_mm512_loadu_si512(p)); }
    static inline Reg multiply(const A& a, const B& b, Reg sum) {
      return _mm512_fmadd_ps(a.high, b.high, _mm512_fmadd_ps(a.low, b.low, sum));
    }
  };
};
