// Register-tiled products on packed operands.
//
// Lanes are queries. A tile holds kGroups vectors of queries, and every matrix is kept so that the
// query index (or, in `outer_accumulate`, the feature index) runs along the lanes: then softmax is
// vertical arithmetic, K and V are read as broadcast scalars in their natural layout, and only the
// query and the output are ever transposed.
#pragma once
#include "cpu/tile/elements.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {

// Rows of a register tile: enough accumulators to hide the latency of the multiply-add, few enough
// to stay in registers.
template <int kGroups>
constexpr int kTileRows = kRegisters == 32 ? (kGroups == 4 ? 4 : 8) : (kGroups == 1 ? 8 : 4);

// Calls body(row, sum) for every kRows rows of keys, which lie key_stride apart; sum[r][g] =
// keys[row + r] . query, in registers. There are kRows or more, and no row beyond them is read: the
// last are those that end at n_rows, some of them for the second time. `between()` is called every
// kWordStep words.
template <class Words, int kGroups, int kRows, class Between, class Body>
VLMFAST_INLINE void for_each_product(const float* __restrict query, const float* __restrict keys,
                                     int64_t key_stride, int words, int n_rows, Between between,
                                     Body body) {
  for (int first = 0; first < n_rows; first += kRows) {
    const int j = minimum(first, n_rows - kRows);
    const float* key = keys + j * key_stride;
    Vec sum[kRows][kGroups];
    VLMFAST_UNROLL for (int r = 0; r < kRows; r++) VLMFAST_UNROLL for (int g = 0; g < kGroups; g++)
        sum[r][g] = zero();
    for (int w = 0; w < words; w += kWordStep) {
      between();
      if constexpr (kFused) {
        VLMFAST_UNROLL for (int u = 0; u < kWordStep; u++) {
          Vec q[kGroups];
          VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) q[g] =
              load(query + ((w + u) * kGroups + g) * kLanes);
          VLMFAST_UNROLL for (int r = 0; r < kRows; r++) {
            const Vec k = broadcast(key[r * key_stride + w + u]);
            VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) sum[r][g] =
                Words::multiply_add(q[g], k, sum[r][g]);
          }
        }
      } else {
        // Products are rounded here before they are added. Summed up kWordStep at a time, they meet
        // the larger sum less often.
        VLMFAST_UNROLL for (int r = 0; r < kRows; r++) {
          Vec part[kGroups];
          VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) part[g] = zero();
          VLMFAST_UNROLL for (int u = 0; u < kWordStep; u++) {
            const Vec k = broadcast(key[r * key_stride + w + u]);
            VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) part[g] =
                Words::multiply_add(load(query + ((w + u) * kGroups + g) * kLanes), k, part[g]);
          }
          VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) sum[r][g] = sum[r][g] + part[g];
        }
      }
    }
    body(j, sum);
  }
}

// scores[row][kGroups * kLanes] = keys[row] . query, for rows [0, n_rows); `running_max` (or
// nullptr) becomes their running maximum.
template <class Words, int kGroups, int kRows = kTileRows<kGroups>, class Ahead>
VLMFAST_NOINLINE void multiply_rows(const float* __restrict query, const float* __restrict keys,
                                    int64_t key_stride, int words, int n_rows,
                                    float* __restrict scores, Vec* running_max, Ahead& ahead) {
  if constexpr (kRows > 1)
    if (n_rows < kRows)
      return multiply_rows<Words, kGroups, kRows / 2>(query, keys, key_stride, words, n_rows,
                                                      scores, running_max, ahead);
  for_each_product<Words, kGroups, kRows>(
      query, keys, key_stride, words, n_rows, [&]() VLMFAST_INLINE_LAMBDA { ahead.step(); },
      [&](int j, const Vec(&sum)[kRows][kGroups]) VLMFAST_INLINE_LAMBDA {
        float* target = scores + j * kGroups * kLanes;
        VLMFAST_UNROLL for (int r = 0; r < kRows; r++)
            VLMFAST_UNROLL for (int g = 0; g < kGroups; g++)
                store(target + (r * kGroups + g) * kLanes, sum[r][g]);
        if (running_max == nullptr) return;
        VLMFAST_UNROLL for (int g = 0; g < kGroups; g++)
            VLMFAST_UNROLL for (int r = 0; r < kRows; r++) running_max[g] =
                max(running_max[g], sum[r][g]);
      });
}

