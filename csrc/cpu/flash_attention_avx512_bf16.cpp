#ifdef __x86_64__
#include "cpu/intrinsics.h"

#include "cpu/flash_attention.h"

#include "cpu/target_avx512_bf16.h"

#include "cpu/flash_attention_kernel.h"
#endif
