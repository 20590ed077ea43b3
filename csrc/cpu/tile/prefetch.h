// Asking for the rows of strided matrices before they are needed.
#pragma once
#include "cpu/tile/elements.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {

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

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
