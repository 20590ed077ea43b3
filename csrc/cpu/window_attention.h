// What the operators hand to the window attention kernels: pointers, strides and a list of
// independent tasks.
#pragma once
#include "cpu/types.h"
#include "cpu/variants.h"

namespace vlmfast::cpu {

struct WindowAttentionProblem {
  ElementType dtype;
  Strided query, key, value;  // (B, H, W, C) each; channels are dense
  const void* pad_value;      // (3C) of the tensors' dtype
  int height, width, heads, head_dim;
  int window_height, window_width, shift_height, shift_width;
  bool wrap_padded;
  int windows_down, windows_across;
  float scale;
  const float* logit_scale = nullptr;  // (heads,) for cosine attention
  float mask;                          // in log2 units
  const float* bias;                   // each head as pack_bias leaves it, in log2 units
  int64_t bias_head_stride;            // 0: one for all heads
  double dropout_p = 0;
  uint64_t dropout_seed = 0;
};

// Heads [head_begin, head_end) of windows [window_begin, window_end) of the batch's.
struct WindowAttentionTask {
  int head_begin, head_end;
  int64_t window_begin, window_end;
  int split;  // which of the partial sums this task adds to; no other task adds to the same heads
};

struct WindowAttentionForward : WindowAttentionProblem {
  Strided out;
  float* logsumexp;  // (B, windows, heads, tokens)
};

struct WindowAttentionBackward : WindowAttentionProblem {
  Strided grad_out;
  Strided grad_query, grad_key, grad_value;
  bool wants_qkv;
  // Partial sums, (splits, ...) each, or nullptr where the gradient is not wanted. All but the
  // first begin at zero.
  float* grad_bias = nullptr;          // (splits, heads, bias_size), as packed
  double* grad_pad = nullptr;          // (splits, 2, C): key and value
  double* grad_logit_scale = nullptr;  // (splits, heads)
};

// A bias (heads, tokens, tokens) in memory, or its gradient.
struct WindowBias {
  void* data;
  int64_t head_stride, query_stride, key_stride;
  ElementType dtype;
};

// The entry points of one instruction-set variant. `next` is what the same thread runs after
// `task`. Scratch is 64-byte aligned and `*_scratch` floats long.
struct WindowAttentionKernel {
  int64_t (*bias_size)(int tokens);  // floats of one packed head
  void (*pack_bias)(const WindowBias&, int tokens, int head, float* packed);
  int64_t (*forward_scratch)(const WindowAttentionForward&);
  void (*forward)(const WindowAttentionForward&, const WindowAttentionTask& task,
                  const WindowAttentionTask& next, float* scratch);
  int64_t (*backward_scratch)(const WindowAttentionBackward&);
  void (*backward)(const WindowAttentionBackward&, const WindowAttentionTask& task,
                   const WindowAttentionTask& next, float* scratch);
  // Adds the `splits` partial sums of a head's bias gradient in order.
  void (*sum_bias)(const float* partial, int splits, int heads, int tokens, int head,
                   const WindowBias& gradient);
};

VLMFAST_DECLARE_VARIANTS(WindowAttentionKernel, window_attention_kernel)

}  // namespace vlmfast::cpu
