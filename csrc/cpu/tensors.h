// Torch's tensors as the operators of all families see and hand them on.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>

#include "checks.h"
#include "cpu/types.h"

namespace vlmfast::cpu {

using torch::headeronly::ScalarType;
using MaybeTensor = std::optional<Tensor>;

// What partial sums of gradients may take beyond the gradients themselves.
constexpr int64_t kMostPartialBytes = 128 << 20;

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

// The seed of dropout that is used.
inline uint64_t read_dropout_seed(const MaybeTensor& seed) {
  VLMFAST_CHECK(seed.has_value(), "dropout_seed: expected a tensor where dropout_p is not 0");
  check_cpu("dropout_seed", *seed);
  VLMFAST_CHECK(seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
                "dropout_seed: expected one int64 element");
  return static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
}

template <size_t kDims>
std::string shape_of(const std::array<int64_t, kDims>& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "(" : ", ") + std::to_string(size);
  return text.empty() ? "()" : text + ")";
}

// An uninitialised tensor in the memory of the CPU whose dimensions lie there in the order
// `memory`, outermost first. Unlike new_empty it neither looks an operator up by name nor goes
// through torch's dispatcher.
template <size_t kDims>
Tensor empty(const std::array<int64_t, kDims>& sizes, ScalarType dtype,
             const std::array<int, kDims>& memory) {
  std::array<int64_t, kDims> strides;
  int64_t stride = 1;
  bool fits = true;
  for (size_t i = kDims; i-- > 0;) {
    strides[memory[i]] = stride;
    fits &= !__builtin_mul_overflow(stride, std::max<int64_t>(sizes[memory[i]], 1), &stride);
  }
  VLMFAST_CHECK(fits, "out of memory: cannot allocate a tensor of shape ", shape_of(sizes));
  AtenTensorHandle handle;
  const auto status = aoti_torch_empty_strided(
      kDims, sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle);
  VLMFAST_CHECK(status == AOTI_TORCH_SUCCESS, "out of memory: cannot allocate a tensor of shape ",
                shape_of(sizes));
  return Tensor(handle);
}

// A contiguous tensor of those sizes, not written.
template <size_t kDims>
Tensor empty(const int64_t (&sizes)[kDims], ScalarType dtype) {
  std::array<int64_t, kDims> all;
  std::array<int, kDims> memory;
  for (size_t i = 0; i < kDims; i++) {
    all[i] = sizes[i];
    memory[i] = static_cast<int>(i);
  }
  return empty<kDims>(all, dtype, memory);
}

// A contiguous tensor of zeros.
template <size_t kDims>
Tensor zeros(const int64_t (&sizes)[kDims], ScalarType dtype) {
  Tensor result = empty(sizes, dtype);
  if (const int64_t n = result.numel())  // else its pointer is null, which memset must not get
    std::memset(result.mutable_data_ptr(), 0, n * result.element_size());
  return result;
}

// An uninitialised (B, H, rows, columns) tensor in the memory order of `like`: heads inside rows,
// or rows inside heads.
inline Tensor empty_rows(const Tensor& like, int64_t rows, int64_t columns) {
  const std::array<int64_t, 4> sizes{like.size(0), like.size(1), rows, columns};
  if (like.stride(1) < like.stride(2)) return empty<4>(sizes, like.scalar_type(), {0, 2, 1, 3});
  return empty<4>(sizes, like.scalar_type(), {0, 1, 2, 3});
}

// What stands for a gradient that nobody asked for.
inline Tensor nothing(const Tensor& like) { return empty({0}, like.scalar_type()); }

}  // namespace vlmfast::cpu
