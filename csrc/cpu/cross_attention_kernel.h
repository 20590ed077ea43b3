// Cross-attention of text tokens to images: all tokens that see an image run against its latents,
// which are packed once.
//
// Lanes are queries in the scores and features in the sums: softmax is vertical arithmetic, and
// only queries are transposed, while latents and results stay rows. A tile is a list of tokens. It
// never holds one that does not see the image: so what an image holds cannot reach others, and
// nothing is computed that a mask would hide. Where a token may see several images, its partial
// results are joined by their maxima and sums (Dao et al., "FlashAttention-2", 2023). Exponents are
// in units of log2, so that exp2 needs no further factor.
#include "cpu/cross_attention.h"
#include "cpu/softmax.h"
#include "cpu/tile/pack.h"
#include "cpu/tile/prefetch.h"
#include "cpu/tile/products.h"
#include "cpu/tile/scratch.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

constexpr int kBlock = 128;  // latents whose scores are held at once
constexpr int kTileGroups = kRegisters == 32 ? 4 : 2;
constexpr int kTile = kTileGroups * kLanes;  // queries whose scores are held at once
constexpr int kScores = kTile * kBlock;
constexpr int kTilesAhead = 2;  // how early the rows of a tile are fetched
// Up to so many queries of an image run one by one: packing it would take longer.
constexpr int kFewRows = kLanes / 4;
// Up to so many queries of an image do not average rounding away. In backward their softmax is
// computed afresh, and scores are summed up kPartWords words at a time.
constexpr int kImpreciseRows = 8, kPartWords = 16;
template <int n>
struct Groups {
  static constexpr int value = n;
};

// Calls body(Groups<g>()) with as many vectors as a tile of n queries has.
template <class Body>
VLMFAST_INLINE void with_groups(int n, Body body) {
  switch ((n + kLanes - 1) / kLanes) {
    case 1:
      return body(Groups<1>());
    case 2:
      return body(Groups<2>());
#if VLMFAST_LEVEL >= 2
    case 3:
      if constexpr (kTileGroups > 2) return body(Groups<3>());
      return;
    case 4:
      if constexpr (kTileGroups > 2) return body(Groups<4>());
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

// Calls body(tile of the tokens, tile to fetch meanwhile); the latter may be empty.
template <class Body>
VLMFAST_INLINE void for_each_tile(Tokens tokens, Body body) {
  for (int first = 0; first < tokens.count; first += kTile) {
    const int later = minimum(first + kTilesAhead * kTile, tokens.count);
    body(tokens.part(first, minimum(kTile, tokens.count - first)),
         tokens.part(later, minimum(kTile, tokens.count - later)));
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

template <class T>
VLMFAST_INLINE Rows<T> rows_from(const Rows<T>& rows, int first) {
  return {rows.row(first), rows.row_stride, rows.column_stride};
}

// The rows of some tokens.
template <class T>
struct TokenRows {
  using Element = T;
  T* data;
  int64_t row_stride, column_stride;
  const int32_t* index;

  VLMFAST_INLINE TokenRows(const Rows<T>& all, Tokens tokens)
      : data(all.data),
        row_stride(all.row_stride),
        column_stride(all.column_stride),
        index(tokens.index) {}
  VLMFAST_INLINE T* row(int i) const { return data + index[i] * row_stride; }
};

// Asks, a step at a time between other work, for the rows of a later tile, and for what the next
// task begins with.
template <class T>
class Fetcher {
 public:
  VLMFAST_INLINE Fetcher(Tokens later, Prefetcher& next) : later_(later), next_(next) {}

  VLMFAST_INLINE void add(const Rows<T>& all, int columns) { tensors_[count_++] = {all, columns}; }

  VLMFAST_INLINE void step() {
    next_.step();
    if (at_ >= later_.count) return;
    const int token = later_.index[at_++];
    for (int i = 0; i < count_; i++) {
      const T* row = tensors_[i].all.row(token);
      for (int d = 0; d < tensors_[i].columns; d += 64 / (int)sizeof(T))
        __builtin_prefetch(row + d, 0, 2);
    }
  }

 private:
  struct Tensor {
    Rows<T> all;
    int columns;
  };
  Tensor tensors_[4];
  Tokens later_;
  Prefetcher& next_;
  int count_ = 0, at_ = 0;
};

// How many steps a product of tokens and n latents gives others.
VLMFAST_INLINE int64_t product_steps(Tokens tokens, int n, int words) {
  int64_t rounds = 0;
  for_each_tile(tokens, [&](Tokens tile, Tokens) VLMFAST_INLINE_LAMBDA {
    with_groups(tile.count, [&](auto groups) VLMFAST_INLINE_LAMBDA {
      constexpr int kRows = kTileRows<decltype(groups)::value>;
      rounds += (n + kRows - 1) / kRows;
    });
  });
  return rounds * (words / kWordStep);
}

// scores[latent][kGroups * kLanes] of n packed latents; `most` becomes their maxima times factor.
template <class Words, int kGroups, class Ahead>
VLMFAST_INLINE void score(const float* query, const Operand& keys, int words, int n, float factor,
                          float* scores, Vec* most, Ahead& ahead) {
  VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) most[g] = broadcast(-kInfinity);
  multiply_rows<Words, kGroups>(query, keys.rows, keys.stride, words, n, scores, most, ahead);
  VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) most[g] = most[g] * broadcast(factor);
}

VLMFAST_INLINE Vec first_or(Vec x, int lanes, float other) {
  return lanes >= kLanes ? x : select_ge(lane_index(0), lanes, broadcast(other), x);
}

// Columns of a row, times `scale`.
template <class T>
VLMFAST_INLINE void store_scaled(T* target, const float* source, int columns, Vec scale) {
  int d = 0;
  for (; d + kLanes <= columns; d += kLanes)
    store_first(target + d, load(source + d) * scale, kLanes);
  if (d < columns) store_first(target + d, load(source + d) * scale, columns - d);
}

// Running maxima (log2 units) and sums of exponentials of a tile's rows.
struct Softmax {
  float top[kTile], sum[kTile];

  VLMFAST_INLINE void clear() {
    for (int i = 0; i < kTile; i++) top[i] = -kInfinity, sum[i] = 0.f;
  }

  // Takes in the maxima of further scores: `subtracted` is what their exponents lose, `rescale` the
  // factor of what was summed up before.
  template <int kGroups>
  VLMFAST_INLINE void raise(const Vec* block_top, Vec* subtracted, float* rescale) {
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      const int c = g * kLanes;
      const Vec old = load(top + c), next = max(old, block_top[g]);
      // Where there is nothing but -inf, subtracting 0 gives weights of 0, not NaN.
      subtracted[g] = select_eq(next, broadcast(-kInfinity), zero(), next);
      const Vec factor = exp2<5>(old - subtracted[g]);
      store(rescale + c, factor);
      store(sum + c, load(sum + c) * factor);
      store(top + c, next);
    }
  }

  // Replaces n scores of each row by exp2(factor * score - subtracted), in words of Words, and adds
  // them up.
  template <class Words, int kGroups>
  VLMFAST_INLINE void weigh(float* scores, int n, float factor, const Vec* subtracted) {
    Vec sums[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) sums[g] = load(sum + g * kLanes);
    exponentiate<Words, kGroups>(scores, n,
                                 remaining_factor<kGroups>(scores, n, factor, subtracted),
                                 subtracted, sums, nullptr);
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) store(sum + g * kLanes, sums[g]);
  }
};

