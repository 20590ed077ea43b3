// The logits of a window, of dot products or cosines, and their softmax.
#pragma once
#include "cpu/softmax.h"
#include "cpu/tile/pack.h"
#include "cpu/tile/products.h"
#include "cpu/window_attention_rows.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

// 1 / max(|x|, 1e-12) from |x|^2.
VLMFAST_INLINE Vec inverse_norm(Vec square) {
  return broadcast(1.f) / max(broadcast(kSmallestNorm), sqrt(square));
}

// out[row] = the inverse norm of each packed row.
template <class Words>
VLMFAST_NOINLINE void inverse_norms(const float* rows, int words, int n_rows, float* out) {
  const auto load_row = [&](int j, int w, int n) VLMFAST_INLINE_LAMBDA {
    return load_first(rows + (int64_t)j * words + w, n);
  };
  sum_rows<Words>(n_rows, words, load_row, load_row, out);
  for (int j = 0; j < n_rows; j += kLanes) store(out + j, inverse_norm(load(out + j)));
}

// Copies of rows whose squares or products might leave the range of float32, as nothing does of
// what cosines are made of: each is divided by the power of two that leaves its largest element
// below 4. Elements are only ever made smaller.
template <class T, int kStep>
struct ShrunkRows {
  T* data;         // [rows][columns]
  T** pointers;    // [rows][kStep]
  float* factors;  // [rows]: what the rows were multiplied by

  void take(Arena* arena, int rows, int columns) {
    data = (T*)arena->take((int64_t)rows * columns);
    pointers = (T**)arena->take((int64_t)rows * kStep * (sizeof(void*) / sizeof(float)));
    factors = arena->take(round_up(rows, kLanes));
  }

  VLMFAST_NOINLINE ScatteredRows<T, kStep> copy(ScatteredRows<T, kStep> rows, int n_rows,
                                                int columns) const {
    for (int i = 0; i < n_rows; i++) {
      const T* from = rows.row(i);
      T* to = data + (int64_t)i * columns;
      Vec largest = zero();
      for (int d = 0; d < columns; d += kLanes) {
        const Vec x = load_first(from + d, minimum(kLanes, columns - d));
        largest = max(largest, max(x, zero() - x));
      }
      factors[i] = factor(horizontal_max(largest));
      pointers[i * kStep] = to;
      for (int d = 0; d < columns; d += kLanes) {
        const int n = minimum(kLanes, columns - d);
        store_first(to + d, load_first(from + d, n) * broadcast(factors[i]), n);
      }
    }
    return {pointers, 0};
  }

 private:
  static VLMFAST_INLINE float factor(float largest) {
    uint32_t bits;
    __builtin_memcpy(&bits, &largest, sizeof bits);
    bits = (uint32_t)minimum(127, maximum(1, 255 - (int)(bits >> 23))) << 23;
    __builtin_memcpy(&largest, &bits, sizeof bits);
    return largest;
  }
};

// Whether any of n vectors of inverse norms is that of a row to be shrunk.
VLMFAST_INLINE bool any_is_long(const Vec* inverse, int n) {
  Vec least = broadcast(1.f);
  for (int i = 0; i < n; i++) least = min(inverse[i], least);
  return horizontal_max(zero() - least) > -kShortestInverse;
}

// The packed rows' inverse norms; where some are too long, `rows` and `packed` become shrunk
// copies. Gives whether they did.
template <class Words, class T, int kStep>
VLMFAST_INLINE bool norms_of_rows(ScatteredRows<T, kStep>* rows, int n_rows, int columns, int words,
                                  const ShrunkRows<T, kStep>& copies, float* packed, float* out) {
  inverse_norms<Words>(packed, words, n_rows, out);
  Vec least = broadcast(1.f);
  for (int j = 0; j < n_rows; j += kLanes) least = min(load(out + j), least);
  if (!any_is_long(&least, 1)) return false;
  *rows = copies.copy(*rows, n_rows, columns);
  pack_rows<Words>(*rows, n_rows, n_rows, columns, words, packed);
  inverse_norms<Words>(packed, words, n_rows, out);
  return true;
}

// The squared norms of a tile's queries, from pack_transposed.
template <class Words, int kGroups>
VLMFAST_INLINE void square_norms(const float* query, int words, Vec* squares) {
  VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) squares[g] = zero();
  for (int w = 0; w < words; w++) VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      const Vec q = load(query + (w * kGroups + g) * kLanes);
      squares[g] = Words::multiply_add(q, q, squares[g]);
    }
}

// The squared and the inverse norms of a tile's packed queries; where some are too long, `rows` and
// `packed` become shrunk copies. Gives whether they did.
template <class Words, int kGroups, class T, int kStep>
VLMFAST_INLINE bool norms_of_queries(ScatteredRows<T, kStep>* rows, int n_rows, int columns,
                                     int words, const ShrunkRows<T, kStep>& copies, float* packed,
                                     Vec* square, Vec* inverse) {
  for (bool are_copies = false;; are_copies = true) {
    square_norms<Words, kGroups>(packed, words, square);
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) inverse[g] = inverse_norm(square[g]);
    if (are_copies || !any_is_long(inverse, kGroups)) return are_copies;
    *rows = copies.copy(*rows, n_rows, columns);
    pack_transposed<Words, kGroups>(*rows, n_rows, columns, 1.f, packed);
  }
}

