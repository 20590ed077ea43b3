// One vector of fp32 lanes, written once per instruction set, and the contract of those files.
//
// A variant file (<family>_<variant>.cpp) includes every standard header it needs, sets its target
// pragma, defines VLMFAST_VARIANT (the namespace) and VLMFAST_LEVEL, and then includes the family's
// kernel header. No standard template may be used below the pragma: the linker keeps one copy of it
// for all variants, and that copy could hold instructions that the machine at hand does not have.
//
//   VLMFAST_LEVEL  0: portable C++ (GCC vector extension)   1: AVX2 + FMA + F16C
//                  2: AVX-512 F/BW/DQ/VL                    3: level 2 + AVX512_BF16
//
// A further instruction set is one file here that gives all of the following, inlined always, in
// the variant's namespace; a target_<name>.h; its name in isa.h and variants.h; and four variant
// files. T is float, BFloat16 or Half. Pointers need no alignment beyond that of their elements.
//
//   kLanes      lanes of a vector: 4, 8 or 16
//   kRegisters  vector registers: 16 or 32
//   kFused      whether fma and fms round once
//   Vec         kLanes floats, with + - * / by lane
//   IntVec      kLanes int32_t
//
//   zero()  broadcast(float)  load(const float*)  store(float*, Vec)
//   fma(a, b, c)            a * b + c
//   fms(a, b, c)            a * b - c
//   max(a, b)               a > b ? a : b: NaN in b survives, NaN in a does not
//   min(a, b)               a < b ? a : b, and so again for NaN
//   sqrt(x)                 correctly rounded
//   horizontal_sum(x)       of all lanes, in any order; NaN survives
//   horizontal_max(x)       of all lanes; NaN may survive or not
//   lane_index(first)       IntVec of first, first + 1, ...
//   select_ge(IntVec a, int32_t b, yes, no)   a >= b ? yes : no
//   select_eq(a, b, yes, no)                  a == b ? yes : no; NaN equals nothing
//   load_first(const T* p, n)      the first n >= 0 elements, all lanes' where n is larger; zero in
//                                  lanes beyond them. Reads nothing beyond
//   store_first(T* p, Vec, n)      the first n lanes, rounded to nearest even: NaN stays NaN, what
//                                  is too large becomes infinite. Writes nothing beyond
//   transpose(Vec r[kLanes])       lane j of r[i] becomes lane i of r[j]
//   sum_of_lanes(const Vec r[kLanes])  lane i: the sum of all lanes of r[i]
//   add_exponent(p, exponent)      p * 2^integer, the integer in the low bits of `exponent`: math.h
//                                  splits x <= 127 into it and a fraction in [-1/2, 1/2]. NaN stays
//                                  NaN; -inf gives 0; below 2^-126 any result from 0 to there will
//                                  do
//
// Where there are better instructions for that, the file defines VLMFAST_OWN_SPLIT_EXPONENT, and
// gives split_exponent(x, &fraction), which returns the integer as its add_exponent takes it.
//
// Where the instruction set multiplies pairs of bfloat16, the file defines VLMFAST_BF16_WORDS, and
// gives what follows. A lane of a Vec then holds two elements, the first in its low half.
//
//   Bf16Vec     kLanes bfloat16
//   zero_bf16()                    a Bf16Vec of zeros
//   dot_pairs(a, b, sum)           sum + a.low * b.low + a.high * b.high in fp32
//   load_pairs(const BFloat16* p, n)  the first n of 2 * kLanes elements, zero beyond them
//   load_bf16(const BFloat16* p, n)   the first n of kLanes elements, zero beyond them
//   interleave(low, high)          pairs of lane i of two Bf16Vec; or of two Vec, rounded
//   store_bf16(float* p, x)        the lanes of x, rounded: kLanes / 2 words
//   store_bf16(float* p, x, y)     the lanes of x and then of y, rounded: kLanes words
//   negate_pairs(x)                both elements of each lane
//   low_of_pairs(x), high_of_pairs(x)  one element of each lane, as fp32
#pragma once
#include "cpu/types.h"

#define VLMFAST_INLINE inline __attribute__((always_inline))
// Hot enough to matter, long enough to be called: one copy keeps build time and instruction cache
// small.
#define VLMFAST_NOINLINE __attribute__((noinline))
#define VLMFAST_INLINE_LAMBDA __attribute__((always_inline))
#define VLMFAST_UNROLL _Pragma("GCC unroll 32")

#if VLMFAST_LEVEL >= 2
#include "cpu/simd/avx512.h"
#elif VLMFAST_LEVEL == 1
#include "cpu/simd/avx2.h"
#else
#include "cpu/simd/base.h"
#endif
