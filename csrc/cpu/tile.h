// Register-tiled products on packed operands, shared by all families, written once for every
// instruction set.
//
// Lanes are queries. A tile holds kGroups vectors of queries, and every matrix is kept so that the
// query index (or, in `outer_accumulate`, the feature index) runs along the lanes: then softmax is
// vertical arithmetic, K and V are read as broadcast scalars in their natural layout, and only the
// query and the output are ever transposed.
//
// Packed operands consist of 32-bit words: one float, or two bfloat16 that one dot-product
// instruction takes at once.
#pragma once
#include "cpu/simd/math.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {

constexpr int kMaxGroups = kLanes == 4 ? 2 : kRegisters == 32 ? 4 : 3;
constexpr int kRowStep = 8;  // rows and columns of packed operands are padded to a multiple of this
constexpr int kWordStep = 4;  // so that there are this many words, or a multiple, in a row

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLog2ELow = 1.925963033500011079e-8f;  // log2(e) - kLog2E
constexpr double kLn2 = 0.69314718055994530942;
constexpr float kInfinity = __builtin_inff();
constexpr float kLowest = -3.40282346638528859812e38f;

// What is added to logits, in units of log2. Finite values stay finite, as torch adds them: a row
// of equal lowest values is uniform, not empty.
VLMFAST_INLINE Vec in_log2_units(Vec raw, float most) {
  const Vec scaled = min(broadcast(most), max(broadcast(-most), raw * broadcast(kLog2E)));
  const Vec magnitude = max(raw, broadcast(0.f) - raw);
  return select_eq(magnitude, broadcast(kInfinity), raw, scaled);
}

VLMFAST_INLINE int round_up(int n, int step) { return (n + step - 1) / step * step; }
VLMFAST_INLINE int minimum(int a, int b) { return a < b ? a : b; }
VLMFAST_INLINE int maximum(int a, int b) { return a > b ? a : b; }

// Carves arrays out of one scratch buffer; with a null buffer it only counts.
struct Arena {
  float* base;
  int64_t used = 0;

  VLMFAST_INLINE float* take(int64_t n) {
    float* p = base == nullptr ? nullptr : base + used;
    used += (n + 15) / 16 * 16;
    return p;
  }
};

struct Fp32Words {
  static constexpr int kElements = 1;
  static constexpr int kExpDegree = 5;
  static VLMFAST_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
};

#if VLMFAST_LEVEL >= 3
struct Bf16Words {
  static constexpr int kElements = 2;
  static constexpr int kExpDegree = 3;
  static VLMFAST_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};
VLMFAST_INLINE __m512i interleaving_order() {
  return _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                          6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
}
// Words of (low[i], high[i]).
VLMFAST_INLINE Vec interleave(__m256i low, __m256i high) {
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(interleaving_order(), both));
}
VLMFAST_INLINE Vec interleave(Vec low, Vec high) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(interleaving_order(), both));
}
#endif

template <class Words>
VLMFAST_INLINE int word_count(int columns) {
  return round_up(columns, kRowStep) / Words::kElements;
}

// Rows of a strided matrix in memory.
template <class T>
struct Rows {
  using Element = T;
  T* data;
  int64_t row_stride;
  int64_t column_stride;

  VLMFAST_INLINE T* row(int i) const { return data + i * row_stride; }
};

// Dense rows that lie anywhere, from `column` on: every kStep-th of `rows`.
template <class T, int kStep>
struct ScatteredRows {
  using Element = T;
  static constexpr int64_t column_stride = 1;
  T* const* rows;
  int64_t column;

  VLMFAST_INLINE T* row(int i) const { return rows[i * kStep] + column; }
};

// Rows of words.
struct Operand {
  const float* rows;
  int64_t stride;

  VLMFAST_INLINE Operand from(int row) const { return {rows + row * stride, stride}; }
};

