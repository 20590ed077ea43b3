// Checks that guard memory. Friendly messages for users come from vlmfast.functional; these hold
// for every caller of the operators.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define VLMFAST_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

namespace vlmfast {

using torch::stable::Tensor;

inline void check_dim(const char* name, const Tensor& tensor, int64_t dim) {
  VLMFAST_CHECK(tensor.dim() == dim, name, ": expected ", dim, " dimensions, got ", tensor.dim());
}

inline void check_size(const char* name, const Tensor& tensor, int64_t dim, int64_t size) {
  VLMFAST_CHECK(tensor.size(dim) == size, name, ": expected size ", size, " in dimension ", dim,
                ", got ", tensor.size(dim));
}

inline void check_cpu(const char* name, const Tensor& tensor) {
  VLMFAST_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor");
}

}  // namespace vlmfast
