// Cross-attention of text tokens to images: all tokens that see an image run against its latents,
// which are packed once.
//
// Lanes are latents in the scores and features in the sums, so that only the keys are transposed,
// once for an image, and queries and results stay rows: text is long, an image is short. A tile is
// a list of tokens. It never holds one that does not see the image: so what an image holds cannot
// reach others, and nothing is computed that a mask would hide. Where a token may see several
// images, its partial results are joined by their maxima and sums (Dao et al., "FlashAttention-2",
// 2023). Exponents are in units of log2, so that exp2 needs no further factor.
#include "cpu/cross_attention.h"
#include "cpu/tile.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

constexpr int kPanelGroups = kLanes == 16 ? 4 : 2;
constexpr int kPanel = kPanelGroups * kLanes;  // latents along the lanes of one product
constexpr int kBlock = 128;                    // latents whose scores are held at once
constexpr int kChunks = 2;
constexpr int kTile = kChunks * kLanes;  // queries whose scores are held at once
constexpr int kPanelScores = kTile * kPanel, kScores = kTile * kBlock;
static_assert(kBlock % kPanel == 0 && kTile % kRowStep == 0);
constexpr int kTilesAhead = 2;  // how early the rows of a tile are fetched
// Up to so many queries of an image run one by one: packing it would take longer.
constexpr int kFewRows = kLanes / 4;
// Beyond this |logsumexp| its rounding to fp32 would show in exp(score - logsumexp), beside the
// rounding of the inputs.
template <class T>
constexpr float kImpreciseLogsumexp = sizeof(T) == 4 ? 16.f : 1024.f;

template <int n>
struct Groups {
  static constexpr int value = n;
};

// Calls body(Groups<g>()) with as many vectors as a panel of n latents has.
template <class Body>
VLMFAST_INLINE void with_groups(int n, Body body) {
  switch ((n + kLanes - 1) / kLanes) {
    case 1:
      return body(Groups<1>());
    case 2:
      return body(Groups<2>());
#if VLMFAST_LEVEL >= 2
    case 3:
      return body(Groups<3>());
    case 4:
      return body(Groups<4>());
#endif
  }
}