// Asks for the cache lines of some rows, one after the other between other work: rows lie far
// apart in a packed projection, where the hardware does not foresee them, and many requests at once
// would stall.
class Prefetcher {
 public:
  template <class T>
  VLMFAST_INLINE void add(const Rows<T>& rows, int n_rows, int columns) {
    const int64_t bytes = columns * (int64_t)sizeof(T);
    if (rows.column_stride != 1 || n_rows <= 0 || bytes <= 0) return;
    ranges_[count_++] = {(const char*)rows.data, rows.row_stride * (int64_t)sizeof(T), bytes,
                         n_rows};
    rows_ += n_rows;
  }

  // Spreads the rows over `steps` calls of `step`.
  VLMFAST_INLINE void spread_over(int64_t steps) {
    constexpr int kMostSteps = 1 << 30;
    steps_ = steps < kMostSteps ? maximum((int)steps, 1) : kMostSteps;
  }

  VLMFAST_INLINE void step() {
    if (at_ == count_) return;
    for (due_ += rows_; due_ >= steps_ && at_ < count_; due_ -= steps_) {
      Range& range = ranges_[at_];
      const char* end = range.row + range.bytes;
      for (const char* line = range.row - (uintptr_t)range.row % kLine; line < end; line += kLine)
        __builtin_prefetch(line, 0, 2);
      range.row += range.stride;
      if (--range.rows == 0) at_++;
    }
  }

 private:
  struct Range {
    const char* row;
    int64_t stride, bytes;
    int rows;
  };
  static constexpr int kMost = 8, kLine = 64;
  Range ranges_[kMost];
  int count_ = 0, at_ = 0, rows_ = 0, steps_ = 1, due_ = 0;
};

// kLanes words that begin at `p`, of which the first n elements exist; what lies beyond them is
// zero.
template <class Words, class T>
VLMFAST_INLINE Vec load_words(const T* p, int n) {
#if VLMFAST_LEVEL >= 3
  if constexpr (Words::kElements == 2)
    return (Vec)_mm512_maskz_loadu_epi16(n >= 32 ? 0xffffffffu : (1u << n) - 1, p);
  else
#endif
    return load_first(p, n);
}

// The same of a row whose elements lie `stride` apart.
template <class Words, class T>
VLMFAST_INLINE Vec gather_words(const T* p, int64_t stride, int n) {
  T buffer[kLanes * Words::kElements];
  for (int i = 0; i < n; i++) buffer[i] = p[i * stride];
  return load_words<Words>(buffer, n);
}

// Calls body(word, load) for the rows' first `words` words, kLanes at a time; load(row) gives those
// of one row. Some words may come twice.
template <class Words, class Source, class Body>
VLMFAST_INLINE void for_each_word(const Source& rows, int columns, int words, Body body) {
  constexpr int kStep = kLanes * Words::kElements;
  const int end = words * Words::kElements;
  int first = 0;
  if (rows.column_stride == 1) {
    const auto whole = [&](int d) VLMFAST_INLINE_LAMBDA {
      body(d / Words::kElements,
           [&](int j) VLMFAST_INLINE_LAMBDA { return load_words<Words>(rows.row(j) + d, kStep); });
    };
    for (; first + kStep <= columns; first += kStep) whole(first);
    if (first == end) return;
    // A load under a mask would ask for the next line, too, which may be nobody's yet.
    if (end == columns && first > 0) return whole(end - kStep);
  }
  for (; first < end; first += kStep) {
    const int n = maximum(0, minimum(kStep, columns - first));
    if (rows.column_stride == 1)
      body(first / Words::kElements,
           [&](int j) VLMFAST_INLINE_LAMBDA { return load_words<Words>(rows.row(j) + first, n); });
    else
      body(first / Words::kElements, [&](int j) VLMFAST_INLINE_LAMBDA {
        return gather_words<Words>(rows.row(j) + first * rows.column_stride, rows.column_stride, n);
      });
  }
}

