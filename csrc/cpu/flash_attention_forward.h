// Forward: online softmax over blocks of keys.
#pragma once
#include "cpu/flash_attention_scores.h"
#include "cpu/tile/scratch.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

template <class Words, class T>
struct Forward {
  const FlashAttentionForward& problem;
  int words, value_columns, keys_at_once;
  bool keeps_state;
  float *keys, *values, *query, *scores, *mask_tile, *keep, *state;
  int64_t state_size;
  int64_t scratch_size;

  Forward(const FlashAttentionForward& p, float* scratch) : problem(p) {
    words = word_count<Words>(p.head_dim);
    value_columns = round_up(p.value_dim, kRowStep);
    const int tiles = tiling_of(p.max_queries, p.causal, false).tiles;
    keys_at_once = panel_keys(kForwardPanel, words + value_columns / Words::kElements, p.max_keys);
    // A panel that only a tile or two will read need not stay in the cache, and a short one lets
    // the next be fetched meanwhile.
    if (tiles <= 2 && p.max_keys > 2 * kBlock) keys_at_once = kBlock;
    keeps_state = keys_at_once < p.max_keys;
    state_size = (value_columns + 2) * kMaxTile + 16;
    Arena arena{scratch};
    const int64_t padded = round_up(keys_at_once, kRowStep);
    keys = arena.take(padded * words);
    values = arena.take(padded / Words::kElements * value_columns);
    query = arena.take((int64_t)round_up(words, kLanes) * kMaxTile);
    scores = arena.take(kBlock * kMaxTile);
    mask_tile = p.mask.data == nullptr ? nullptr : arena.take(kBlock * kMaxTile);
    keep = p.dropout_p > 0 ? arena.take(kBlock * kMaxTile) : nullptr;
    state = arena.take(state_size * (keeps_state ? tiles : 1));
    scratch_size = arena.used;
  }

  template <int kGroups>
  VLMFAST_NOINLINE void weights(int n, float factor, const Vec* row_max, Vec* sum,
                                const float* kept) const {
    exponentiate<Words, kGroups>(scores, n, factor, row_max, sum, kept);
  }