template <class Words, int kGroups, int kColumns>
VLMFAST_INLINE void weighted_columns(const float* __restrict weights,
                                     const float* __restrict values, int64_t value_stride,
                                     int n_rows, float* __restrict out, const Vec* rescale) {
  Vec sum[kColumns][kGroups];
  VLMFAST_UNROLL for (int d = 0; d < kColumns; d++) VLMFAST_UNROLL for (int g = 0; g < kGroups; g++)
      sum[d][g] = zero();
  for (int r = 0; r < n_rows; r++) {
    Vec p[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) p[g] =
        load(weights + (r * kGroups + g) * kLanes);
    VLMFAST_UNROLL for (int d = 0; d < kColumns; d++) {
      const Vec v = broadcast(values[r * value_stride + d]);
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) sum[d][g] =
          Words::multiply_add(p[g], v, sum[d][g]);
    }
  }
  VLMFAST_UNROLL for (int d = 0; d < kColumns; d++)
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
    float* o = out + (d * kGroups + g) * kLanes;
    store(o, rescale == nullptr ? sum[d][g] : fma(rescale[g], load(o), sum[d][g]));
  }
}

// out[column][kGroups * kLanes] = rescale * out + sum over rows of weights[row] *
// values[row][column]; without `rescale` out starts from zero. n_rows counts rows of words;
// `columns` is a multiple of kRowStep.
template <class Words, int kGroups>
VLMFAST_NOINLINE void weighted_sum(const float* weights, const float* values, int64_t value_stride,
                                   int n_rows, int columns, float* out, const Vec* rescale) {
  constexpr int kColumns = kTileRows<kGroups>;
  for (int d = 0; d < columns; d += kColumns)
    weighted_columns<Words, kGroups, kColumns>(weights, values + d, value_stride, n_rows,
                                               out + d * kGroups * kLanes, rescale);
}

template <class Words, int kVectors, int kRows, bool kLeftByColumns>
VLMFAST_INLINE void outer_rows(const float* __restrict left, int left_stride,
                               const float* __restrict right, int right_stride, int depth,
                               bool overwrite, float* __restrict out, int out_stride) {
  Vec sum[kRows][kVectors];
  VLMFAST_UNROLL for (int r = 0; r < kRows; r++) VLMFAST_UNROLL for (int v = 0; v < kVectors; v++)
      sum[r][v] = zero();
  for (int i = 0; i < depth; i++) {
    Vec x[kVectors];
    VLMFAST_UNROLL for (int v = 0; v < kVectors; v++) x[v] =
        load(right + i * right_stride + v * kLanes);
    VLMFAST_UNROLL for (int r = 0; r < kRows; r++) {
      const Vec weight =
          broadcast(kLeftByColumns ? left[i * left_stride + r] : left[r * left_stride + i]);
      VLMFAST_UNROLL for (int v = 0; v < kVectors; v++) sum[r][v] =
          Words::multiply_add(weight, x[v], sum[r][v]);
    }
  }
  VLMFAST_UNROLL for (int r = 0; r < kRows; r++) VLMFAST_UNROLL for (int v = 0; v < kVectors; v++) {
    float* target = out + r * out_stride + v * kLanes;
    store(target, overwrite ? sum[r][v] : load(target) + sum[r][v]);
  }
}

template <class Words, int kVectors, bool kLeftByColumns>
VLMFAST_INLINE void outer_columns(const float* left, int left_stride, const float* right,
                                  int right_stride, int depth, int n_rows, bool overwrite,
                                  float* out, int out_stride) {
  // Four rows of two vectors are too few sums to hide the latency of a multiply-add.
  constexpr int kRows = kRegisters == 32 && kVectors <= 2 ? 8 : 4;
  const int left_step = kLeftByColumns ? 1 : left_stride;
  int j = 0;
  for (; kRows > 4 && j + 4 < n_rows; j += kRows)
    outer_rows<Words, kVectors, kRows, kLeftByColumns>(left + j * left_step, left_stride, right,
                                                       right_stride, depth, overwrite,
                                                       out + (int64_t)j * out_stride, out_stride);
  for (; j < n_rows; j += 4)
    outer_rows<Words, kVectors, 4, kLeftByColumns>(left + j * left_step, left_stride, right,
                                                   right_stride, depth, overwrite,
                                                   out + (int64_t)j * out_stride, out_stride);
}

