// Flash attention on one tile of queries at a time: forward by online softmax, backward by
// recomputation.
//
// Dao et al., "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
// 2023. Nothing of size L x S is ever held: keys are packed a panel at a time (one panel lies in
// the second-level cache), and scores live in blocks of kBlock keys by one tile of queries
// (first-level cache). Everything is computed in units of log2, so that exp2 needs no further
// factor.
#include "cpu/flash_attention_backward.h"
#include "cpu/flash_attention_forward.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

int64_t forward_scratch(const FlashAttentionForward& problem) {
  return with_types(problem.dtype, [&](auto words, auto element) {
    return Forward<decltype(words), decltype(element)>(problem, nullptr).scratch_size;
  });
}

void forward(const FlashAttentionForward& problem, const FlashAttentionTask& task,
             const FlashAttentionTask& next, float* scratch) {
  with_types(problem.dtype, [&](auto words, auto element) {
    Forward<decltype(words), decltype(element)>(problem, scratch).run(task, next);
  });
}

int64_t backward_scratch(const FlashAttentionBackward& problem) {
  return with_types(problem.dtype, [&](auto words, auto element) {
    return Backward<decltype(words), decltype(element)>(problem, nullptr).scratch_size;
  });
}

void backward(const FlashAttentionBackward& problem, const FlashAttentionTask& task,
              const FlashAttentionTask& next, float* scratch) {
  with_types(problem.dtype, [&](auto words, auto element) {
    Backward<decltype(words), decltype(element)>(problem, scratch).run(task, next);
  });
}

// The gradient of one row of queries from its `splits` partial sums, added in order.
void sum_splits(const FlashAttentionBackward& problem, int splits, int64_t batch, int64_t head,
                int64_t row) {
  with_types(problem.dtype, [&](auto, auto element) {
    using T = decltype(element);
    const float* partial =
        problem.grad_query_splits +
        ((batch * problem.heads + head) * problem.query_length + row) * problem.head_dim;
    store_sum(problem.grad_query.at<T>(batch, head, row), partial, splits,
              problem.grad_query_split_size, problem.head_dim);
  });
}

}  // namespace

extern const FlashAttentionKernel flash_attention_kernel = {
    forward_scratch, forward, backward_scratch, backward, sum_splits, kMaxTile};

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
