// Backward: the gradient of the logits of each tile, multiplied out to both sides.
#pragma once
#include "cpu/contrastive_loss_scores.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

template <class Words, class T>
struct Backward : Tiles<Words, T> {
  using Base = Tiles<Words, T>;
  using Base::logits;
  using Base::query_index;
  const ContrastiveLossBackward& problem;
  int dim_columns, vectors;
  int64_t row_sums_tile, plain_rows_tile;
  float *column_pairs, *plain_rows, *row_sums, *weights, *left, *state;
  int64_t scratch_size;

  static constexpr bool kPairs = Words::kElements == 2;
  static constexpr int kDepth = kWidth / Words::kElements;  // words along the rows of a tile

  enum { kShift, kOfSum, kOfTotal, kOfPositive, kGradScale, kGradBias, kStates };

  Backward(const ContrastiveLossBackward& p, Arena arena) : Base(p, arena), problem(p) {
    dim_columns = round_up(p.dim, kRowStep);
    vectors = (p.dim + kLanes - 1) / kLanes;
    const int64_t units = (int64_t)p.tiles_per_block * p.queries;
    row_sums_tile = (int64_t)dim_columns * kWidth;
    plain_rows_tile = (int64_t)kDepth * vectors * kLanes;
    column_pairs = kPairs && wants_rows() ? arena.take((int64_t)kPanel / 2 * dim_columns) : nullptr;
    plain_rows = wants_columns() ? arena.take(plain_rows_tile * units) : nullptr;
    row_sums = wants_rows() ? arena.take(row_sums_tile * units) : nullptr;
    const bool in_place = !kPairs && p.queries == 1;
    weights = in_place ? logits : arena.take(kPanel * kDepth);
    left = kPairs ? arena.take(kPanel * kDepth) : weights;
    state = arena.take(kStates * kWidth * p.tiles_per_block);
    scratch_size = arena.used;
  }

  VLMFAST_INLINE bool wants_rows() const { return problem.grad_rows != nullptr; }
  VLMFAST_INLINE bool wants_columns() const { return problem.grad_columns != nullptr; }
  VLMFAST_INLINE float* state_of(int tile, int which, int g) const {
    return state + ((tile * kStates + which) * kGroups + g) * kLanes;
  }

  void begin(int block) const {
    Base::pack_block(block);
    const float* const inputs[] = {problem.row_max, problem.grad_row_sum, problem.grad_row_total,
                                   problem.grad_positive};
    for (int t = 0; t < Base::tile_count(block); t++) {
      const int first = Base::first_row(block, t), count = Base::row_count(block, t);
      for (int which = 0; which < kStates; which++)
        for (int g = 0; g < kGroups; g++) {
          const int n = maximum(0, minimum(kLanes, count - g * kLanes));
          const bool given = which < 4 && inputs[which] != nullptr;
          const Vec x = given ? load_first(inputs[which] + first + g * kLanes, n) : zero();
          store(state_of(t, which, g), which == kShift ? shift_of(x) : x);
        }
      if (wants_rows() && problem.n_columns == 0)
        clear(row_sums + t * problem.queries * row_sums_tile, problem.queries * row_sums_tile);
      if (!wants_columns()) continue;
      for (int q = 0; q < problem.queries; q++)
        pack_row_pairs<Words>(Base::rows_of(block, t, q), count, kWidth, problem.dim,
                              vectors * kLanes,
                              plain_rows + (t * problem.queries + q) * plain_rows_tile);
    }
  }

  void panel(int block, int index) const {
    const Panel panel = Base::load_panel(index);
    if (column_pairs != nullptr)
      pack_row_pairs<Words>(Base::columns_of(index), panel.n, round_up(panel.n, kRowStep),
                            problem.dim, dim_columns, column_pairs);
    Prefetcher ahead = Base::next_columns(block, index);
    Prefetcher sums = column_sums_ahead(index);
    for (int t = 0; t < Base::tile_count(block); t++) {
      const Lanes lanes = Base::lanes(block, t, panel);
      Base::similarities(t, panel, t == 0 ? sums : ahead);
      if (Base::is_plain(lanes, panel.n))
        gradients<false>(lanes, t, panel);
      else
        gradients<true>(lanes, t, panel);
      for (int q = 0; q < problem.queries; q++) multiply_out(block, t, q, panel);
    }
  }

  // Requests what the first tile will add to.
  VLMFAST_INLINE Prefetcher column_sums_ahead(int panel) const {
    Prefetcher result;
    if (!wants_columns()) return result;
    const int64_t stride = (int64_t)vectors * kLanes;
    float* first = problem.column_sums + (int64_t)panel * kPanel * stride;
    result.add(Rows<float>{first, stride, 1}, Base::column_count(panel), vectors * kLanes);
    result.spread_over(Base::steps(Base::column_count(panel)));
    return result;
  }