// Calls body(row) for a tile's rows, kLanes at a time, and gathers what it returns as
// out[row] = reduce of its lanes.
template <class Body, class Reduce>
VLMFAST_INLINE void reduce_rows(int count, float* out, Body body, Reduce reduce) {
  for (int c = 0; c < count; c += kLanes) {
    Vec rows[kLanes];
    for (int i = 0; i < kLanes; i++) rows[i] = c + i < count ? body(c + i) : zero();
    transpose(rows);
    VLMFAST_UNROLL for (int half = kLanes / 2; half > 0; half /= 2)
        VLMFAST_UNROLL for (int i = 0; i < half; i++) rows[i] = reduce(rows[i], rows[i + half]);
    store(out + c, rows[0]);
  }
}

// log2 of the sums; of 1 where there is none.
VLMFAST_INLINE void log2_of_sums(const float* sums, float* logs) {
  for (int i = 0; i < kTile; i++) logs[i] = sums[i] == 0.f ? 1.f : sums[i];
  log2_in_place(logs, kTile);
}

VLMFAST_INLINE float natural_logsumexp(float top, float log2_sum) {
  return (float)(((double)top + log2_sum) * kLn2);
}

// Maxima and sums of all rows, where they come from several images.
struct RowStatistics {
  float *tops, *sums;

  VLMFAST_INLINE void clear(int64_t rows) const {
    for (int64_t i = 0; i < rows; i++) tops[i] = -kInfinity, sums[i] = 0.f;
  }