// Calls body(first latent, latents) for each panel of n latents.
template <class Body>
VLMFAST_INLINE void for_each_panel(int n, Body body) {
  for (int first = 0; first < n; first += kPanel) body(first, minimum(kPanel, n - first));
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

// Asks for the rows of a later tile, one between other work on a row of this one.
template <class T>
struct RowFetcher {
  Rows<T> all;
  Tokens tokens;
  int columns;

  VLMFAST_INLINE void row(int i) const {
    if (i >= tokens.count) return;
    const T* first = all.row(tokens.index[i]);
    for (int d = 0; d < columns; d += 64 / (int)sizeof(T)) __builtin_prefetch(first + d, 0, 2);
  }
};

// The rows of two tokens, or of one, as a matrix.
template <class T>
VLMFAST_INLINE Rows<T> two_rows(const Rows<T>& all, Tokens tokens, int first) {
  const int token = tokens.index[first];
  const int step = first + 1 < tokens.count ? tokens.index[first + 1] - token : 0;
  return {all.row(token), step * all.row_stride, all.column_stride};
}

// The rows of some tokens, as pack_rows packs them.
template <class Words, class T>
VLMFAST_INLINE void pack_token_rows(const Rows<T>& all, Tokens tokens, int columns, int words,
                                    float* out) {
  const int padded = round_up(tokens.count, kRowStep);
  if (tokens.adjacent())
    return pack_rows<Words>(rows_from(all, tokens.index[0]), tokens.count, padded, columns, words,
                            out);
  for (int i = 0; i < tokens.count; i++)
    pack_rows<Words>(rows_from(all, tokens.index[i]), 1, 1, columns, words,
                     out + (int64_t)i * words);
  for (int64_t i = (int64_t)tokens.count * words; i < (int64_t)padded * words; i++) out[i] = 0.f;
}

// The rows of some tokens, as pack_row_pairs packs them.
template <class Words, class T>
VLMFAST_INLINE void pack_token_pairs(const Rows<T>& all, Tokens tokens, int columns, int width,
                                     float* out) {
  constexpr int kStep = Words::kElements;
  if (tokens.adjacent())
    return pack_row_pairs<Words>(rows_from(all, tokens.index[0]), tokens.count,
                                 round_up(tokens.count, kStep), columns, width, out);
  for (int i = 0; i < tokens.count; i += kStep)
    pack_row_pairs<Words>(two_rows(all, tokens, i), minimum(kStep, tokens.count - i), kStep,
                          columns, width, out + (int64_t)(i / kStep) * width);
}

// The transposed rows of n latents, panel after panel.
template <class Words, class T>
VLMFAST_INLINE void pack_panels(const Rows<T>& rows, int n, int columns, int words, float* out) {
  for_each_panel(n, [&](int first, int m) VLMFAST_INLINE_LAMBDA {
    with_groups(m, [&](auto groups) VLMFAST_INLINE_LAMBDA {
      pack_transposed<Words, decltype(groups)::value>(rows_from(rows, first), m, columns, 1.f,
                                                      out + (int64_t)first * words);
    });
  });
}

// out[panel][row][latent] = rows[row] . panels[:, latent], for `count` rows and n latents.
template <class Words>
VLMFAST_INLINE void multiply_panels(const float* panels, const float* rows, int words, int count,
                                    int n, float* out, Prefetcher& ahead) {
  for_each_panel(n, [&](int first, int m) VLMFAST_INLINE_LAMBDA {
    with_groups(m, [&](auto groups) VLMFAST_INLINE_LAMBDA {
      multiply_rows<Words, decltype(groups)::value>(panels + (int64_t)first * words, rows, words,
                                                    count, out + first / kPanel * kPanelScores,
                                                    nullptr, ahead);
    });
  });
}

// Of a panel of m latents: how far apart its rows are.
VLMFAST_INLINE int panel_width(int m) { return round_up(m, kLanes); }

// Calls body(position, lanes) for the vectors of a row of n scores; fewer lanes than kLanes count
// in the last one.
template <class Body>
VLMFAST_INLINE void for_each_vector(int row, int n, Body body) {
  for_each_panel(n, [&](int first, int m) VLMFAST_INLINE_LAMBDA {
    const int at = first / kPanel * kPanelScores + row * panel_width(m);
    for (int g = 0; g < m; g += kLanes) body(at + g, m - g);
  });
}

VLMFAST_INLINE Vec first_or(Vec x, int lanes, float other) {
  return lanes >= kLanes ? x : select_ge(lane_index(0), lanes, broadcast(other), x);
}

// Two vectors, of which `columns` elements exist, as words of pairs; a vector where words are
// elements.
template <class Words>
VLMFAST_INLINE void store_words(float* target, const Vec* x, int columns) {
#if VLMFAST_LEVEL >= 3
  if constexpr (Words::kElements == 2) {
    const Vec pairs = (Vec)_mm512_cvtne2ps_pbh(x[1], x[0]);
    store_first(target, pairs, columns / 2);
    return;
  }
#endif
  store(target, x[0]);
}

// Running maxima (log2 units) and sums of exponentials of a tile's rows.
struct Softmax {
  float top[kTile], sum[kTile];

  VLMFAST_INLINE void clear() {
    for (int i = 0; i < kTile; i++) top[i] = -kInfinity, sum[i] = 0.f;
  }

  // Takes in the maxima of further scores: `subtracted` is what their exponents lose, `rescale` the
  // factor of what was summed up before.
  VLMFAST_INLINE void raise(const float* block_top, float* subtracted, float* rescale) {
    VLMFAST_UNROLL for (int c = 0; c < kTile; c += kLanes) {
      const Vec old = load(top + c), next = max(old, load(block_top + c));
      // Where there is nothing but -inf, subtracting 0 gives weights of 0, not NaN.
      const Vec shift = select_eq(next, broadcast(-kInfinity), zero(), next);
      const Vec factor = exp2<5>(old - shift);
      store(subtracted + c, shift);
      store(rescale + c, factor);
      store(sum + c, load(sum + c) * factor);
      store(top + c, next);
    }
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

// Maxima of `factor` times the scores.
VLMFAST_INLINE void row_maxima(const float* scores, int count, int n, float factor, float* out) {
  reduce_rows(
      count, out,
      [&](int row) VLMFAST_INLINE_LAMBDA {
        Vec most = broadcast(-kInfinity);
        for_each_vector(row, n, [&](int at, int lanes) VLMFAST_INLINE_LAMBDA {
          most = max(most, first_or(load(scores + at) * broadcast(factor), lanes, -kInfinity));
        });
        return most;
      },
      [](Vec a, Vec b) VLMFAST_INLINE_LAMBDA { return max(a, b); });
}

// The factor that scores still need before exp2. As maxima are those of rounded products, an exact
// product could exceed them by what rounding takes, and that overflows where logits are huge: there
// scores are multiplied here, and rounded likewise.
VLMFAST_INLINE float remaining_factor(float* scores, int count, int n, float factor,
                                      const float* subtracted) {
  constexpr float kHuge = 1 << 20;
  bool huge = false;
  for (int i = 0; i < count; i++) {
    const float size = __builtin_fabsf(subtracted[i]);
    huge |= size > kHuge && size < kInfinity;
  }
  if (!huge) return factor;
  for (int i = 0; i < count; i++)
    for_each_vector(i, n, [&](int at, int) VLMFAST_INLINE_LAMBDA {
      store(scores + at, load(scores + at) * broadcast(factor));
    });
  return 1.f;
}

VLMFAST_INLINE void add_rows(float* sums, const float* more) {
  VLMFAST_UNROLL for (int c = 0; c < kTile; c += kLanes)
      store(sums + c, load(sums + c) + load(more + c));
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
    float subtracted[kTile];
    joined.raise(tile.top, subtracted, kept);
    VLMFAST_UNROLL for (int c = 0; c < kTile; c += kLanes) {
      const Vec factor = exp2<5>(load(tile.top + c) - load(subtracted + c));
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
  float factor;  // of the products, before exp2
  float *panels, *values, *query, *scores, *out;
  // Where tokens may see several images:
  RowStatistics rows{};
  float* row_out;
  int64_t scratch_size;

  Forward(const CrossAttentionForward& p, float* scratch) : problem(p) {
    words = word_count<Words>(p.head_dim);
    value_stride = round_up(p.value_dim, kLanes);
    value_vectors = value_stride / kLanes;
    factor = p.scale * kLog2E;
    Arena arena{scratch};
    panels = arena.take((int64_t)round_up(p.latents, kPanel) * words);
    values = arena.take((int64_t)round_up(p.latents, kRowStep) / Words::kElements * value_stride);
    query = arena.take((int64_t)kTile * round_up(maximum(words, p.head_dim), kLanes));
    scores = arena.take(maximum(kScores, round_up(p.latents, kLanes)));
    out = arena.take((int64_t)kTile * value_stride);
    const int64_t held = p.several ? (int64_t)p.group * p.queries_most : 0;
    rows.tops = arena.take(held);
    rows.sums = arena.take(held);
    row_out = arena.take(held * value_stride);
    scratch_size = arena.used;
  }

  // Replaces n scores of each row by exp2(factor * score - subtracted), as pairs where words are,
  // and adds them up.
  VLMFAST_INLINE void weights(int count, int n, const float* subtracted, float* sums,
                              const RowFetcher<T>& later, Prefetcher& ahead) const {
    constexpr int kStep = Words::kElements;
    const Vec f = broadcast(remaining_factor(scores, count, n, factor, subtracted));
    float more[kTile] = {};
    reduce_rows(
        count, more,
        [&](int row) VLMFAST_INLINE_LAMBDA {
          later.row(row);
          ahead.step();
          const Vec shift = broadcast(subtracted[row]);
          Vec total = zero();
          for_each_panel(n, [&](int first, int m) VLMFAST_INLINE_LAMBDA {
            const int width = panel_width(m);
            float* panel = scores + first / kPanel * kPanelScores;
            for (int g = 0; g < m; g += kStep * kLanes) {
              Vec p[2] = {zero(), zero()};
              VLMFAST_UNROLL for (int i = 0; i < kStep; i++) {
                const int at = g + i * kLanes;
                if (at >= m) break;
                const Vec score = load(panel + row * width + at);
                p[i] = first_or(exp2<Words::kExpDegree>(fms(f, score, shift)), m - at, 0.f);
                total = total + p[i];
              }
              store_words<Words>(panel + row * (width / kStep) + g / kStep, p, width - g);
            }
          });
          return total;
        },
        [](Vec a, Vec b) VLMFAST_INLINE_LAMBDA { return a + b; });
    add_rows(sums, more);
  }

  // The queries of a tile against n packed latents: `out` becomes the weighted sums, still to be
  // divided.
  VLMFAST_INLINE void attend(const CrossAttentionTask& task, int head, Tokens tile, Tokens later,
                             int n, Prefetcher& ahead, Softmax* softmax) const {
    const Rows<T> queries = rows_of<T>(problem.query, task.batch, head);
    pack_token_rows<Words>(queries, tile, problem.head_dim, words, query);
    softmax->clear();
    for (int first = 0; first < n; first += kBlock) {
      const int m = minimum(kBlock, n - first);
      float most[kTile], subtracted[kTile], rescale[kTile];
      for (int i = 0; i < kTile; i++) most[i] = -kInfinity;
      multiply_panels<Words>(panels + (int64_t)first * words, query, words, tile.count, m, scores,
                             ahead);
      row_maxima(scores, tile.count, m, factor, most);
      softmax->raise(most, subtracted, rescale);
      weights(tile.count, m, subtracted, softmax->sum,
              {queries, later.part(0, first == 0 ? later.count : 0), problem.head_dim}, ahead);
      if (first > 0)
        for (int i = 0; i < tile.count; i++)
          for (int d = 0; d < value_stride; d += kLanes) {
            float* target = out + (int64_t)i * value_stride + d;
            store(target, load(target) * broadcast(rescale[i]));
          }
      for_each_panel(m, [&](int from, int k) VLMFAST_INLINE_LAMBDA {
        outer_accumulate<Words>(scores + from / kPanel * kPanelScores,
                                panel_width(k) / Words::kElements,
                                values + (int64_t)(first + from) / Words::kElements * value_stride,
                                (k + Words::kElements - 1) / Words::kElements, tile.count,
                                first + from == 0, out, value_vectors);
      });
    }
  }

  // One query against n latents in place: `out` starts with the weighted sum, still to be divided.
  VLMFAST_NOINLINE void attend_row(const Rows<T>& queries, int token, Rows<T> key, Rows<T> value,
                                   int n, Prefetcher& ahead, Softmax* softmax) const {
    const int dim = problem.head_dim;
    for (int d = 0; d < dim; d += kLanes)
      store(query + d,
            load_columns(queries, token, d, minimum(kLanes, dim - d)) * broadcast(factor));
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
          [](Vec a, Vec b) VLMFAST_INLINE_LAMBDA { return a + b; });
      const Vec score = first_or(load(scores + first), m, -kInfinity);
      store(scores + first, score);
      most = max(most, score);
    }
    softmax->clear();
    float top[kTile], subtracted[kTile], rescale[kTile];
    for (int i = 0; i < kTile; i++) top[i] = -kInfinity;
    top[0] = horizontal_max(most);
    softmax->raise(top, subtracted, rescale);
    Vec total = zero();
    for (int first = 0; first < n; first += kLanes) {
      const Vec p = exp2<Words::kExpDegree>(load(scores + first) - broadcast(subtracted[0]));
      store(scores + first, p);
      total = total + p;
    }
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
    T* target = problem.out.at<T>(batch, head, token);
    for (int d = 0; d < problem.value_dim; d += kLanes)
      store_first(target + d, load(source + d) * broadcast(scale),
                  minimum(kLanes, problem.value_dim - d));
  }

  // Results of a tile from its weighted sums. Rows that see nothing have a sum of 0 and give 0.
  VLMFAST_INLINE void store_tile(const Softmax& softmax, int batch, int head, Tokens tile,
                                 Tokens later, const float* sums, Prefetcher& ahead) const {
    float logs[kTile];
    log2_of_sums(softmax.sum, logs);
    float* target = logsumexp(batch, head);
    const RowFetcher<T> fetcher{rows_of<T>(problem.out, batch, head), later, problem.value_dim};
    for (int i = 0; i < tile.count; i++) {
      fetcher.row(i);
      ahead.step();
      target[tile.index[i]] = natural_logsumexp(softmax.top[i], logs[i]);
      store_row(batch, head, tile.index[i], sums + (int64_t)i * value_stride,
                softmax.sum[i] == 0.f ? 0.f : 1.f / softmax.sum[i]);
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

  VLMFAST_INLINE void pack(const CrossAttentionTask& task, int image, int n) const {
    pack_panels<Words>(latents_of<T>(problem.key, task.batch, task.head, image), n,
                       problem.head_dim, words, panels);
    pack_row_pairs<Words>(latents_of<T>(problem.value, task.batch, task.head, image), n,
                          round_up(n, kRowStep), problem.value_dim, value_stride, values);
  }

  // All query heads' tokens against n latents of an image; take(head, tile, later tile, softmax)
  // takes the weighted sums from `out`.
  template <class Take>
  VLMFAST_INLINE void attend_image(const CrossAttentionTask& task, int image, Tokens tokens, int n,
                                   Prefetcher& ahead, Take take) const {
    Softmax softmax;
    const bool few = is_few(tokens);
    if (!few) pack(task, image, n);
    for (int h = 0; h < problem.group; h++) {
      const int head = task.head * problem.group + h;
      if (few) {
        for (int i = 0; i < tokens.count; i++) {
          attend_row(rows_of<T>(problem.query, task.batch, head), tokens.index[i],
                     latents_of<T>(problem.key, task.batch, task.head, image),
                     latents_of<T>(problem.value, task.batch, task.head, image), n, ahead,
                     &softmax);
          take(head, tokens.part(i, 1), tokens.part(i, 0), softmax);
        }
      } else {
        for_each_tile(tokens, [&](Tokens tile, Tokens later) VLMFAST_INLINE_LAMBDA {
          if (!problem.prefetch) later.count = 0;
          attend(task, head, tile, later, n, ahead, &softmax);
          take(head, tile, later, softmax);
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
    // One step for each row weighed and one for each stored, beside those of the products.
    const int64_t all_rows = (int64_t)tokens.count * problem.group;
    const int64_t per_row = is_few(tokens) ? 1 + (n + kLanes - 1) / kLanes : 2;
    Prefetcher ahead = prefetcher(task, next, all_rows * per_row);
    attend_image(task, image, tokens, n, ahead,
                 [&](int head, Tokens tile, Tokens later, const Softmax& softmax)
                     VLMFAST_INLINE_LAMBDA {
                       store_tile(softmax, task.batch, head, tile, later, out, ahead);
                     });
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
                       [&](int head, Tokens tile, Tokens, const Softmax& softmax)
                           VLMFAST_INLINE_LAMBDA { join(softmax, tile, first_row(head)); });
      });
    for (int h = 0; h < problem.group; h++)
      for (int token = task.begin; token < task.end; token++) {
        if (problem.image_index[(int64_t)task.batch * problem.tokens + token] == kUniformRow)
          continue;
        const int64_t row = (int64_t)h * range + token - task.begin;
        Prefetcher none;
        Softmax softmax;
        softmax.clear();
        softmax.top[0] = rows.tops[row];
        softmax.sum[0] = rows.sums[row];
        store_tile(softmax, task.batch, task.head * problem.group + h, {&token, 1}, {&token, 0},
                   row_out + row * value_stride, none);
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
  float factor;                                  // of the products, before exp2
  float *key_panels, *value_panels, *key_rows, *grad_keys, *grad_values;
  float *query, *grad_out, *query_pairs, *grad_out_pairs, *grad_query;
  float *scores, *grad_scores, *grad_words, *left, *grad_left;
  RowStatistics rows{};  // where tokens may see several images
  int64_t scratch_size;

  static constexpr int kStep = Words::kElements;

  Backward(const CrossAttentionBackward& p, float* scratch) : problem(p) {
    words = word_count<Words>(p.head_dim);
    value_words = word_count<Words>(p.value_dim);
    stride = round_up(p.head_dim, kLanes);
    value_stride = round_up(p.value_dim, kLanes);
    factor = p.scale * kLog2E;
    Arena arena{scratch};
    const int64_t panel_rows = round_up(p.latents, kPanel), padded = round_up(p.latents, kRowStep);
    key_panels = arena.take(panel_rows * words);
    value_panels = arena.take(panel_rows * value_words);
    key_rows = arena.take(padded / kStep * stride);
    grad_keys = arena.take(p.wants_key_value ? padded * stride : 0);
    grad_values = arena.take(p.wants_key_value ? padded * value_stride : 0);
    query = arena.take((int64_t)kTile * words);
    grad_out = arena.take((int64_t)kTile * value_words);
    // Rows of floats serve both products, if they are padded alike.
    const bool same = kStep == 1 && words == stride,
               value_same = kStep == 1 && value_words == value_stride;
    query_pairs = same ? query : arena.take((int64_t)kTile / kStep * stride);
    grad_out_pairs = value_same ? grad_out : arena.take((int64_t)kTile / kStep * value_stride);
    grad_query = arena.take((int64_t)kTile * stride);
    scores = arena.take(kScores);
    grad_scores = arena.take(kScores);
    grad_words = kStep == 1 ? grad_scores : arena.take(kScores / 2);
    left = kStep == 1 ? scores : arena.take(kScores / 2);
    grad_left = kStep == 1 ? grad_scores : arena.take(kScores / 2);
    const int64_t held = p.several ? (int64_t)p.group * p.tokens : 0;
    rows.tops = arena.take(held);
    rows.sums = arena.take(held);
    scratch_size = arena.used;
  }

  // exp(-logsumexp) as share * exp2(-top). Rows that see nothing get weights of exp2(-inf) = 0.
  // False where rounding has taken too much of the logsumexp.
  static VLMFAST_INLINE bool split(float logsumexp, float* top, float* share) {
    *top = kInfinity;
    *share = 1.f;
    if (logsumexp == -kInfinity) return true;
    *top = logsumexp * kLog2E;
    const float rest = __builtin_fmaf(logsumexp, kLog2E, -*top) + logsumexp * kLog2ELow;
    *share = 1.f - rest * (float)kLn2;
    return !(__builtin_fabsf(logsumexp) > kImpreciseLogsumexp<T>);
  }

  // The softmax of a tile's packed queries over n packed latents, without its weights.
  VLMFAST_NOINLINE void statistics(int count, int n, Prefetcher& ahead, Softmax* softmax) const {
    softmax->clear();
    for (int first = 0; first < n; first += kBlock) {
      const int m = minimum(kBlock, n - first);
      float most[kTile], subtracted[kTile], rescale[kTile], more[kTile] = {};
      for (int i = 0; i < kTile; i++) most[i] = -kInfinity;
      multiply_panels<Words>(key_panels + (int64_t)first * words, query, words, count, m, scores,
                             ahead);
      row_maxima(scores, count, m, factor, most);
      softmax->raise(most, subtracted, rescale);
      const Vec f = broadcast(remaining_factor(scores, count, m, factor, subtracted));
      reduce_rows(
          count, more,
          [&](int row) VLMFAST_INLINE_LAMBDA {
            const Vec shift = broadcast(subtracted[row]);
            Vec total = zero();
            for_each_vector(row, m, [&](int at, int lanes) VLMFAST_INLINE_LAMBDA {
              const Vec p = exp2<Words::kExpDegree>(fms(f, load(scores + at), shift));
              total = total + first_or(p, lanes, 0.f);
            });
            return total;
          },
          [](Vec a, Vec b) VLMFAST_INLINE_LAMBDA { return a + b; });
      add_rows(softmax->sum, more);
    }
  }

  // grad_out . out - grad_logsumexp of each row, and its logsumexp as `split` has it.
  VLMFAST_INLINE void row_values(const CrossAttentionTask& task, int head, Tokens tile,
                                 Tokens later, int n, float* delta, float* top, float* share,
                                 Prefetcher& ahead) const {
    const Rows<T> grad = rows_of<T>(problem.grad_out, task.batch, head);
    const Rows<T> out = rows_of<T>(problem.out, task.batch, head);
    const RowFetcher<T> later_out{out, later, problem.value_dim},
        later_grad{grad, later, problem.value_dim};
    reduce_rows(
        tile.count, delta,
        [&](int i) VLMFAST_INLINE_LAMBDA {
          const int token = tile.index[i];
          later_out.row(i);
          later_grad.row(i);
          Vec sum = zero();
          for (int d = 0; d < problem.value_dim; d += kLanes) {
            const int m = minimum(kLanes, problem.value_dim - d);
            sum = fma(load_columns(grad, token, d, m), load_first(out.row(token) + d, m), sum);
          }
          return sum;
        },
        [](Vec a, Vec b) VLMFAST_INLINE_LAMBDA { return a + b; });
    const int64_t row = ((int64_t)task.batch * problem.heads + head) * problem.tokens;
    const int64_t held_row = (int64_t)(head - task.head * problem.group) * problem.tokens;
    // Nor do a few rows average the rounding of their logsumexp away.
    bool precise = problem.several || tile.count > kFewRows;
    for (int i = 0; i < tile.count; i++) {
      const int token = tile.index[i];
      const float logsumexp = problem.logsumexp[row + token];
      if (problem.several) {
        top[i] = rows.tops[held_row + token];
        share[i] = rows.sums[held_row + token];
      } else {
        precise &= split(logsumexp, top + i, share + i);
      }
      if (logsumexp == -kInfinity)
        delta[i] = 0.f;
      else if (problem.grad_logsumexp != nullptr)
        delta[i] -= problem.grad_logsumexp[row + token];
    }
    if (precise) return;
    Softmax softmax;
    statistics(tile.count, n, ahead, &softmax);
    for (int i = 0; i < tile.count; i++)
      if (top[i] != kInfinity) top[i] = softmax.top[i], share[i] = 1.f / softmax.sum[i];
  }

  // P and dS of a block of n latents, from the products in `scores` and `grad_scores`. With fp32
  // words they replace them; with bf16 words `left` and `grad_left` get them as pairs of queries,
  // and `grad_words` gets dS as pairs of latents.
  VLMFAST_INLINE void gradients(int count, int n, const float* delta, const float* top,
                                const float* share, Prefetcher& ahead) const {
    const Vec f = broadcast(remaining_factor(scores, count, n, factor, top));
    for_each_panel(n, [&](int first, int m) VLMFAST_INLINE_LAMBDA {
      const int width = panel_width(m), panel = first / kPanel;
      for (int row = 0; row < count; row += kStep) {
        ahead.step();
        for (int g = 0; g < m; g += kStep * kLanes) {
          Vec weight[kStep][kStep], grad[kStep][kStep];  // row, vector
          VLMFAST_UNROLL for (int r = 0; r < kStep; r++)
              VLMFAST_UNROLL for (int v = 0; v < kStep; v++) {
            const int i = row + r, lanes = m - g - v * kLanes;
            weight[r][v] = grad[r][v] = zero();
            if (i >= count || lanes <= 0) continue;
            const int at = panel * kPanelScores + i * width + g + v * kLanes;
            const Vec power = exp2<Words::kExpDegree>(fms(f, load(scores + at), broadcast(top[i])));
            const Vec p = first_or(power * broadcast(share[i]), lanes, 0.f);
            weight[r][v] = p;
            grad[r][v] = p * (load(grad_scores + at) - broadcast(delta[i]));
          }
          const int at = panel * kPanelScores + row * width + g;
          if constexpr (kStep == 1) {
            store(scores + at, weight[0][0]);
            store(grad_scores + at, grad[0][0]);
          }
#if VLMFAST_LEVEL >= 3
          else {
            const int pair = panel * kPanelScores / 2 + row / 2 * width + g;
            VLMFAST_UNROLL for (int v = 0; v < kStep; v++) {
              if (g + v * kLanes >= m) break;
              store(left + pair + v * kLanes, interleave(weight[0][v], weight[1][v]));
              store(grad_left + pair + v * kLanes, interleave(grad[0][v], grad[1][v]));
            }
            VLMFAST_UNROLL for (int r = 0; r < kStep; r++) store_words<Words>(
                grad_words + panel * kPanelScores / 2 + ((row + r) * width + g) / 2, grad[r],
                width - g);
          }
#endif
        }
      }
    });
  }

  // A tile against n packed latents. With `overwrite` it stores its share of grad_keys and
  // grad_values instead of adding it.
  VLMFAST_INLINE void tile(const CrossAttentionTask& task, int head, Tokens tile, Tokens later,
                           int n, bool overwrite, Prefetcher& ahead) const {
    const Rows<T> query_in = rows_of<T>(problem.query, task.batch, head);
    const Rows<T> grad_in = rows_of<T>(problem.grad_out, task.batch, head);
    pack_token_rows<Words>(query_in, tile, problem.head_dim, words, query);
    pack_token_rows<Words>(grad_in, tile, problem.value_dim, value_words, grad_out);
    if (problem.wants_key_value) {
      if (query_pairs != query)
        pack_token_pairs<Words>(query_in, tile, problem.head_dim, stride, query_pairs);
      if (grad_out_pairs != grad_out)
        pack_token_pairs<Words>(grad_in, tile, problem.value_dim, value_stride, grad_out_pairs);
    }
    float delta[kTile], top[kTile], share[kTile];
    row_values(task, head, tile, later, n, delta, top, share, ahead);
    const int depth = (tile.count + kStep - 1) / kStep;
    for (int first = 0; first < n; first += kBlock) {
      const int m = minimum(kBlock, n - first);
      multiply_panels<Words>(key_panels + (int64_t)first * words, query, words, tile.count, m,
                             scores, ahead);
      multiply_panels<Words>(value_panels + (int64_t)first * value_words, grad_out, value_words,
                             tile.count, m, grad_scores, ahead);
      gradients(tile.count, m, delta, top, share, ahead);
      for_each_panel(m, [&](int from, int k) VLMFAST_INLINE_LAMBDA {
        const int panel = from / kPanel * kPanelScores / kStep, width = panel_width(k);
        const int64_t latent = first + from;
        if (problem.wants_key_value) {
          outer_accumulate<Words, true>(left + panel, width, grad_out_pairs, depth, k, overwrite,
                                        grad_values + latent * value_stride, value_stride / kLanes);
          outer_accumulate<Words, true>(grad_left + panel, width, query_pairs, depth, k, overwrite,
                                        grad_keys + latent * stride, stride / kLanes);
        }
        if (problem.wants_query)
          outer_accumulate<Words>(grad_words + panel, width / kStep,
                                  key_rows + latent / kStep * stride, (k + kStep - 1) / kStep,
                                  tile.count, latent == 0, grad_query, stride / kLanes);
      });
    }
    if (problem.wants_query) store_grad_query(task, head, tile, later, ahead);
  }

  VLMFAST_INLINE float* partial_grad_query(const CrossAttentionTask& task, int head) const {
    return problem.grad_query_splits + task.split * problem.grad_query_split_size +
           ((int64_t)task.batch * problem.heads + head) * problem.tokens * problem.head_dim;
  }

  VLMFAST_INLINE void store_grad_query(const CrossAttentionTask& task, int head, Tokens tile,
                                       Tokens later, Prefetcher& ahead) const {
    const Vec scale = broadcast(problem.scale);
    const RowFetcher<T> later_query{rows_of<T>(problem.query, task.batch, head), later,
                                    problem.head_dim};
    const RowFetcher<T> later_grad{rows_of<T>(problem.grad_query, task.batch, head), later,
                                   problem.head_dim};
    for (int i = 0; i < tile.count; i++) {
      later_query.row(i);
      ahead.step();
      later_grad.row(i);
      for (int d = 0; d < problem.head_dim; d += kLanes) {
        const int n = minimum(kLanes, problem.head_dim - d), token = tile.index[i];
        const Vec grad = load(grad_query + (int64_t)i * stride + d) * scale;
        if (problem.several) {
          float* target = partial_grad_query(task, head) + (int64_t)token * problem.head_dim + d;
          store_first(target, load_first(target, n) + grad, n);
        } else {
          store_first(problem.grad_query.at<T>(task.batch, head, token) + d, grad, n);
        }
      }
    }
  }

  VLMFAST_INLINE void pack(const CrossAttentionTask& task, int image, int n) const {
    const Rows<T> key = latents_of<T>(problem.key, task.batch, task.head, image);
    pack_panels<Words>(key, n, problem.head_dim, words, key_panels);
    pack_panels<Words>(latents_of<T>(problem.value, task.batch, task.head, image), n,
                       problem.value_dim, value_words, value_panels);
    if (problem.wants_query)
      pack_row_pairs<Words>(key, n, round_up(n, kRowStep), problem.head_dim, stride, key_rows);
  }

  VLMFAST_INLINE void clear_grad_latents() const {
    const int64_t padded = round_up(problem.latents, kRowStep);
    for (int64_t i = 0; i < padded * stride; i += kLanes) store(grad_keys + i, zero());
    for (int64_t i = 0; i < padded * value_stride; i += kLanes) store(grad_values + i, zero());
  }

  VLMFAST_INLINE void store_grad_latents(const CrossAttentionTask& task, int image) const {
    const Strided key = problem.grad_key.image(image, sizeof(T)),
                  value = problem.grad_value.image(image, sizeof(T));
    const int64_t key_head = (int64_t)task.batch * (problem.heads / problem.group) + task.head;
    const float* uniform = problem.uniform_gradient == nullptr
                               ? nullptr
                               : problem.uniform_gradient + key_head * problem.value_dim;
    const Vec scale = broadcast(problem.scale);
    for (int j = 0; j < problem.latents; j++) {
      T* target = key.at<T>(task.batch, task.head, j);
      for (int d = 0; d < problem.head_dim; d += kLanes)
        store_first(target + d, load(grad_keys + (int64_t)j * stride + d) * scale,
                    minimum(kLanes, problem.head_dim - d));
      target = value.at<T>(task.batch, task.head, j);
      for (int d = 0; d < problem.value_dim; d += kLanes) {
        const int n = minimum(kLanes, problem.value_dim - d);
        Vec sum = load(grad_values + (int64_t)j * value_stride + d);
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
      add_tokens(problem.out, problem.value_dim);
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
      Prefetcher ahead = prefetcher(next, (int64_t)tokens.count * problem.group);
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
    bool precise = problem.tokens > kFewRows;
    for (int64_t i = 0; i < held; i++) precise &= split(logsumexp[i], rows.tops + i, rows.sums + i);
    if (precise) return;
    rows.clear(held);
    for (int image = 0; image < problem.images; image++)
      for_each_list(problem, task.batch, image, [&](Tokens tokens, int n) {
        pack(task, image, n);
        for_each_head_tile(task, tokens, [&](int head, Tokens part, Tokens) {
          Prefetcher none;
          Softmax softmax;
          float kept[kTile], added[kTile];
          pack_token_rows<Words>(rows_of<T>(problem.query, task.batch, head), part,
                                 problem.head_dim, words, query);
          statistics(part.count, n, none, &softmax);
          rows.join(softmax, part, (int64_t)(head - task.head * problem.group) * problem.tokens,
                    kept, added);
        });
      });
    for (int64_t i = 0; i < held; i++) {
      if (rows.sums[i] == 0.f)
        split(-kInfinity, rows.tops + i, rows.sums + i);
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
    forward_scratch,  forward,    fill_rows, backward_scratch, backward, clear_grad_rows,
    sum_uniform_rows, sum_splits, kTile};

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
