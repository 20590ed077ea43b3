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

#if VLMFAST_LEVEL >= 2
#include "cpu/simd/avx512.h"
#elif VLMFAST_LEVEL == 1
#include "cpu/simd/avx2.h"
#else
#include "cpu/simd/base.h"
#endif