// out[word][kGroups * kLanes]: the transposed rows, times `scale` (fp32 words) or with the sign of
// `scale` (bf16 words, which stay unrounded; the caller scales the product). Rows from n_rows on
// are zero, and so are words up to word_count.
template <class Words, int kGroups, class Source>
VLMFAST_NOINLINE void pack_transposed(Source rows, int n_rows, int columns, float scale,
                                      float* out) {
  const Vec factor = broadcast(scale);
  const int words = word_count<Words>(columns);
  for_each_word<Words>(rows, columns, words, [&](int word, auto load_row) VLMFAST_INLINE_LAMBDA {
    for (int g = 0; g < kGroups; g++) {
      Vec r[kLanes];
      VLMFAST_UNROLL for (int i = 0; i < kLanes; i++) {
        const int row = g * kLanes + i;
        r[i] = row < n_rows ? load_row(row) : zero();
        if constexpr (Words::kElements == 1) r[i] = r[i] * factor;
      }
#if VLMFAST_LEVEL >= 3
      if (Words::kElements == 2 && scale < 0)
        for (int i = 0; i < kLanes; i++)
          r[i] = (Vec)_mm512_xor_si512((__m512i)r[i], _mm512_set1_epi32((int)0x80008000));
#endif
      transpose(r);
      float* target = out + (word * kGroups + g) * kLanes;
      const int n = words - word;
      VLMFAST_UNROLL for (int i = 0; i < kLanes; i++) if (i < n)
          store(target + i * kGroups * kLanes, r[i]);
    }
  });
}

// out[row][row_words]: rows as they are, zero beyond n_rows up to padded_rows and beyond the last
// column.
template <class Words, class Source>
VLMFAST_NOINLINE void pack_rows(Source rows, int n_rows, int padded_rows, int columns,
                                int row_words, float* out) {
  for_each_word<Words>(
      rows, columns, row_words, [&](int word, auto load_row) VLMFAST_INLINE_LAMBDA {
        float* target = out + word;
        if (word + kLanes <= row_words) {
          for (int j = 0; j < n_rows; j++) store(target + (int64_t)j * row_words, load_row(j));
        } else {
          for (int j = 0; j < n_rows; j++)
            store_first(target + (int64_t)j * row_words, load_row(j), row_words - word);
        }
      });
  const int64_t end = (int64_t)padded_rows * row_words;
  for (int64_t i = (int64_t)n_rows * row_words; i < end; i++) out[i] = 0.f;
}

// Operand of a product that sums over rows. out[row / kElements][padded_columns]: with bf16 words,
// word d holds (row 2r, row 2r + 1) of column d. Zero beyond the last row and column.
template <class Words, class Source>
VLMFAST_NOINLINE void pack_row_pairs(Source rows, int n_rows, int padded_rows, int columns,
                                     int padded_columns, float* out) {
  if constexpr (Words::kElements == 1)
    pack_rows<Words>(rows, n_rows, padded_rows, columns, padded_columns, out);
#if VLMFAST_LEVEL >= 3
  else {
    const auto half = [&](int j, int d, int n) VLMFAST_INLINE_LAMBDA {
      if (j >= n_rows) return _mm256_setzero_si256();
      const auto* p = rows.row(j) + d * rows.column_stride;
      if (rows.column_stride == 1) return _mm256_maskz_loadu_epi16(first_lanes(n), p);
      typename Source::Element buffer[kLanes];
      for (int i = 0; i < n; i++) buffer[i] = p[i * rows.column_stride];
      return _mm256_maskz_loadu_epi16(first_lanes(n), buffer);
    };
    for (int j = 0; j < padded_rows; j += 2) {
      float* target = out + (int64_t)(j / 2) * padded_columns;
      int d = 0;
      for (; d + kLanes <= columns; d += kLanes)
        store(target + d, interleave(half(j, d, kLanes), half(j + 1, d, kLanes)));
      if (d < padded_columns) {
        const int n = maximum(0, columns - d);
        store_first(target + d, interleave(half(j, d, n), half(j + 1, d, n)), padded_columns - d);
      }
    }
  }
#endif
}

