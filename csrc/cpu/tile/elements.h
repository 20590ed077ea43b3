// What packed operands are made of, and rows of matrices as they lie in memory.
//
// Packed operands consist of 32-bit words: one float, or two bfloat16 that one dot-product
// instruction takes at once.
#pragma once
#include "cpu/simd/simd.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {

constexpr int kMaxGroups = kLanes == 4 ? 2 : kRegisters == 32 ? 4 : 3;
constexpr int kRowStep = 8;  // rows and columns of packed operands are padded to a multiple of this
constexpr int kWordStep = 4;  // so that there are this many words, or a multiple, in a row

VLMFAST_INLINE int round_up(int n, int step) { return (n + step - 1) / step * step; }
VLMFAST_INLINE int minimum(int a, int b) { return a < b ? a : b; }
VLMFAST_INLINE int maximum(int a, int b) { return a > b ? a : b; }

template <int n>
struct Count {
  static constexpr int value = n;
};

// Calls body(Count<n>()), for n in [1, kMost].
template <int kMost, class Body>
VLMFAST_INLINE void with_count(int n, Body body) {
  static_assert(kMost >= 2 && kMost <= 6);
  switch (n) {
    case 1:
      return body(Count<1>());
    case 2:
      return body(Count<2>());
    case 3:
      if constexpr (kMost >= 3) return body(Count<3>());
      return;
    case 4:
      if constexpr (kMost >= 4) return body(Count<4>());
      return;
    case 5:
      if constexpr (kMost >= 5) return body(Count<5>());
      return;
    case 6:
      if constexpr (kMost >= 6) return body(Count<6>());
  }
}

struct Fp32Words {
  static constexpr int kElements = 1;
  static constexpr int kExpDegree = 5;
  static VLMFAST_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
};

#ifdef VLMFAST_BF16_WORDS
struct Bf16Words {
  static constexpr int kElements = 2;
  static constexpr int kExpDegree = 3;
  static VLMFAST_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return dot_pairs(a, b, sum); }
};
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

// kLanes words that begin at `p`, of which the first n elements exist; what lies beyond them is
// zero.
template <class Words, class T>
VLMFAST_INLINE Vec load_words(const T* p, int n) {
#ifdef VLMFAST_BF16_WORDS
  if constexpr (Words::kElements == 2)
    return load_pairs(p, n);
  else
#endif
    return load_first(p, n);
}

// kLanes words from the first n elements of a row, which lie `stride` apart.
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

// Runs `body` with the word and element types of tensors of a dtype.
template <class Body>
VLMFAST_INLINE auto with_types(ElementType dtype, Body body) {
  switch (dtype) {
    case ElementType::kFloat:
      return body(Fp32Words(), float());
    case ElementType::kHalf:
      return body(Fp32Words(), Half());
    default:
#ifdef VLMFAST_BF16_WORDS
      return body(Bf16Words(), BFloat16());
#else
      return body(Fp32Words(), BFloat16());
#endif
  }
}

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
