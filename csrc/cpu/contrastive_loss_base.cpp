#define VLMFAST_VARIANT base
#define VLMFAST_LEVEL 0
#include "cpu/contrastive_loss_kernel.h"
