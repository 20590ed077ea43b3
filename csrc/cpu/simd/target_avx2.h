// AVX2, FMA and F16C for all that follows in a variant file, after every standard header.
#pragma GCC target("avx2,fma,f16c")
#define VLMFAST_VARIANT avx2
#define VLMFAST_LEVEL 1
