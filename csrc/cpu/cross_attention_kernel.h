// Cross-attention of text tokens to images: all tokens that see an image run against its latents,
// which are packed once.
//
// An image's tokens are given as a list. Where they follow each other in memory, as they do when
// images stand in the order of the text, a tile of them is read in place, else gathered. A tile
// never holds a token that does not see the image: so what an image holds cannot reach others, and
// nothing is computed that a mask would hide. Where a token may see several images, the rows of its
// partial results are joined by their maxima and sums; Dao et al., "FlashAttention-2", 2023, say
// how. Everything is computed in units of log2, so that exp2 needs no further factor.
#include "cpu/cross_attention.h"
#include "cpu/tile.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

constexpr int kBlock = 96;  // latents whose scores are held at once
constexpr int kMaxTile = kMaxGroups * kLanes;
// Up to so many queries of an image run one by one: tiles would leave most lanes idle.
constexpr int kFewRows = kLanes / 4;
// Beyond this |logsumexp| its rounding to fp32 would show in exp(score - logsumexp), beside the
// rounding of the inputs.
template <class T>
constexpr float kImpreciseLogsumexp = sizeof(T) == 4 ? 16.f : 1024.f;

template <int n>
struct Groups {
  static constexpr int value = n;
};

template <class Body>
VLMFAST_INLINE void with_groups(int groups, Body body) {
  switch (groups) {
    case 1:
      return body(Groups<1>());
    case 2:
      return body(Groups<2>());
#if VLMFAST_LEVEL >= 1
    case 3:
      return body(Groups<3>());
#endif
#if VLMFAST_LEVEL >= 2
    case 4:
      return body(Groups<4>());
#endif
  }
}

// Tokens that follow each other in their list, and see an image.
struct Tokens {
  const int32_t* index;
  int count;

  VLMFAST_INLINE bool adjacent() const { return index[count - 1] - index[0] == count - 1; }
  VLMFAST_INLINE Tokens part(int first, int n) const { return {index + first, n}; }

  // Those in [first, last), of a list in increasing order.
  VLMFAST_INLINE Tokens within(int first, int last) const {
    const int begin = position_of(first);
    return part(begin, position_of(last) - begin);
  }

 private:
  VLMFAST_INLINE int position_of(int token) const {
    int low = 0, high = count;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (index[middle] < token)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

// Calls body(tile of the tokens, groups of lanes). Tiles are of nearly equal size: a short last
// tile would use few lanes and few accumulators.
template <class Body>
VLMFAST_INLINE void for_each_tile(Tokens tokens, Body body) {
  const int vectors = (tokens.count + kLanes - 1) / kLanes;
  const int tiles = (vectors + kMaxGroups - 1) / kMaxGroups;
  for (int t = 0, first = 0; t < tiles; t++) {
    const int end = (int)((int64_t)vectors * (t + 1) / tiles);
    const int begin = first * kLanes, count = minimum(tokens.count, end * kLanes) - begin;
    with_groups(end - first, [&](auto groups) VLMFAST_INLINE_LAMBDA {
      body(tokens.part(begin, count), groups);
    });
    first = end;
  }
}

// How many latents of an image exist.
VLMFAST_INLINE int length_of(const CrossAttentionProblem& problem, int batch, int image) {
  if (problem.image_lengths == nullptr) return problem.latents;
  const int length = problem.image_lengths[(int64_t)batch * problem.images + image];
  return maximum(0, minimum(length, problem.latents));
}

// Calls body(tokens, latents) for the lists of tokens that see an image: those that image_lengths
// binds, and those that see all of it. Lists that are empty, or see nothing, are left out.
template <class Body>
VLMFAST_INLINE void for_each_list(const CrossAttentionProblem& problem, int batch, int image,
                                  Body body) {
  const int32_t *order = problem.order + batch * problem.order_size,
                *segment = problem.segments + ((int64_t)batch * problem.images + image) * 3;
  for (int i = 0; i < 2; i++) {
    const Tokens tokens{order + segment[i], segment[i + 1] - segment[i]};
    const int n = i == 0 ? length_of(problem, batch, image) : problem.latents;
    if (tokens.count > 0 && n > 0) body(tokens, n);
  }
}

template <class T>
VLMFAST_INLINE Rows<T> rows_of(const Strided& tensor, int batch, int head) {
  return {tensor.at<T>(batch, head, 0), tensor.stride[2], tensor.stride[3]};
}

template <class T>
VLMFAST_INLINE Rows<T> latents_of(const StridedImages& tensor, int batch, int head, int image) {
  return rows_of<T>(tensor.image(image, sizeof(T)), batch, head);
}

// The rows of some tokens: in place, or gathered into `buffer`.
template <class T>
VLMFAST_INLINE Rows<T> token_rows(const Strided& tensor, int batch, int head, Tokens tokens,
                                  int columns, T* buffer) {
  const Rows<T> all = rows_of<T>(tensor, batch, head);
  if (tokens.adjacent()) return {all.row(tokens.index[0]), all.row_stride, all.column_stride};
  for (int i = 0; i < tokens.count; i++) {
    const T* row = all.row(tokens.index[i]);
    T* target = buffer + (int64_t)i * columns;
    if (all.column_stride == 1)
      __builtin_memcpy(target, row, columns * sizeof(T));
    else
      for (int d = 0; d < columns; d++) target[d] = row[d * all.column_stride];
  }
  return {buffer, columns, 1};
}

// The rows of some tokens = factor * the transpose of source[column][kGroups * kLanes].
template <int kGroups, class T>
VLMFAST_INLINE void store_token_rows(const float* source, const Vec* factor, const Strided& tensor,
                                     int batch, int head, Tokens tokens, int columns, T* buffer) {
  T* first = tensor.at<T>(batch, head, tokens.index[0]);
  if (tokens.adjacent())
    return store_transposed<kGroups>(source, factor, first, tensor.stride[2], tokens.count,
                                     columns);
  store_transposed<kGroups>(source, factor, buffer, columns, tokens.count, columns);
  for (int i = 0; i < tokens.count; i++)
    __builtin_memcpy(first + (tokens.index[i] - tokens.index[0]) * tensor.stride[2],
                     buffer + (int64_t)i * columns, columns * sizeof(T));
}

template <class T>
VLMFAST_INLINE void store_zeros(T* row, int columns) {
  __builtin_memset(row, 0, columns * sizeof(T));
}

template <class T>
VLMFAST_INLINE Vec load_columns(const Rows<T>& rows, int row, int d, int n) {
  const T* p = rows.row(row) + d * rows.column_stride;
  return rows.column_stride == 1 ? load_first(p, n)
                                 : gather_words<Fp32Words>(p, rows.column_stride, n);
}

// Running maximum (log2 units) and sum of exponentials of a tile's rows.
template <int kGroups>
struct Softmax {
  Vec most[kGroups], sum[kGroups];

  VLMFAST_INLINE Softmax() {
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      most[g] = broadcast(-kInfinity);
      sum[g] = zero();
    }
  }

  // Takes in the maximum of further scores: `subtracted` is what their exponents lose, `rescale`
  // the factor of what was summed up before.
  VLMFAST_INLINE void raise(const Vec* block_most, Vec* subtracted, Vec* rescale) {
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      const Vec next = max(most[g], block_most[g]);
      // Where there is nothing but -inf, subtracting 0 gives weights of 0, not NaN.
      subtracted[g] = select_eq(next, broadcast(-kInfinity), zero(), next);
      rescale[g] = exp2<5>(most[g] - subtracted[g]);
      sum[g] = sum[g] * rescale[g];
      most[g] = next;
    }
  }
};

