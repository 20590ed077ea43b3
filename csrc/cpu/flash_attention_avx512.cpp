#ifdef __x86_64__
#include "cpu/simd/intrinsics.h"

#include "cpu/flash_attention.h"

#include "cpu/simd/target_avx512.h"

#include "cpu/flash_attention_kernel.h"
#endif
