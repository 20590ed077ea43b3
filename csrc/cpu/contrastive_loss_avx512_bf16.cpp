#ifdef __x86_64__
#include "cpu/intrinsics.h"

#include "cpu/contrastive_loss.h"

#include "cpu/target_avx512_bf16.h"

#include "cpu/contrastive_loss_kernel.h"
#endif