// Scores of a tile against packed latents, a block at a time.
template <class Words>
struct Scores {
  const float *query, *keys;  // pack_transposed, pack_rows
  int words;
  float factor;  // still to be multiplied in
  float* scores;
  Prefetcher& ahead;

  // Those of latents [first, first + n), and their maximum, times factor.
  template <int kGroups>
  VLMFAST_INLINE void block(int first, int n, Vec* most) const {
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) most[g] = broadcast(-kInfinity);
    multiply_rows<Words, kGroups>(query, keys + (int64_t)first * words, words, n, scores, most,
                                  ahead);
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) most[g] = most[g] * broadcast(factor);
  }

  // The softmax over latents [0, n).
  template <int kGroups>
  VLMFAST_INLINE Softmax<kGroups> statistics(int n) const {
    Softmax<kGroups> softmax;
    for (int first = 0; first < n; first += kBlock) {
      const int m = minimum(kBlock, n - first);
      Vec most[kGroups], subtracted[kGroups], rescale[kGroups];
      block<kGroups>(first, m, most);
      softmax.raise(most, subtracted, rescale);
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        Vec total = zero();
        for (int j = 0; j < m; j++)
          total = total +
                  exp2<Words::kExpDegree>(fms(
                      broadcast(factor), load(scores + (j * kGroups + g) * kLanes), subtracted[g]));
        softmax.sum[g] = softmax.sum[g] + total;
      }
    }
    return softmax;
  }
};

// What scores lack of scale * log2(e) when the queries are packed.
template <class Words>
VLMFAST_INLINE float score_factor(const CrossAttentionProblem& problem) {
  return Words::kElements == 1 ? 1.f : __builtin_fabsf(problem.scale) * kLog2E;
}

// Maxima and sums of all rows, where they come from several images.
struct RowStatistics {
  float *tops, *sums;

  VLMFAST_INLINE void clear(int64_t rows) const {
    for (int64_t i = 0; i < rows; i++) tops[i] = -kInfinity, sums[i] = 0.f;
  }

  // Joins those of a tile, whose rows are first_row + its tokens: old and new results then count by
  // the factors `kept` and `added`.
  template <int kGroups>
  VLMFAST_INLINE void join(const Softmax<kGroups>& tile, Tokens tokens, int64_t first_row,
                           float* kept, float* added) const {
    constexpr int kWidth = kGroups * kLanes;
    float old_tops[kWidth], old_sums[kWidth], new_tops[kWidth], new_sums[kWidth];
    for (int i = 0; i < kWidth; i++) {
      const int64_t row = first_row + tokens.index[minimum(i, tokens.count - 1)];
      old_tops[i] = tops[row];
      old_sums[i] = sums[row];
    }
    Softmax<kGroups> joined;
    Vec subtracted[kGroups], rescale[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      joined.most[g] = load(old_tops + g * kLanes);
      joined.sum[g] = load(old_sums + g * kLanes);
    }
    joined.raise(tile.most, subtracted, rescale);
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      const Vec factor = exp2<5>(tile.most[g] - subtracted[g]);
      store(kept + g * kLanes, rescale[g]);
      store(added + g * kLanes, factor);
      store(new_tops + g * kLanes, joined.most[g]);
      store(new_sums + g * kLanes, fma(tile.sum[g], factor, joined.sum[g]));
    }
    for (int i = 0; i < tokens.count; i++) {
      tops[first_row + tokens.index[i]] = new_tops[i];
      sums[first_row + tokens.index[i]] = new_sums[i];
    }
  }
};

VLMFAST_INLINE float natural_logsumexp(float top, float log2_sum) {
  return (float)(((double)top + log2_sum) * kLn2);
}

template <class Words, class T>
struct Forward {
  const CrossAttentionForward& problem;
  int words, value_columns, value_stride;
  float *keys, *values, *query, *scores, *out;
  T* buffer;
  // Where tokens may see several images:
  RowStatistics rows{};
  float *row_out, *tile_out;
  int64_t scratch_size;

  Forward(const CrossAttentionForward& p, float* scratch) : problem(p) {
    words = word_count<Words>(p.head_dim);
    value_columns = round_up(p.value_dim, kRowStep);
    value_stride = round_up(p.value_dim, kLanes);
    Arena arena{scratch};
    const int64_t padded = round_up(p.latents, kRowStep);
    keys = arena.take(padded * words);
    values = arena.take(padded / Words::kElements * value_columns);
    query = arena.take((int64_t)round_up(maximum(words, p.head_dim), kLanes) * kMaxTile);
    scores = arena.take(maximum(kBlock * kMaxTile, round_up(p.latents, kLanes)));
    out = arena.take((int64_t)round_up(p.value_dim, kLanes) * kMaxTile);
    buffer = (T*)arena.take((int64_t)maximum(p.head_dim, p.value_dim) * kMaxTile);
    const int64_t held = p.several ? (int64_t)p.group * p.queries_most : 0;
    rows.tops = arena.take(held);
    rows.sums = arena.take(held);
    row_out = arena.take(held * value_stride);
    tile_out = arena.take(p.several ? (int64_t)kMaxTile * value_stride : 0);
    scratch_size = arena.used;
  }

