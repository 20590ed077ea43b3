#ifdef __x86_64__
#include "cpu/intrinsics.h"

#include "cpu/contrastive_loss.h"

#pragma GCC target("avx2,fma,f16c")
#define VLMFAST_VARIANT avx2
#define VLMFAST_LEVEL 1
#include "cpu/contrastive_loss_kernel.h"
#endif
