// Attention within windows of a map that is shifted and padded by index arithmetic alone.
//
// Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 2021; with
// `logit_scale` "Swin Transformer V2: Scaling Up Capacity and Resolution", 2022. A task gathers the
// rows of a window by their addresses, head after head, and scatters results the same way. All keys
// of a window form one block, so that softmax needs no second look. Everything is computed in units
// of log2, so that exp2 needs no further factor.
#include "cpu/window_attention_backward.h"
#include "cpu/window_attention_forward.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

int64_t bias_size(int tokens) { return WindowTiling(tokens).bias_size(); }

void sum_bias(const WindowAttentionBackward& problem, int splits, int head) {
  const WindowTiling tiling(problem.window_height * problem.window_width);
  store_bias_gradient(problem.bias_sums + head * tiling.bias_size(), splits,
                      problem.heads * tiling.bias_size(), tiling, head, problem.grad_bias);
}

int64_t forward_scratch(const WindowAttentionForward& problem) {
  return with_types(problem.dtype, [&](auto words, auto element) {
    return Forward<decltype(words), decltype(element)>(problem, nullptr).scratch_size;
  });
}

void forward(const WindowAttentionForward& problem, const WindowAttentionTask& task,
             const WindowAttentionTask& next, bool has_biases, float* scratch) {
  with_types(problem.dtype, [&](auto words, auto element) {
    Forward<decltype(words), decltype(element)>(problem, scratch).run(task, next, has_biases);
  });
}

int64_t backward_scratch(const WindowAttentionBackward& problem) {
  return with_types(problem.dtype, [&](auto words, auto element) {
    return Backward<decltype(words), decltype(element)>(problem, nullptr).scratch_size;
  });
}

void backward(const WindowAttentionBackward& problem, const WindowAttentionTask& task,
              const WindowAttentionTask& next, bool has_biases, float* scratch) {
  with_types(problem.dtype, [&](auto words, auto element) {
    Backward<decltype(words), decltype(element)>(problem, scratch).run(task, next, has_biases);
  });
}

}  // namespace

extern const WindowAttentionKernel window_attention_kernel = {
    bias_size, forward_scratch, forward, backward_scratch, backward, sum_bias};

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
