// Sixteen lanes: AVX-512 F/BW/DQ/VL and, at level 3, its bfloat16 products. See simd.h.
#pragma once

namespace vlmfast::cpu::VLMFAST_VARIANT {

constexpr int kLanes = 16;
constexpr int kRegisters = 32;
constexpr bool kFused = true;
using Vec = __m512;
using IntVec = __m512i;

VLMFAST_INLINE Vec zero() { return _mm512_setzero_ps(); }
VLMFAST_INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
VLMFAST_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
VLMFAST_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
VLMFAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
VLMFAST_INLINE Vec fms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }
VLMFAST_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
VLMFAST_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
VLMFAST_INLINE Vec sqrt(Vec x) { return _mm512_sqrt_ps(x); }
VLMFAST_INLINE float horizontal_sum(Vec x) { return _mm512_reduce_add_ps(x); }
VLMFAST_INLINE float horizontal_max(Vec x) { return _mm512_reduce_max_ps(x); }
VLMFAST_INLINE IntVec lane_index(int32_t first) {
  return _mm512_add_epi32(_mm512_set1_epi32(first),
                          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}
VLMFAST_INLINE Vec select_ge(IntVec a, int32_t b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmpge_epi32_mask(a, _mm512_set1_epi32(b)), no, yes);
}
VLMFAST_INLINE Vec select_eq(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), no, yes);
}
VLMFAST_INLINE __mmask16 first_lanes(int n) {
  return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1);
}
VLMFAST_INLINE Vec load_first(const float* p, int n) {
  return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
VLMFAST_INLINE void store_first(float* p, Vec x, int n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), x);
}
VLMFAST_INLINE Vec widen(__m256i bf16_bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16_bits), 16));
}
VLMFAST_INLINE Vec load_first(const BFloat16* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
VLMFAST_INLINE Vec load_first(const Half* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
VLMFAST_INLINE __m256i narrow_bf16(Vec x) {
#if VLMFAST_LEVEL >= 3
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, even, _mm512_set1_epi32(0x7fc0)));
#endif
}
VLMFAST_INLINE void store_first(BFloat16* p, Vec x, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_bf16(x));
}
VLMFAST_INLINE void store_first(Half* p, Vec x, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

VLMFAST_INLINE void transpose(Vec r[16]) {
  Vec t[16];
  VLMFAST_UNROLL for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  VLMFAST_UNROLL for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  VLMFAST_UNROLL for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  VLMFAST_UNROLL for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

VLMFAST_INLINE Vec sum_of_lanes(const Vec r[16]) {
  Vec four[4];  // in each 128 bits a part of the sums of four
  VLMFAST_UNROLL for (int i = 0; i < 4; i++) {
    const Vec* x = r + 4 * i;
    const Vec ab = _mm512_unpacklo_ps(x[0], x[1]) + _mm512_unpackhi_ps(x[0], x[1]);
    const Vec cd = _mm512_unpacklo_ps(x[2], x[3]) + _mm512_unpackhi_ps(x[2], x[3]);
    const __m512d p = _mm512_castps_pd(ab), q = _mm512_castps_pd(cd);
    four[i] =
        _mm512_castpd_ps(_mm512_unpacklo_pd(p, q)) + _mm512_castpd_ps(_mm512_unpackhi_pd(p, q));
  }
  const Vec low =
      _mm512_shuffle_f32x4(four[0], four[1], 0x88) + _mm512_shuffle_f32x4(four[0], four[1], 0xdd);
  const Vec high =
      _mm512_shuffle_f32x4(four[2], four[3], 0x88) + _mm512_shuffle_f32x4(four[2], four[3], 0xdd);
  return _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd);
}

#define VLMFAST_OWN_SPLIT_EXPONENT
VLMFAST_INLINE Vec split_exponent(Vec x, Vec* fraction) {
  *fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return x - *fraction;
}
VLMFAST_INLINE Vec add_exponent(Vec p, Vec exponent) { return _mm512_scalef_ps(p, exponent); }

#if VLMFAST_LEVEL >= 3
#define VLMFAST_BF16_WORDS
using Bf16Vec = __m256i;

VLMFAST_INLINE Bf16Vec zero_bf16() { return _mm256_setzero_si256(); }
VLMFAST_INLINE Vec dot_pairs(Vec a, Vec b, Vec sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
VLMFAST_INLINE Vec load_pairs(const BFloat16* p, int n) {
  return (Vec)_mm512_maskz_loadu_epi16(n >= 32 ? 0xffffffffu : (1u << n) - 1, p);
}
VLMFAST_INLINE Bf16Vec load_bf16(const BFloat16* p, int n) {
  return _mm256_maskz_loadu_epi16(first_lanes(n), p);
}
VLMFAST_INLINE __m512i interleaving_order() {
  return _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                          6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
}
VLMFAST_INLINE Vec interleave(Bf16Vec low, Bf16Vec high) {
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(interleaving_order(), both));
}
VLMFAST_INLINE Vec interleave(Vec low, Vec high) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(interleaving_order(), both));
}
VLMFAST_INLINE void store_bf16(float* p, Vec x) {
  _mm256_storeu_si256((__m256i*)p, narrow_bf16(x));
}
VLMFAST_INLINE void store_bf16(float* p, Vec first, Vec second) {
  store(p, (Vec)_mm512_cvtne2ps_pbh(second, first));
}
VLMFAST_INLINE Vec negate_pairs(Vec x) {
  return (Vec)_mm512_xor_si512((__m512i)x, _mm512_set1_epi32((int)0x80008000));
}
VLMFAST_INLINE Vec low_of_pairs(Vec x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 16));
}
VLMFAST_INLINE Vec high_of_pairs(Vec x) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32((int)0xffff0000)));
}
#endif

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
