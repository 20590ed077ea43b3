// Forward: the maximum and sum of each row and column.
#pragma once
#include "cpu/contrastive_loss_scores.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

template <class Words, class T>
struct Forward : Tiles<Words, T> {
  using Base = Tiles<Words, T>;
  using Base::logits;
  const ContrastiveLossForward& problem;
  float *state, *tile_max, *tile_sum;
  int64_t scratch_size;

  enum { kMax, kSum, kTotal, kPositive, kStates };

  Forward(const ContrastiveLossForward& p, Arena arena) : Base(p, arena), problem(p) {
    state = arena.take(kStates * kWidth * p.tiles_per_block);
    tile_max = arena.take(kPanel);
    tile_sum = arena.take(kPanel);
    scratch_size = arena.used;
  }

  VLMFAST_INLINE float* state_of(int tile, int which, int g) const {
    return state + ((tile * kStates + which) * kGroups + g) * kLanes;
  }

  void begin(int block) const {
    Base::pack_block(block);
    for (int t = 0; t < problem.tiles_per_block; t++)
      for (int which = 0; which < kStates; which++)
        for (int g = 0; g < kGroups; g++)
          store(state_of(t, which, g),
                which == kMax && !problem.sigmoid ? broadcast(-kInfinity) : zero());
  }

  void panel(int block, int index) const {
    const Panel panel = Base::load_panel(index);
    Prefetcher ahead = Base::next_columns(block, index);
    for (int t = 0; t < Base::tile_count(block); t++) {
      const Lanes lanes = Base::lanes(block, t, panel);
      Base::similarities(t, panel, ahead);
      if (Base::is_plain(lanes, panel.n))
        add_tile<false>(lanes, t, panel);
      else
        add_tile<true>(lanes, t, panel);
    }
  }

  template <bool kMasked>
  VLMFAST_NOINLINE void add_tile(const Lanes& lanes, int tile, const Panel& panel) const {
    if (problem.sigmoid) {
      add_softplus<kMasked>(lanes, tile, panel.n);
    } else {
      scale_and_find_maxima<kMasked>(lanes, tile, panel.n);
      add_exponentials(tile, panel.n);
      if (problem.column_max != nullptr) merge_columns(panel);
    }
  }

  // The logit of row `g` and `column`, with total and positive kept up.
  template <bool kMasked>
  VLMFAST_INLINE Vec logit(const Lanes& lanes, int g, int column, Vec* total, Vec* positive) const {
    const Vec x = fma(load(logits + column * kWidth + g * kLanes), broadcast(problem.scale),
                      broadcast(problem.bias));
    if constexpr (kMasked) {
      total[g] = total[g] + lanes.paired(g, column, zero(), x);
      positive[g] = positive[g] + lanes.paired(g, column, x, zero());
    } else {
      total[g] = total[g] + x;
    }
    return x;
  }

  VLMFAST_INLINE void add_state(int tile, int which, const Vec* values) const {
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      float* p = state_of(tile, which, g);
      store(p, load(p) + values[g]);
    }
  }

  template <bool kMasked>
  VLMFAST_INLINE void scale_and_find_maxima(const Lanes& lanes, int tile, int n) const {
    Vec row_max[kGroups], total[kGroups], positive[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      row_max[g] = broadcast(-kInfinity);
      total[g] = positive[g] = zero();
    }
    for (int j = 0; j < n; j++) {
      Vec max_of_column = broadcast(-kInfinity);
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        Vec x = logit<kMasked>(lanes, g, j, total, positive);
        if constexpr (kMasked) {
          const Vec hidden = broadcast(-kInfinity);
          x = lanes.existing(g, lanes.paired(g, j, hidden, x), hidden);
        }
        store(logits + j * kWidth + g * kLanes, x);
        row_max[g] = max(row_max[g], x);
        max_of_column = max(max_of_column, x);
      }
      tile_max[j] = horizontal_max(max_of_column);
    }
    add_state(tile, kTotal, total);
    if (kMasked) add_state(tile, kPositive, positive);
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      const Vec old = load(state_of(tile, kMax, g)), now = max(old, row_max[g]);
      store(state_of(tile, kMax, g), now);
      float* sum = state_of(tile, kSum, g);
      store(sum, load(sum) * exponential(old - shift_of(now)));
    }
  }

  VLMFAST_INLINE void add_exponentials(int tile, int n) const {
    Vec shift[kGroups], sum[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      shift[g] = shift_of(load(state_of(tile, kMax, g)));
      sum[g] = zero();
    }
    const bool columns = problem.column_max != nullptr;
    for (int j = 0; j < n; j++) {
      const Vec column_shift = shift_of(broadcast(tile_max[j]));
      Vec column_sum = zero();
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        const Vec x = load(logits + j * kWidth + g * kLanes);
        sum[g] = sum[g] + exponential(x - shift[g]);
        if (columns) column_sum = column_sum + exponential(x - column_shift);
      }
      if (columns) tile_sum[j] = horizontal_sum(column_sum);
    }
    add_state(tile, kSum, sum);
  }

  VLMFAST_INLINE void merge_columns(const Panel& panel) const {
    float* maxima = problem.column_max + panel.index * kPanel;
    float* sums = problem.column_sum + panel.index * kPanel;
    for (int j = 0; j < panel.n; j += kLanes) {
      const int m = minimum(kLanes, panel.n - j);
      const Vec old = load_first(maxima + j, m), here = load_first(tile_max + j, m);
      const Vec now = max(old, here), shift = shift_of(now);
      const Vec sum = load_first(sums + j, m) * exponential(old - shift) +
                      load_first(tile_sum + j, m) * exponential(here - shift);
      store_first(maxima + j, now, m);
      store_first(sums + j, sum, m);
    }
  }

  template <bool kMasked>
  VLMFAST_INLINE void add_softplus(const Lanes& lanes, int tile, int n) const {
    Vec sum[kGroups], total[kGroups], positive[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) sum[g] = total[g] = positive[g] = zero();
    for (int j = 0; j < n; j++) VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        Vec x = softplus(logit<kMasked>(lanes, g, j, total, positive));
        if constexpr (kMasked) x = lanes.paired(g, j, zero(), x);
        sum[g] = sum[g] + x;
      }
    add_state(tile, kSum, sum);
    add_state(tile, kTotal, total);
    if (kMasked) add_state(tile, kPositive, positive);
  }

  void end(int block) const {
    float* const outputs[kStates] = {problem.row_max, problem.row_sum, problem.row_total,
                                     problem.positive};
    for (int t = 0; t < Base::tile_count(block); t++) {
      const int first = Base::first_row(block, t), count = Base::row_count(block, t);
      for (int which = 0; which < kStates; which++)
        for (int g = 0; g * kLanes < count; g++)
          store_first(outputs[which] + first + g * kLanes, load(state_of(t, which, g)),
                      minimum(kLanes, count - g * kLanes));
    }
  }
};

}  // namespace
}  // namespace vlmfast::cpu::VLMFAST_VARIANT
