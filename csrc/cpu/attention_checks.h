// Checks of the tensors of attention from some queries to other keys, whole or of images.
#pragma once
#include "cpu/tensors.h"

namespace vlmfast::cpu {

// query (B, Hq, rows, D), key (B, H, ..., D) and value (B, H, ..., Dv) of `key_dims` dimensions,
// all but the last of which key and value share. Returns their dtype.
inline ElementType check_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                   int64_t key_dims) {
  check_dim("query", query, 4);
  check_dim("key", key, key_dims);
  check_dim("value", value, key_dims);
  check_cpu("query", query);
  check_cpu("key", key);
  check_cpu("value", value);
  const ElementType dtype = element_type("query", query, false);
  VLMFAST_CHECK(element_type("key", key, false) == dtype, "key: expected the dtype of query");
  VLMFAST_CHECK(element_type("value", value, false) == dtype, "value: expected the dtype of query");
  check_size("key", key, 0, query.size(0));
  check_size("key", key, key_dims - 1, query.size(3));
  for (int64_t i = 0; i < key_dims - 1; i++) check_size("value", value, i, key.size(i));
  const int64_t heads = query.size(1), key_heads = key.size(1);
  VLMFAST_CHECK(key_heads > 0 ? heads % key_heads == 0 : heads == 0, "query: expected its ", heads,
                " heads to be a multiple of the ", key_heads, " heads of key");
  VLMFAST_CHECK(query.size(3) > 0, "query: expected a head dimension of at least 1, got 0");
  return dtype;
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

// Checks what backward gets of the forward pass, and puts it into the problem. Returns the rows
// that problem->grad_logsumexp then points to.
template <class Problem>
MaybeTensor read_results(const Tensor& grad_out, const MaybeTensor& grad_logsumexp,
                         const Tensor& query, const Tensor& out, const Tensor& logsumexp,
                         Problem* problem) {
  check_output("grad_out", grad_out, query, problem->value_dim);
  check_output("out", out, query, problem->value_dim);
  VLMFAST_CHECK(out.stride(3) == 1 || problem->value_dim <= 1,
                "out: expected a last dimension of stride 1");
  problem->grad_out = strided(grad_out);
  problem->out = strided(out);
  problem->logsumexp = row_statistics("logsumexp", logsumexp, query);
  problem->grad_logsumexp = nullptr;
  if (!grad_logsumexp) return std::nullopt;
  MaybeTensor rows = torch::stable::contiguous(*grad_logsumexp);
  problem->grad_logsumexp = row_statistics("grad_logsumexp", *rows, query);
  return rows;
}

}  // namespace vlmfast::cpu
