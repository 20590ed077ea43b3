#define VLMFAST_VARIANT base
#define VLMFAST_LEVEL 0
#include "cpu/cross_attention_kernel.h"