// out[j][:] = weights[j] * row, of `vectors` vectors.
VLMFAST_INLINE void set_outer(const float* weights, const float* row, int n, int vectors,
                              float* out) {
  for (int j = 0; j < n; j++) {
    const Vec weight = broadcast(weights[j]);
    for (int v = 0; v < vectors; v++)
      store(out + ((int64_t)j * vectors + v) * kLanes, weight * load(row + v * kLanes));
  }
}

// Calls body(Count<rows of keys that one register tile holds>()): one less than usual where that
// wastes less of the last tile (49 = 7 * 7), and no more than there are.
template <int kGroups, int kMany = kTileRows<kGroups>, class Body>
VLMFAST_INLINE void with_rows(int n, Body body) {
  constexpr int kFew = kMany == 8 && kRegisters == 32 ? 7 : kMany;
  if constexpr (kMany > 1)
    if (n < kFew) return with_rows<kGroups, kMany / 2>(n, body);
  if (round_up(n, kFew) < round_up(n, kMany))
    body(Count<kFew>());
  else
    body(Count<kMany>());
}

// The logits of one head in one window, in log2 units.
template <class Words>
struct Logits {
  const WindowTiling& tiling;
  const float* keys;         // pack_rows
  const float* key_factors;  // inverse norms, or nullptr
  int words;
  const float* bias;     // packed, or nullptr
  const float* regions;  // nullptr where the window does not wrap
  float mask;

  // logits[key][lane] for the tile's queries from the vector `first` on, and their maxima.
  template <int kGroups>
  VLMFAST_INLINE void tile(const float* query, int first, const Vec* factor, float* logits,
                           Vec* row_max, WindowPrefetcher& ahead) const {
    with_rows<kGroups>(tiling.tokens, [&](auto rows) VLMFAST_INLINE_LAMBDA {
      constexpr int kRows = decltype(rows)::value;
      if (bias != nullptr && key_factors == nullptr && regions == nullptr)
        tile<kGroups, kRows, true>(query, first, factor, logits, row_max, ahead);
      else
        tile<kGroups, kRows, false>(query, first, factor, logits, row_max, ahead);
    });
  }

  // kPlain: a bias, and neither cosines nor regions.
  template <int kGroups, int kRows, bool kPlain>
  VLMFAST_NOINLINE void tile(const float* query, int first, const Vec* factor, float* logits,
                             Vec* row_max, WindowPrefetcher& ahead) const {
    const int n = tiling.tokens;
    const float* added = bias == nullptr ? nullptr : bias + tiling.bias_tile(first);
    Vec top[kGroups];  // in registers, which `row_max` cannot be
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) top[g] = broadcast(-kInfinity);
    const auto finish = [&](int j, int g, Vec sum) VLMFAST_INLINE_LAMBDA {
      Vec f = factor[g];
      if (!kPlain && key_factors != nullptr) f = f * broadcast(key_factors[j]);
      Vec x = !kPlain && bias == nullptr ? sum * f
                                         : fma(sum, f, load(added + (j * kGroups + g) * kLanes));
      if (!kPlain && regions != nullptr)
        x = x + masked(load(regions + (first + g) * kLanes), regions[j]);
      store(logits + (j * kGroups + g) * kLanes, x);
      top[g] = max(top[g], x);
    };
    for_each_product<Words, kGroups, kRows>(
        query, keys, words, words, n, [&]() VLMFAST_INLINE_LAMBDA { ahead.step(); },
        [&](int j, const Vec(&sum)[kRows][kGroups]) VLMFAST_INLINE_LAMBDA {
          VLMFAST_UNROLL for (int r = 0; r < kRows; r++)
              VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) finish(j + r, g, sum[r][g]);
        });
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) row_max[g] = top[g];
  }

  VLMFAST_INLINE Vec masked(Vec regions_of_lanes, float region) const {
    return select_eq(regions_of_lanes, broadcast(region), zero(), broadcast(mask));
  }

  // The last query's logits[key]; lanes beyond the keys are -inf.
  VLMFAST_INLINE void last(const float* query, float factor, float* logits) const {
    const int n = tiling.tokens;
    multiply_row<Words>(query, keys, words, words, n, logits);
    const float* added = bias == nullptr ? nullptr : bias + tiling.bias_tiles_size();
    for (int j = 0; j < n; j += kLanes) {
      Vec f = broadcast(factor);
      if (key_factors != nullptr) f = f * load(key_factors + j);
      const Vec product = load(logits + j);
      Vec x = bias == nullptr ? product * f : fma(product, f, load(added + j));
      if (regions != nullptr) x = x + masked(load(regions + j), regions[n - 1]);
      store(logits + j, select_ge(lane_index(j), n, broadcast(-kInfinity), x));
    }
  }
};

// In place: exp2(logits - their maximum), and their sum, of one row.
template <class Words>
VLMFAST_INLINE float exponentiate_row(float* logits, int n, float* row_max) {
  Vec top = broadcast(-kInfinity), sum = zero();
  for (int j = 0; j < n; j += kLanes) top = max(top, load(logits + j));
  *row_max = horizontal_max(top);
  for (int j = 0; j < n; j += kLanes) {
    const Vec p = exp2<Words::kExpDegree>(load(logits + j) - broadcast(*row_max));
    sum = sum + p;
    store(logits + j, p);
  }
  return horizontal_sum(sum);
}

}  // namespace
}  // namespace vlmfast::cpu::VLMFAST_VARIANT
