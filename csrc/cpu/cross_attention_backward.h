// Backward: recomputes the weights of each tile of tokens.
#pragma once
#include "cpu/cross_attention_scores.h"
#include "cpu/tile/scratch.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

template <class Words, class T>
struct Backward {
  const CrossAttentionBackward& problem;
  int words, value_words, stride, value_stride;  // of packed rows; of gradients
  float factor, sign;  // of the products, before exp2, and of the packed queries
  float *keys, *values, *key_rows, *grad_keys, *grad_values;
  float *query, *grad_out, *query_rows, *grad_out_rows, *grad_query;
  float *scores, *grad_scores, *left, *grad_left;
  JoinedRows rows{};  // where tokens may see several images
  int64_t scratch_size;

  static constexpr int kStep = Words::kElements;

  Backward(const CrossAttentionBackward& p, float* scratch) : problem(p) {
    words = word_count<Words>(p.head_dim);
    value_words = word_count<Words>(p.value_dim);
    stride = round_up(p.head_dim, kLanes);
    value_stride = round_up(p.value_dim, kLanes);
    factor = __builtin_fabsf(p.scale) * kLog2E;
    sign = p.scale < 0 ? -1.f : 1.f;
    Arena arena{scratch};
    const int64_t padded = round_up(p.latents, kRowStep);
    keys = arena.take(padded * words);
    values = arena.take(padded * value_words);
    // Rows of floats serve both products, if they are padded alike.
    key_rows = kStep == 1 && words == stride ? keys : arena.take(padded / kStep * stride);
    grad_keys = arena.take(p.wants_key_value ? padded * stride : 0);
    grad_values = arena.take(p.wants_key_value ? padded * value_stride : 0);
    query = arena.take((int64_t)kTile * round_up(words, kLanes));
    grad_out = arena.take((int64_t)kTile * round_up(value_words, kLanes));
    query_rows = arena.take((int64_t)kTile / kStep * stride);
    grad_out_rows = arena.take((int64_t)kTile / kStep * value_stride);
    grad_query = arena.take((int64_t)kTile * stride);
    scores = arena.take(kScores);
    grad_scores = arena.take(kScores);
    left = kStep == 1 ? scores : arena.take(kScores / 2);
    grad_left = kStep == 1 ? grad_scores : arena.take(kScores / 2);
    const int64_t held = p.many_images ? (int64_t)p.group * p.tokens : 0;
    rows.tops = arena.take(held);
    rows.sums = arena.take(held);
    scratch_size = arena.used;
  }

