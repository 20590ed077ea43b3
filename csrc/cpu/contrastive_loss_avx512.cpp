#ifdef __x86_64__
#include <immintrin.h>

#include "cpu/contrastive_loss.h"

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define VLMFAST_VARIANT avx512
#define VLMFAST_LEVEL 2
#include "cpu/contrastive_loss_kernel.h"
#endif
