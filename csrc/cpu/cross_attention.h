// What the operators hand to the cross-attention kernels: pointers, strides and a list of
// independent tasks.
#pragma once
#include "cpu/types.h"
#include "cpu/variants.h"

namespace vlmfast::cpu {

// (B, Hkv, I, L, D): the (B, Hkv, L, D) tensor of the first image, and how far apart images are.
struct StridedImages {
  Strided first;
  int64_t image_stride = 0;

  inline __attribute__((always_inline)) Strided image(int image, int64_t element_size) const {
    Strided result = first;
    result.data = static_cast<char*>(first.data) + image * image_stride * element_size;
    return result;
  }
};

// Values of `image_index`; a positive one is the number of an image.
enum RowKind : int32_t { kZeroRow = 0, kUniformRow = -1, kDenseRow = -2 };

struct CrossAttentionProblem {
  ElementType dtype;
  Strided query;             // (B, Hq, T, D)
  StridedImages key, value;  // (B, Hkv, I, L, D), (B, Hkv, I, L, Dv)
  int heads, key_heads;      // of the queries, of the latents
  int group;                 // query heads per key head
  int tokens, images, latents;
  int head_dim, value_dim;
  int max_queries;  // of one head, of all tasks
  float scale;
  bool many_images;              // a token may see more than one image
  bool prefetch;                 // the tensors do not lie in a cache already
  const int32_t* image_index;    // (B, T)
  const int32_t* order;          // (B, order_size)
  const int32_t* segments;       // (B, I, 3)
  const int32_t* image_lengths;  // (B, I) or nullptr
  int64_t order_size;
};

// Where a token sees one image at most: the tokens order[begin] to order[end] against images
// [image_begin, image_end), which is one. Where it may see several, in forward: tokens [begin, end)
// against all their images; in backward: all tokens against the images of a split.
struct CrossAttentionTask {
  int batch, head;  // a key head
  int image_begin, image_end;
  int begin, end;
  int split = 0;  // which of the partial sums of grad_query this task writes
};

struct CrossAttentionForward : CrossAttentionProblem {
  Strided out;       // (B, Hq, T, Dv)
  float* logsumexp;  // (B, Hq, T)
};

struct CrossAttentionBackward : CrossAttentionProblem {
  Strided grad_out, out;
  const float* logsumexp;
  const float* grad_logsumexp;  // (B, Hq, T) or nullptr
  Strided grad_query;
  StridedImages grad_key, grad_value;
  bool wants_query, wants_key_value;
  float* grad_query_splits = nullptr;  // (splits, B, Hq, T, D), where `many_images`
  int64_t grad_query_split_size = 0;
  float* uniform_gradient = nullptr;  // (B, Hkv, Dv): what uniform rows add to every grad_value row
};

// The entry points of one instruction-set variant. `next` is what the same thread runs after
// `task`. Scratch is 64-byte aligned and `*_scratch` floats long.
struct CrossAttentionKernel {
  int64_t (*forward_scratch)(const CrossAttentionForward&);
  void (*forward)(const CrossAttentionForward&, const CrossAttentionTask& task,
                  const CrossAttentionTask& next, float* scratch);
  // Rows that see no image, for the query heads of a key head; scratch of the forward pass.
  void (*fill_rows)(const CrossAttentionForward&, int batch, int key_head, float* scratch);
  int64_t (*backward_scratch)(const CrossAttentionBackward&);
  void (*backward)(const CrossAttentionBackward&, const CrossAttentionTask& task,
                   const CrossAttentionTask& next, float* scratch);
  // grad_query of rows that see no image, where no token sees several.
  void (*clear_grad_rows)(const CrossAttentionBackward&, int batch, int key_head);
  void (*sum_uniform_rows)(const CrossAttentionBackward&, int batch, int key_head);
  void (*sum_splits)(const CrossAttentionBackward&, int splits, int batch, int head, int token);
  int queries_per_tile;
};

VLMFAST_DECLARE_VARIANTS(CrossAttentionKernel, cross_attention_kernel)

}  // namespace vlmfast::cpu
