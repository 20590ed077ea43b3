// Arrays within one scratch buffer.
#pragma once
#include "cpu/simd/simd.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {

// Carves arrays out of one scratch buffer; with a null buffer it only counts.
struct Arena {
  float* base;
  int64_t used = 0;

  VLMFAST_INLINE float* take(int64_t n) {
    float* p = base == nullptr ? nullptr : base + used;
    used += (n + 15) / 16 * 16;
    return p;
  }
};

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
