#ifdef __x86_64__
#include "cpu/intrinsics.h"

#include "cpu/cross_attention.h"

#include "cpu/target_avx512_bf16.h"

#include "cpu/cross_attention_kernel.h"
#endif