// out[row][vectors * kLanes] += (or, with `overwrite`, =) the sum over i of left[row][i] *
// right[i][:]: here the lanes run over features. Rows [0, n_rows) rounded up to 4 are touched. With
// kLeftByColumns the weights are left[i][row].
template <class Words, bool kLeftByColumns = false>
VLMFAST_NOINLINE void outer_accumulate(const float* left, int left_stride, const float* right,
                                       int depth, int n_rows, bool overwrite, float* out,
                                       int vectors) {
  constexpr int kMost = kRegisters == 32 ? 6 : 2;
  const int stride = vectors * kLanes;
  int left_over = vectors;
  for (int parts = (vectors + kMost - 1) / kMost; parts > 0; parts--) {
    const int n = (left_over + parts - 1) / parts, first = (vectors - left_over) * kLanes;
    const float* x = right + first;
    float* o = out + first;
    with_count<kMost>(n, [&](auto vectors) VLMFAST_INLINE_LAMBDA {
      outer_columns<Words, decltype(vectors)::value, kLeftByColumns>(
          left, left_stride, x, stride, depth, n_rows, overwrite, o, stride);
    });
    left_over -= n;
  }
}

// out[row] = the sum over words of left(row, word, n) . right(row, word, n), each of which loads n
// words; here the lanes of `out` are rows.
template <class Words, class Left, class Right>
VLMFAST_INLINE void sum_rows(int n_rows, int words, Left left, Right right, float* out) {
  for (int j = 0; j < n_rows; j += kLanes) {
    Vec r[kLanes];
    VLMFAST_UNROLL for (int i = 0; i < kLanes; i++) r[i] = zero();
    if (j + kLanes <= n_rows && words % kLanes == 0) {
      for (int w = 0; w < words; w += kLanes)
        VLMFAST_UNROLL for (int i = 0; i < kLanes; i++) r[i] =
            Words::multiply_add(left(j + i, w, kLanes), right(j + i, w, kLanes), r[i]);
    } else {
      for (int i = 0; i < kLanes && j + i < n_rows; i++) {
        Vec sum = zero();
        for (int w = 0; w < words; w += kLanes) {
          const int n = minimum(kLanes, words - w);
          sum = Words::multiply_add(left(j + i, w, n), right(j + i, w, n), sum);
        }
        r[i] = sum;
      }
    }
    store(out + j, sum_of_lanes(r));
  }
}

// out[row] = row . rows[row], of rows of words.
template <class Words>
VLMFAST_NOINLINE void multiply_row(const float* row, const float* rows, int64_t stride, int words,
                                   int n_rows, float* out) {
  sum_rows<Words>(
      n_rows, words,
      [&](int, int w, int n) VLMFAST_INLINE_LAMBDA { return load_first(row + w, n); },
      [&](int j, int w, int n)
          VLMFAST_INLINE_LAMBDA { return load_first(rows + j * stride + w, n); },
      out);
}

// out[column] = sum over rows of words of weights[row] * rows[row][column].
template <class Words>
VLMFAST_NOINLINE void combine_rows(const float* weights, const float* rows, int64_t stride,
                                   int n_rows, int columns, float* out) {
  for (int d = 0; d < columns; d += kLanes) {
    const int n = minimum(kLanes, columns - d);
    Vec sum[4] = {zero(), zero(), zero(), zero()};
    int r = 0;
    for (; r + 4 <= n_rows; r += 4)
      VLMFAST_UNROLL for (int i = 0; i < 4; i++) sum[i] = Words::multiply_add(
          broadcast(weights[r + i]), load_first(rows + (r + i) * stride + d, n), sum[i]);
    for (; r < n_rows; r++)
      sum[0] =
          Words::multiply_add(broadcast(weights[r]), load_first(rows + r * stride + d, n), sum[0]);
    store(out + d, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
