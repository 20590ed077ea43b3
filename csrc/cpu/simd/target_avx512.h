// AVX-512 F/BW/DQ/VL for all that follows in a variant file, after every standard header.
#ifdef VLMFAST_EMULATE_AVX512  // built by tests/tools/emulation.py
#include "emulation/avx512.h"
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define VLMFAST_VARIANT avx512
#define VLMFAST_LEVEL 2
