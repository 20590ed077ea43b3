#ifdef __x86_64__
#include "cpu/simd/intrinsics.h"

#include "cpu/contrastive_loss.h"

#include "cpu/simd/target_avx2.h"

#include "cpu/contrastive_loss_kernel.h"
#endif
