// AVX-512 with its bfloat16 products for all that follows in a variant file, after every standard
// header.
#ifdef VLMFAST_EMULATE_AVX512  // built by tests/tools/emulation.py
#include "emulation/avx512.h"
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
#define VLMFAST_VARIANT avx512_bf16
#define VLMFAST_LEVEL 3
