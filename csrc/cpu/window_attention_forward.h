// Forward: window after window, head after head.
#pragma once
#include "cpu/rows.h"
#include "cpu/tile/dropout.h"
#include "cpu/window_attention_bias.h"
#include "cpu/window_attention_scores.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

template <class Words, class T>
struct Forward {
  enum Tensors { kQuery, kKey, kValue, kOut, kTensors };
  const WindowAttentionForward& problem;
  WindowTiling tiling;
  int words, value_columns, row_words;
  float *biases, *keys, *values, *key_factors, *query, *scores, *keep, *sums, *row, *row_scores;
  mutable Window<T, kTensors> windows[2];
  ShrunkRows<T, kTensors> key_copies, query_copies;  // where there are cosines
  T* sink;
  int64_t scratch_size;

  Forward(const WindowAttentionForward& p, float* scratch)
      : problem(p), tiling(p.window_height * p.window_width) {
    words = word_count<Words>(p.head_dim);
    value_columns = round_up(p.head_dim, kRowStep);
    row_words = round_up(words, kLanes);
    Arena arena{scratch};
    const int64_t padded = tiling.padded_tokens;
    biases = p.bias.data == nullptr ? nullptr : arena.take(p.heads_per_task * tiling.bias_size());
    keys = arena.take(padded * words);
    values = arena.take(padded / Words::kElements * value_columns + kLanes);
    key_factors = p.logit_scale == nullptr ? nullptr : arena.take(padded);
    query = arena.take((int64_t)row_words * kMaxTile);
    scores = arena.take(padded * kMaxTile);
    keep = p.dropout_p > 0 ? arena.take(padded * kMaxTile) : nullptr;
    sums = arena.take((int64_t)value_columns * kMaxTile);
    row = arena.take(maximum(row_words, round_up(p.head_dim, kLanes)));
    row_scores = arena.take(padded);
    sink = (T*)arena.take((int64_t)p.heads * p.head_dim);
    for (auto& window : windows) window.take(&arena, tiling);
    if (p.logit_scale != nullptr) {
      key_copies.take(&arena, tiling.tokens, p.head_dim);
      query_copies.take(&arena, kMaxTile, p.head_dim);
    }
    scratch_size = arena.used;
  }

  VLMFAST_INLINE void locate_window(int64_t index, Window<T, kTensors>* window) const {
    const int channels = problem.heads * problem.head_dim;
    T* pad = (T*)problem.pad_value;
    const Map<T> maps[kTensors] = {{problem.query, pad},
                                   {problem.key, pad + channels},
                                   {problem.value, pad + 2 * channels},
                                   {problem.out, sink}};
    locate(problem, index, maps, window);
  }

