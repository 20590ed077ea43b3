// Functions of vectors on top of simd.h, neutral of instruction sets.
#pragma once
#include "cpu/simd/simd.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLog2ELow = 1.925963033500011079e-8f;  // log2(e) - kLog2E
constexpr double kLn2 = 0.69314718055994530942;
constexpr float kInfinity = __builtin_inff();
constexpr float kLowest = -3.40282346638528859812e38f;

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

#ifndef VLMFAST_OWN_SPLIT_EXPONENT
VLMFAST_INLINE Vec split_exponent(Vec x, Vec* fraction) {
  x = max(broadcast(-127.f),
          x);  // there 2^x has the bits of zero, and below it the exponent would wrap
  // Adding 1.5 * 2^23 leaves round(x) in the low bits: half the work of a rounding instruction, and
  // on the adders instead of the multipliers.
  const Vec shifted = x + broadcast(12582912.f);
  *fraction = x - (shifted - broadcast(12582912.f));
  return shifted;
}
#endif

// 2^x for x <= 127. -inf gives 0, NaN stays NaN.
template <int kDegree>
VLMFAST_INLINE Vec exp2(Vec x) {
  Vec fraction;
  const Vec exponent = split_exponent(x, &fraction);
  return add_exponent(exp2_of_fraction<kDegree>(fraction), exponent);
}

// e^x for x <= 88.
VLMFAST_INLINE Vec exponential(Vec x) { return exp2<5>(x * broadcast(kLog2E)); }

VLMFAST_INLINE Vec magnitude(Vec x) { return max(zero() - x, x); }

// log(1 + e) for e in [0, 1], also where e is tiny.
VLMFAST_INLINE Vec log1p_of_fraction(Vec e) {
  const Vec s = e / (e + broadcast(2.f)), s2 = s * s;  // log(1 + e) = 2 atanh(s), s <= 1/3
  Vec p = broadcast(2.f / 15);
  p = fma(p, s2, broadcast(2.f / 13));
  p = fma(p, s2, broadcast(2.f / 11));
  p = fma(p, s2, broadcast(2.f / 9));
  p = fma(p, s2, broadcast(2.f / 7));
  p = fma(p, s2, broadcast(2.f / 5));
  p = fma(p, s2, broadcast(2.f / 3));
  return s * fma(p, s2, broadcast(2.f));
}

VLMFAST_INLINE Vec softplus(Vec x) {
  return max(zero(), x) + log1p_of_fraction(exponential(zero() - magnitude(x)));
}

VLMFAST_INLINE Vec sigmoid(Vec x) {
  const Vec e = exponential(zero() - magnitude(x));
  const Vec small = e / (e + broadcast(1.f));  // of the negative one of x and -x
  return select_eq(max(zero(), x), x, broadcast(1.f) - small, small);
}

// In place: x[i] = log2(x[i]) for normal x > 0; NaN stays NaN.
VLMFAST_INLINE void log2_in_place(float* x, int n) {
  for (int i = 0; i < n; i++) {
    int32_t bits;
    __builtin_memcpy(&bits, x + i, 4);
    const int32_t exponent =
        (bits - 0x3f3504f3) >> 23;  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
    const int32_t mantissa_bits = bits - (exponent << 23);
    float m;
    __builtin_memcpy(&m, &mantissa_bits, 4);
    const float s = (m - 1.f) / (m + 1.f), s2 = s * s;  // log(m) = 2 atanh(s)
    const float series = 1.f + s2 * (1.f / 3 + s2 * (1.f / 5 + s2 * (1.f / 7 + s2 * (1.f / 9))));
    x[i] = (float)exponent + 2.88539008178f * s * series + (x[i] - x[i]);
  }
}

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
