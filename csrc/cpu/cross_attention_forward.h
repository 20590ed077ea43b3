// Forward: the tokens of each image against its latents.
#pragma once
#include "cpu/cross_attention_scores.h"
#include "cpu/tile/scratch.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

template <class Words, class T>
struct Forward {
  const CrossAttentionForward& problem;
  int words, value_vectors, value_stride;
  float factor, sign;  // of the products, before exp2, and of the packed queries
  float *keys, *values, *query, *scores, *out;
  // Where tokens may see several images:
  JoinedRows rows{};
  float* row_out;
  int64_t scratch_size;

  Forward(const CrossAttentionForward& p, float* scratch) : problem(p) {
    words = word_count<Words>(p.head_dim);
    value_stride = round_up(p.value_dim, kLanes);
    value_vectors = value_stride / kLanes;
    factor = __builtin_fabsf(p.scale) * kLog2E;
    sign = p.scale < 0 ? -1.f : 1.f;
    Arena arena{scratch};
    const int64_t padded = round_up(p.latents, kRowStep);
    keys = arena.take(padded * words);
    values = arena.take(padded / Words::kElements * value_stride);
    query = arena.take((int64_t)kTile * round_up(maximum(words, p.head_dim), kLanes));
    scores = arena.take(maximum(kScores, round_up(p.latents, kLanes)));
    out = arena.take((int64_t)kTile * value_stride);
    const int64_t held = p.many_images ? (int64_t)p.group * p.max_queries : 0;
    rows.tops = arena.take(held);
    rows.sums = arena.take(held);
    row_out = arena.take(held * value_stride);
    scratch_size = arena.used;
  }

  // The queries of a tile against n packed latents: `out` becomes the weighted sums, still to be
  // divided.
  template <int kGroups>
  VLMFAST_NOINLINE void attend(const TokenRows<T>& queries, int count, const Operand& image_keys,
                               int n, Fetcher<T>& ahead, Softmax* softmax) const {
    constexpr int kWidth = kGroups * kLanes, kStep = Words::kElements;
    pack_transposed<Words, kGroups>(queries, count, problem.head_dim, sign, query);
    softmax->clear();
    for (int first = 0; first < n; first += kBlock) {
      const int m = minimum(kBlock, n - first);
      Vec row_max[kGroups], subtracted[kGroups];
      float rescale[kTile];
      score<Words, kGroups>(query, image_keys.from(first), words, m, factor, scores, row_max,
                            ahead);
      softmax->raise<kGroups>(row_max, subtracted, rescale);
      softmax->weigh<Words, kGroups>(scores, m, factor, subtracted);
      if (first > 0)
        for (int i = 0; i < count; i++)
          for (int d = 0; d < value_stride; d += kLanes) {
            float* target = out + (int64_t)i * value_stride + d;
            store(target, load(target) * broadcast(rescale[i]));
          }
      outer_accumulate<Words, true>(scores, kWidth, values + (int64_t)first / kStep * value_stride,
                                    (m + kStep - 1) / kStep, count, first == 0, out, value_vectors);
    }
  }

