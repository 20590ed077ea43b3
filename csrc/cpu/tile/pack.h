// Rows of strided matrices to packed operands, and results back to rows.
#pragma once
#include "cpu/tile/elements.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {

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
#ifdef VLMFAST_BF16_WORDS
      if (Words::kElements == 2 && scale < 0)
        for (int i = 0; i < kLanes; i++) r[i] = negate_pairs(r[i]);
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
#ifdef VLMFAST_BF16_WORDS
  else {
    const auto half = [&](int j, int d, int n) VLMFAST_INLINE_LAMBDA {
      if (j >= n_rows) return zero_bf16();
      const auto* p = rows.row(j) + d * rows.column_stride;
      if (rows.column_stride == 1) return load_bf16(p, n);
      typename Source::Element buffer[kLanes];
      for (int i = 0; i < n; i++) buffer[i] = p[i * rows.column_stride];
      return load_bf16(buffer, n);
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

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
