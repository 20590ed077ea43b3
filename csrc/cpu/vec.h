// One vector of fp32 lanes, written once per instruction set.
//
// A variant file (<family>_<variant>.cpp) includes every standard header it needs, sets its target
// pragma, defines VLMFAST_VARIANT (the namespace) and VLMFAST_LEVEL, and then includes the family's
// kernel header. No standard template may be used below the pragma: the linker keeps one copy of it
// for all variants, and that copy could hold instructions that the machine at hand does not have.
//
//   VLMFAST_LEVEL  0: portable C++ (GCC vector extension)   1: AVX2 + FMA + F16C
//                  2: AVX-512 F/BW/DQ/VL                    3: level 2 + AVX512_BF16
#pragma once
#include "cpu/types.h"

#define VLMFAST_INLINE inline __attribute__((always_inline))
// Hot enough to matter, long enough to be called: one copy keeps build time and instruction cache
// small.
#define VLMFAST_NOINLINE __attribute__((noinline))
#define VLMFAST_INLINE_LAMBDA __attribute__((always_inline))
#define VLMFAST_UNROLL _Pragma("GCC unroll 32")

namespace vlmfast::cpu::VLMFAST_VARIANT {

#if VLMFAST_LEVEL >= 2
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
using Vec = __m512;
using IntVec = __m512i;

VLMFAST_INLINE Vec zero() { return _mm512_setzero_ps(); }
VLMFAST_INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
VLMFAST_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
VLMFAST_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
VLMFAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
VLMFAST_INLINE Vec fms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }
// NaN in the second operand survives, NaN in the first does not.
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
// Lane i: the sum of all lanes of r[i].
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

#elif VLMFAST_LEVEL == 1
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
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
// p * 2^k, where k stands in the low bits of n. NaN stays: the low bits of its payload are
// anything.
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

#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
using Vec = float __attribute__((vector_size(16)));
using IntVec = int32_t __attribute__((vector_size(16)));

VLMFAST_INLINE Vec broadcast(float x) { return Vec{x, x, x, x}; }
VLMFAST_INLINE Vec zero() { return broadcast(0.f); }
VLMFAST_INLINE Vec load(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
VLMFAST_INLINE void store(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof x); }
VLMFAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
VLMFAST_INLINE Vec fms(Vec a, Vec b, Vec c) { return a * b - c; }
VLMFAST_INLINE Vec select(IntVec mask, Vec yes, Vec no) {
  return (Vec)((mask & (IntVec)yes) | (~mask & (IntVec)no));
}
VLMFAST_INLINE Vec max(Vec a, Vec b) { return select(a > b, a, b); }
VLMFAST_INLINE Vec min(Vec a, Vec b) { return select(a < b, a, b); }
VLMFAST_INLINE Vec sqrt(Vec x) {
  return Vec{__builtin_sqrtf(x[0]), __builtin_sqrtf(x[1]), __builtin_sqrtf(x[2]),
             __builtin_sqrtf(x[3])};
}
VLMFAST_INLINE float horizontal_sum(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
VLMFAST_INLINE float horizontal_max(Vec x) {
  const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
VLMFAST_INLINE IntVec lane_index(int32_t first) {
  return IntVec{first, first + 1, first + 2, first + 3};
}
VLMFAST_INLINE Vec select_ge(IntVec a, int32_t b, Vec yes, Vec no) {
  return select(a >= IntVec{b, b, b, b}, yes, no);
}
VLMFAST_INLINE Vec select_eq(Vec a, Vec b, Vec yes, Vec no) { return select(a == b, yes, no); }
VLMFAST_INLINE float to_float(float x) { return x; }
VLMFAST_INLINE float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
VLMFAST_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof x);
  return bits;
}
VLMFAST_INLINE float to_float(BFloat16 x) { return bits_to_float((uint32_t)x.bits << 16); }
VLMFAST_INLINE float to_float(Half x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest << 13));
  // Multiplying by 2^112 moves the exponent's bias from 15 to 127 and makes subnormals normal.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}
VLMFAST_INLINE void from_float(float x, float* p) { *p = x; }
VLMFAST_INLINE void from_float(float x, BFloat16* p) {
  const uint32_t bits = float_to_bits(x);
  p->bits = x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
VLMFAST_INLINE void from_float(float x, Half* p) {
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000,
                 magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    half = 0x7c00;
  } else if (magnitude <
             0x38800000) {  // adding 0.5 leaves the subnormal's integer in the low bits, rounded
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  p->bits = (uint16_t)(sign | half);
}
template <class T>
VLMFAST_INLINE Vec load_first(const T* p, int n) {
  Vec x = zero();
  for (int i = 0; i < 4 && i < n; i++) x[i] = to_float(p[i]);
  return x;
}
template <class T>
VLMFAST_INLINE void store_first(T* p, Vec x, int n) {
  for (int i = 0; i < 4 && i < n; i++) from_float(x[i], p + i);
}
VLMFAST_INLINE Vec add_exponent(Vec p, Vec n) {
  return (Vec)((IntVec)p + (((IntVec)n << 23) & (p == p)));
}
VLMFAST_INLINE void transpose(Vec r[4]) {
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < i; j++) {
      const float t = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = t;
    }
}
VLMFAST_INLINE Vec sum_of_lanes(const Vec r[4]) {
  Vec sum;
  for (int i = 0; i < 4; i++) sum[i] = (r[i][0] + r[i][2]) + (r[i][1] + r[i][3]);
  return sum;
}
#endif

// 2^f on [-1/2, 1/2], 1 at 0: relative error 9.4e-8 (degree 5) or 1.1e-4 (degree 3).
template <int kDegree>
VLMFAST_INLINE Vec exp2_of_fraction(Vec f) {
  Vec p;
  if constexpr (kDegree == 3) {
    p = broadcast(5.500904471e-02f);
    p = fma(p, f, broadcast(2.422109544e-01f));
    p = fma(p, f, broadcast(6.932829022e-01f));
  } else {
    static_assert(kDegree == 5);
    p = broadcast(1.326940721e-03f);
    p = fma(p, f, broadcast(9.671294130e-03f));
    p = fma(p, f, broadcast(5.550711229e-02f));
    p = fma(p, f, broadcast(2.402224690e-01f));
    p = fma(p, f, broadcast(6.931470037e-01f));
  }
  return fma(p, f, broadcast(1.f));
}

// 2^x for x <= 127. -inf gives 0, NaN stays NaN.
template <int kDegree>
VLMFAST_INLINE Vec exp2(Vec x) {
#if VLMFAST_LEVEL >= 2
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_of_fraction<kDegree>(f), x - f);
#else
  x = max(broadcast(-127.f),
          x);  // there 2^x has the bits of zero, and below it the exponent would wrap
  // Adding 1.5 * 2^23 leaves round(x) in the low bits: half the work of a rounding instruction, and
  // on the adders instead of the multipliers.
  const Vec shifted = x + broadcast(12582912.f);
  const Vec f = x - (shifted - broadcast(12582912.f));
  return add_exponent(exp2_of_fraction<kDegree>(f), shifted);
#endif
}

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
