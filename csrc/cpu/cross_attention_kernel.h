// Cross-attention of text tokens to images: all tokens that see an image run against its latents,
// which are packed once.
//
// Lanes are queries in the scores and features in the sums: softmax is vertical arithmetic, and
// only queries are transposed, while latents and results stay rows. A tile is a list of tokens. It
// never holds one that does not see the image: so what an image holds cannot reach others, and
// nothing is computed that a mask would hide. Where a token may see several images, its partial
// results are joined by their maxima and sums (Dao et al., "FlashAttention-2", 2023). Exponents are
// in units of log2, so that exp2 needs no further factor.
#include "cpu/cross_attention_backward.h"
#include "cpu/cross_attention_forward.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

int64_t forward_scratch(const CrossAttentionForward& problem) {
  return with_types(problem.dtype, [&](auto words, auto element) {
    return Forward<decltype(words), decltype(element)>(problem, nullptr).scratch_size;
  });
}

void forward(const CrossAttentionForward& problem, const CrossAttentionTask& task,
             const CrossAttentionTask& next, float* scratch) {
  with_types(problem.dtype, [&](auto words, auto element) {
    Forward<decltype(words), decltype(element)>(problem, scratch).run(task, next);
  });
}

void fill_rows(const CrossAttentionForward& problem, int batch, int key_head, float* scratch) {
  with_types(problem.dtype, [&](auto words, auto element) {
    Forward<decltype(words), decltype(element)>(problem, scratch).fill_rows(batch, key_head);
  });
}

int64_t backward_scratch(const CrossAttentionBackward& problem) {
  return with_types(problem.dtype, [&](auto words, auto element) {
    return Backward<decltype(words), decltype(element)>(problem, nullptr).scratch_size;
  });
}

void backward(const CrossAttentionBackward& problem, const CrossAttentionTask& task,
              const CrossAttentionTask& next, float* scratch) {
  with_types(problem.dtype, [&](auto words, auto element) {
    Backward<decltype(words), decltype(element)>(problem, scratch).run(task, next);
  });
}

void clear_grad_rows(const CrossAttentionBackward& problem, int batch, int key_head) {
  with_types(problem.dtype, [&](auto, auto element) {
    for (int token = 0; token < problem.tokens; token++) {
      const int32_t kind = problem.image_index[(int64_t)batch * problem.tokens + token];
      if (kind > 0 && length_of(problem, batch, kind - 1) > 0) continue;
      for (int h = 0; h < problem.group; h++)
        store_zeros(
            problem.grad_query.at<decltype(element)>(batch, key_head * problem.group + h, token),
            problem.head_dim);
    }
  });
}

// Of grad_out over the uniform rows of a key head's queries, divided by the number of values; in
// runs of rows, so that rounding does not grow with their number.
void sum_uniform_rows(const CrossAttentionBackward& problem, int batch, int key_head) {
  with_types(problem.dtype, [&](auto, auto element) {
    using T = decltype(element);
    constexpr int kRun = 128;
    const int32_t* kinds = problem.image_index + (int64_t)batch * problem.tokens;
    float* target = problem.uniform_gradient +
                    ((int64_t)batch * problem.key_heads + key_head) * problem.value_dim;
    const Vec factor = broadcast(1.f / ((float)problem.images * problem.latents));
    for (int d = 0; d < problem.value_dim; d += kLanes) {
      const int n = minimum(kLanes, problem.value_dim - d);
      Vec total = zero();
      for (int h = 0; h < problem.group; h++) {
        const Rows<T> grad = rows_of<T>(problem.grad_out, batch, key_head * problem.group + h);
        for (int first = 0; first < problem.tokens; first += kRun) {
          Vec sum = zero();
          for (int token = first; token < minimum(first + kRun, problem.tokens); token++)
            if (kinds[token] == kUniformRow) sum = sum + load_columns(grad, token, d, n);
          total = total + sum;
        }
      }
      store_first(target + d, total * factor, n);
    }
  });
}

// The gradient of one query from its `splits` partial sums, added in order.
void sum_splits(const CrossAttentionBackward& problem, int splits, int batch, int head, int token) {
  with_types(problem.dtype, [&](auto, auto element) {
    const float* partial =
        problem.grad_query_splits +
        (((int64_t)batch * problem.heads + head) * problem.tokens + token) * problem.head_dim;
    store_sum(problem.grad_query.at<decltype(element)>(batch, head, token), partial, splits,
              problem.grad_query_split_size, problem.head_dim);
  });
}

}  // namespace

extern const CrossAttentionKernel cross_attention_kernel = {
    forward_scratch,  forward,    fill_rows, backward_scratch, backward, clear_grad_rows,
    sum_uniform_rows, sum_splits, kTile};

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
