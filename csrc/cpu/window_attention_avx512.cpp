#ifdef __x86_64__
#include "cpu/simd/intrinsics.h"

#include "cpu/window_attention.h"

#include "cpu/simd/target_avx512.h"

#include "cpu/window_attention_kernel.h"
#endif
