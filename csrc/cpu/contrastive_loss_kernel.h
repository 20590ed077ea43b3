// Contrastive losses by tiles of the logits, which are never held together: forward gives the
// maximum and sum of each row and column in one pass, backward recomputes each tile once, turns it
// into its gradient G and multiplies that out to both sides.
//
// Lanes are rows. A tile is kWidth rows by a panel of kPanel columns. Both towers exceed the
// second-level cache, so that a product takes the feature dimension in parts: a part of a tile's
// rows stays in the first-level cache while all columns of the panel pass by. Sums of parts also
// round less than one long sum.
#include "cpu/contrastive_loss_backward.h"
#include "cpu/contrastive_loss_forward.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

template <class Body>
VLMFAST_INLINE auto with_forward(const ContrastiveLossForward& problem, float* scratch, Body body) {
  return with_types(problem.dtype, [&](auto words, auto element) {
    return body(Forward<decltype(words), decltype(element)>(problem, Arena{scratch}));
  });
}

template <class Body>
VLMFAST_INLINE auto with_backward(const ContrastiveLossBackward& problem, float* scratch,
                                  Body body) {
  return with_types(problem.dtype, [&](auto words, auto element) {
    return body(Backward<decltype(words), decltype(element)>(problem, Arena{scratch}), element);
  });
}

int64_t forward_scratch(const ContrastiveLossForward& problem) {
  return with_forward(problem, nullptr, [](const auto& run) { return run.scratch_size; });
}

void forward_begin(const ContrastiveLossForward& problem, int block, float* scratch) {
  with_forward(problem, scratch, [&](const auto& run) { run.begin(block); });
}

void forward_panel(const ContrastiveLossForward& problem, int block, int panel, float* scratch) {
  with_forward(problem, scratch, [&](const auto& run) { run.panel(block, panel); });
}

void forward_end(const ContrastiveLossForward& problem, int block, float* scratch) {
  with_forward(problem, scratch, [&](const auto& run) { run.end(block); });
}

int64_t backward_scratch(const ContrastiveLossBackward& problem) {
  return with_backward(problem, nullptr, [](const auto& run, auto) { return run.scratch_size; });
}

void backward_begin(const ContrastiveLossBackward& problem, int block, float* scratch) {
  with_backward(problem, scratch, [&](const auto& run, auto) { run.begin(block); });
}

void backward_panel(const ContrastiveLossBackward& problem, int block, int panel, float* scratch) {
  with_backward(problem, scratch, [&](const auto& run, auto) { run.panel(block, panel); });
}

void backward_end(const ContrastiveLossBackward& problem, int block, float* scratch) {
  with_backward(problem, scratch, [&](const auto& run, auto element) {
    if (problem.float32_grads)
      run.template end<float>(block);
    else
      run.template end<decltype(element)>(block);
  });
}

template <class Out>
void scale_columns(const ContrastiveLossBackward& problem, int first, int last) {
  const int padded = round_up(problem.dim, kLanes);
  for (int j = first; j < last; j++) {
    const float* sums = problem.column_sums + (int64_t)j * padded;
    Out* out = (Out*)problem.grad_columns + (int64_t)j * problem.dim;
    store_scaled(out, sums, problem.dim, broadcast(problem.scale));
  }
}

void store_columns(const ContrastiveLossBackward& problem, int first, int last) {
  with_types(problem.dtype, [&](auto, auto element) {
    if (problem.float32_grads)
      scale_columns<float>(problem, first, last);
    else
      scale_columns<decltype(element)>(problem, first, last);
  });
}

}  // namespace

extern const ContrastiveLossKernel contrastive_loss_kernel = {
    forward_scratch, forward_begin, forward_panel, forward_end, backward_scratch, backward_begin,
    backward_panel,  backward_end,  store_columns, kWidth,      kPanel,           kLanes};

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
