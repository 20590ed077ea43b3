// What the operators hand to the flash attention kernels: pointers, strides and a list of
// independent tasks.
#pragma once
#include "cpu/types.h"
#include "cpu/variants.h"

namespace vlmfast::cpu {

struct FlashAttentionProblem {
  ElementType dtype;
  Strided query, key, value;  // (B, Hq, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv)
  Strided mask;               // stride 0 along dimensions that broadcast; no data: no mask
  ElementType mask_dtype = ElementType::kFloat;
  int heads, group;  // query heads; query heads per key head
  int64_t query_length;
  int max_queries, max_keys;  // of all tasks
  int head_dim, value_dim;
  bool causal;    // some task has a causal_shift
  bool prefetch;  // the tensors do not lie in a cache already
  float scale;
  double dropout_p = 0;
  uint64_t dropout_seed = 0;
};

// Rows [q_begin, q_end) of one query head against keys [k_begin, k_end). Key j is visible to query
// i iff j <= i + causal_shift, which is kNotCausal where every key is.
struct FlashAttentionTask {
  int64_t batch;
  int head;  // a key head in backward, a query head in forward
  int q_begin, q_end, k_begin, k_end;
  int causal_shift;
  // Backward alone:
  int all_k_begin = 0, all_k_end = 0;  // every key of these queries, where tasks share them out
  int split = 0;                       // which of the partial sums of grad_query this task writes
  int unit = 0;                        // which copy of the mask's gradient this task adds to
};
constexpr int kNotCausal = 1 << 30;

struct FlashAttentionForward : FlashAttentionProblem {
  Strided out;       // (B, Hq, L, Dv)
  float* logsumexp;  // (B, Hq, L)
};

struct FlashAttentionBackward : FlashAttentionProblem {
  Strided grad_out, out;
  const float* logsumexp;
  const float* grad_logsumexp;  // (B, Hq, L) or nullptr
  Strided grad_query, grad_key, grad_value;
  bool wants_query, wants_key_value;
  bool exact_delta;  // `out` is rounded too coarsely for the gradient of the mask
  float* grad_query_splits =
      nullptr;  // (splits, B, Hq, L, D) fp32 where keys are split over tasks, else nullptr
  int64_t grad_query_split_size = 0;
  float* grad_mask = nullptr;  // (units, *mask.shape) fp32, added to; nullptr: not wanted
  int64_t grad_mask_unit_size = 0;
  int64_t grad_mask_stride[4] = {0, 0, 0, 0};  // 0 along dimensions to sum over
};

// The entry points of one instruction-set variant. `next` is what the same thread runs after
// `task`. Scratch is 64-byte aligned and `*_scratch` floats long.
struct FlashAttentionKernel {
  int64_t (*forward_scratch)(const FlashAttentionForward&);
  void (*forward)(const FlashAttentionForward&, const FlashAttentionTask& task,
                  const FlashAttentionTask& next, float* scratch);
  int64_t (*backward_scratch)(const FlashAttentionBackward&);
  void (*backward)(const FlashAttentionBackward&, const FlashAttentionTask& task,
                   const FlashAttentionTask& next, float* scratch);
  void (*sum_splits)(const FlashAttentionBackward&, int splits, int64_t batch, int64_t head,
                     int64_t row);
  int queries_per_tile;
};

VLMFAST_DECLARE_VARIANTS(FlashAttentionKernel, flash_attention_kernel)

}  // namespace vlmfast::cpu
