// Element types that the CPU kernels read and write, without any dependence on torch.
#pragma once
#include <cstdint>

namespace vlmfast::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

enum class ElementType : int8_t { kBool, kFloat, kBFloat16, kHalf };

}  // namespace vlmfast::cpu