  // Replaces scores by exp2(factor * score - subtracted), as pairs of rows where words are, and
  // adds them up.
  template <int kGroups>
  VLMFAST_INLINE void weights(int n, float factor, const Vec* subtracted, Vec* sum) const {
    const Vec f = broadcast(factor);
    constexpr int kStep = Words::kElements, kWidth = kGroups * kLanes;
    Vec total[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) total[g] = zero();
    for (int j = 0; j < n; j += kStep) {
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        Vec p[2] = {zero(), zero()};
        VLMFAST_UNROLL for (int i = 0; i < kStep; i++) {
          if (kStep == 2 && j + i >= n) break;
          p[i] = exp2<Words::kExpDegree>(
              fms(f, load(scores + (j + i) * kWidth + g * kLanes), subtracted[g]));
          total[g] = total[g] + p[i];
        }
        float* target = scores + (j / kStep * kGroups + g) * kLanes;
#if VLMFAST_LEVEL >= 3
        if constexpr (kStep == 2) p[0] = interleave(p[0], p[1]);
#endif
        store(target, p[0]);
      }
    }
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) sum[g] = sum[g] + total[g];
  }

  // A tile against n packed latents: `out` becomes the weighted sum, still to be divided.
  template <int kGroups>
  VLMFAST_INLINE Softmax<kGroups> attend(Rows<T> tile, int count, int n, Prefetcher& ahead) const {
    pack_transposed<Words, kGroups>(tile, count, problem.head_dim, problem.scale * kLog2E, query);
    const Scores<Words> product{query, keys, words, score_factor<Words>(problem), scores, ahead};
    Softmax<kGroups> softmax;
    for (int first = 0; first < n; first += kBlock) {
      const int m = minimum(kBlock, n - first);
      Vec most[kGroups], subtracted[kGroups], rescale[kGroups];
      product.template block<kGroups>(first, m, most);
      softmax.raise(most, subtracted, rescale);
      weights<kGroups>(m, product.factor, subtracted, softmax.sum);
      weighted_sum<Words, kGroups>(scores, values + first / Words::kElements * value_columns,
                                   value_columns, (m + Words::kElements - 1) / Words::kElements,
                                   value_columns, out, first == 0 ? nullptr : rescale);
    }
    return softmax;
  }

  // One query against n latents in place, the features or the latents along the lanes: `out` starts
  // with the weighted sum, still to be divided.
  VLMFAST_NOINLINE Softmax<1> attend_row(const T* row, int64_t stride, Rows<T> key, Rows<T> value,
                                         int n, Prefetcher& ahead) const {
    const int dim = problem.head_dim;
    for (int d = 0; d < dim; d += kLanes)
      store(query + d, load_columns(Rows<T>{row, 0, stride}, 0, d, minimum(kLanes, dim - d)) *
                           broadcast(problem.scale * kLog2E));
    Vec most = broadcast(-kInfinity);
    for (int first = 0; first < n; first += kLanes) {
      const int m = minimum(kLanes, n - first);
      ahead.step();
      Vec sums[kLanes];
      VLMFAST_UNROLL for (int i = 0; i < kLanes; i++) {
        sums[i] = zero();
        if (i < m)
          for (int d = 0; d < dim; d += kLanes)
            sums[i] = fma(load_columns(key, first + i, d, minimum(kLanes, dim - d)),
                          load(query + d), sums[i]);
      }
      transpose(sums);
      VLMFAST_UNROLL for (int half = kLanes / 2; half > 0; half /= 2)
          VLMFAST_UNROLL for (int i = 0; i < half; i++) sums[i] = sums[i] + sums[i + half];
      const Vec score = select_ge(lane_index(0), m, broadcast(-kInfinity), sums[0]);
      store(scores + first, score);
      most = max(most, score);
    }
    Softmax<1> softmax;
    const Vec top = broadcast(horizontal_max(most));
    Vec subtracted, rescale;
    softmax.raise(&top, &subtracted, &rescale);
    Vec total = zero();
    for (int first = 0; first < n; first += kLanes) {
      const Vec p = exp2<Words::kExpDegree>(load(scores + first) - subtracted);
      store(scores + first, p);
      total = total + p;
    }
    softmax.sum[0] = broadcast(horizontal_sum(total));
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
    return softmax;
  }

  VLMFAST_INLINE float* logsumexp(int batch, int head) const {
    return problem.logsumexp + ((int64_t)batch * problem.heads + head) * problem.tokens;
  }

  // 1 / sum, or 0 for rows that see nothing; log2 of the sum.
  template <int kGroups>
  VLMFAST_INLINE void reciprocals(const Softmax<kGroups>& softmax, Vec* factor, float* logs) const {
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      factor[g] = select_eq(softmax.sum[g], zero(), zero(), broadcast(1.f) / softmax.sum[g]);
      store(logs + g * kLanes, select_eq(softmax.sum[g], zero(), broadcast(1.f), softmax.sum[g]));
    }
    log2_in_place(logs, kGroups * kLanes);
  }

  template <int kGroups>
  VLMFAST_INLINE void store_tile(const Softmax<kGroups>& softmax, int batch, int head,
                                 Tokens tokens) const {
    float logs[kGroups * kLanes], tops[kGroups * kLanes];
    Vec factor[kGroups];
    reciprocals(softmax, factor, logs);
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) store(tops + g * kLanes, softmax.most[g]);
    float* target = logsumexp(batch, head);
    for (int i = 0; i < tokens.count; i++)
      target[tokens.index[i]] = natural_logsumexp(tops[i], logs[i]);
    store_token_rows<kGroups>(out, factor, problem.out, batch, head, tokens, problem.value_dim,
                              buffer);
  }

  VLMFAST_INLINE void store_row(const Softmax<1>& softmax, int batch, int head, int token) const {
    float logs[kLanes];
    Vec factor;
    reciprocals(softmax, &factor, logs);
    logsumexp(batch, head)[token] = natural_logsumexp(horizontal_max(softmax.most[0]), logs[0]);
    T* target = problem.out.at<T>(batch, head, token);
    for (int d = 0; d < problem.value_dim; d += kLanes)
      store_first(target + d, load(out + d) * factor, minimum(kLanes, problem.value_dim - d));
  }

  // Joins results[i], of token i of the tile, to the rows from first_row on.
  template <int kGroups>
  VLMFAST_INLINE void join(const Softmax<kGroups>& softmax, Tokens tokens, int64_t first_row,
                           const float* results) const {
    float kept[kGroups * kLanes], added[kGroups * kLanes];
    rows.join(softmax, tokens, first_row, kept, added);
    for (int i = 0; i < tokens.count; i++) {
      float* target = row_out + (first_row + tokens.index[i]) * value_stride;
      const float* source = results + (int64_t)i * value_stride;
      for (int d = 0; d < value_stride; d += kLanes)
        store(target + d,
              fma(load(target + d), broadcast(kept[i]), load(source + d) * broadcast(added[i])));
    }
  }

  VLMFAST_INLINE bool is_few(Tokens tokens) const {
    return (int64_t)tokens.count * problem.group <= kFewRows;
  }

  VLMFAST_INLINE void pack(const CrossAttentionTask& task, int image, int n) const {
    const int padded = round_up(n, kRowStep);
    pack_rows<Words>(latents_of<T>(problem.key, task.batch, task.head, image), n, padded,
                     problem.head_dim, words, keys);
    pack_row_pairs<Words>(latents_of<T>(problem.value, task.batch, task.head, image), n, padded,
                          problem.value_dim, value_columns, values);
  }

  // Requests what `next` reads and writes, spread over this task.
  VLMFAST_INLINE Prefetcher prefetcher(const CrossAttentionTask& task,
                                       const CrossAttentionTask& next, int64_t steps) const {
    Prefetcher result;
    if (!problem.prefetch || next.image_begin >= next.image_end) return result;
    if (next.batch != task.batch || next.head != task.head ||
        next.image_begin != task.image_begin) {
      const Rows<T> key = latents_of<T>(problem.key, next.batch, next.head, next.image_begin);
      const Rows<T> value = latents_of<T>(problem.value, next.batch, next.head, next.image_begin);
      result.add(key, problem.latents, problem.head_dim);
      result.add(value, problem.latents, problem.value_dim);
    }
    const Tokens tokens{problem.order + next.batch * problem.order_size + next.begin,
                        next.end - next.begin};
    if (!problem.several && tokens.count > 0 && tokens.adjacent()) {
      const int first = tokens.index[0], head = next.head * problem.group;
      Rows<T> in = rows_of<T>(problem.query, next.batch, head);
      Rows<T> to = rows_of<T>(problem.out, next.batch, head);
      in.data = in.row(first);
      to.data = to.row(first);
      result.add(in, tokens.count, problem.head_dim);
      result.add(to, tokens.count, problem.value_dim);
    }
    result.spread_over(steps);
    return result;
  }

  // The tokens of one query head against an image, packed where they are not few; then
  // by_tile(tile, groups, softmax) or by_row(row, softmax) takes the results from `out`.
  template <class ByTile, class ByRow>
  VLMFAST_INLINE void attend_tokens(const CrossAttentionTask& task, int head, int image,
                                    Tokens tokens, int n, Prefetcher& ahead, ByTile by_tile,
                                    ByRow by_row) const {
    if (!is_few(tokens)) {
      for_each_tile(tokens, [&](Tokens part, auto groups) {
        constexpr int kGroups = decltype(groups)::value;
        const Rows<T> tile =
            token_rows<T>(problem.query, task.batch, head, part, problem.head_dim, buffer);
        by_tile(part, groups, attend<kGroups>(tile, part.count, n, ahead));
      });
      return;
    }
    const Rows<T> queries = rows_of<T>(problem.query, task.batch, head);
    const Rows<T> key = latents_of<T>(problem.key, task.batch, task.head, image);
    const Rows<T> value = latents_of<T>(problem.value, task.batch, task.head, image);
    for (int i = 0; i < tokens.count; i++)
      by_row(tokens.part(i, 1),
             attend_row(queries.row(tokens.index[i]), queries.column_stride, key, value, n, ahead));
  }

  VLMFAST_INLINE void run_one(const CrossAttentionTask& task,
                              const CrossAttentionTask& next) const {
    const Tokens tokens{problem.order + task.batch * problem.order_size + task.begin,
                        task.end - task.begin};
    const int image = task.image_begin, n = length_of(problem, task.batch, image);
    if (n == 0) return fill_zeros(task, tokens);
    const int64_t per_step = is_few(tokens) ? kLanes : kRowStep * kMaxTile;
    Prefetcher ahead =
        prefetcher(task, next, (int64_t)tokens.count * problem.group * n / per_step + 1);
    if (!is_few(tokens)) pack(task, image, n);
    for (int h = 0; h < problem.group; h++) {
      const int head = task.head * problem.group + h;
      attend_tokens(
          task, head, image, tokens, n, ahead,
          [&](Tokens part, auto groups, const auto& softmax) {
            store_tile<decltype(groups)::value>(softmax, task.batch, head, part);
          },
          [&](Tokens row, const Softmax<1>& softmax) {
            store_row(softmax, task.batch, head, row.index[0]);
          });
    }
  }

  VLMFAST_INLINE void fill_zeros(const CrossAttentionTask& task, Tokens tokens) const {
    for (int h = 0; h < problem.group; h++)
      for (int i = 0; i < tokens.count; i++)
        store_empty(task.batch, task.head * problem.group + h, tokens.index[i]);
  }

  VLMFAST_INLINE void store_empty(int batch, int head, int token) const {
    store_zeros(problem.out.at<T>(batch, head, token), problem.value_dim);
    logsumexp(batch, head)[token] = -kInfinity;
  }

  VLMFAST_INLINE void run_several(const CrossAttentionTask& task) const {
    const int range = task.end - task.begin;
    const int64_t held = (int64_t)problem.group * range;
    rows.clear(held);
    for (int64_t i = 0; i < held * value_stride; i += kLanes) store(row_out + i, zero());
    for (int image = task.image_begin; image < task.image_end; image++)
      for_each_list(problem, task.batch, image, [&](Tokens all, int n) {
        const Tokens tokens = all.within(task.begin, task.end);
        if (tokens.count == 0) return;
        Prefetcher ahead;
        if (!is_few(tokens)) pack(task, image, n);
        for (int h = 0; h < problem.group; h++) {
          const int64_t first_row = (int64_t)h * range - task.begin;
          attend_tokens(
              task, task.head * problem.group + h, image, tokens, n, ahead,
              [&](Tokens part, auto groups, const auto& softmax) {
                constexpr int kGroups = decltype(groups)::value;
                Vec ones[kGroups];
                VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) ones[g] = broadcast(1.f);
                store_transposed<kGroups>(out, ones, tile_out, value_stride, part.count,
                                          problem.value_dim);
                join<kGroups>(softmax, part, first_row, tile_out);
              },
              [&](Tokens row, const Softmax<1>& softmax) {
                join<1>(softmax, row, first_row, out);
              });
        }
      });
    for (int h = 0; h < problem.group; h++)
      for (int token = task.begin; token < task.end; token++) {
        const int64_t row = (int64_t)h * range + token - task.begin;
        const int head = task.head * problem.group + h;
        if (problem.image_index[(int64_t)task.batch * problem.tokens + token] == kUniformRow)
          continue;
        Softmax<1> softmax;
        softmax.most[0] = broadcast(rows.tops[row]);
        softmax.sum[0] = broadcast(rows.sums[row]);
        for (int d = 0; d < value_stride; d += kLanes)
          store(out + d, load(row_out + row * value_stride + d));
        store_row(softmax, task.batch, head, token);
      }
  }

  void run(const CrossAttentionTask& task, const CrossAttentionTask& next) const {
    if (problem.several)
      run_several(task);
    else
      run_one(task, next);
  }

  // The mean of all values of a key head, into `out`.
  VLMFAST_INLINE void mean(int batch, int key_head) const {
    const Vec factor = broadcast(1.f / ((float)problem.images * problem.latents));
    for (int d = 0; d < problem.value_dim; d += kLanes) {
      const int n = minimum(kLanes, problem.value_dim - d);
      Vec total = zero();
      for (int image = 0; image < problem.images; image++) {
        const Rows<T> value = latents_of<T>(problem.value, batch, key_head, image);
        Vec sum = zero();
        for (int j = 0; j < problem.latents; j++) sum = sum + load_columns(value, j, d, n);
        total = total + sum;
      }
      store(out + d, total * factor);
    }
  }

  void fill_rows(int batch, int key_head) const {
    const int32_t* kinds = problem.image_index + (int64_t)batch * problem.tokens;
    const int64_t values = (int64_t)problem.images * problem.latents;
    bool has_mean = false;
    for (int token = 0; token < problem.tokens; token++) {
      if (kinds[token] == kUniformRow && values > 0 && !has_mean) {
        mean(batch, key_head);
        has_mean = true;
      }
      for (int h = 0; h < problem.group; h++) {
        const int head = key_head * problem.group + h;
        if (kinds[token] == kUniformRow && values > 0) {
          T* target = problem.out.at<T>(batch, head, token);
          for (int d = 0; d < problem.value_dim; d += kLanes)
            store_first(target + d, load(out + d), minimum(kLanes, problem.value_dim - d));
          float log_count = (float)values;
          log2_in_place(&log_count, 1);
          logsumexp(batch, head)[token] = natural_logsumexp(0.f, log_count);
        } else if (kinds[token] == kUniformRow || (kinds[token] == kZeroRow && !problem.several)) {
          store_empty(batch, head, token);
        }
      }
    }
  }
};

