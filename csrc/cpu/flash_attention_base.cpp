#define VLMFAST_VARIANT base
#define VLMFAST_LEVEL 0
#include "cpu/flash_attention_kernel.h"
