// What the operators hand to the contrastive loss kernels: pointers, strides and sizes.
//
// Rows are cut into blocks, columns into panels. A block meets every panel, in order, and blocks
// add to a panel's columns in order: thus no sum over rows depends on the number of threads, and
// none needs memory of its own for each of them.
#pragma once
#include "cpu/types.h"
#include "cpu/variants.h"

namespace vlmfast::cpu {

struct ContrastiveLossProblem {
  ElementType dtype;
  Strided rows;     // (n, queries, 1, D)
  Strided columns;  // (1, 1, M, D)
  int n_rows, queries, n_columns, dim;
  int first_column;  // the column that is paired with row 0; may lie outside
  float scale, bias;
  bool sigmoid;
  int tiles_per_block;
};

struct ContrastiveLossForward : ContrastiveLossProblem {
  float *row_max, *row_sum, *row_total, *positive;  // (n)
  float *column_max, *column_sum;                   // (M), at first -inf and 0; or nullptr
};

struct ContrastiveLossBackward : ContrastiveLossProblem {
  // nullptr: zero
  const float *grad_row_sum, *grad_row_total, *grad_positive, *grad_column_sum;
  const float *row_max, *column_max;
  // Dense; nullptr: not wanted. In the problem's dtype, or float where float32_grads is set.
  void *grad_rows, *grad_columns;
  bool float32_grads;
  float* column_sums;  // (M, D rounded up to lanes): grad_columns / scale, before it is rounded
  float *grad_scale, *grad_bias;  // (n) shares of each row
};

// The entry points of one instruction-set variant. Scratch is 64-byte aligned, `*_scratch` floats
// long, and keeps a block's state from `*_begin` to `*_end`.
struct ContrastiveLossKernel {
  int64_t (*forward_scratch)(const ContrastiveLossForward&);
  void (*forward_begin)(const ContrastiveLossForward&, int block, float* scratch);
  void (*forward_panel)(const ContrastiveLossForward&, int block, int panel, float* scratch);
  void (*forward_end)(const ContrastiveLossForward&, int block, float* scratch);
  int64_t (*backward_scratch)(const ContrastiveLossBackward&);
  void (*backward_begin)(const ContrastiveLossBackward&, int block, float* scratch);
  void (*backward_panel)(const ContrastiveLossBackward&, int block, int panel, float* scratch);
  void (*backward_end)(const ContrastiveLossBackward&, int block, float* scratch);
  // grad_columns[first..last) from column_sums, which may be the same memory.
  void (*store_columns)(const ContrastiveLossBackward&, int first, int last);
  int rows_per_tile, columns_per_panel, lanes;
};

VLMFAST_DECLARE_VARIANTS(ContrastiveLossKernel, contrastive_loss_kernel)

}  // namespace vlmfast::cpu