// out rows [0, n_rows) = factor * the transpose of source[column][kGroups * kLanes].
template <int kGroups, class Target>
VLMFAST_NOINLINE void store_transposed(const float* source, const Vec* factor, Target out,
                                       int n_rows, int columns) {
  for (int g = 0; g < kGroups; g++) {
    const int rows = minimum(kLanes, n_rows - g * kLanes);
    for (int d = 0; d < columns; d += kLanes) {
      const int n = minimum(kLanes, columns - d);
      Vec r[kLanes];
      VLMFAST_UNROLL for (int i = 0; i < kLanes; i++) r[i] =
          i < n ? factor[g] * load(source + ((d + i) * kGroups + g) * kLanes) : zero();
      transpose(r);
      if (n == kLanes) {
        VLMFAST_UNROLL for (int i = 0; i < kLanes; i++) if (i < rows)
            store_first(out.row(g * kLanes + i) + d, r[i], kLanes);
      } else {
        VLMFAST_UNROLL for (int i = 0; i < kLanes; i++) if (i < rows)
            store_first(out.row(g * kLanes + i) + d, r[i], n);
      }
    }
  }
}

// out rows [0, n_rows) = factor * rows of source, which lie `stride` apart.
template <class T>
VLMFAST_NOINLINE void store_rows(const float* source, int64_t stride, float factor, Rows<T> out,
                                 int n_rows, int columns) {
  const Vec f = broadcast(factor);
  for (int j = 0; j < n_rows; j++) {
    const float* from = source + j * stride;
    T* to = out.row(j);
    int d = 0;
    for (; d + kLanes <= columns; d += kLanes) store_first(to + d, f * load(from + d), kLanes);
    if (d == columns) continue;
    if (d > 0) {  // the last vector ends with the row
      d = columns - kLanes;
      store_first(to + d, f * load(from + d), kLanes);
    } else {
      store_first(to, f * load(from), columns);
    }
  }
}

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
#if VLMFAST_LEVEL == 0
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
#else
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
#endif
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

// Stores row j of the weights or, with bf16 words, rows j and j + 1 joined into words of pairs.
template <class Words, int kGroups>
VLMFAST_INLINE void store_weight(float* rows, int j, int g, Vec first, Vec second) {
#if VLMFAST_LEVEL >= 3
  if constexpr (Words::kElements == 2) {
    store(rows + (j / 2 * kGroups + g) * kLanes, interleave(first, second));
    return;
  }
#endif
  store(rows + (j * kGroups + g) * kLanes, first);
}

// The factor that scores still need before exp2. A maximum is a product rounded, which exact
// products exceed or miss by what rounding took: by so much, where logits are huge, that exp2
// overflows or all weights vanish. There scores are multiplied here, rounded likewise, and no
// longer exceed it.
template <int kGroups>
VLMFAST_INLINE float remaining_factor(float* scores, int n, float factor, const Vec* most) {
  constexpr float kLarge = 1024.f;  // up to there rounding takes at most 2^-14
  if (factor == 1.f) return factor;
  Vec largest = zero();
  VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
    const Vec size = max(most[g], zero() - most[g]);
    largest = max(select_eq(size, broadcast(kInfinity), zero(), size), largest);
  }
  if (!(horizontal_max(largest) > kLarge)) return factor;
  for (int i = 0; i < n * kGroups * kLanes; i += kLanes)
    store(scores + i, load(scores + i) * broadcast(factor));
  return 1.f;
}