  // Scores of `count` packed queries, from n packed latents on; grad_scores may hold parts of them.
  template <int kGroups, class Ahead>
  VLMFAST_INLINE void scores_of(int count, const Operand& latents, int n, Vec* row_max,
                                Ahead& ahead) const {
    constexpr int kWidth = kGroups * kLanes;
    if ((kGroups - 1) * kLanes >= kImpreciseRows || count > kImpreciseRows)
      return score<Words, kGroups>(query, latents, words, n, factor, scores, row_max, ahead);
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) row_max[g] = broadcast(-kInfinity);
    for (int w = 0; w < words; w += kPartWords) {
      const bool is_last = w + kPartWords >= words;
      multiply_rows<Words, kGroups>(query + w * kWidth, latents.rows + w, latents.stride,
                                    minimum(kPartWords, words - w), n,
                                    w == 0 ? scores : grad_scores, nullptr, ahead);
      for (int j = 0; j < n; j++) VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
          const int at = j * kWidth + g * kLanes;
          if (w > 0) store(scores + at, load(scores + at) + load(grad_scores + at));
          if (is_last) row_max[g] = max(row_max[g], load(scores + at) * broadcast(factor));
        }
    }
  }

  // The softmax of some queries over n packed latents, without its weights.
  template <int kGroups>
  VLMFAST_NOINLINE void statistics(const TokenRows<T>& queries, int count, int n,
                                   Softmax* softmax) const {
    Prefetcher none;
    const Operand packed{keys, words};
    pack_transposed<Words, kGroups>(queries, count, problem.head_dim, sign, query);
    softmax->clear();
    for (int first = 0; first < n; first += kBlock) {
      const int m = minimum(kBlock, n - first);
      Vec row_max[kGroups], subtracted[kGroups];
      float rescale[kTile];
      scores_of<kGroups>(count, packed.from(first), m, row_max, none);
      softmax->raise<kGroups>(row_max, subtracted, rescale);
      softmax->weigh<Words, kGroups>(scores, m, factor, subtracted);
    }
  }

  VLMFAST_INLINE Softmax statistics(const CrossAttentionTask& task, int head, Tokens tile,
                                    int n) const {
    Softmax softmax;
    with_groups(tile.count, [&](auto groups) VLMFAST_INLINE_LAMBDA {
      const TokenRows<T> queries(rows_of<T>(problem.query, task.batch, head), tile);
      statistics<decltype(groups)::value>(queries, tile.count, n, &softmax);
    });
    return softmax;
  }

  // grad_out . out - grad_logsumexp of each row, and its logsumexp as split_logsumexp gives it.
  VLMFAST_INLINE void row_values(const CrossAttentionTask& task, int head, Tokens tile, int n,
                                 float* delta, float* top, float* share) const {
    const Rows<T> grad = rows_of<T>(problem.grad_out, task.batch, head);
    const Rows<T> out = rows_of<T>(problem.out, task.batch, head);
    reduce_rows(
        tile.count, delta,
        [&](int i) VLMFAST_INLINE_LAMBDA {
          const int token = tile.index[i];
          Vec sum = zero();
          for (int d = 0; d < problem.value_dim; d += kLanes) {
            const int m = minimum(kLanes, problem.value_dim - d);
            sum = fma(load_columns(grad, token, d, m), load_first(out.row(token) + d, m), sum);
          }
          return sum;
        },
        [&](Vec a, Vec b) VLMFAST_INLINE_LAMBDA { return a + b; });
    const int64_t row = first_row(task, head);
    const int64_t held_row = (int64_t)(head - task.head * problem.group) * problem.tokens;
    // Lanes without a query get weights of exp2(-inf) = 0.
    for (int i = tile.count; i < kTile; i++) delta[i] = share[i] = 0.f, top[i] = kInfinity;
    bool precise = problem.many_images || tile.count > kImpreciseRows;
    for (int i = 0; i < tile.count; i++) {
      const int token = tile.index[i];
      const float logsumexp = problem.logsumexp[row + token];
      if (problem.many_images) {
        top[i] = rows.tops[held_row + token];
        share[i] = rows.sums[held_row + token];
      } else {
        precise &= split_logsumexp<T>(logsumexp, top + i, share + i);
      }
      if (logsumexp == -kInfinity)
        delta[i] = 0.f;
      else if (problem.grad_logsumexp != nullptr)
        delta[i] -= problem.grad_logsumexp[row + token];
    }
    if (precise) return;
    const Softmax softmax = statistics(task, head, tile, n);
    for (int i = 0; i < tile.count; i++)
      if (top[i] != kInfinity) top[i] = softmax.top[i], share[i] = 1.f / softmax.sum[i];
  }

  VLMFAST_INLINE int64_t first_row(const CrossAttentionTask& task, int head) const {
    return ((int64_t)task.batch * problem.heads + head) * problem.tokens;
  }

  // P and dS of a block of n latents from `grad_scores` and weight_at(at, g), which is P. With fp32
  // words they replace scores and grad_scores; with bf16 words `left` and `grad_left` get them as
  // pairs of queries, and grad_scores gets dS as pairs of latents. Up to a multiple of kRowStep
  // there are zeros.
  template <int kGroups, class Weight>
  VLMFAST_INLINE void gradients(int count, int n, const float* delta, Weight weight_at) const {
    write_gradients<Words, kGroups>(
        n, round_up(n, kRowStep), left, grad_left, grad_scores,
        [&](int, int at, int g, Vec* weight, Vec* grad) VLMFAST_INLINE_LAMBDA {
          const int lanes = count - g * kLanes;
          const Vec p = weight_at(at, g);
          *weight = first_or(p, lanes, 0.f);
          *grad = first_or(p * (load(grad_scores + at) - load(delta + g * kLanes)), lanes, 0.f);
        });
  }

  template <int kGroups>
  VLMFAST_NOINLINE void gradients_of_part(int count, int n, const float* delta, const float* top,
                                          const float* share) const {
    Vec tops[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) tops[g] = load(top + g * kLanes);
    const Vec f = broadcast(remaining_factor<kGroups>(scores, n, factor, tops));
    gradients<kGroups>(count, n, delta, [&](int at, int g) VLMFAST_INLINE_LAMBDA {
      return exp2<Words::kExpDegree>(fms(f, load(scores + at), tops[g])) * load(share + g * kLanes);
    });
  }

  template <int kGroups>
  VLMFAST_NOINLINE void gradients_of_whole_rows(Tokens tile, int64_t row, int n,
                                                const Vec* row_max) const {
    float delta[kTile], share[kTile];
    whole_rows<Words, kGroups>(scores, grad_scores, nullptr, 1.f, n,
                               remaining_factor<kGroups>(scores, n, factor, row_max), row_max,
                               delta, share);
    if (problem.grad_logsumexp != nullptr)
      for (int i = 0; i < tile.count; i++)
        if (share[i] != 0.f) delta[i] -= problem.grad_logsumexp[row + tile.index[i]];
    gradients<kGroups>(tile.count, n, delta, [&](int at, int g) VLMFAST_INLINE_LAMBDA {
      return load(scores + at) * load(share + g * kLanes);
    });
  }

  // A tile against n packed latents. With `overwrite` it stores its share of grad_keys and
  // grad_values instead of adding it.
  template <int kGroups>
  VLMFAST_NOINLINE void run_tile(const CrossAttentionTask& task, int head, Tokens tile, int n,
                                 bool overwrite, Fetcher<T>& ahead) const {
    constexpr int kWidth = kGroups * kLanes, kDepth = kWidth / kStep;
    const TokenRows<T> query_in(rows_of<T>(problem.query, task.batch, head), tile);
    const TokenRows<T> grad_in(rows_of<T>(problem.grad_out, task.batch, head), tile);
    // Where tokens see this image alone and one block holds it, neither logsumexp nor out is
    // needed.
    const bool whole = !problem.many_images && n <= kBlock;
    float delta[kTile], top[kTile], share[kTile];
    if (!whole) row_values(task, head, tile, n, delta, top, share);
    pack_transposed<Words, kGroups>(query_in, tile.count, problem.head_dim, sign, query);
    pack_transposed<Words, kGroups>(grad_in, tile.count, problem.value_dim, 1.f, grad_out);
    if (problem.wants_key_value) {
      pack_row_pairs<Words>(query_in, tile.count, kWidth, problem.head_dim, stride, query_rows);
      pack_row_pairs<Words>(grad_in, tile.count, kWidth, problem.value_dim, value_stride,
                            grad_out_rows);
    }
    const int depth = (tile.count + kStep - 1) / kStep;
    const Operand packed{keys, words};
    for (int first = 0; first < n; first += kBlock) {
      const int m = minimum(kBlock, n - first);
      Vec row_max[kGroups];
      scores_of<kGroups>(tile.count, packed.from(first), m, row_max, ahead);
      multiply_rows<Words, kGroups>(grad_out, values + (int64_t)first * value_words, value_words,
                                    value_words, m, grad_scores, nullptr, ahead);
      if (whole)
        gradients_of_whole_rows<kGroups>(tile, first_row(task, head), m, row_max);
      else
        gradients_of_part<kGroups>(tile.count, m, delta, top, share);
      if (problem.wants_key_value) {
        outer_accumulate<Words>(left, kDepth, grad_out_rows, depth, m, overwrite,
                                grad_values + (int64_t)first * value_stride, value_stride / kLanes);
        outer_accumulate<Words>(grad_left, kDepth, query_rows, depth, m, overwrite,
                                grad_keys + (int64_t)first * stride, stride / kLanes);
      }
      if (problem.wants_query)
        outer_accumulate<Words, true>(
            grad_scores, kWidth, key_rows + (int64_t)first / kStep * stride,
            (m + kStep - 1) / kStep, tile.count, first == 0, grad_query, stride / kLanes);
    }
    if (problem.wants_query) store_grad_query(task, head, tile);
  }

  VLMFAST_INLINE void tile(const CrossAttentionTask& task, int head, Tokens tile, Tokens later,
                           int n, bool overwrite, Prefetcher& ahead) const {
    Fetcher<T> fetcher(later, ahead);
    fetcher.add(rows_of<T>(problem.query, task.batch, head), problem.head_dim);
    fetcher.add(rows_of<T>(problem.grad_out, task.batch, head), problem.value_dim);
    if (problem.many_images || n > kBlock)
      fetcher.add(rows_of<T>(problem.out, task.batch, head), problem.value_dim);
    if (problem.wants_query && !problem.many_images)
      fetcher.add(rows_of<T>(problem.grad_query, task.batch, head), problem.head_dim);
    with_groups(tile.count, [&](auto groups) VLMFAST_INLINE_LAMBDA {
      run_tile<decltype(groups)::value>(task, head, tile, n, overwrite, fetcher);
    });
  }

  VLMFAST_INLINE float* partial_grad_query(const CrossAttentionTask& task, int head) const {
    return problem.grad_query_splits + task.split * problem.grad_query_split_size +
           ((int64_t)task.batch * problem.heads + head) * problem.tokens * problem.head_dim;
  }

  VLMFAST_INLINE void store_grad_query(const CrossAttentionTask& task, int head,
                                       Tokens tile) const {
    const Vec scale = broadcast(problem.scale);
    for (int i = 0; i < tile.count; i++) {
      const int token = tile.index[i];
      float* grad = grad_query + (int64_t)i * stride;
      if (problem.many_images) {
        float* target = partial_grad_query(task, head) + (int64_t)token * problem.head_dim;
        for (int d = 0; d < problem.head_dim; d += kLanes) {
          const int n = minimum(kLanes, problem.head_dim - d);
          store_first(target + d, fma(load(grad + d), scale, load_first(target + d, n)), n);
        }
      } else {
        store_scaled(problem.grad_query.at<T>(task.batch, head, token), grad, problem.head_dim,
                     scale);
      }
    }
  }

  VLMFAST_INLINE void pack(const CrossAttentionTask& task, int image, int n) const {
    const Rows<T> key = latents_of<T>(problem.key, task.batch, task.head, image);
    const Rows<T> value = latents_of<T>(problem.value, task.batch, task.head, image);
    const int padded = round_up(n, kRowStep);
    pack_rows<Words>(key, n, padded, problem.head_dim, words, keys);
    pack_rows<Words>(value, n, padded, problem.value_dim, value_words, values);
    if (problem.wants_query && key_rows != keys)
      pack_row_pairs<Words>(key, n, padded, problem.head_dim, stride, key_rows);
  }

  VLMFAST_INLINE void clear_grad_latents() const {
    const int64_t padded = round_up(problem.latents, kRowStep);
    clear(grad_keys, padded * stride);
    clear(grad_values, padded * value_stride);
  }

  VLMFAST_INLINE void store_grad_latents(const CrossAttentionTask& task, int image) const {
    const Strided key = problem.grad_key.image(image, sizeof(T)),
                  value = problem.grad_value.image(image, sizeof(T));
    const int64_t key_head = (int64_t)task.batch * problem.key_heads + task.head;
    const float* uniform = problem.uniform_gradient == nullptr
                               ? nullptr
                               : problem.uniform_gradient + key_head * problem.value_dim;
    const Vec scale = broadcast(problem.scale);
    for (int j = 0; j < problem.latents; j++) {
      store_scaled(key.at<T>(task.batch, task.head, j), grad_keys + (int64_t)j * stride,
                   problem.head_dim, scale);
      T* target = value.at<T>(task.batch, task.head, j);
      if (uniform == nullptr) {
        store_scaled(target, grad_values + (int64_t)j * value_stride, problem.value_dim,
                     broadcast(1.f));
        continue;
      }
      for (int d = 0; d < problem.value_dim; d += kLanes) {
        const int n = minimum(kLanes, problem.value_dim - d);
        const Vec sum = load(grad_values + (int64_t)j * value_stride + d);
        store_first(target + d, sum + load_first(uniform + d, n), n);
      }
    }
  }

  // Requests what `next` reads and writes first, spread over this task.
  VLMFAST_INLINE Prefetcher prefetcher(const CrossAttentionTask& next, int64_t steps) const {
    Prefetcher result;
    if (!problem.prefetch || problem.many_images || next.image_begin >= next.image_end)
      return result;
    const int image = next.image_begin;
    const auto add_latents = [&](const StridedImages& tensor, int dim) {
      result.add(latents_of<T>(tensor, next.batch, next.head, image), problem.latents, dim);
    };
    const Tokens tokens{problem.order + next.batch * problem.order_size + next.begin,
                        next.end - next.begin};
    const auto add_tokens = [&](const Strided& tensor, int dim) {
      const Rows<T> all = rows_of<T>(tensor, next.batch, next.head * problem.group);
      result.add(rows_from(all, tokens.index[0]), minimum(tokens.count, kTilesAhead * kTile), dim);
    };
    add_latents(problem.key, problem.head_dim);
    add_latents(problem.value, problem.value_dim);
    if (tokens.count > 0 && tokens.adjacent()) {
      add_tokens(problem.query, problem.head_dim);
      add_tokens(problem.grad_out, problem.value_dim);
      if (problem.latents > kBlock) add_tokens(problem.out, problem.value_dim);
      if (problem.wants_query) add_tokens(problem.grad_query, problem.head_dim);
    }
    if (problem.wants_key_value) {
      add_latents(problem.grad_key, problem.head_dim);
      add_latents(problem.grad_value, problem.value_dim);
    }
    result.spread_over(steps);
    return result;
  }

  // Calls body(query head, tile of the tokens, tile to fetch meanwhile).
  template <class Body>
  VLMFAST_INLINE void for_each_head_tile(const CrossAttentionTask& task, Tokens tokens,
                                         Body body) const {
    for (int h = 0; h < problem.group; h++)
      for_each_tile(tokens, [&](Tokens tile, Tokens later) VLMFAST_INLINE_LAMBDA {
        if (!problem.prefetch) later.count = 0;
        body(task.head * problem.group + h, tile, later);
      });
  }

  VLMFAST_INLINE void run_image(const CrossAttentionTask& task, const CrossAttentionTask& next,
                                int image) const {
    bool overwrite = true;
    for_each_list(problem, task.batch, image, [&](Tokens tokens, int n) {
      if (overwrite && n < problem.latents && problem.wants_key_value) {
        clear_grad_latents();
        overwrite = false;
      }
      const int64_t steps = product_steps(tokens, n, words + value_words);
      Prefetcher ahead = prefetcher(next, steps * problem.group);
      pack(task, image, n);
      for_each_head_tile(task, tokens, [&](int head, Tokens part, Tokens later) {
        tile(task, head, part, later, n, overwrite, ahead);
        overwrite = false;
      });
    });
    if (!problem.wants_key_value) return;
    if (overwrite) clear_grad_latents();
    store_grad_latents(task, image);
  }

  // Every row's logsumexp, split into tops and sums, before any image's share of the gradients:
  // from what forward left, or, where rounding has taken too much of that, from all images afresh.
  VLMFAST_INLINE void prepare_rows(const CrossAttentionTask& task) const {
    const int64_t held = (int64_t)problem.group * problem.tokens;
    const float* logsumexp =
        problem.logsumexp +
        ((int64_t)task.batch * problem.heads + task.head * problem.group) * problem.tokens;
    bool precise = problem.tokens > kImpreciseRows && problem.latents > kFewLatents;
    for (int64_t i = 0; i < held; i++)
      precise &= split_logsumexp<T>(logsumexp[i], rows.tops + i, rows.sums + i);
    if (precise) return;
    rows.clear(held);
    for (int image = 0; image < problem.images; image++)
      for_each_list(problem, task.batch, image, [&](Tokens tokens, int n) {
        pack(task, image, n);
        for_each_head_tile(task, tokens, [&](int head, Tokens part, Tokens) {
          float kept[kTile], added[kTile];
          const Softmax softmax = statistics(task, head, part, n);
          rows.join(softmax, part, (int64_t)(head - task.head * problem.group) * problem.tokens,
                    kept, added);
        });
      });
    for (int64_t i = 0; i < held; i++) {
      if (rows.sums[i] == 0.f)
        split_logsumexp<T>(-kInfinity, rows.tops + i, rows.sums + i);
      else
        rows.sums[i] = 1.f / rows.sums[i];
    }
  }

  void run(const CrossAttentionTask& task, const CrossAttentionTask& next) const {
    if (!problem.many_images) return run_image(task, next, task.image_begin);
    prepare_rows(task);
    if (problem.wants_query) {
      float* target = partial_grad_query(task, task.head * problem.group);
      const int64_t end = (int64_t)problem.group * problem.tokens * problem.head_dim;
      for (int64_t i = 0; i < end; i++) target[i] = 0.f;
    }
    for (int image = task.image_begin; image < task.image_end; image++)
      run_image(task, next, image);
  }
};

}  // namespace
}  // namespace vlmfast::cpu::VLMFAST_VARIANT
