// What the operators hand to the window attention kernels: pointers, strides and a list of
// independent tasks.
#pragma once
#include "cpu/types.h"
#include "cpu/variants.h"

namespace vlmfast::cpu {

// A bias (heads, tokens, tokens) in memory, or its gradient.
struct WindowBias {
  void* data = nullptr;  // nullptr: there is none
  int64_t head_stride = 0, query_stride = 0, key_stride = 0;
  ElementType dtype = ElementType::kFloat;
};

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
  WindowBias bias;
  int heads_per_task;  // at most
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
  WindowBias grad_bias;
  // Partial sums, (splits, ...) each, or nullptr where the gradient is not wanted. `bias_sums`
  // begins uninitialised, the others at zero.
  float* bias_sums = nullptr;          // (splits, heads, bias_size); needless for one split
  double* grad_pad = nullptr;          // (splits, 2, C): key and value
  double* grad_logit_scale = nullptr;  // (splits, heads)
};

// The entry points of one instruction-set variant. `next` is what the same thread runs after
// `task`; `has_biases` says that its task before had the same heads, whose packed biases are still
// in scratch. Scratch is 64-byte aligned and `*_scratch` floats long.
struct WindowAttentionKernel {
  int64_t (*bias_size)(int tokens);  // floats of one packed head
  int64_t (*forward_scratch)(const WindowAttentionForward&);
  void (*forward)(const WindowAttentionForward&, const WindowAttentionTask& task,
                  const WindowAttentionTask& next, bool has_biases, float* scratch);
  int64_t (*backward_scratch)(const WindowAttentionBackward&);
  void (*backward)(const WindowAttentionBackward&, const WindowAttentionTask& task,
                   const WindowAttentionTask& next, bool has_biases, float* scratch);
  // The gradient of a head's bias: its `splits` partial sums in order.
  void (*sum_bias)(const WindowAttentionBackward&, int splits, int head);
};

VLMFAST_DECLARE_VARIANTS(WindowAttentionKernel, window_attention_kernel)

}  // namespace vlmfast::cpu
