// Backward: recomputes the weights of each block from its scores and the logsumexp.
#pragma once
#include "cpu/flash_attention_scores.h"
#include "cpu/tile/scratch.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

template <class Words, class T>
struct Backward {
  const FlashAttentionBackward& problem;
  int words, value_words, columns, vectors, value_vectors, keys_at_once;
  float *keys, *values, *key_pairs, *grad_keys, *grad_values;
  float *query, *grad_out, *query_rows, *grad_out_rows, *scores, *grad_scores, *exact_grad_scores,
      *left, *grad_left, *mask_tile, *keep;
  float *grad_query, *temporary_rows;
  int64_t grad_query_tile;
  int64_t scratch_size;

  static constexpr bool kPairs = Words::kElements == 2;

  Backward(const FlashAttentionBackward& p, float* scratch) : problem(p) {
    words = word_count<Words>(p.head_dim);
    value_words = word_count<Words>(p.value_dim);
    columns = round_up(p.head_dim, kRowStep);
    vectors = (p.head_dim + kLanes - 1) / kLanes;
    value_vectors = (p.value_dim + kLanes - 1) / kLanes;
    const int64_t per_key = words + value_words + (kPairs ? columns / 2 : 0) +
                            (p.wants_key_value ? (vectors + value_vectors) * kLanes : 0);
    const int64_t tiles = (int64_t)tiling_of(p.max_queries, p.causal, false).tiles * p.group;
    const int64_t panel = tiles <= 2 ? kBackwardPanel / 8 : kBackwardPanel;
    keys_at_once = panel_keys(panel, per_key, p.max_keys);
    grad_query_tile = (int64_t)columns * kMaxTile;
    Arena arena{scratch};
    const int64_t padded = round_up(keys_at_once, kRowStep);
    keys = arena.take(padded * words);
    values = arena.take(padded * value_words);
    key_pairs = arena.take(kPairs ? padded / 2 * columns : 0);
    grad_keys = arena.take(p.wants_key_value ? padded * vectors * kLanes : 0);
    grad_values = arena.take(p.wants_key_value ? padded * value_vectors * kLanes : 0);
    query = arena.take((int64_t)round_up(words, kLanes) * kMaxTile);
    grad_out = arena.take((int64_t)round_up(value_words, kLanes) * kMaxTile);
    query_rows = arena.take((int64_t)kMaxTile / Words::kElements * vectors * kLanes);
    grad_out_rows = arena.take((int64_t)kMaxTile / Words::kElements * value_vectors * kLanes);
    scores = arena.take(kBlock * kMaxTile);
    grad_scores = arena.take(kBlock * kMaxTile);
    exact_grad_scores = p.grad_mask == nullptr ? nullptr
                        : kPairs               ? arena.take(kBlock * kMaxTile)
                                               : grad_scores;
    left = kPairs ? arena.take(kBlock * kMaxTile / 2) : scores;
    grad_left = kPairs ? arena.take(kBlock * kMaxTile / 2) : grad_scores;
    mask_tile = p.mask.data == nullptr ? nullptr : arena.take(kBlock * kMaxTile);
    keep = p.dropout_p > 0 ? arena.take(kBlock * kMaxTile) : nullptr;
    temporary_rows = arena.take((int64_t)kBlock * maximum(words, value_words));
    const bool many_panels = keys_at_once < p.max_keys || p.grad_query_splits != nullptr;
    grad_query = arena.take(grad_query_tile * (many_panels ? tiles : 1));
    scratch_size = arena.used;
  }

  VLMFAST_INLINE int64_t first_row(const Scores<Words, T>& tile) const {
    return (tile.task.batch * problem.heads + tile.head) * problem.query_length + tile.first_query;
  }

  // delta = grad_out . out - grad_logsumexp of each row, whose weights are exp2(score - top) *
  // share.
  template <int kGroups>
  VLMFAST_INLINE void row_values(const Scores<Words, T>& tile, Rows<T> grad, float* delta,
                                 float* top, float* share) const {
    constexpr int kWidth = kGroups * kLanes;
    const int64_t row = first_row(tile);
    bool precise = true;
    for (int i = 0; i < kWidth; i++)
      precise &= split_logsumexp<T>(i < tile.count ? problem.logsumexp[row + i] : -kInfinity,
                                    top + i, share + i);
    if (problem.exact_delta || !precise)
      row_statistics<kGroups>(tile, top, share, delta);
    else
      output_products<kGroups>(tile, grad, delta);
    for (int i = 0; i < kWidth; i++) {
      if (top[i] == kInfinity)
        delta[i] = 0.f;
      else if (problem.grad_logsumexp != nullptr)
        delta[i] -= problem.grad_logsumexp[row + i];
    }
  }