  // Joins those of a tile, whose rows are first_row + its tokens: old and new results then count by
  // the factors `kept` and `added`.
  VLMFAST_INLINE void join(const Softmax& tile, Tokens tokens, int64_t first_row, float* kept,
                           float* added) const {
    Softmax joined;
    joined.clear();
    for (int i = 0; i < tokens.count; i++) {
      joined.top[i] = tops[first_row + tokens.index[i]];
      joined.sum[i] = sums[first_row + tokens.index[i]];
    }
    Vec tops_of_tile[kTileGroups], subtracted[kTileGroups];
    VLMFAST_UNROLL for (int g = 0; g < kTileGroups; g++) tops_of_tile[g] =
        load(tile.top + g * kLanes);
    joined.raise<kTileGroups>(tops_of_tile, subtracted, kept);
    VLMFAST_UNROLL for (int g = 0; g < kTileGroups; g++) {
      const int c = g * kLanes;
      const Vec factor = exp2<5>(tops_of_tile[g] - subtracted[g]);
      store(added + c, factor);
      store(joined.sum + c, fma(load(tile.sum + c), factor, load(joined.sum + c)));
    }
    for (int i = 0; i < tokens.count; i++) {
      tops[first_row + tokens.index[i]] = joined.top[i];
      sums[first_row + tokens.index[i]] = joined.sum[i];
    }
  }
};