  template <int kGroups>
  VLMFAST_NOINLINE void tile(const Window<T, kTensors>& window, const Logits<Words>& logits,
                             int head, int first, uint32_t dropout_row, float* logsumexp,
                             WindowPrefetcher& ahead) const {
    constexpr int kWidth = kGroups * kLanes;
    const int column = head * problem.head_dim, n = tiling.tokens;
    const int first_query = first * kLanes,
              count = minimum(kWidth, tiling.tiled_queries() - first_query);
    auto rows = window.of(kQuery, column, first_query);
    pack_transposed<Words, kGroups>(rows, count, problem.head_dim, 1.f, query);
    Vec factor[kGroups], row_max[kGroups], sum[kGroups];
    if (problem.logit_scale == nullptr) {
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) factor[g] =
          broadcast(problem.scale * kLog2E);
    } else {
      Vec square[kGroups];
      norms_of_queries<Words, kGroups>(&rows, count, problem.head_dim, words, query_copies, query,
                                       square, factor);
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) factor[g] =
          factor[g] * broadcast(problem.logit_scale[head] * kLog2E);
    }
    logits.template tile<kGroups>(query, first, factor, scores, row_max, ahead);
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) sum[g] = zero();
    if (keep != nullptr)
      philox(problem.dropout_p, problem.dropout_seed)
          .keep(0, n, first_query, kWidth, dropout_row, keep);
    // Pairs of rows become one, so that runs of them would leave gaps; their sums may be rougher.
    const int step = Words::kElements == 1 ? kRun : n;
    for (int j = 0; j < n; j += step) {
      const int run = minimum(step, n - j);
      if (keep != nullptr)
        exponentiate<Words, kGroups>(scores + j * kWidth, run, 1.f, row_max, sum,
                                     keep + j * kWidth);
      else
        exponentiate<Words, kGroups>(scores + j * kWidth, run, 1.f, row_max, sum, nullptr);
    }
    weighted_sum<Words, kGroups>(scores, values, value_columns,
                                 (n + Words::kElements - 1) / Words::kElements, value_columns, sums,
                                 nullptr);
    const Vec kept = broadcast(kept_scale(problem.dropout_p));
    float logs[kWidth], tops[kWidth];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      factor[g] = kept / sum[g];
      store(logs + g * kLanes, sum[g]);
      store(tops + g * kLanes, row_max[g]);
    }
    log2_in_place(logs, kWidth);
    for (int i = 0; i < count; i++) logsumexp[first_query + i] = (tops[i] + logs[i]) * (float)kLn2;
    const auto target = window.of(kOut, column, first_query);
    store_transposed<kGroups>(sums, factor, target, count, problem.head_dim);
  }

  VLMFAST_NOINLINE void last_query(const Window<T, kTensors>& window, const Logits<Words>& logits,
                                   int head, uint32_t dropout_row, float* logsumexp) const {
    const int column = head * problem.head_dim, n = tiling.tokens, q = n - 1;
    auto rows = window.of(kQuery, column, q);
    pack_rows<Words>(rows, 1, 1, problem.head_dim, row_words, row);
    float factor = problem.scale * kLog2E;
    if (problem.logit_scale != nullptr) {
      float norm[kLanes];
      norms_of_rows<Words>(&rows, 1, problem.head_dim, row_words, query_copies, row, norm);
      factor = norm[0] * problem.logit_scale[head] * kLog2E;
    }
    logits.last(row, factor, row_scores);
    float row_max, sum = exponentiate_row<Words>(row_scores, n, &row_max);
    if (keep != nullptr) {
      philox(problem.dropout_p, problem.dropout_seed).keep(0, n, q, 1, dropout_row, keep);
      for (int j = 0; j < n; j++) row_scores[j] *= keep[j];
    }
    round_weights<Words>(row_scores, n);
    combine_rows<Words>(row_scores, values, value_columns,
                        (n + Words::kElements - 1) / Words::kElements, problem.head_dim, row);
    store_scaled(window.of(kOut, column, q).row(0), row, problem.head_dim,
                 broadcast(kept_scale(problem.dropout_p) / sum));
    log2_in_place(&sum, 1);
    logsumexp[q] = (row_max + sum) * (float)kLn2;
  }

  void run_head(const Window<T, kTensors>& window, int64_t index, int head, const float* bias,
                WindowPrefetcher& ahead) const {
    const int column = head * problem.head_dim, n = tiling.tokens;
    auto key_rows = window.of(kKey, column);
    pack_rows<Words>(key_rows, n, tiling.padded_tokens, problem.head_dim, words, keys);
    pack_row_pairs<Words>(window.of(kValue, column), n, round_up(n, Words::kElements),
                          problem.head_dim, value_columns, values);
    if (key_factors != nullptr)
      norms_of_rows<Words>(&key_rows, n, problem.head_dim, words, key_copies, keys, key_factors);
    const Logits<Words> logits{tiling,      keys, key_factors,
                               words,       bias, window.wraps ? window.regions : nullptr,
                               problem.mask};
    const int64_t at = index * problem.heads + head;
    float* logsumexp = problem.logsumexp + at * n;
    for (int t = 0; t < tiling.tiles; t++) {
      const int first = tiling.first_vector(t), vectors = tiling.first_vector(t + 1) - first;
      with_count<kMaxGroups>(vectors, [&](auto groups) VLMFAST_INLINE_LAMBDA {
        tile<decltype(groups)::value>(window, logits, head, first, (uint32_t)at, logsumexp, ahead);
      });
    }
    if (tiling.leaves_one) last_query(window, logits, head, (uint32_t)at, logsumexp);
  }

  void run(const WindowAttentionTask& task, const WindowAttentionTask& next,
           bool has_biases) const {
    Window<T, kTensors>*window = windows, *following = windows + 1;
    locate_window(task.window_begin, window);
    if (biases != nullptr && !has_biases)
      pack_biases(problem.bias, tiling, task.head_begin, task.head_end, biases);
    for (int64_t index = task.window_begin; index < task.window_end; index++) {
      const bool is_last = index + 1 == task.window_end;
      const WindowAttentionTask& upcoming = is_last ? next : task;
      locate_window(is_last ? next.window_begin : index + 1, following);
      const int column = upcoming.head_begin * problem.head_dim;
      const int columns = (upcoming.head_end - upcoming.head_begin) * problem.head_dim;
      WindowPrefetcher ahead(*following, tiling, column, columns, task.head_end - task.head_begin,
                             words);
      for (int head = task.head_begin; head < task.head_end; head++) {
        const int64_t at = (head - task.head_begin) * tiling.bias_size();
        run_head(*window, index, head, biases == nullptr ? nullptr : biases + at, ahead);
      }
      Window<T, kTensors>* free = window;
      window = following;
      following = free;
    }
  }
};

}  // namespace
}  // namespace vlmfast::cpu::VLMFAST_VARIANT