  // grad_out . out of each row.
  template <int kGroups>
  VLMFAST_INLINE void output_products(const Scores<Words, T>& tile, Rows<T> grad,
                                      float* products) const {
    const T* out = problem.out.at<T>(tile.task.batch, tile.head, tile.first_query);
    for (int g = 0; g < kGroups; g++) {
      Vec sums[kLanes];
      VLMFAST_UNROLL for (int i = 0; i < kLanes; i++) sums[i] = zero();
      for (int i = 0; i < minimum(kLanes, tile.count - g * kLanes); i++) {
        const int at = g * kLanes + i;
        constexpr int kStep = kLanes * Words::kElements;
        for (int d = 0; d < problem.value_dim; d += kStep) {
          const int n = minimum(kStep, problem.value_dim - d);
          const T* p = grad.row(at) + d * grad.column_stride;
          const Vec grads = grad.column_stride == 1 ? load_words<Words>(p, n)
                                                    : gather_words<Words>(p, grad.column_stride, n);
          sums[i] = Words::multiply_add(
              grads, load_words<Words>(out + at * problem.out.stride[2] + d, n), sums[i]);
        }
      }
      store(products + g * kLanes, sum_of_lanes(sums));
    }
  }

  // Computes `top` and `share` of the rows that see a key afresh, and delta = sum(P * dP) of the
  // same weights. A large |logsumexp| (a row of masks as low as -1e9 or the lowest float has one)
  // loses log(sum) to rounding. And grad_out . out lacks what rounding took from out: the rows of
  // dS would not sum to 0, nor dS vanish where one key has all the weight.
  template <int kGroups>
  void row_statistics(const Scores<Words, T>& tile, float* top, float* share, float* delta) const {
    constexpr int kWidth = kGroups * kLanes;
    const FlashAttentionTask& task = tile.task;
    const int key_head = tile.head / problem.group;
    const Vec scale = broadcast(kept_scale(problem.dropout_p));
    Vec row_max[kGroups], sum[kGroups], products[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      row_max[g] = broadcast(-kInfinity);
      sum[g] = products[g] = zero();
    }
    const int end = tile.visible_end(task.all_k_end);
    for (int key = task.all_k_begin; key < end; key += kBlock) {
      const int n = minimum(kBlock, end - key), padded = round_up(n, kRowStep);
      pack_rows<Words>(rows_of<T>(problem.key, task.batch, key_head, key), n, padded,
                       problem.head_dim, words, temporary_rows);
      float factor;
      Vec block_max[kGroups];
      if (!tile.template block<kGroups>({temporary_rows, words}, words, key, n, scores, &factor,
                                        block_max))
        continue;
      pack_rows<Words>(rows_of<T>(problem.value, task.batch, key_head, key), n, padded,
                       problem.value_dim, value_words, temporary_rows);
      multiply_rows<Words, kGroups>(grad_out, temporary_rows, value_words, value_words, n,
                                    grad_scores, nullptr, tile.ahead);
      if (keep != nullptr) keep_of_block<kGroups>(tile, key, n);
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        Vec subtracted;
        const Vec rescale = raise_maximum(block_max[g], &row_max[g], &subtracted);
        Vec block_sum = zero(), block_products = zero();
        for (int j = 0; j < n; j++) {
          const int at = j * kWidth + g * kLanes;
          const Vec weight = exp2<5>(fms(broadcast(factor), load(scores + at), subtracted));
          block_sum = block_sum + weight;
          const Vec kept = keep == nullptr ? weight : weight * (load(keep + at) * scale);
          block_products = fma(kept, load(grad_scores + at), block_products);
        }
        sum[g] = fma(sum[g], rescale, block_sum);
        products[g] = fma(products[g], rescale, block_products);
      }
    }
    float tops[kWidth], shares[kWidth];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      const Vec inverse = broadcast(1.f) / sum[g];
      store(tops + g * kLanes, row_max[g]);
      store(shares + g * kLanes, inverse);
      store(delta + g * kLanes, products[g] * inverse);
    }
    for (int i = 0; i < tile.count; i++)
      if (top[i] != kInfinity) top[i] = tops[i], share[i] = shares[i];
  }

  template <int kGroups>
  VLMFAST_INLINE void keep_of_block(const Scores<Words, T>& tile, int key, int n) const {
    dropout(problem).keep(key, n, tile.first_query, kGroups * kLanes,
                          (uint32_t)(tile.task.batch * problem.heads + tile.head), keep);
  }

  // As whole_rows, with 0 in lanes without a query, and the gradient of the logsumexp.
  template <int kGroups>
  void statistics_of_whole_rows(const Scores<Words, T>& tile, int n, float factor,
                                const Vec* row_max, float* delta, float* share) const {
    whole_rows<Words, kGroups>(scores, grad_scores, keep, kept_scale(problem.dropout_p), n, factor,
                               row_max, delta, share);
    for (int i = tile.count; i < kGroups * kLanes; i++) share[i] = delta[i] = 0.f;
    const int64_t row = first_row(tile);
    if (problem.grad_logsumexp != nullptr)
      for (int i = 0; i < tile.count; i++)
        if (share[i] != 0.f) delta[i] -= problem.grad_logsumexp[row + i];
  }

  // P (after dropout) and dS of a block, from the products in `scores` and `grad_scores`. With fp32
  // words they replace them; with bf16 words `left` and `grad_left` get them as pairs along the
  // queries, and `grad_scores` gets dS as pairs along the keys. Rows [n, padded) become zero.
  // weight_at(at, g) is P before dropout.
  template <int kGroups, class Weight>
  VLMFAST_INLINE void gradients(int n, int padded, const float* delta, Weight weight_at) const {
    if (keep == nullptr && exact_grad_scores == nullptr)
      gradients<kGroups, true>(n, padded, delta, weight_at);
    else
      gradients<kGroups, false>(n, padded, delta, weight_at);
  }

  // kPlain: neither dropout nor a gradient of the mask.
  template <int kGroups, bool kPlain, class Weight>
  VLMFAST_INLINE void gradients(int n, int padded, const float* delta, Weight weight_at) const {
    const Vec scale = broadcast(kept_scale(problem.dropout_p));
    write_gradients<Words, kGroups>(
        n, padded, left, grad_left, grad_scores,
        [&](int, int at, int g, Vec* weight, Vec* grad) VLMFAST_INLINE_LAMBDA {
          const Vec p = weight_at(at, g);
          const Vec kept = kPlain || keep == nullptr ? broadcast(1.f) : load(keep + at) * scale;
          *weight = p * kept;
          *grad = p * fms(load(grad_scores + at), kept, load(delta + g * kLanes));
          if (!kPlain && exact_grad_scores != nullptr) store(exact_grad_scores + at, *grad);
        });
  }

  // kDegree: of exp2; 5 where delta was computed with it.
  template <int kGroups, int kDegree>
  VLMFAST_NOINLINE void gradients_of_part(int n, int padded, float factor, const float* delta,
                                          const float* top, const float* share) const {
    Vec tops[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) tops[g] = load(top + g * kLanes);
    const Vec f = broadcast(remaining_factor<kGroups>(scores, n, factor, tops));
    gradients<kGroups>(n, padded, delta, [&](int at, int g) VLMFAST_INLINE_LAMBDA {
      // Where large terms cancel, a score may exceed the logsumexp that the forward pass, adding in
      // another order, took from the same terms.
      const Vec exponent = fms(f, load(scores + at), load(top + g * kLanes));
      return exp2<kDegree>(min(zero(), exponent)) * load(share + g * kLanes);
    });
  }

  template <int kGroups>
  VLMFAST_NOINLINE void gradients_of_whole_rows(int n, int padded, const float* delta,
                                                const float* share) const {
    gradients<kGroups>(n, padded, delta, [&](int at, int g) VLMFAST_INLINE_LAMBDA {
      return load(scores + at) * load(share + g * kLanes);
    });
  }

  // Adds the block's dS to the gradient of the mask, summed over the dimensions along which the
  // mask broadcasts.
  template <int kGroups>
  void add_grad_mask(const FlashAttentionTask& task, const Scores<Words, T>& tile, int key,
                     int n) const {
    constexpr int kWidth = kGroups * kLanes;
    const int64_t* stride = problem.grad_mask_stride;
    float* base = problem.grad_mask + task.unit * problem.grad_mask_unit_size +
                  task.batch * stride[0] + tile.head * stride[1] + tile.first_query * stride[2] +
                  key * stride[3];
    if (stride[2] == 0) {
      for (int j = 0; j < n; j++) {
        Vec sum = zero();
        for (int g = 0; g < kGroups; g++)
          sum = sum + load(exact_grad_scores + j * kWidth + g * kLanes);
        base[j * stride[3]] += horizontal_sum(sum);
      }
    } else {
      for (int g = 0; g < kGroups; g++)
        for (int j = 0; j < n; j += kLanes) {
          Vec r[kLanes];
          for (int i = 0; i < kLanes; i++)
            r[i] = j + i < n ? load(exact_grad_scores + (j + i) * kWidth + g * kLanes) : zero();
          transpose(r);
          const int m = minimum(kLanes, n - j), rows = minimum(kLanes, tile.count - g * kLanes);
          for (int i = 0; i < rows; i++) {
            float* target = base + (g * kLanes + i) * stride[2] + j;
            store_first(target, load_first(target, m) + r[i], m);
          }
        }
    }
  }

  template <int kGroups>
  void tile(const FlashAttentionTask& task, Panel& panel, int head, int first_query, int count,
            bool is_first_tile, float* grad_query_sum) const {
    constexpr int kWidth = kGroups * kLanes, kDepth = kWidth / Words::kElements;
    const Scores<Words, T> tile{problem, task,  head,        first_query,
                                count,   query, panel.ahead, mask_tile};
    const int end = tile.visible_end(panel.end);
    Vec factors[kGroups];
    if (panel.is_first) clear(grad_query_sum, (int64_t)columns * kWidth);
    if (panel.begin < end) {
      const Rows<T> query_in = rows_of<T>(problem.query, task.batch, head, first_query);
      const Rows<T> grad_in = rows_of<T>(problem.grad_out, task.batch, head, first_query);
      pack_transposed<Words, kGroups>(query_in, count, problem.head_dim, problem.scale * kLog2E,
                                      query);
      pack_transposed<Words, kGroups>(grad_in, count, problem.value_dim, 1.f, grad_out);
      if (problem.wants_key_value) {
        pack_row_pairs<Words>(query_in, count, kWidth, problem.head_dim, vectors * kLanes,
                              query_rows);
        pack_row_pairs<Words>(grad_in, count, kWidth, problem.value_dim, value_vectors * kLanes,
                              grad_out_rows);
      }
      float delta[kWidth], top[kWidth], share[kWidth];
      const bool whole = task.all_k_begin == panel.begin &&
                         tile.visible_end(task.all_k_end) == end && end - panel.begin <= kBlock;
      if (!whole) row_values<kGroups>(tile, grad_in, delta, top, share);
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) factors[g] = broadcast(1.f);
      for (int key = panel.begin; key < end; key += kBlock) {
        const int n = minimum(kBlock, end - key), padded = round_up(n, kRowStep),
                  at = key - panel.begin;
        float factor;
        Vec row_max[kGroups];
        if (!tile.template block<kGroups>(panel.keys.from(at), words, key, n, scores, &factor,
                                          whole ? row_max : nullptr))
          continue;
        multiply_rows<Words, kGroups>(grad_out, panel.values.from(at).rows, panel.values.stride,
                                      value_words, n, grad_scores, nullptr, panel.ahead);
        if (keep != nullptr) keep_of_block<kGroups>(tile, key, n);
        if (whole) {
          statistics_of_whole_rows<kGroups>(tile, n, factor, row_max, delta, share);
          gradients_of_whole_rows<kGroups>(n, padded, delta, share);
        } else if (problem.exact_delta) {
          gradients_of_part<kGroups, 5>(n, padded, factor, delta, top, share);
        } else {
          gradients_of_part<kGroups, Words::kExpDegree>(n, padded, factor, delta, top, share);
        }
        if (problem.grad_mask != nullptr) add_grad_mask<kGroups>(task, tile, key, n);
        if (problem.wants_key_value) {
          outer_accumulate<Words>(
              left, kDepth, grad_out_rows, kDepth, n, is_first_tile && overwrites(),
              grad_values + (int64_t)at * value_vectors * kLanes, value_vectors);
          outer_accumulate<Words>(grad_left, kDepth, query_rows, kDepth, n,
                                  is_first_tile && overwrites(),
                                  grad_keys + (int64_t)at * vectors * kLanes, vectors);
        }
        if (problem.wants_query)
          weighted_sum<Words, kGroups>(
              grad_scores, panel.key_pairs.from(at / Words::kElements).rows, panel.key_pairs.stride,
              (n + Words::kElements - 1) / Words::kElements, columns, grad_query_sum, factors);
      }
    }
    if (!panel.is_last || !problem.wants_query) return;
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) factors[g] = broadcast(problem.scale);
    if (problem.grad_query_splits != nullptr) {
      float* target = problem.grad_query_splits + task.split * problem.grad_query_split_size +
                      ((task.batch * problem.heads + head) * problem.query_length + first_query) *
                          problem.head_dim;
      store_transposed<kGroups>(grad_query_sum, factors, Rows<float>{target, problem.head_dim, 1},
                                count, problem.head_dim);
    } else {
      const auto target = rows_of<T>(problem.grad_query, task.batch, head, first_query);
      store_transposed<kGroups>(grad_query_sum, factors, target, count, problem.head_dim);
    }
  }

  // One query, after others have met these keys; lanes are keys in the scores, features in the
  // sums.
  VLMFAST_NOINLINE void one_query(const FlashAttentionTask& task, const Panel& panel, int head,
                                  int row) const {
    const int n = panel.end - panel.begin;
    const Rows<T> query_in = rows_of<T>(problem.query, task.batch, head, row);
    const Rows<T> grad_in = rows_of<T>(problem.grad_out, task.batch, head, row);
    pack_rows<Words>(query_in, 1, 1, problem.head_dim, words, query);
    pack_rows<Words>(grad_in, 1, 1, problem.value_dim, value_words, grad_out);
    multiply_row<Words>(query, panel.keys.rows, panel.keys.stride, words, n, scores);
    multiply_row<Words>(grad_out, panel.values.rows, panel.values.stride, value_words, n,
                        grad_scores);
    const Vec inverse =
        broadcast(exponentiate_row<Words>(scores, n, problem.scale * kLog2E).inverse);
    Vec products = zero();
    for (int j = 0; j < n; j += kLanes) {
      const Vec weight = load(scores + j) * inverse;
      store(scores + j, weight);
      products = fma(weight, load(grad_scores + j), products);
    }
    float delta = horizontal_sum(products);
    if (problem.grad_logsumexp != nullptr)
      delta -=
          problem.grad_logsumexp[(task.batch * problem.heads + head) * problem.query_length + row];
    for (int j = 0; j < n; j += kLanes)
      store(grad_scores + j, load(scores + j) * (load(grad_scores + j) - broadcast(delta)));
    if (problem.wants_key_value) {
      load_row(query_in, 0, problem.head_dim, query_rows);
      load_row(grad_in, 0, problem.value_dim, grad_out_rows);
      add_outer(scores, grad_out_rows, n, value_vectors, grad_values);
      add_outer(grad_scores, query_rows, n, vectors, grad_keys);
    }
    if (!problem.wants_query) return;
    round_weights<Words>(grad_scores, n);
    combine_rows<Words>(grad_scores, panel.key_pairs.rows, panel.key_pairs.stride,
                        (n + Words::kElements - 1) / Words::kElements, problem.head_dim,
                        grad_query);
    store_scaled(problem.grad_query.at<T>(task.batch, head, row), grad_query, problem.head_dim,
                 broadcast(problem.scale));
  }

  // Where the first tile of queries meets every key it can store its share of grad_keys and
  // grad_values; else they start from zero.
  VLMFAST_INLINE bool overwrites() const { return !problem.causal && problem.mask.data == nullptr; }

  // Requests, while one tile of a panel runs, what is needed soon: the queries of the next tile,
  // what this one writes, and a share of the keys and values of the next panel or task. More at a
  // time would drive what this task works with out of the cache.
  VLMFAST_INLINE Prefetcher prefetcher(const FlashAttentionTask& task,
                                       const FlashAttentionTask& next, const Panel& panel,
                                       const Tiling& tiling, int64_t tile) const {
    Prefetcher result;
    if (!problem.prefetch) return result;
    const int64_t tiles = (int64_t)tiling.tiles * problem.group;
    const int n = panel.end - panel.begin;
    const bool is_last = tile + 1 == tiles;
    const auto add_queries = [&](const Strided& tensor, const FlashAttentionTask& of, int64_t t,
                                 int width) VLMFAST_INLINE_LAMBDA {
      const int head = of.head * problem.group + (int)(t / tiling.tiles),
                first = tiling.first_vector((int)(t % tiling.tiles)) * kLanes,
                count = minimum(kMaxTile + 1, of.q_end - of.q_begin - first);
      result.add(rows_of<T>(tensor, of.batch, head, of.q_begin + first), count, width);
    };
    const FlashAttentionTask& of = is_last && panel.is_last ? next : task;
    const int64_t coming = is_last ? 0 : tile + 1;
    add_queries(problem.query, of, coming, problem.head_dim);
    add_queries(problem.grad_out, of, coming, problem.value_dim);
    add_queries(problem.out, of, coming, problem.value_dim);

    const FlashAttentionTask& keys_of = panel.is_last ? next : task;
    const int begin = panel.is_last ? next.k_begin : panel.end;
    const int64_t keys_left = minimum(keys_of.k_end - begin, keys_at_once);
    const int first = begin + (int)(keys_left * tile / tiles),
              count = begin + (int)(keys_left * (tile + 1) / tiles) - first;
    result.add(rows_of<T>(problem.key, keys_of.batch, keys_of.head, first), count,
               problem.head_dim);
    result.add(rows_of<T>(problem.value, keys_of.batch, keys_of.head, first), count,
               problem.value_dim);

    if (problem.wants_query && panel.is_last)
      add_queries(problem.grad_query, task, tile, problem.head_dim);
    if (problem.wants_key_value && is_last) {
      result.add(rows_of<T>(problem.grad_key, task.batch, task.head, panel.begin), n,
                 problem.head_dim);
      result.add(rows_of<T>(problem.grad_value, task.batch, task.head, panel.begin), n,
                 problem.value_dim);
    }
    result.spread_over((int64_t)n / kRowStep * (words / kWordStep) * (problem.causal ? 1 : 2));
    return result;
  }

  // `next` is what this thread runs afterwards.
  void run(const FlashAttentionTask& task, const FlashAttentionTask& next) const {
    const int task_keys = task.k_end - task.k_begin;
    const bool may_leave_one = task_keys == task.all_k_end - task.all_k_begin &&
                               runs_alone(problem, task_keys, keys_at_once);
    const Tiling tiling = tiling_of(task.q_end - task.q_begin, problem.causal, may_leave_one);
    const bool many_panels = task_keys > keys_at_once;
    int begin = task.k_begin;
    do {
      const int end = minimum(begin + keys_at_once, task.k_end), n = end - begin;
      const int padded = round_up(n, kRowStep);
      Panel panel{begin, end, begin == task.k_begin, end == task.k_end, true, {}, {}, {}, {}};
      const Rows<T> key_rows = rows_of<T>(problem.key, task.batch, task.head, begin);
      const Rows<T> value_rows = rows_of<T>(problem.value, task.batch, task.head, begin);
      panel.keys = panel.key_pairs = rows_as_words<Words>(key_rows, n, problem.head_dim, keys);
      panel.values = rows_as_words<Words>(value_rows, n, problem.value_dim, values);
      if (kPairs) {
        pack_row_pairs<Words>(key_rows, n, padded, problem.head_dim, columns, key_pairs);
        panel.key_pairs = {key_pairs, columns};
      }
      if (problem.wants_key_value && (!overwrites() || tiling.tiles == 0)) {
        clear(grad_keys, (int64_t)padded * vectors * kLanes);
        clear(grad_values, (int64_t)padded * value_vectors * kLanes);
      }
      for (int h = 0; h < problem.group; h++) {
        for (int t = 0; t < tiling.tiles; t++) {
          const int first = tiling.first_vector(t), groups = tiling.first_vector(t + 1) - first;
          const int first_query = task.q_begin + first * kLanes,
                    head = task.head * problem.group + h;
          const int count = minimum(groups * kLanes, task.q_end - first_query);
          float* sum =
              grad_query + (many_panels ? ((int64_t)h * tiling.tiles + t) * grad_query_tile : 0);
          panel.ahead = prefetcher(task, next, panel, tiling, (int64_t)h * tiling.tiles + t);
          with_count<kMaxGroups>(groups, [&](auto vectors) VLMFAST_INLINE_LAMBDA {
            tile<decltype(vectors)::value>(task, panel, head, first_query, count, h + t == 0, sum);
          });
        }
        if (tiling.leaves_one)
          one_query(task, panel, task.head * problem.group + h, task.q_end - 1);
      }
      if (problem.wants_key_value) {
        store_rows(grad_keys, vectors * kLanes, problem.scale,
                   rows_of<T>(problem.grad_key, task.batch, task.head, begin), n, problem.head_dim);
        store_rows(grad_values, value_vectors * kLanes, 1.f,
                   rows_of<T>(problem.grad_value, task.batch, task.head, begin), n,
                   problem.value_dim);
      }
      begin = end;
    } while (begin < task.k_end);
  }
};

}  // namespace
}  // namespace vlmfast::cpu::VLMFAST_VARIANT
