// Rows of strided matrices, some columns at a time.
#pragma once
#include "cpu/tile/elements.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {

// The n <= kLanes elements of a row from column d on; zero beyond them.
template <class T>
VLMFAST_INLINE Vec load_columns(const Rows<T>& rows, int row, int d, int n) {
  const T* p = rows.row(row) + d * rows.column_stride;
  return rows.column_stride == 1 ? load_first(p, n)
                                 : gather_words<Fp32Words>(p, rows.column_stride, n);
}

// A row as floats, in whole vectors.
template <class T>
VLMFAST_INLINE void load_row(const Rows<T>& rows, int row, int columns, float* out) {
  for (int d = 0; d < columns; d += kLanes)
    store(out + d, load_columns(rows, row, d, minimum(kLanes, columns - d)));
}

// Columns of a row, times `scale`.
template <class T>
VLMFAST_INLINE void store_scaled(T* target, const float* source, int columns, Vec scale) {
  int d = 0;
  for (; d + kLanes <= columns; d += kLanes)
    store_first(target + d, load(source + d) * scale, kLanes);
  if (d < columns) store_first(target + d, load(source + d) * scale, columns - d);
}

// A row from its `splits` partial sums, which lie `stride` apart, added in order.
template <class T>
VLMFAST_INLINE void store_sum(T* target, const float* partial, int splits, int64_t stride,
                              int columns) {
  for (int d = 0; d < columns; d += kLanes) {
    const int n = minimum(kLanes, columns - d);
    Vec sum = zero();
    for (int i = 0; i < splits; i++) sum = sum + load_first(partial + i * stride + d, n);
    store_first(target + d, sum, n);
  }
}

// Whole vectors of zeros, until n floats are covered.
VLMFAST_INLINE void clear(float* target, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(target + i, zero());
}

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
