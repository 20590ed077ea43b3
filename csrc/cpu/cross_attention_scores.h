// Which tokens see an image, tiles of them, and the softmax of their scores.
#pragma once
#include "cpu/cross_attention.h"
#include "cpu/rows.h"
#include "cpu/softmax.h"
#include "cpu/tile/pack.h"
#include "cpu/tile/prefetch.h"
#include "cpu/tile/products.h"

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
// Of images of up to so many latents a row may have all its weight on one: it is then 1 to the last
// bit, as in eager PyTorch, only where the softmax is computed afresh.
constexpr int kFewLatents = 8;

// Calls body(Count<groups>()) with as many vectors as a tile of n queries has.
template <class Body>
VLMFAST_INLINE void with_groups(int n, Body body) {
  with_count<kTileGroups>((n + kLanes - 1) / kLanes, body);
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

// scores[latent][kGroups * kLanes] of n packed latents; `row_max` becomes their maxima times
// factor.
template <class Words, int kGroups, class Ahead>
VLMFAST_INLINE void score(const float* query, const Operand& keys, int words, int n, float factor,
                          float* scores, Vec* row_max, Ahead& ahead) {
  VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) row_max[g] = broadcast(-kInfinity);
  multiply_rows<Words, kGroups>(query, keys.rows, keys.stride, words, n, scores, row_max, ahead);
  VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) row_max[g] = row_max[g] * broadcast(factor);
}

VLMFAST_INLINE Vec first_or(Vec x, int lanes, float other) {
  return lanes >= kLanes ? x : select_ge(lane_index(0), lanes, broadcast(other), x);
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
      Vec row_max = load(top + c);
      const Vec factor = raise_maximum(block_top[g], &row_max, &subtracted[g]);
      store(rescale + c, factor);
      store(sum + c, load(sum + c) * factor);
      store(top + c, row_max);
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

// Maxima and sums of all rows, joined from several images.
struct JoinedRows {
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

}  // namespace
}  // namespace vlmfast::cpu::VLMFAST_VARIANT
