// Torch's tensors as the operators of all families see and hand them on.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>

#include "checks.h"
#include "cpu/types.h"

namespace vlmfast::cpu {

using torch::headeronly::ScalarType;
using MaybeTensor = std::optional<Tensor>;

inline ElementType element_type(const char* name, const Tensor& tensor, bool allow_bool) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return ElementType::kFloat;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    case ScalarType::Half:
      return ElementType::kHalf;
    case ScalarType::Bool:
      if (allow_bool) return ElementType::kBool;
      [[fallthrough]];
    default:
      VLMFAST_CHECK(false, name, ": expected float32, bfloat16 or float16",
                    allow_bool ? " or bool" : "");
  }
  return ElementType::kFloat;
}

// Of a tensor of four dimensions.
inline Strided strided(const Tensor& tensor) {
  Strided result;
  result.data = tensor.data_ptr();
  for (int i = 0; i < 4; i++) result.stride[i] = tensor.stride(i);
  return result;
}

// Whether fetching ahead pays: what lies in a core's own cache anyway arrives soon enough, and the
// requests cost more than they save.
inline bool exceeds_cache(std::initializer_list<const Tensor*> tensors) {
  constexpr int64_t kCachedBytes = 2 << 20;  // about a usual second-level cache
  int64_t bytes = 0;
  for (const Tensor* tensor : tensors)
    bytes += tensor->numel() * static_cast<int64_t>(tensor->element_size());
  return bytes > kCachedBytes;
}

// The output of attention, or its gradient: rows of `columns` numbers for the rows of query.
inline void check_output(const char* name, const Tensor& tensor, const Tensor& query,
                         int64_t columns) {
  check_dim(name, tensor, 4);
  check_cpu(name, tensor);
  VLMFAST_CHECK(tensor.scalar_type() == query.scalar_type(), name, ": expected the dtype of query");
  for (int i = 0; i < 3; i++) check_size(name, tensor, i, query.size(i));
  check_size(name, tensor, 3, columns);
}

// A number for each row of query.
inline const float* row_statistics(const char* name, const Tensor& tensor, const Tensor& query) {
  check_cpu(name, tensor);
  check_dim(name, tensor, 3);
  for (int i = 0; i < 3; i++) check_size(name, tensor, i, query.size(i));
  VLMFAST_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(), name,
                ": expected a contiguous float32 tensor");
  return static_cast<const float*>(tensor.const_data_ptr());
}

// The seed of dropout that is used.
inline uint64_t read_dropout_seed(const MaybeTensor& seed) {
  VLMFAST_CHECK(seed.has_value(), "dropout_seed: expected a tensor where dropout_p is not 0");
  check_cpu("dropout_seed", *seed);
  VLMFAST_CHECK(seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
                "dropout_seed: expected one int64 element");
  return static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
}

// What stands for a gradient that nobody asked for.
inline Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

}  // namespace vlmfast::cpu