// scores[row][kGroups * kLanes] become exp2(factor * score - most), times `kept` (or nullptr), in
// words of Words; their sums over the rows, before `kept`, are added to `sum`.
template <class Words, int kGroups>
VLMFAST_INLINE void exponentiate(float* scores, int n, float factor, const Vec* most, Vec* sum,
                                 const float* kept) {
  const Vec f = broadcast(factor);
  constexpr int kStep = Words::kElements, kWidth = kGroups * kLanes;
  Vec total[kGroups];
  VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) total[g] = zero();
  for (int j = 0; j < n; j += kStep) {
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      Vec p[2] = {zero(), zero()};
      VLMFAST_UNROLL for (int i = 0; i < kStep; i++) {
        if (kStep == 2 && j + i >= n) break;
        const int at = (j + i) * kWidth + g * kLanes;
        p[i] = exp2<Words::kExpDegree>(fms(f, load(scores + at), most[g]));
        total[g] = total[g] + p[i];
        if (kept != nullptr) p[i] = p[i] * load(kept + at);
      }
      store_weight<Words, kGroups>(scores, j, g, p[0], p[1]);
    }
  }
  VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) sum[g] = sum[g] + total[g];
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
    switch (n) {
      case 1:
        outer_columns<Words, 1, kLeftByColumns>(left, left_stride, x, stride, depth, n_rows,
                                                overwrite, o, stride);
        break;
      case 2:
        outer_columns<Words, 2, kLeftByColumns>(left, left_stride, x, stride, depth, n_rows,
                                                overwrite, o, stride);
        break;
#if VLMFAST_LEVEL >= 2
      case 3:
        outer_columns<Words, 3, kLeftByColumns>(left, left_stride, x, stride, depth, n_rows,
                                                overwrite, o, stride);
        break;
      case 4:
        outer_columns<Words, 4, kLeftByColumns>(left, left_stride, x, stride, depth, n_rows,
                                                overwrite, o, stride);
        break;
      case 5:
        outer_columns<Words, 5, kLeftByColumns>(left, left_stride, x, stride, depth, n_rows,
                                                overwrite, o, stride);
        break;
      case 6:
        outer_columns<Words, 6, kLeftByColumns>(left, left_stride, x, stride, depth, n_rows,
                                                overwrite, o, stride);
        break;
#endif
    }
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

// Rounds fp32 weights to words of Words, in place; beyond the n there are zeros.
template <class Words>
VLMFAST_INLINE void round_weights(float* weights, int n) {
#if VLMFAST_LEVEL >= 3
  if constexpr (Words::kElements == 2)
    for (int j = 0; j < n; j += kLanes)
      _mm256_storeu_si256((__m256i*)(weights + j / 2), narrow_bf16(load(weights + j)));
#endif
}

// Rows j (and j + 1 with bf16 words) of P and dS, the operands of the products of a backward pass.
// With fp32 words `left` gets P and `right` dS; with bf16 words `left` and `grad_left` get them as
// pairs along the queries, and `right` gets dS as pairs along the keys.
template <class Words, int kGroups>
VLMFAST_INLINE void store_gradients(int j, const Vec (&weight)[Words::kElements][kGroups],
                                    const Vec (&grad)[Words::kElements][kGroups], float* left,
                                    float* grad_left, float* right) {
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
        store(right + (j / 2 * kGroups + g) * kLanes, interleave(grad[0][g], grad[1][g]));
    return;
  }
#endif
  VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
    store(left + j * kWidth + g * kLanes, weight[0][g]);
    store(right + j * kWidth + g * kLanes, grad[0][g]);
  }
}

// Dropout without state: out[row][lane], for keys row0 .. row0 + n_rows - 1 and queries lane0 ..
// lane0 + lanes - 1, is 1 where word key % 4 of philox4x32-10 at counter (key / 4, query, head, 0)
// reaches `threshold`, else 0. (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// 2011.)
struct Philox {
  uint32_t seed_low, seed_high, threshold;