  // Turns the similarities into G, the gradient of the logits.
  template <bool kMasked>
  VLMFAST_NOINLINE void gradients(const Lanes& lanes, int tile, const Panel& panel) const {
    const int n = panel.n;
    const float *of_column_sum = problem.grad_column_sum, *column_max = problem.column_max;
    if (of_column_sum != nullptr) {
      of_column_sum += panel.index * kPanel;
      column_max += panel.index * kPanel;
    }
    const bool of_rows = problem.grad_row_sum != nullptr;
    const Vec scale = broadcast(problem.scale), bias = broadcast(problem.bias);
    Vec grad_scale[kGroups], grad_bias[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) grad_scale[g] = grad_bias[g] = zero();
    for (int j = 0; j < n; j++) {
      Vec of_column = zero(), column_shift = zero();
      if (of_column_sum != nullptr) {
        of_column = broadcast(of_column_sum[j]);
        column_shift = shift_of(broadcast(column_max[j]));
      }
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        float* p = logits + j * kWidth + g * kLanes;
        const Vec similarity = load(p), x = fma(similarity, scale, bias);
        Vec grad = load(state_of(tile, kOfTotal, g));
        const Vec of_row = load(state_of(tile, kOfSum, g));
        if (problem.sigmoid) {
          grad = fma(of_row, sigmoid(x), grad);
        } else {
          if (of_rows) grad = fma(of_row, exponential(x - load(state_of(tile, kShift, g))), grad);
          if (of_column_sum != nullptr) grad = fma(of_column, exponential(x - column_shift), grad);
        }
        if constexpr (kMasked) {
          grad = lanes.paired(g, j, load(state_of(tile, kOfPositive, g)), grad);
          grad = lanes.existing(g, grad, zero());
        }
        grad_scale[g] = fma(grad, similarity, grad_scale[g]);
        grad_bias[g] = grad_bias[g] + grad;
        store(p, grad);
      }
    }
    clear(logits + n * kWidth, (round_up(n, kRowStep) - n) * kWidth);
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      float *s = state_of(tile, kGradScale, g), *b = state_of(tile, kGradBias, g);
      store(s, load(s) + grad_scale[g]);
      store(b, load(b) + grad_bias[g]);
    }
  }

  // G as the operands of both products: of a query, where it is the one that counts.
  VLMFAST_NOINLINE void to_operands(int query, int n) const {
    constexpr int kRows = Words::kElements;
    for (int j = 0; j < round_up(n, kRowStep); j += kRows) {
      Vec grad[kRows][kGroups];
      VLMFAST_UNROLL for (int i = 0; i < kRows; i++)
          VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        const int at = (j + i) * kWidth + g * kLanes;
        grad[i][g] = load(logits + at);
        if (query_index != nullptr && j + i < n)
          grad[i][g] =
              select_eq(load(query_index + at), broadcast((float)query), grad[i][g], zero());
      }
#ifdef VLMFAST_BF16_WORDS
      if constexpr (kPairs) {
        VLMFAST_UNROLL for (int i = 0; i < 2; i++)
            VLMFAST_UNROLL for (int g = 0; g < kGroups; g += 2)
                store_bf16(left + (j + i) * kDepth + g * kLanes / 2, grad[i][g], grad[i][g + 1]);
        VLMFAST_UNROLL for (int g = 0; g < kGroups; g++)
            store(weights + (j / 2 * kGroups + g) * kLanes, interleave(grad[0][g], grad[1][g]));
        continue;
      }
#endif
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++)
          store(weights + j * kWidth + g * kLanes, grad[0][g]);
    }
  }

  void multiply_out(int block, int tile, int query, const Panel& panel) const {
    if (!wants_rows() && !wants_columns()) return;
    const int unit = tile * problem.queries + query, padded = round_up(panel.n, kRowStep);
    if (weights != logits) to_operands(query, panel.n);
    if (wants_rows()) {
      Vec one[kGroups];
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) one[g] = broadcast(1.f);
      weighted_sum<Words, kGroups>(weights, kPairs ? column_pairs : panel.columns,
                                   kPairs ? dim_columns : panel.stride, padded / Words::kElements,
                                   dim_columns, row_sums + unit * row_sums_tile,
                                   panel.index == 0 ? nullptr : one);
    }
    if (wants_columns()) {
      const bool is_first = block == 0 && unit == 0;
      float* sums = problem.column_sums + (int64_t)panel.index * kPanel * vectors * kLanes;
      outer_accumulate<Words>(left, kDepth, plain_rows + unit * plain_rows_tile, kDepth, panel.n,
                              is_first, sums, vectors);
    }
  }

  template <class Out>
  void end(int block) const {
    Vec scale[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) scale[g] = broadcast(problem.scale);
    const int64_t row_stride = (int64_t)problem.queries * problem.dim;
    for (int t = 0; t < Base::tile_count(block); t++) {
      const int first = Base::first_row(block, t), count = Base::row_count(block, t);
      for (int g = 0; g * kLanes < count; g++) {
        const int n = minimum(kLanes, count - g * kLanes), at = first + g * kLanes;
        store_first(problem.grad_scale + at, load(state_of(t, kGradScale, g)), n);
        store_first(problem.grad_bias + at, load(state_of(t, kGradBias, g)), n);
      }
      if (!wants_rows()) continue;
      for (int q = 0; q < problem.queries; q++)
        store_transposed<kGroups>(
            row_sums + (t * problem.queries + q) * row_sums_tile, scale,
            Rows<Out>{(Out*)problem.grad_rows + first * row_stride + (int64_t)q * problem.dim,
                      row_stride, 1},
            count, problem.dim);
    }
  }
};

}  // namespace
}  // namespace vlmfast::cpu::VLMFAST_VARIANT