template <class Words, class T>
struct Forward {
  const CrossAttentionForward& problem;
  int words, value_vectors, value_stride;
  float factor, sign;  // of the products, before exp2, and of the packed queries
  float *keys, *values, *query, *scores, *out;
  // Where tokens may see several images:
  RowStatistics rows{};
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
    const int64_t held = p.several ? (int64_t)p.group * p.queries_most : 0;
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
      Vec most[kGroups], subtracted[kGroups];
      float rescale[kTile];
      score<Words, kGroups>(query, image_keys.from(first), words, m, factor, scores, most, ahead);
      softmax->raise<kGroups>(most, subtracted, rescale);
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
    for (int d = 0; d < dim; d += kLanes)
      store(query + d, load_columns(queries, token, d, minimum(kLanes, dim - d)));
    Vec most = broadcast(-kInfinity);
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
      most = max(most, score);
    }
    softmax->clear();
    const float top = horizontal_max(most), subtracted = top == -kInfinity ? 0.f : top;
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
          if (!problem.several)
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

  VLMFAST_INLINE void run_several(const CrossAttentionTask& task) const {
    const int range = task.end - task.begin;
    const int64_t held = (int64_t)problem.group * range;
    const auto first_row = [&](int head) {
      return (int64_t)(head - task.head * problem.group) * range - task.begin;
    };
    rows.clear(held);
    for (int64_t i = 0; i < held * value_stride; i += kLanes) store(row_out + i, zero());
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
    if (problem.several)
      run_several(task);
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
  int words, value_words, stride, value_stride;  // of packed rows; of gradients
  float factor, sign;  // of the products, before exp2, and of the packed queries
  float *keys, *values, *key_rows, *grad_keys, *grad_values;
  float *query, *grad_out, *query_rows, *grad_out_rows, *grad_query;
  float *scores, *grad_scores, *left, *grad_left;
  RowStatistics rows{};  // where tokens may see several images
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
    const int64_t held = p.several ? (int64_t)p.group * p.tokens : 0;
    rows.tops = arena.take(held);
    rows.sums = arena.take(held);
    scratch_size = arena.used;
  }

  // Scores of `count` packed queries, from n packed latents on; grad_scores may hold parts of them.
  template <int kGroups, class Ahead>
  VLMFAST_INLINE void scores_of(int count, const Operand& latents, int n, Vec* most,
                                Ahead& ahead) const {
    constexpr int kWidth = kGroups * kLanes;
    if ((kGroups - 1) * kLanes >= kImpreciseRows || count > kImpreciseRows)
      return score<Words, kGroups>(query, latents, words, n, factor, scores, most, ahead);
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) most[g] = broadcast(-kInfinity);
    for (int w = 0; w < words; w += kPartWords) {
      const bool is_last = w + kPartWords >= words;
      multiply_rows<Words, kGroups>(query + w * kWidth, latents.rows + w, latents.stride,
                                    minimum(kPartWords, words - w), n,
                                    w == 0 ? scores : grad_scores, nullptr, ahead);
      for (int j = 0; j < n; j++) VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
          const int at = j * kWidth + g * kLanes;
          if (w > 0) store(scores + at, load(scores + at) + load(grad_scores + at));
          if (is_last) most[g] = max(most[g], load(scores + at) * broadcast(factor));
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
      Vec most[kGroups], subtracted[kGroups];
      float rescale[kTile];
      scores_of<kGroups>(count, packed.from(first), m, most, none);
      softmax->raise<kGroups>(most, subtracted, rescale);
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

  // grad_out . out - grad_logsumexp of each row, and its logsumexp as `split` has it.
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
    bool precise = problem.several || tile.count > kImpreciseRows;
    for (int i = 0; i < tile.count; i++) {
      const int token = tile.index[i];
      const float logsumexp = problem.logsumexp[row + token];
      if (problem.several) {
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

  // Where the scores of all n latents are at hand: turns them into their exponentials, and finds
  // `share`, the reciprocal of their sum, and delta = sum(P * dP) - grad_logsumexp.
  template <int kGroups>
  VLMFAST_INLINE void whole_rows(Tokens tile, int64_t row, int n, const Vec* most, float* delta,
                                 float* share) const {
    constexpr int kWidth = kGroups * kLanes;
    Vec top[kGroups], sum[kGroups], products[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      top[g] = select_eq(most[g], broadcast(-kInfinity), zero(), most[g]);
      sum[g] = products[g] = zero();
    }
    const Vec f = broadcast(remaining_factor<kGroups>(scores, n, factor, top));
    for (int j = 0; j < n; j++) VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        const int at = j * kWidth + g * kLanes;
        const Vec weight = exp2<Words::kExpDegree>(fms(f, load(scores + at), top[g]));
        store(scores + at, weight);
        sum[g] = sum[g] + weight;
        products[g] = fma(weight, load(grad_scores + at), products[g]);
      }
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      const Vec inverse = select_eq(sum[g], zero(), zero(), broadcast(1.f) / sum[g]);
      store(share + g * kLanes, inverse);
      store(delta + g * kLanes, products[g] * inverse);
    }
    if (problem.grad_logsumexp != nullptr)
      for (int i = 0; i < tile.count; i++)
        if (share[i] != 0.f) delta[i] -= problem.grad_logsumexp[row + tile.index[i]];
  }

  // P and dS of a block of n latents from `grad_scores` and weight_at(at, g), which is P. With fp32
  // words they replace scores and grad_scores; with bf16 words `left` and `grad_left` get them as
  // pairs of queries, and grad_scores gets dS as pairs of latents. Up to a multiple of kRowStep
  // there are zeros.
  template <int kGroups, class Weight>
  VLMFAST_INLINE void gradients(int count, int n, const float* delta, Weight weight_at) const {
    constexpr int kWidth = kGroups * kLanes;
    for (int j = 0; j < round_up(n, kRowStep); j += kStep) {
      Vec weight[kStep][kGroups], grad[kStep][kGroups];
      VLMFAST_UNROLL for (int i = 0; i < kStep; i++)
          VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        weight[i][g] = grad[i][g] = zero();
        if (j + i >= n) continue;
        const int at = (j + i) * kWidth + g * kLanes, lanes = count - g * kLanes;
        const Vec p = weight_at(at, g);
        const Vec ds = p * (load(grad_scores + at) - load(delta + g * kLanes));
        weight[i][g] = first_or(p, lanes, 0.f);
        grad[i][g] = first_or(ds, lanes, 0.f);
      }
      store_gradients<Words, kGroups>(j, weight, grad, left, grad_left, grad_scores);
    }
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
                                                const Vec* most) const {
    float delta[kTile], share[kTile];
    whole_rows<kGroups>(tile, row, n, most, delta, share);
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
    const bool whole = !problem.several && n <= kBlock;
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
      Vec most[kGroups];
      scores_of<kGroups>(tile.count, packed.from(first), m, most, ahead);
      multiply_rows<Words, kGroups>(grad_out, values + (int64_t)first * value_words, value_words,
                                    value_words, m, grad_scores, nullptr, ahead);
      if (whole)
        gradients_of_whole_rows<kGroups>(tile, first_row(task, head), m, most);
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
    if (problem.several || n > kBlock)
      fetcher.add(rows_of<T>(problem.out, task.batch, head), problem.value_dim);
    if (problem.wants_query && !problem.several)
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
      if (problem.several) {
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
    for (int64_t i = 0; i < padded * stride; i += kLanes) store(grad_keys + i, zero());
    for (int64_t i = 0; i < padded * value_stride; i += kLanes) store(grad_values + i, zero());
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
    if (!problem.prefetch || problem.several || next.image_begin >= next.image_end) return result;
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
    bool precise = problem.tokens > kImpreciseRows;
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
    const int32_t* kinds = problem.image_index + (int64_t)batch * problem.tokens;
    float* target = problem.uniform_gradient +
                    ((int64_t)batch * problem.key_heads + key_head) * problem.value_dim;
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
    forward_scratch,  forward,    fill_rows, backward_scratch, backward, clear_grad_rows,
    sum_uniform_rows, sum_splits, kTile};

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