  // One query against n latents in place: `out` starts with the weighted sum, still to be divided.
  VLMFAST_NOINLINE void attend_row(const Rows<T>& queries, int token, Rows<T> key, Rows<T> value,
                                   int n, Prefetcher& ahead, Softmax* softmax) const {
    const int dim = problem.head_dim;
    load_row(queries, token, dim, query);
    Vec row_max = broadcast(-kInfinity);
    for (int first = 0; first < n; first += kLanes) {
      const int m = minimum(kLanes, n - first);
      ahead.step();
      reduce_rows(
          m, scores + first,
          [&](int j) VLMFAST_INLINE_LAMBDA {
            Vec sum = zero();
            for (int d = 0; d < dim; d += kLanes)
              sum = fma(load_columns(key, first + j, d, minimum(kLanes, dim - d)), load(query + d),
                        sum);
            return sum;
          },
          [&](Vec a, Vec b) VLMFAST_INLINE_LAMBDA { return a + b; });
      const Vec logits = load(scores + first) * broadcast(problem.scale * kLog2E);
      const Vec score = first_or(logits, m, -kInfinity);
      store(scores + first, score);
      row_max = max(row_max, score);
    }
    softmax->clear();
    const float top = horizontal_max(row_max), subtracted = top == -kInfinity ? 0.f : top;
    Vec total = zero();
    for (int first = 0; first < n; first += kLanes) {
      const Vec p = exp2<Words::kExpDegree>(load(scores + first) - broadcast(subtracted));
      store(scores + first, p);
      total = total + p;
    }
    softmax->top[0] = top;
    softmax->sum[0] = horizontal_sum(total);
    for (int d = 0; d < problem.value_dim; d += kLanes) {
      const int columns = minimum(kLanes, problem.value_dim - d);
      Vec sums[4] = {zero(), zero(), zero(), zero()};
      int j = 0;
      for (; j + 4 <= n; j += 4)
        VLMFAST_UNROLL for (int i = 0; i < 4; i++) sums[i] =
            fma(broadcast(scores[j + i]), load_columns(value, j + i, d, columns), sums[i]);
      for (; j < n; j++)
        sums[0] = fma(broadcast(scores[j]), load_columns(value, j, d, columns), sums[0]);
      store(out + d, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
  }

  VLMFAST_INLINE float* logsumexp(int batch, int head) const {
    return problem.logsumexp + ((int64_t)batch * problem.heads + head) * problem.tokens;
  }

  VLMFAST_INLINE void store_row(int batch, int head, int token, const float* source,
                                float scale) const {
    store_scaled(problem.out.at<T>(batch, head, token), source, problem.value_dim,
                 broadcast(scale));
  }

  // Results of a tile from its weighted sums. Rows that see nothing have a sum of 0 and give 0.
  VLMFAST_INLINE void store_tile(const Softmax& softmax, int batch, int head, Tokens tile,
                                 const float* sums) const {
    float logs[kTile], logsumexps[kTile], factors[kTile];
    log2_of_sums(softmax.sum, logs);
    for (int i = 0; i < kTile; i++) {
      logsumexps[i] = natural_logsumexp(softmax.top[i], logs[i]);
      factors[i] = softmax.sum[i] == 0.f ? 0.f : 1.f / softmax.sum[i];
    }
    float* target = logsumexp(batch, head);
    const Rows<T> rows = rows_of<T>(problem.out, batch, head);
    for (int i = 0; i < tile.count; i++) {
      const int token = tile.index[i];
      target[token] = logsumexps[i];
      store_scaled(rows.row(token), sums + (int64_t)i * value_stride, problem.value_dim,
                   broadcast(factors[i]));
    }
  }

  VLMFAST_INLINE void store_empty(int batch, int head, int token) const {
    store_zeros(problem.out.at<T>(batch, head, token), problem.value_dim);
    logsumexp(batch, head)[token] = -kInfinity;
  }

  // Joins the results of a tile to the rows from first_row on.
  VLMFAST_INLINE void join(const Softmax& softmax, Tokens tile, int64_t first_row) const {
    float kept[kTile], added[kTile];
    rows.join(softmax, tile, first_row, kept, added);
    for (int i = 0; i < tile.count; i++) {
      float* target = row_out + (first_row + tile.index[i]) * value_stride;
      const float* source = out + (int64_t)i * value_stride;
      for (int d = 0; d < value_stride; d += kLanes)
        store(target + d,
              fma(load(target + d), broadcast(kept[i]), load(source + d) * broadcast(added[i])));
    }
  }

  VLMFAST_INLINE bool is_few(Tokens tokens) const {
    return (int64_t)tokens.count * problem.group <= kFewRows;
  }

  // The keys of an image as words: packed, or where they lie if one tile alone reads them.
  VLMFAST_INLINE Operand packed_keys(const CrossAttentionTask& task, int image, Tokens tokens,
                                     int n) const {
    const Rows<T> rows = latents_of<T>(problem.key, task.batch, task.head, image);
    constexpr int kElements = Words::kElements;
    if constexpr (kElements * sizeof(T) == sizeof(float))
      if (rows.column_stride == 1 && rows.row_stride % kElements == 0 &&
          problem.head_dim % kRowStep == 0 && problem.group == 1 && tokens.count <= kTile)
        return {(const float*)rows.data, rows.row_stride / kElements};
    pack_rows<Words>(rows, n, round_up(n, kRowStep), problem.head_dim, words, keys);
    return {keys, words};
  }

  // All query heads' tokens against n latents of an image; take(head, tile, softmax) takes
  // the weighted sums from `out`.
  template <class Take>
  VLMFAST_INLINE void attend_image(const CrossAttentionTask& task, int image, Tokens tokens, int n,
                                   Prefetcher& ahead, Take take) const {
    Softmax softmax;
    const bool few = is_few(tokens);
    Operand image_keys{};
    if (!few) {
      image_keys = packed_keys(task, image, tokens, n);
      pack_row_pairs<Words>(latents_of<T>(problem.value, task.batch, task.head, image), n,
                            round_up(n, kRowStep), problem.value_dim, value_stride, values);
    }
    for (int h = 0; h < problem.group; h++) {
      const int head = task.head * problem.group + h;
      if (few) {
        for (int i = 0; i < tokens.count; i++) {
          attend_row(rows_of<T>(problem.query, task.batch, head), tokens.index[i],
                     latents_of<T>(problem.key, task.batch, task.head, image),
                     latents_of<T>(problem.value, task.batch, task.head, image), n, ahead,
                     &softmax);
          take(head, tokens.part(i, 1), softmax);
        }
      } else {
        for_each_tile(tokens, [&](Tokens tile, Tokens later) VLMFAST_INLINE_LAMBDA {
          if (!problem.prefetch) later.count = 0;
          const Rows<T> queries = rows_of<T>(problem.query, task.batch, head);
          Fetcher<T> fetcher(later, ahead);
          fetcher.add(queries, problem.head_dim);
          if (!problem.many_images)
            fetcher.add(rows_of<T>(problem.out, task.batch, head), problem.value_dim);
          with_groups(tile.count, [&](auto groups) VLMFAST_INLINE_LAMBDA {
            attend<decltype(groups)::value>(TokenRows<T>(queries, tile), tile.count, image_keys, n,
                                            fetcher, &softmax);
          });
          take(head, tile, softmax);
        });
      }
    }
  }

  // Requests what `next` reads and writes, spread over this task.
  VLMFAST_INLINE Prefetcher prefetcher(const CrossAttentionTask& task,
                                       const CrossAttentionTask& next, int64_t steps) const {
    Prefetcher result;
    if (!problem.prefetch || next.image_begin >= next.image_end) return result;
    if (next.batch != task.batch || next.head != task.head ||
        next.image_begin != task.image_begin) {
      result.add(latents_of<T>(problem.key, next.batch, next.head, next.image_begin),
                 problem.latents, problem.head_dim);
      result.add(latents_of<T>(problem.value, next.batch, next.head, next.image_begin),
                 problem.latents, problem.value_dim);
    }
    const Tokens tokens{problem.order + next.batch * problem.order_size + next.begin,
                        next.end - next.begin};
    if (tokens.count > 0 && tokens.adjacent()) {
      const int head = next.head * problem.group;
      const int count = minimum(tokens.count, kTilesAhead * kTile);
      result.add(rows_from(rows_of<T>(problem.query, next.batch, head), tokens.index[0]), count,
                 problem.head_dim);
      result.add(rows_from(rows_of<T>(problem.out, next.batch, head), tokens.index[0]), count,
                 problem.value_dim);
    }
    result.spread_over(steps);
    return result;
  }

  VLMFAST_INLINE void run_one(const CrossAttentionTask& task,
                              const CrossAttentionTask& next) const {
    const Tokens tokens{problem.order + task.batch * problem.order_size + task.begin,
                        task.end - task.begin};
    const int image = task.image_begin, n = length_of(problem, task.batch, image);
    if (n == 0) {
      for (int h = 0; h < problem.group; h++)
        for (int i = 0; i < tokens.count; i++)
          store_empty(task.batch, task.head * problem.group + h, tokens.index[i]);
      return;
    }
    const int64_t steps = is_few(tokens) ? tokens.count * (int64_t)((n + kLanes - 1) / kLanes)
                                         : product_steps(tokens, n, words);
    Prefetcher ahead = prefetcher(task, next, steps * problem.group);
    attend_image(task, image, tokens, n, ahead,
                 [&](int head, Tokens tile, const Softmax& softmax)
                     VLMFAST_INLINE_LAMBDA { store_tile(softmax, task.batch, head, tile, out); });
  }

  VLMFAST_INLINE void run_many_images(const CrossAttentionTask& task) const {
    const int range = task.end - task.begin;
    const int64_t held = (int64_t)problem.group * range;
    const auto first_row = [&](int head) {
      return (int64_t)(head - task.head * problem.group) * range - task.begin;
    };
    rows.clear(held);
    clear(row_out, held * value_stride);
    for (int image = task.image_begin; image < task.image_end; image++)
      for_each_list(problem, task.batch, image, [&](Tokens all, int n) {
        const Tokens tokens = all.within(task.begin, task.end);
        Prefetcher none;
        if (tokens.count > 0)
          attend_image(task, image, tokens, n, none,
                       [&](int head, Tokens tile, const Softmax& softmax)
                           VLMFAST_INLINE_LAMBDA { join(softmax, tile, first_row(head)); });
      });
    for (int h = 0; h < problem.group; h++)
      for (int token = task.begin; token < task.end; token++) {
        if (problem.image_index[(int64_t)task.batch * problem.tokens + token] == kUniformRow)
          continue;
        const int64_t row = (int64_t)h * range + token - task.begin;
        Softmax softmax;
        softmax.clear();
        softmax.top[0] = rows.tops[row];
        softmax.sum[0] = rows.sums[row];
        store_tile(softmax, task.batch, task.head * problem.group + h, {&token, 1},
                   row_out + row * value_stride);
      }
  }

  void run(const CrossAttentionTask& task, const CrossAttentionTask& next) const {
    if (problem.many_images)
      run_many_images(task);
    else
      run_one(task, next);
  }

  // The mean of all values of a key head, into `out`.
  VLMFAST_INLINE void mean(int batch, int key_head) const {
    const Vec share = broadcast(1.f / ((float)problem.images * problem.latents));
    for (int d = 0; d < problem.value_dim; d += kLanes) {
      const int n = minimum(kLanes, problem.value_dim - d);
      Vec total = zero();
      for (int image = 0; image < problem.images; image++) {
        const Rows<T> value = latents_of<T>(problem.value, batch, key_head, image);
        Vec sum = zero();
        for (int j = 0; j < problem.latents; j++) sum = sum + load_columns(value, j, d, n);
        total = total + sum;
      }
      store(out + d, total * share);
    }
  }

  void fill_rows(int batch, int key_head) const {
    const int32_t* kinds = problem.image_index + (int64_t)batch * problem.tokens;
    const int64_t values = (int64_t)problem.images * problem.latents;
    float log_count = (float)values;
    log2_in_place(&log_count, 1);
    bool has_mean = false;
    for (int token = 0; token < problem.tokens; token++) {
      const bool uniform = kinds[token] == kUniformRow && values > 0;
      if (uniform && !has_mean) {
        mean(batch, key_head);
        has_mean = true;
      }
      for (int h = 0; h < problem.group; h++) {
        const int head = key_head * problem.group + h;
        if (uniform) {
          store_row(batch, head, token, out, 1.f);
          logsumexp(batch, head)[token] = natural_logsumexp(0.f, log_count);
        } else if (kinds[token] == kUniformRow ||
                   (kinds[token] == kZeroRow && !problem.many_images)) {
          store_empty(batch, head, token);
        }
      }
    }
  }
};

}  // namespace
}  // namespace vlmfast::cpu::VLMFAST_VARIANT