  VLMFAST_INLINE void keep(int row0, int n_rows, int lane0, int lanes, uint32_t head,
                           float* out) const {
    for (int block = row0 / 4; block * 4 < row0 + n_rows; block++) {
      float kept[4][kMaxGroups * kLanes];
      for (int lane = 0; lane < lanes; lane++) {
        uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(lane0 + lane), c2 = head, c3 = 0;
        uint32_t k0 = seed_low, k1 = seed_high;
        VLMFAST_UNROLL for (int round = 0; round < 10; round++) {
          const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
          c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
          c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
          c1 = (uint32_t)p1;
          c3 = (uint32_t)p0;
          k0 += 0x9E3779B9u;
          k1 += 0xBB67AE85u;
        }
        kept[0][lane] = c0 >= threshold ? 1.f : 0.f;
        kept[1][lane] = c1 >= threshold ? 1.f : 0.f;
        kept[2][lane] = c2 >= threshold ? 1.f : 0.f;
        kept[3][lane] = c3 >= threshold ? 1.f : 0.f;
      }
      for (int i = 0; i < 4; i++) {
        const int row = block * 4 + i - row0;
        if (row >= 0 && row < n_rows)
          for (int lane = 0; lane < lanes; lane++) out[row * lanes + lane] = kept[i][lane];
      }
    }
  }
};

VLMFAST_INLINE Philox philox(double dropout_p, uint64_t seed) {
  const double threshold = dropout_p * 4294967296.0;
  return Philox{(uint32_t)seed, (uint32_t)(seed >> 32),
                threshold >= 4294967295.0 ? 4294967295u : (uint32_t)threshold};
}

// What the weights that dropout keeps are multiplied by.
VLMFAST_INLINE float kept_scale(double dropout_p) {
  return dropout_p >= 1 ? 0.f : (float)(1 / (1 - dropout_p));
}

// Beyond this |logsumexp| its rounding to fp32 would show in exp(score - logsumexp), beside the
// rounding of inputs of type T.
template <class T>
constexpr float kImpreciseLogsumexp = sizeof(T) == 4 ? 16.f : 1024.f;

// exp(-logsumexp) as share * exp2(-top). Rows that see nothing get weights of exp2(-inf) = 0. False
// where rounding has taken too much of the logsumexp.
template <class T>
VLMFAST_INLINE bool split_logsumexp(float logsumexp, float* top, float* share) {
  *top = kInfinity;
  *share = 1.f;
  if (logsumexp == -kInfinity) return true;
  *top = logsumexp * kLog2E;
  const float rest = __builtin_fmaf(logsumexp, kLog2E, -*top) + logsumexp * kLog2ELow;
  *share = 1.f - rest * (float)kLn2;
  return !(__builtin_fabsf(logsumexp) > kImpreciseLogsumexp<T>);
}

// Runs `body` with the word and element types of tensors of a dtype.
template <class Body>
VLMFAST_INLINE auto with_types(ElementType dtype, Body body) {
  switch (dtype) {
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

// In place: x[i] = log2(x[i]) for normal x > 0; NaN stays NaN.
VLMFAST_INLINE void log2_in_place(float* x, int n) {
  for (int i = 0; i < n; i++) {
    int32_t bits;
    __builtin_memcpy(&bits, x + i, 4);
    const int32_t exponent =
        (bits - 0x3f3504f3) >> 23;  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
    const int32_t mantissa_bits = bits - (exponent << 23);
    float m;
    __builtin_memcpy(&m, &mantissa_bits, 4);
    const float s = (m - 1.f) / (m + 1.f), s2 = s * s;  // log(m) = 2 atanh(s)
    const float series = 1.f + s2 * (1.f / 3 + s2 * (1.f / 5 + s2 * (1.f / 7 + s2 * (1.f / 9))));
    x[i] = (float)exponent + 2.88539008178f * s * series + (x[i] - x[i]);
  }
}

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