template <class Words, class T>
struct Backward {
  const CrossAttentionBackward& problem;
  int words, value_words, columns, vectors, value_vectors;
  float *keys, *values, *key_pairs, *grad_keys, *grad_values;
  float *query, *grad_out, *query_rows, *grad_out_rows, *scores, *grad_scores, *left, *grad_left;
  float* grad_query;
  T *query_buffer, *grad_buffer, *out_buffer;
  // Where tokens may see several images:
  RowStatistics rows{};
  float* tile_grad_query;
  int64_t scratch_size;

  static constexpr bool kPairs = Words::kElements == 2;

  Backward(const CrossAttentionBackward& p, float* scratch) : problem(p) {
    words = word_count<Words>(p.head_dim);
    value_words = word_count<Words>(p.value_dim);
    columns = round_up(p.head_dim, kRowStep);
    vectors = (p.head_dim + kLanes - 1) / kLanes;
    value_vectors = (p.value_dim + kLanes - 1) / kLanes;
    Arena arena{scratch};
    const int64_t padded = round_up(p.latents, kRowStep);
    keys = arena.take(padded * words);
    values = arena.take(padded * value_words);
    key_pairs = kPairs ? arena.take(padded / 2 * columns) : keys;
    grad_keys = arena.take(p.wants_key_value ? padded * vectors * kLanes : 0);
    grad_values = arena.take(p.wants_key_value ? padded * value_vectors * kLanes : 0);
    query = arena.take((int64_t)round_up(words, kLanes) * kMaxTile);
    grad_out = arena.take((int64_t)round_up(value_words, kLanes) * kMaxTile);
    query_rows = arena.take((int64_t)kMaxTile / Words::kElements * vectors * kLanes);
    grad_out_rows = arena.take((int64_t)kMaxTile / Words::kElements * value_vectors * kLanes);
    scores = arena.take(kBlock * kMaxTile);
    grad_scores = arena.take(kBlock * kMaxTile);
    left = kPairs ? arena.take(kBlock * kMaxTile / 2) : scores;
    grad_left = kPairs ? arena.take(kBlock * kMaxTile / 2) : grad_scores;
    grad_query = arena.take((int64_t)round_up(p.head_dim, kLanes) * kMaxTile);
    query_buffer = (T*)arena.take((int64_t)p.head_dim * kMaxTile);
    grad_buffer = (T*)arena.take((int64_t)p.value_dim * kMaxTile);
    out_buffer = (T*)arena.take((int64_t)p.value_dim * kMaxTile);
    const int64_t held = p.several ? (int64_t)p.group * p.tokens : 0;
    rows.tops = arena.take(held);
    rows.sums = arena.take(held);
    tile_grad_query = arena.take(p.several ? (int64_t)kMaxTile * p.head_dim : 0);
    scratch_size = arena.used;
  }

