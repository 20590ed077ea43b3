#define VLMFAST_VARIANT base
#define VLMFAST_LEVEL 0
#include "cpu/window_attention_kernel.h"
