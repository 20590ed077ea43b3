// The logits of a block of rows against a panel of columns.
#pragma once
#include "cpu/contrastive_loss.h"
#include "cpu/rows.h"
#include "cpu/softmax.h"
#include "cpu/tile/pack.h"
#include "cpu/tile/prefetch.h"
#include "cpu/tile/products.h"
#include "cpu/tile/scratch.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

constexpr int kGroups = kMaxGroups;
constexpr int kWidth = kGroups * kLanes;
constexpr int kPanel = 96;
constexpr int kPartWords = 128;  // of a product: 32 KiB of packed rows, no more
constexpr int kProductRows = kRegisters == 32 ? 6 : 4;
static_assert(kPanel % 24 == 0 && 24 % kProductRows == 0 && 24 % kRowStep == 0);

// out[column][kWidth] (+)= columns . rows over `words` words; n is rounded up to kProductRows.
template <class Words>
VLMFAST_NOINLINE void multiply_part(const float* __restrict rows, const float* __restrict columns,
                                    int column_stride, int words, int n, bool is_first,
                                    float* __restrict out, Prefetcher& ahead) {
  for (int j = 0; j < n; j += kProductRows) {
    const float* column = columns + (int64_t)j * column_stride;
    float* target = out + j * kWidth;
    ahead.step();
    Vec sum[kProductRows][kGroups];
    VLMFAST_UNROLL for (int r = 0; r < kProductRows; r++)
        VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) sum[r][g] = zero();
    for (int w = 0; w < words; w += kWordStep) {
      VLMFAST_UNROLL for (int u = 0; u < kWordStep; u++) {
        Vec x[kGroups];
        VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) x[g] =
            load(rows + ((w + u) * kGroups + g) * kLanes);
        VLMFAST_UNROLL for (int r = 0; r < kProductRows; r++) {
          const Vec y = broadcast(column[r * column_stride + w + u]);
          VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) sum[r][g] =
              Words::multiply_add(x[g], y, sum[r][g]);
        }
      }
    }
    VLMFAST_UNROLL for (int r = 0; r < kProductRows; r++)
        VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      float* p = target + (r * kGroups + g) * kLanes;
      store(p, is_first ? sum[r][g] : load(p) + sum[r][g]);
    }
  }
}

// Which lanes of a tile hold a row, and which of them is a column's pair.
struct Lanes {
  int count, pair_of_column_0;

  VLMFAST_INLINE Vec paired(int g, int column, Vec yes, Vec no) const {
    const IntVec lane = lane_index(g * kLanes);
    const int pair = pair_of_column_0 + column;
    return select_ge(lane, pair, select_ge(lane, pair + 1, no, yes), no);
  }
  VLMFAST_INLINE Vec existing(int g, Vec yes, Vec no) const {
    return select_ge(lane_index(g * kLanes), count, no, yes);
  }
};

// One panel of columns as rows of words.
struct Panel {
  int index, n;
  const float* columns;
  int stride;  // in words
};

// The packed rows of one block, and the logits of its tiles with the columns of one panel.
template <class Words, class T>
struct Tiles {
  const ContrastiveLossProblem& problem;
  int words;
  int64_t tile_floats;
  float *rows, *packed_columns, *logits, *one_query, *query_index;

  Tiles(const ContrastiveLossProblem& p, Arena& arena) : problem(p) {
    words = word_count<Words>(p.dim);
    tile_floats = (int64_t)round_up(words, kLanes) * kWidth;
    rows = arena.take(tile_floats * p.queries * p.tiles_per_block);
    packed_columns = arena.take((int64_t)kPanel * words);
    logits = arena.take(kPanel * kWidth);
    one_query = p.queries > 1 ? arena.take(kPanel * kWidth) : nullptr;
    query_index = p.queries > 1 ? arena.take(kPanel * kWidth) : nullptr;
  }

  VLMFAST_INLINE int first_row(int block, int tile) const {
    return (block * problem.tiles_per_block + tile) * kWidth;
  }
  VLMFAST_INLINE int row_count(int block, int tile) const {
    return minimum(kWidth, problem.n_rows - first_row(block, tile));
  }
  VLMFAST_INLINE int tile_count(int block) const {
    const int rows = problem.n_rows - first_row(block, 0);
    return minimum(problem.tiles_per_block, (rows + kWidth - 1) / kWidth);
  }
  VLMFAST_INLINE int column_count(int panel) const {
    return minimum(kPanel, problem.n_columns - panel * kPanel);
  }