  VLMFAST_INLINE Scores<Words> products(Prefetcher& ahead) const {
    return {query, keys, words, score_factor<Words>(problem), scores, ahead};
  }

  // A logsumexp in log2 units as top + log_sum. Rows that see nothing get weights of
  // exp2(-inf) = 0. False where rounding has taken too much of it.
  static VLMFAST_INLINE bool split(float logsumexp, float* top, float* log_sum) {
    *top = kInfinity;
    *log_sum = 0.f;
    if (logsumexp == -kInfinity) return true;
    *top = logsumexp * kLog2E;
    *log_sum = __builtin_fmaf(logsumexp, kLog2E, -*top) + logsumexp * kLog2ELow;
    return !(__builtin_fabsf(logsumexp) > kImpreciseLogsumexp<T>);
  }

  // grad_out . out - grad_logsumexp of each row, and its logsumexp as `top` + `log_sum`.
  template <int kGroups>
  VLMFAST_INLINE void row_values(const CrossAttentionTask& task, int head, Tokens tokens, int n,
                                 Rows<T> grad, float* delta, float* top, float* log_sum,
                                 Prefetcher& ahead) const {
    constexpr int kWidth = kGroups * kLanes, kStep = kLanes * Words::kElements;
    const Rows<T> out =
        token_rows<T>(problem.out, task.batch, head, tokens, problem.value_dim, out_buffer);
    for (int g = 0; g < kGroups; g++) {
      Vec sums[kLanes];
      VLMFAST_UNROLL for (int i = 0; i < kLanes; i++) sums[i] = zero();
      for (int i = 0; i < minimum(kLanes, tokens.count - g * kLanes); i++) {
        const int at = g * kLanes + i;
        for (int d = 0; d < problem.value_dim; d += kStep) {
          const int m = minimum(kStep, problem.value_dim - d);
          const T* p = grad.row(at) + d * grad.column_stride;
          const Vec grads = grad.column_stride == 1 ? load_words<Words>(p, m)
                                                    : gather_words<Words>(p, grad.column_stride, m);
          sums[i] = Words::multiply_add(grads, load_words<Words>(out.row(at) + d, m), sums[i]);
        }
      }
      transpose(sums);
      Vec total = sums[0];
      VLMFAST_UNROLL for (int i = 1; i < kLanes; i++) total = total + sums[i];
      store(delta + g * kLanes, total);
    }
    const int64_t row = ((int64_t)task.batch * problem.heads + head) * problem.tokens;
    const int64_t held_row = (int64_t)(head - task.head * problem.group) * problem.tokens;
    bool precise = true;
    for (int i = 0; i < kWidth; i++) {
      if (i >= tokens.count) {
        split(-kInfinity, top + i, log_sum + i);
        delta[i] = 0.f;
        continue;
      }
      const int token = tokens.index[i];
      const float logsumexp = problem.logsumexp[row + token];
      if (problem.several) {
        top[i] = rows.tops[held_row + token];
        log_sum[i] = rows.sums[held_row + token];
      } else {
        precise &= split(logsumexp, top + i, log_sum + i);
      }
      if (logsumexp == -kInfinity)
        delta[i] = 0.f;
      else if (problem.grad_logsumexp != nullptr)
        delta[i] -= problem.grad_logsumexp[row + token];
    }
    if (precise) return;
    // The row's maximum and sum are computed afresh and kept apart.
    const Softmax<kGroups> softmax = products(ahead).template statistics<kGroups>(n);
    float tops[kWidth], sums[kWidth];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      store(tops + g * kLanes, softmax.most[g]);
      store(sums + g * kLanes, select_eq(softmax.sum[g], zero(), broadcast(1.f), softmax.sum[g]));
    }
    log2_in_place(sums, kWidth);
    for (int i = 0; i < tokens.count; i++)
      if (top[i] != kInfinity) top[i] = tops[i], log_sum[i] = sums[i];
  }

  // P and dS of a block, from the products in `scores` and `grad_scores`. With fp32 words they
  // replace them; with bf16 words `left` and `grad_left` get them as pairs along the queries, and
  // `grad_scores` gets dS as pairs along the latents. Rows [n, padded) become zero.
  template <int kGroups>
  VLMFAST_INLINE void gradients(int n, int padded, float factor, const float* delta,
                                const float* top, const float* log_sum) const {
    constexpr int kWidth = kGroups * kLanes, kRows = Words::kElements;
    for (int j = 0; j < padded; j += kRows) {
      Vec weight[kRows][kGroups], grad[kRows][kGroups];
      VLMFAST_UNROLL for (int i = 0; i < kRows; i++)
          VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        const int at = (j + i) * kWidth + g * kLanes;
        weight[i][g] = grad[i][g] = zero();
        if (j + i >= n) continue;
        const Vec shifted = fms(broadcast(factor), load(scores + at), load(top + g * kLanes)) -
                            load(log_sum + g * kLanes);
        weight[i][g] = exp2<Words::kExpDegree>(shifted);
        grad[i][g] = weight[i][g] * (load(grad_scores + at) - load(delta + g * kLanes));
      }
      store_gradients<kGroups>(j, weight, grad);
    }
  }

  template <int kGroups>
  VLMFAST_INLINE void store_gradients(int j, const Vec (&weight)[Words::kElements][kGroups],
                                      const Vec (&grad)[Words::kElements][kGroups]) const {
    constexpr int kWidth = kGroups * kLanes;
#if VLMFAST_LEVEL >= 3
    if constexpr (Words::kElements == 2) {
      VLMFAST_UNROLL for (int i = 0; i < 2; i++) {
        float *l = left + (j + i) * kWidth / 2, *gl = grad_left + (j + i) * kWidth / 2;
        VLMFAST_UNROLL for (int g = 0; g + 1 < kGroups; g += 2) {
          store(l + g * kLanes / 2, (Vec)_mm512_cvtne2ps_pbh(weight[i][g + 1], weight[i][g]));
          store(gl + g * kLanes / 2, (Vec)_mm512_cvtne2ps_pbh(grad[i][g + 1], grad[i][g]));
        }
        if constexpr (kGroups % 2 == 1) {
          constexpr int g = kGroups - 1;
          _mm256_storeu_si256((__m256i*)(l + g * kLanes / 2), narrow_bf16(weight[i][g]));
          _mm256_storeu_si256((__m256i*)(gl + g * kLanes / 2), narrow_bf16(grad[i][g]));
        }
      }
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++)
          store(grad_scores + (j / 2 * kGroups + g) * kLanes, interleave(grad[0][g], grad[1][g]));
      return;
    }
