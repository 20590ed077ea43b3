// Four lanes in portable C++, by GCC's vector extension. See simd.h.
#pragma once

namespace vlmfast::cpu::VLMFAST_VARIANT {

constexpr int kLanes = 4;
constexpr int kRegisters = 16;
constexpr bool kFused = false;
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
// NaN stays: the low bits of its payload are anything.
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

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
