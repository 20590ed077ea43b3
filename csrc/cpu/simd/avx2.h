// Eight lanes: AVX2, FMA and F16C. See simd.h.
#pragma once

namespace vlmfast::cpu::VLMFAST_VARIANT {

constexpr int kLanes = 8;
constexpr int kRegisters = 16;
constexpr bool kFused = true;
using Vec = __m256;
using IntVec = __m256i;

VLMFAST_INLINE Vec zero() { return _mm256_setzero_ps(); }
VLMFAST_INLINE Vec broadcast(float x) { return _mm256_set1_ps(x); }
VLMFAST_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
VLMFAST_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
VLMFAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
VLMFAST_INLINE Vec fms(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }
VLMFAST_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
VLMFAST_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
VLMFAST_INLINE Vec sqrt(Vec x) { return _mm256_sqrt_ps(x); }
VLMFAST_INLINE float horizontal_sum(Vec x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
VLMFAST_INLINE float horizontal_max(Vec x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
VLMFAST_INLINE IntVec lane_index(int32_t first) {
  return _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
VLMFAST_INLINE Vec select_ge(IntVec a, int32_t b, Vec yes, Vec no) {
  return _mm256_blendv_ps(yes, no,
                          _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(b), a)));
}
VLMFAST_INLINE Vec select_eq(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
}
VLMFAST_INLINE Vec load_first(const float* p, int n) {
  if (n >= 8) return load(p);
  return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane_index(0)));
}
VLMFAST_INLINE void store_first(float* p, Vec x, int n) {
  if (n >= 8) return store(p, x);
  _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane_index(0)), x);
}
VLMFAST_INLINE __m128i load_first_16bit(const uint16_t* p, int n) {
  if (n >= 8) return _mm_loadu_si128((const __m128i*)p);
  alignas(16) uint16_t t[8] = {};
  for (int i = 0; i < n; i++) t[i] = p[i];
  return _mm_load_si128((const __m128i*)t);
}
VLMFAST_INLINE void store_first_16bit(uint16_t* p, __m128i x, int n) {
  if (n >= 8) return _mm_storeu_si128((__m128i*)p, x);
  alignas(16) uint16_t t[8];
  _mm_store_si128((__m128i*)t, x);
  for (int i = 0; i < n; i++) p[i] = t[i];
}
VLMFAST_INLINE Vec load_first(const BFloat16* p, int n) {
  const __m256i wide = _mm256_cvtepu16_epi32(load_first_16bit(&p->bits, n));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
VLMFAST_INLINE Vec load_first(const Half* p, int n) {
  return _mm256_cvtph_ps(load_first_16bit(&p->bits, n));
}
VLMFAST_INLINE void store_first(BFloat16* p, Vec x, int n) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i even = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i word = _mm256_blendv_epi8(even, _mm256_set1_epi32(0x7fc0), nan);
  store_first_16bit(
      &p->bits, _mm_packus_epi32(_mm256_castsi256_si128(word), _mm256_extracti128_si256(word, 1)),
      n);
}
VLMFAST_INLINE void store_first(Half* p, Vec x, int n) {
  store_first_16bit(&p->bits, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT), n);
}
// NaN stays: the low bits of its payload are anything.
VLMFAST_INLINE Vec add_exponent(Vec p, Vec n) {
  const __m256i is_number = _mm256_castps_si256(_mm256_cmp_ps(p, p, _CMP_ORD_Q));
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(n), 23);
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(p), _mm256_and_si256(is_number, exponent)));
}

VLMFAST_INLINE void transpose(Vec r[8]) {
  Vec t[8];
  VLMFAST_UNROLL for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  VLMFAST_UNROLL for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  VLMFAST_UNROLL for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  VLMFAST_UNROLL for (int i = 0; i < 8; i++) r[i] = t[i];
}
VLMFAST_INLINE Vec sum_of_lanes(const Vec r[8]) {
  Vec four[2];
  VLMFAST_UNROLL for (int i = 0; i < 2; i++) {
    const Vec* x = r + 4 * i;
    const Vec ab = _mm256_unpacklo_ps(x[0], x[1]) + _mm256_unpackhi_ps(x[0], x[1]);
    const Vec cd = _mm256_unpacklo_ps(x[2], x[3]) + _mm256_unpackhi_ps(x[2], x[3]);
    four[i] = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
  }
  return _mm256_permute2f128_ps(four[0], four[1], 0x20) +
         _mm256_permute2f128_ps(four[0], four[1], 0x31);
}

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