  template <int kGroups>
  void tile(const FlashAttentionTask& task, Panel& panel, int first_query, int count,
            float* slot) const {
    constexpr int kWidth = kGroups * kLanes;
    float* out = slot + 2 * kWidth + 16;
    float* started = slot + 2 * kWidth;
    const Scores<Words, T> tile{problem, task,  task.head,   first_query,
                                count,   query, panel.ahead, mask_tile};
    const Rows<T> rows = rows_of<T>(problem.query, task.batch, task.head, first_query);
    if (panel.packs_query)
      pack_transposed<Words, kGroups>(rows, count, problem.head_dim, problem.scale * kLog2E, query);
    Vec row_max[kGroups], sum[kGroups];
    if (panel.is_first) *started = 0.f;
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      row_max[g] = panel.is_first ? broadcast(-kInfinity) : load(slot + g * kLanes);
      sum[g] = panel.is_first ? zero() : load(slot + kWidth + g * kLanes);
    }
    const int end = tile.visible_end(panel.end);
    for (int key = panel.begin; key < end; key += kBlock) {
      const int n = minimum(kBlock, end - key);
      float factor;
      Vec block_max[kGroups], subtracted[kGroups], rescale[kGroups];
      if (!tile.template block<kGroups>(panel.keys.from(key - panel.begin), words, key, n, scores,
                                        &factor, block_max))
        continue;
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        rescale[g] = raise_maximum(block_max[g], &row_max[g], &subtracted[g]);
        sum[g] = sum[g] * rescale[g];
      }
      if (keep != nullptr) {
        dropout(problem).keep(key, n, first_query, kWidth,
                              (uint32_t)(task.batch * problem.heads + task.head), keep);
        weights<kGroups>(n, factor, subtracted, sum, keep);
      } else {
        weights<kGroups>(n, factor, subtracted, sum, nullptr);
      }
      const int n_rows = (n + Words::kElements - 1) / Words::kElements;
      weighted_sum<Words, kGroups>(
          scores, panel.values.from((key - panel.begin) / Words::kElements).rows,
          panel.values.stride, n_rows, value_columns, out, *started != 0.f ? rescale : nullptr);
      *started = 1.f;
    }
    if (!panel.is_last) {
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        store(slot + g * kLanes, row_max[g]);
        store(slot + kWidth + g * kLanes, sum[g]);
      }
      return;
    }
    if (*started == 0.f) clear(out, (int64_t)value_columns * kWidth);
    finish<kGroups>(task, first_query, count, row_max, sum, out);
  }

  // One query; lanes are keys in the scores and features in the sum.
  VLMFAST_NOINLINE void one_query(const FlashAttentionTask& task, const Panel& panel,
                                  int row) const {
    const int n = panel.end - panel.begin;
    pack_rows<Words>(rows_of<T>(problem.query, task.batch, task.head, row), 1, 1, problem.head_dim,
                     words, query);
    multiply_row<Words>(query, panel.keys.rows, panel.keys.stride, words, n, scores);
    const RowStatistics statistics = exponentiate_row<Words>(scores, n, problem.scale * kLog2E);
    float log_sum = statistics.sum == 0.f ? 1.f : statistics.sum;
    log2_in_place(&log_sum, 1);
    problem.logsumexp[(task.batch * problem.heads + task.head) * problem.query_length + row] =
        natural_logsumexp(statistics.top, log_sum);
    round_weights<Words>(scores, n);
    combine_rows<Words>(scores, panel.values.rows, panel.values.stride,
                        (n + Words::kElements - 1) / Words::kElements, problem.value_dim, state);
    store_scaled(problem.out.at<T>(task.batch, task.head, row), state, problem.value_dim,
                 broadcast(statistics.inverse));
  }

  template <int kGroups>
  VLMFAST_INLINE void finish(const FlashAttentionTask& task, int first_query, int count,
                             const Vec* row_max, const Vec* sum, const float* out) const {
    constexpr int kWidth = kGroups * kLanes;
    const Vec kept = broadcast(kept_scale(problem.dropout_p));
    float logs[kWidth], tops[kWidth];
    Vec factor[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      // Rows that see no key have a sum of 0 and give 0.
      factor[g] = select_eq(sum[g], zero(), zero(), kept / sum[g]);
      store(logs + g * kLanes, select_eq(sum[g], zero(), broadcast(1.f), sum[g]));
      store(tops + g * kLanes, row_max[g]);
    }
    log2_in_place(logs, kWidth);
    float* logsumexp = problem.logsumexp +
                       (task.batch * problem.heads + task.head) * problem.query_length +
                       first_query;
    // A row of nothing but the lowest mask was clamped there in log2 units.
    for (int i = 0; i < count; i++)
      logsumexp[i] = tops[i] == kLowest ? kLowest : natural_logsumexp(tops[i], logs[i]);
    const auto target = rows_of<T>(problem.out, task.batch, task.head, first_query);
    store_transposed<kGroups>(out, factor, target, count, problem.value_dim);
  }

  // Requests what `next` reads and writes, spread over the last panel of this task.
  VLMFAST_INLINE Prefetcher prefetcher(const FlashAttentionTask& task,
                                       const FlashAttentionTask& next, int tiles,
                                       int keys_left) const {
    Prefetcher result;
    if (!problem.prefetch) return result;
    const int head = next.head / problem.group;
    const int n = minimum(next.k_end - next.k_begin, keys_at_once);
    const int rest = task.q_end - task.q_begin - kMaxTile;
    result.add(rows_of<T>(problem.query, task.batch, task.head, task.q_begin + kMaxTile), rest,
               problem.head_dim);
    result.add(rows_of<T>(problem.out, task.batch, task.head, task.q_begin),
               task.q_end - task.q_begin, problem.value_dim);
    if (next.batch != task.batch || head != task.head / problem.group) {
      result.add(rows_of<T>(problem.value, next.batch, head, next.k_begin), n, problem.value_dim);
      result.add(rows_of<T>(problem.key, next.batch, head, next.k_begin), n, problem.head_dim);
    }
    result.add(rows_of<T>(problem.query, next.batch, next.head, next.q_begin),
               minimum(kMaxTile, next.q_end - next.q_begin), problem.head_dim);
    result.spread_over((int64_t)tiles * keys_left / kRowStep * (words / kWordStep) /
                       (problem.causal ? 2 : 1));
    return result;
  }

  // Requests the keys and values of the panel that begins at key `begin`.
  VLMFAST_INLINE Prefetcher panel_prefetcher(const FlashAttentionTask& task, int key_head,
                                             int begin, int tiles, int keys_left) const {
    Prefetcher result;
    if (!problem.prefetch) return result;
    const int n = minimum(task.k_end - begin, keys_at_once);
    result.add(rows_of<T>(problem.key, task.batch, key_head, begin), n, problem.head_dim);
    result.add(rows_of<T>(problem.value, task.batch, key_head, begin), n, problem.value_dim);
    result.spread_over((int64_t)tiles * keys_left / kRowStep * (words / kWordStep) /
                       (problem.causal ? 2 : 1));
    return result;
  }

  // `next` is what this thread runs afterwards.
  void run(const FlashAttentionTask& task, const FlashAttentionTask& next) const {
    const bool may_leave_one = runs_alone(problem, task.k_end - task.k_begin, keys_at_once);
    const Tiling tiling = tiling_of(task.q_end - task.q_begin, problem.causal, may_leave_one);
    const int key_head = task.head / problem.group;
    int begin = task.k_begin;
    do {
      const int end = minimum(begin + keys_at_once, task.k_end), n = end - begin;
      const bool is_first = begin == task.k_begin;
      Panel panel{begin, end, is_first, end == task.k_end, is_first || tiling.tiles > 1, {},
                  {},    {},  {}};
      panel.ahead = panel.is_last ? prefetcher(task, next, tiling.tiles, n)
                                  : panel_prefetcher(task, key_head, end, tiling.tiles, n);
      const Rows<T> key_rows = rows_of<T>(problem.key, task.batch, key_head, begin);
      const Rows<T> value_rows = rows_of<T>(problem.value, task.batch, key_head, begin);
      panel.keys = rows_as_words<Words>(key_rows, n, problem.head_dim, keys);
      if constexpr (Words::kElements == 1) {
        panel.values = rows_as_words<Words>(value_rows, n, problem.value_dim, values);
      } else {
        pack_row_pairs<Words>(value_rows, n, round_up(n, kRowStep), problem.value_dim,
                              value_columns, values);
        panel.values = {values, value_columns};
      }
      for (int t = 0; t < tiling.tiles; t++) {
        const int first = tiling.first_vector(t), groups = tiling.first_vector(t + 1) - first;
        const int first_query = task.q_begin + first * kLanes;
        const int count = minimum(groups * kLanes, task.q_end - first_query);
        float* slot = state + (keeps_state ? t * state_size : 0);
        with_count<kMaxGroups>(groups, [&](auto vectors) VLMFAST_INLINE_LAMBDA {
          tile<decltype(vectors)::value>(task, panel, first_query, count, slot);
        });
      }
      if (tiling.leaves_one) one_query(task, panel, task.q_end - 1);
      begin = end;
    } while (begin < task.k_end);
  }
};

}  // namespace
}  // namespace vlmfast::cpu::VLMFAST_VARIANT
