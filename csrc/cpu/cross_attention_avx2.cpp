#ifdef __x86_64__
#include "cpu/simd/intrinsics.h"

#include "cpu/cross_attention.h"

#include "cpu/simd/target_avx2.h"

#include "cpu/cross_attention_kernel.h"
#endif
