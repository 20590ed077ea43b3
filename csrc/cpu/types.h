// What the CPU kernels read and write, without any dependence on torch.
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

// (batch, head, row, column) strides in elements; `data` keeps the tensor's own element type.
struct Strided {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};

  // Inlined always: a copy compiled for one instruction set must not serve the others.
  template <class T>
  inline __attribute__((always_inline)) T* at(int64_t batch, int64_t head, int64_t row) const {
    return static_cast<T*>(data) + batch * stride[0] + head * stride[1] + row * stride[2];
  }
};

}  // namespace vlmfast::cpu