  VLMFAST_INLINE Rows<T> rows_of(int block, int tile, int query) const {
    const Strided& x = problem.rows;
    return {x.at<T>(first_row(block, tile), query, 0), x.stride[0], x.stride[3]};
  }
  VLMFAST_INLINE Rows<T> columns_of(int panel) const {
    const Strided& y = problem.columns;
    return {y.at<T>(0, 0, panel * kPanel), y.stride[2], y.stride[3]};
  }

  void pack_block(int block) const {
    for (int t = 0; t < tile_count(block); t++)
      for (int q = 0; q < problem.queries; q++)
        pack_transposed<Words, kGroups>(rows_of(block, t, q), row_count(block, t), problem.dim, 1.f,
                                        rows + (t * problem.queries + q) * tile_floats);
  }

  // Whether a full panel can be read where it lies.
  VLMFAST_INLINE bool lies_in_words() const {
    const Strided& y = problem.columns;
    return sizeof(T) * Words::kElements == 4 && y.stride[3] == 1 && problem.dim % kRowStep == 0 &&
           y.stride[2] >= 0 && y.stride[2] <= 1 << 20 && y.stride[2] % Words::kElements == 0 &&
           (uintptr_t)y.data % 4 == 0;
  }

  Panel load_panel(int index) const {
    const int n = column_count(index);
    if (n == kPanel && lies_in_words())
      return {index, n, (const float*)columns_of(index).data,
              (int)problem.columns.stride[2] / Words::kElements};
    pack_rows<Words>(columns_of(index), n, round_up(n, 24), problem.dim, words, packed_columns);
    return {index, n, packed_columns, words};
  }

  VLMFAST_INLINE Lanes lanes(int block, int tile, const Panel& panel) const {
    const int64_t pair =
        (int64_t)panel.index * kPanel - problem.first_column - first_row(block, tile);
    // Far outside any one value is as good as another.
    const int far = 1 << 20;
    return {row_count(block, tile), pair > far ? far : pair < -far ? -far : (int)pair};
  }
  VLMFAST_INLINE bool is_plain(const Lanes& lanes, int n) const {
    return lanes.count == kWidth &&
           (lanes.pair_of_column_0 >= kWidth || lanes.pair_of_column_0 + n <= 0);
  }

  VLMFAST_INLINE void multiply(const float* packed, const Panel& panel, float* out,
                               Prefetcher& ahead) const {
    for (int w = 0; w < words; w += kPartWords)
      multiply_part<Words>(packed + w * kWidth, panel.columns + w, panel.stride,
                           minimum(kPartWords, words - w), panel.n, w == 0, out, ahead);
  }

  // Calls of `Prefetcher::step` in the products of one tile.
  VLMFAST_INLINE int64_t steps(int n) const {
    return (int64_t)problem.queries * ((words + kPartWords - 1) / kPartWords) *
           ((n + kProductRows - 1) / kProductRows);
  }

  // Requests the columns of the next panel.
  VLMFAST_INLINE Prefetcher next_columns(int block, int panel) const {
    Prefetcher result;
    if ((panel + 1) * kPanel >= problem.n_columns) return result;
    result.add(columns_of(panel + 1), column_count(panel + 1), problem.dim);
    result.spread_over(steps(kPanel) * tile_count(block));
    return result;
  }

  // logits[column][kWidth] = the largest similarity over the queries, not yet scaled.
  void similarities(int tile, const Panel& panel, Prefetcher& ahead) const {
    const float* packed = rows + tile * problem.queries * tile_floats;
    multiply(packed, panel, logits, ahead);
    for (int q = 1; q < problem.queries; q++) {
      multiply(packed + q * tile_floats, panel, one_query, ahead);
      for (int i = 0; i < panel.n * kWidth; i += kLanes) {
        const Vec old = load(logits + i), largest = max(old, load(one_query + i));
        const Vec index = q == 1 ? zero() : load(query_index + i);
        // The first of equals, and NaN once there is one.
        const Vec stays = select_eq(largest, old, index, broadcast((float)q));
        store(query_index + i, select_eq(old, old, stays, index));
        store(logits + i, select_eq(old, old, largest, old));
      }
    }
  }
};

}  // namespace
}  // namespace vlmfast::cpu::VLMFAST_VARIANT