#endif
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      store(scores + j * kWidth + g * kLanes, weight[0][g]);
      store(grad_scores + j * kWidth + g * kLanes, grad[0][g]);
    }
  }

  // A tile against n packed latents. With `overwrite` it stores its share of grad_keys and
  // grad_values instead of adding it.
  template <int kGroups>
  VLMFAST_INLINE void tile(const CrossAttentionTask& task, int head, Tokens tokens, int n,
                           bool overwrite, Prefetcher& ahead) const {
    constexpr int kWidth = kGroups * kLanes, kDepth = kWidth / Words::kElements;
    const Rows<T> query_in =
        token_rows<T>(problem.query, task.batch, head, tokens, problem.head_dim, query_buffer);
    const Rows<T> grad_in =
        token_rows<T>(problem.grad_out, task.batch, head, tokens, problem.value_dim, grad_buffer);
    pack_transposed<Words, kGroups>(query_in, tokens.count, problem.head_dim,
                                    problem.scale * kLog2E, query);
    pack_transposed<Words, kGroups>(grad_in, tokens.count, problem.value_dim, 1.f, grad_out);
    if (problem.wants_key_value) {
      pack_row_pairs<Words>(query_in, tokens.count, kWidth, problem.head_dim, vectors * kLanes,
                            query_rows);
      pack_row_pairs<Words>(grad_in, tokens.count, kWidth, problem.value_dim,
                            value_vectors * kLanes, grad_out_rows);
    }
    float delta[kWidth], top[kWidth], log_sum[kWidth];
    row_values<kGroups>(task, head, tokens, n, grad_in, delta, top, log_sum, ahead);
    Vec factors[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) factors[g] = broadcast(1.f);
    const Scores<Words> product = products(ahead);
    for (int first = 0; first < n; first += kBlock) {
      const int m = minimum(kBlock, n - first), padded = round_up(m, kRowStep);
      Vec unused[kGroups];
      product.template block<kGroups>(first, m, unused);
      multiply_rows<Words, kGroups>(grad_out, values + (int64_t)first * value_words, value_words, m,
                                    grad_scores, nullptr, ahead);
      gradients<kGroups>(m, padded, product.factor, delta, top, log_sum);
      if (problem.wants_key_value) {
        outer_accumulate<Words>(left, kDepth, grad_out_rows, kDepth, m, overwrite,
                                grad_values + (int64_t)first * value_vectors * kLanes,
                                value_vectors);
        outer_accumulate<Words>(grad_left, kDepth, query_rows, kDepth, m, overwrite,
                                grad_keys + (int64_t)first * vectors * kLanes, vectors);
      }
      if (problem.wants_query)
        weighted_sum<Words, kGroups>(
            grad_scores, key_pairs + (int64_t)first / Words::kElements * columns, columns,
            padded / Words::kElements, columns, grad_query, first == 0 ? nullptr : factors);
    }
    if (!problem.wants_query) return;
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) factors[g] = broadcast(problem.scale);
    if (problem.several) {
      store_transposed<kGroups>(grad_query, factors, tile_grad_query, problem.head_dim,
                                tokens.count, problem.head_dim);
      add_grad_query(task, head, tokens);
    } else {
      store_token_rows<kGroups>(grad_query, factors, problem.grad_query, task.batch, head, tokens,
                                problem.head_dim, query_buffer);
    }
  }

  VLMFAST_INLINE float* partial_grad_query(const CrossAttentionTask& task, int head) const {
    return problem.grad_query_splits + task.split * problem.grad_query_split_size +
           ((int64_t)task.batch * problem.heads + head) * problem.tokens * problem.head_dim;
  }

  VLMFAST_INLINE void add_grad_query(const CrossAttentionTask& task, int head,
                                     Tokens tokens) const {
    float* target = partial_grad_query(task, head);
    for (int i = 0; i < tokens.count; i++) {
      float* row = target + (int64_t)tokens.index[i] * problem.head_dim;
      const float* source = tile_grad_query + (int64_t)i * problem.head_dim;
      for (int d = 0; d < problem.head_dim; d += kLanes) {
        const int n = minimum(kLanes, problem.head_dim - d);
        store_first(row + d, load_first(row + d, n) + load_first(source + d, n), n);
      }
    }
  }

  VLMFAST_INLINE void pack(const CrossAttentionTask& task, int image, int n) const {
    const int padded = round_up(n, kRowStep);
    const Rows<T> key = latents_of<T>(problem.key, task.batch, task.head, image);
    pack_rows<Words>(key, n, padded, problem.head_dim, words, keys);
    pack_rows<Words>(latents_of<T>(problem.value, task.batch, task.head, image), n, padded,
                     problem.value_dim, value_words, values);
    if (kPairs) pack_row_pairs<Words>(key, n, padded, problem.head_dim, columns, key_pairs);
  }

  VLMFAST_INLINE void clear_grad_latents() const {
    const int64_t padded = round_up(problem.latents, kRowStep);
    for (int64_t i = 0; i < padded * vectors * kLanes; i += kLanes) store(grad_keys + i, zero());
    for (int64_t i = 0; i < padded * value_vectors * kLanes; i += kLanes)
      store(grad_values + i, zero());
  }

  VLMFAST_INLINE void store_grad_latents(const CrossAttentionTask& task, int image) const {
    const Strided key = problem.grad_key.image(image, sizeof(T)),
                  value = problem.grad_value.image(image, sizeof(T));
    const float* uniform =
        problem.uniform_gradient == nullptr
            ? nullptr
            : problem.uniform_gradient +
                  ((int64_t)task.batch * (problem.heads / problem.group) + task.head) *
                      problem.value_dim;
    for (int j = 0; j < problem.latents; j++) {
      T* target = key.at<T>(task.batch, task.head, j);
      for (int d = 0; d < problem.head_dim; d += kLanes)
        store_first(target + d,
                    load(grad_keys + (int64_t)j * vectors * kLanes + d) * broadcast(problem.scale),
                    minimum(kLanes, problem.head_dim - d));
      target = value.at<T>(task.batch, task.head, j);
      for (int d = 0; d < problem.value_dim; d += kLanes) {
        const int n = minimum(kLanes, problem.value_dim - d);
        Vec sum = load(grad_values + (int64_t)j * value_vectors * kLanes + d);
        if (uniform != nullptr) sum = sum + load_first(uniform + d, n);
        store_first(target + d, sum, n);
      }
    }
  }

  // Requests what `next` reads and writes first, spread over this task.
  VLMFAST_INLINE Prefetcher prefetcher(const CrossAttentionTask& next, int64_t steps) const {
    Prefetcher result;
    if (!problem.prefetch || problem.several || next.image_begin >= next.image_end) return result;
    const int image = next.image_begin;
    result.add(latents_of<T>(problem.key, next.batch, next.head, image), problem.latents,
               problem.head_dim);
    result.add(latents_of<T>(problem.value, next.batch, next.head, image), problem.latents,
               problem.value_dim);
    const Tokens tokens{problem.order + next.batch * problem.order_size + next.begin,
                        next.end - next.begin};
    const auto add_tokens = [&](const Strided& tensor, int dim) {
      Rows<T> rows = rows_of<T>(tensor, next.batch, next.head * problem.group);
      rows.data = rows.row(tokens.index[0]);
      result.add(rows, tokens.count, dim);
    };
    if (tokens.count > 0 && tokens.adjacent()) {
      add_tokens(problem.query, problem.head_dim);
      add_tokens(problem.grad_out, problem.value_dim);
      add_tokens(problem.out, problem.value_dim);
      if (problem.wants_query) add_tokens(problem.grad_query, problem.head_dim);
    }
    if (problem.wants_key_value) {
      result.add(latents_of<T>(problem.grad_key, next.batch, next.head, image), problem.latents,
                 problem.head_dim);
      result.add(latents_of<T>(problem.grad_value, next.batch, next.head, image), problem.latents,
                 problem.value_dim);
    }
    result.spread_over(steps);
    return result;
  }

  // Calls body(query head, tile of the tokens, groups).
  template <class Body>
  VLMFAST_INLINE void for_each_head_tile(const CrossAttentionTask& task, Tokens tokens,
                                         Body body) const {
    for (int h = 0; h < problem.group; h++)
      for_each_tile(tokens, [&](Tokens part, auto groups) VLMFAST_INLINE_LAMBDA {
        body(task.head * problem.group + h, part, groups);
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
      Prefetcher ahead = prefetcher(
          next, 2 * (int64_t)tokens.count * problem.group * n / (kRowStep * kMaxTile) + 1);
      pack(task, image, n);
      for_each_head_tile(task, tokens, [&](int head, Tokens part, auto groups) {
        tile<decltype(groups)::value>(task, head, part, n, overwrite, ahead);
        overwrite = false;
      });
    });
    if (!problem.wants_key_value) return;
    if (overwrite) clear_grad_latents();
    store_grad_latents(task, image);
  }

  // Every row's logsumexp as tops + sums, before any image's share of the gradients: from what
  // forward left, or, where rounding has taken too much of that, from all images afresh.
  VLMFAST_INLINE void prepare_rows(const CrossAttentionTask& task) const {
    const int64_t held = (int64_t)problem.group * problem.tokens;
    const float* logsumexp =
        problem.logsumexp +
        ((int64_t)task.batch * problem.heads + task.head * problem.group) * problem.tokens;
    bool precise = true;
    for (int64_t i = 0; i < held; i++) precise &= split(logsumexp[i], rows.tops + i, rows.sums + i);
    if (precise) return;
    rows.clear(held);
    for (int image = 0; image < problem.images; image++)
      for_each_list(problem, task.batch, image, [&](Tokens tokens, int n) {
        pack(task, image, n);
        for_each_head_tile(task, tokens, [&](int head, Tokens part, auto groups) {
          constexpr int kGroups = decltype(groups)::value;
          Prefetcher none;
          float kept[kGroups * kLanes], added[kGroups * kLanes];
          const Rows<T> in =
              token_rows<T>(problem.query, task.batch, head, part, problem.head_dim, query_buffer);
          pack_transposed<Words, kGroups>(in, part.count, problem.head_dim, problem.scale * kLog2E,
                                          query);
          rows.join(products(none).template statistics<kGroups>(n), part,
                    (int64_t)(head - task.head * problem.group) * problem.tokens, kept, added);
        });
      });
    for (int64_t i = 0; i < held; i++) {
      if (rows.sums[i] == 0.f) {
        split(-kInfinity, rows.tops + i, rows.sums + i);
        continue;
      }
      log2_in_place(rows.sums + i, 1);
    }
  }

  void run(const CrossAttentionTask& task, const CrossAttentionTask& next) const {
    if (!problem.several) return run_image(task, next, task.image_begin);
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

// Runs `body` with the word and element types of the problem.
template <class Body>
VLMFAST_INLINE auto with_types(const CrossAttentionProblem& problem, Body body) {
  switch (problem.dtype) {
    case ElementType::kFloat:
      return body(Fp32Words(), float());
    case ElementType::kHalf:
      return body(Fp32Words(), Half());
#if VLMFAST_LEVEL >= 3
    default:
      return body(Bf16Words(), BFloat16());
#else
    default:
      return body(Fp32Words(), BFloat16());
#endif
  }
}

int64_t forward_scratch(const CrossAttentionForward& problem) {
  return with_types(problem, [&](auto words, auto element) {
    return Forward<decltype(words), decltype(element)>(problem, nullptr).scratch_size;
  });
}

void forward(const CrossAttentionForward& problem, const CrossAttentionTask& task,
             const CrossAttentionTask& next, float* scratch) {
  with_types(problem, [&](auto words, auto element) {
    Forward<decltype(words), decltype(element)>(problem, scratch).run(task, next);
  });
}

void fill_rows(const CrossAttentionForward& problem, int batch, int key_head, float* scratch) {
  with_types(problem, [&](auto words, auto element) {
    Forward<decltype(words), decltype(element)>(problem, scratch).fill_rows(batch, key_head);
  });
}

int64_t backward_scratch(const CrossAttentionBackward& problem) {
  return with_types(problem, [&](auto words, auto element) {
    return Backward<decltype(words), decltype(element)>(problem, nullptr).scratch_size;
  });
}

void backward(const CrossAttentionBackward& problem, const CrossAttentionTask& task,
              const CrossAttentionTask& next, float* scratch) {
  with_types(problem, [&](auto words, auto element) {
    Backward<decltype(words), decltype(element)>(problem, scratch).run(task, next);
  });
}

void clear_grad_rows(const CrossAttentionBackward& problem, int batch, int key_head) {
  with_types(problem, [&](auto, auto element) {
    for (int token = 0; token < problem.tokens; token++) {
      const int32_t kind = problem.image_index[(int64_t)batch * problem.tokens + token];
      if (kind > 0 && length_of(problem, batch, kind - 1) > 0) continue;
      for (int h = 0; h < problem.group; h++)
        store_zeros(
            problem.grad_query.at<decltype(element)>(batch, key_head * problem.group + h, token),
            problem.head_dim);
    }
  });
}

// Of grad_out over the uniform rows of a key head's queries, divided by the number of values; in
// runs of rows, so that rounding does not grow with their number.
void sum_uniform_rows(const CrossAttentionBackward& problem, int batch, int key_head) {
  with_types(problem, [&](auto, auto element) {
    using T = decltype(element);
    constexpr int kRun = 128;
    const int key_heads = problem.heads / problem.group;
    const int32_t* kinds = problem.image_index + (int64_t)batch * problem.tokens;
    float* target =
        problem.uniform_gradient + ((int64_t)batch * key_heads + key_head) * problem.value_dim;
    const Vec factor = broadcast(1.f / ((float)problem.images * problem.latents));
    for (int d = 0; d < problem.value_dim; d += kLanes) {
      const int n = minimum(kLanes, problem.value_dim - d);
      Vec total = zero();
      for (int h = 0; h < problem.group; h++) {
        const Rows<T> grad = rows_of<T>(problem.grad_out, batch, key_head * problem.group + h);
        for (int first = 0; first < problem.tokens; first += kRun) {
          Vec sum = zero();
          for (int token = first; token < minimum(first + kRun, problem.tokens); token++)
            if (kinds[token] == kUniformRow) sum = sum + load_columns(grad, token, d, n);
          total = total + sum;
        }
      }
      store_first(target + d, total * factor, n);
    }
  });
}

// The gradient of one query from its `splits` partial sums, added in order.
void sum_splits(const CrossAttentionBackward& problem, int splits, int batch, int head, int token) {
  with_types(problem, [&](auto, auto element) {
    auto* out = problem.grad_query.at<decltype(element)>(batch, head, token);
    const float* partial =
        problem.grad_query_splits +
        (((int64_t)batch * problem.heads + head) * problem.tokens + token) * problem.head_dim;
    for (int d = 0; d < problem.head_dim; d += kLanes) {
      const int n = minimum(kLanes, problem.head_dim - d);
      Vec sum = zero();
      for (int i = 0; i < splits; i++)
        sum = sum + load_first(partial + i * problem.grad_query_split_size + d, n);
      store_first(out + d, sum, n);
    }
  });
}

}  // namespace

extern const CrossAttentionKernel cross_attention_kernel = {
    forward_scratch, forward,          fill_rows,  backward_scratch, backward,
    clear_grad_rows, sum_uniform_rows, sum_splits, kMaxTile};

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
