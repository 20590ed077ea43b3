// The scores of a tile of queries against a block of keys, under a mask and the causal diagonal.
#pragma once
#include "cpu/flash_attention.h"
#include "cpu/rows.h"
#include "cpu/softmax.h"
#include "cpu/tile/dropout.h"
#include "cpu/tile/pack.h"
#include "cpu/tile/prefetch.h"
#include "cpu/tile/products.h"
#include "cpu/tiling.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

constexpr int kBlock = 96;
constexpr int kMaxTile = kMaxGroups * kLanes;

// How much of the second-level cache a packed panel may take, in floats: 384 KiB of keys and
// values, 576 KiB where their gradients lie beside them, of the 1 MiB or more where AVX-512 is.
// A quarter to four times that made no difference beyond noise at 1,024 to 4,096 keys of head dim
// 64 or 128, forward and backward, on a Zen 3 with 512 KiB.
constexpr int64_t kForwardPanel = 96 * 1024;
constexpr int64_t kBackwardPanel = 144 * 1024;

int panel_keys(int64_t budget, int64_t floats_per_key, int keys) {
  const int max_keys = maximum((int)(budget / floats_per_key) / kBlock * kBlock, kBlock);
  const int panels = (keys + max_keys - 1) / max_keys;
  return panels <= 1 ? keys : round_up((keys + panels - 1) / panels, kBlock);
}

// A single query alone has no tile to share its work with, and is one. Under a causal mask tiles
// are narrow: they compute less of what the diagonal hides.
VLMFAST_INLINE Tiling tiling_of(int queries, bool causal, bool may_leave_one) {
  const int max_groups = causal ? minimum(2, kMaxGroups) : kMaxGroups;
  return Tiling(queries, max_groups, may_leave_one && queries > 1);
}

// Whether a query may be run by itself against n keys: where it sees and keeps all of them, and one
// panel holds them.
VLMFAST_INLINE bool runs_alone(const FlashAttentionProblem& problem, int n, int keys_at_once) {
  return n > 0 && n <= minimum(keys_at_once, kBlock * kMaxTile) && !problem.causal &&
         problem.mask.data == nullptr && !(problem.dropout_p > 0);
}

template <class M>
VLMFAST_INLINE Vec load_mask_row(const M* row, int64_t stride, int n) {
  const Vec raw = stride == 1 ? load_first(row, n) : gather_words<Fp32Words>(row, stride, n);
  return in_log2_units(raw, -kLowest);
}

VLMFAST_INLINE Vec load_mask_row(const bool* row, int64_t stride, int n) {
  float values[kLanes];
  for (int i = 0; i < kLanes; i++) values[i] = i < n && row[i * stride] ? 0.f : -kInfinity;
  return load(values);
}

Philox dropout(const FlashAttentionProblem& problem) {
  return philox(problem.dropout_p, problem.dropout_seed);
}

template <class T>
VLMFAST_INLINE Rows<T> rows_of(const Strided& tensor, int64_t batch, int head, int row) {
  return {tensor.at<T>(batch, head, row), tensor.stride[2], tensor.stride[3]};
}

// n rows as words: packed, or where they lie if one block holds them. More rows would be read again
// and again from places that may share few sets of a cache.
template <class Words, class T>
VLMFAST_INLINE Operand rows_as_words(const Rows<T>& rows, int n, int columns, float* packed) {
  if constexpr (sizeof(T) == sizeof(float))
    if (rows.column_stride == 1 && columns % kRowStep == 0 && n <= kBlock)
      return {rows.data, rows.row_stride};
  const int words = word_count<Words>(columns);
  pack_rows<Words>(rows, n, round_up(n, kRowStep), columns, words, packed);
  return {packed, words};
}

// The keys and values that a task's tiles are being run against.
struct Panel {
  int begin, end;
  bool is_first, is_last;  // of the task
  bool packs_query;        // of forward alone: false where the tile before was the same
  Prefetcher ahead;
  Operand keys, values;
  Operand key_pairs;  // of backward alone
};

// One tile of queries of one task: its scores against blocks of packed keys.
template <class Words, class T>
struct Scores {
  const FlashAttentionProblem& problem;
  const FlashAttentionTask& task;
  int head;                // query head
  int first_query, count;  // rows of the tensor
  const float* query;      // pack_transposed
  Prefetcher& ahead;
  float* mask_tile;  // [kBlock][kGroups * kLanes] in log2 units, where there is a mask

  VLMFAST_INLINE int visible_end(int end) const {
    if (task.causal_shift == kNotCausal) return end;
    const int64_t last = (int64_t)first_query + count - 1 + task.causal_shift;
    return last + 1 < end ? (int)(last + 1) : end;
  }
  VLMFAST_INLINE bool crosses_diagonal(int key, int n) const {
    return task.causal_shift != kNotCausal &&
           (int64_t)key + n - 1 > (int64_t)first_query + task.causal_shift;
  }

  template <int kGroups, class M>
  bool load_mask(const M* base, int key, int n) const {
    const int64_t row_stride = problem.mask.stride[2], key_stride = problem.mask.stride[3];
    constexpr int kWidth = kGroups * kLanes;
    const Vec hidden = broadcast(-kInfinity);
    Vec visible = zero();
    if (row_stride == 0) {
      for (int j = 0; j < n; j += kLanes) {
        const int m = minimum(kLanes, n - j);
        const Vec row = load_mask_row(base + (key + j) * key_stride, key_stride, m);
        float values[kLanes];
        store(values, row);
        for (int i = 0; i < m; i++) {
          const Vec v = broadcast(values[i]);
          visible = select_eq(v, hidden, visible, broadcast(1.f));
          for (int g = 0; g < kGroups; g++) store(mask_tile + (j + i) * kWidth + g * kLanes, v);
        }
      }
    } else {
      for (int j = 0; j < n; j += kLanes) {
        const int m = minimum(kLanes, n - j);
        for (int g = 0; g < kGroups; g++) {
          Vec r[kLanes];
          for (int i = 0; i < kLanes; i++) {
            const int row = first_query + g * kLanes + i;
            r[i] =
                g * kLanes + i < count
                    ? load_mask_row(base + row * row_stride + (key + j) * key_stride, key_stride, m)
                    : broadcast(-kInfinity);
          }
          transpose(r);
          for (int i = 0; i < m; i++) {
            visible = select_eq(r[i], hidden, visible, broadcast(1.f));
            store(mask_tile + (j + i) * kWidth + g * kLanes, r[i]);
          }
        }
      }
    }
    return horizontal_max(visible) > 0;
  }

  template <int kGroups>
  bool load_mask(int key, int n) const {
    const int64_t offset = task.batch * problem.mask.stride[0] + head * problem.mask.stride[1];
    switch (problem.mask_dtype) {
      case ElementType::kBool:
        return load_mask<kGroups>((const bool*)problem.mask.data + offset, key, n);
      case ElementType::kFloat:
        return load_mask<kGroups>((const float*)problem.mask.data + offset, key, n);
      case ElementType::kBFloat16:
        return load_mask<kGroups>((const BFloat16*)problem.mask.data + offset, key, n);
      default:
        return load_mask<kGroups>((const Half*)problem.mask.data + offset, key, n);
    }
  }

  // Scores of keys [key, key + n), with `factor` still to be multiplied in; `row_max` (or nullptr)
  // gets their maximum, times factor. False where a mask hides all of them; `scores` is then not
  // written.
  template <int kGroups>
  VLMFAST_INLINE bool block(const Operand& keys, int words, int key, int n, float* scores,
                            float* factor, Vec* row_max) const {
    constexpr int kWidth = kGroups * kLanes;
    const bool masked = problem.mask.data != nullptr, diagonal = crosses_diagonal(key, n);
    if (masked && !load_mask<kGroups>(key, n)) return false;
    *factor = Words::kElements == 1 ? 1.f : __builtin_fabsf(problem.scale) * kLog2E;
    Vec top[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) top[g] = broadcast(-kInfinity);
    // The first query sees rows up to `shift`; rows before `open` need no look at the mask or the
    // diagonal. Those after are none, or kRowStep at least, as a product of few rows is slow.
    const int64_t shift = (int64_t)first_query + task.causal_shift - key;
    const int open = masked || (diagonal && *factor == 0.f) ? 0
                     : diagonal
                         ? (int)(shift < 0 ? 0
                                           : minimum((int)shift + 1, maximum(0, n - kRowStep)) /
                                                 kRowStep * kRowStep)
                         : n;
    if (open > 0)
      multiply_rows<Words, kGroups>(query, keys.rows, keys.stride, words, open, scores,
                                    row_max == nullptr ? nullptr : top, ahead);
    if (open < n)
      multiply_rows<Words, kGroups>(query, keys.from(open).rows, keys.stride, words, n - open,
                                    scores + open * kWidth, nullptr, ahead);
    if (masked) {
      const Vec f = broadcast(*factor), hidden = broadcast(-kInfinity);
      for (int j = 0; j < n; j++) VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
          float* s = scores + j * kWidth + g * kLanes;
          const Vec m = load(mask_tile + j * kWidth + g * kLanes);
          // A hidden key's score is dropped, not added to -inf: it may be NaN.
          const Vec x = select_eq(m, hidden, hidden, fma(f, load(s), m));
          store(s, x);
          if (!diagonal) top[g] = max(top[g], x);
        }
      *factor = 1.f;
    }
    if (diagonal) {
      const Vec f = broadcast(*factor == 0.f ? 0.f : 1.f);
      for (int j = open; j < n; j++) VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
          float* s = scores + j * kWidth + g * kLanes;
          const Vec x = select_ge(lane_index((int32_t)shift + g * kLanes), j, f * load(s),
                                  broadcast(-kInfinity));
          store(s, x);
          top[g] = max(top[g], x);
        }
      if (*factor == 0.f) *factor = 1.f;  // for 0 * -inf would be NaN
    }
    if (row_max != nullptr) {
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) row_max[g] = top[g] * broadcast(*factor);
      *factor = remaining_factor<kGroups>(scores, n, *factor, row_max);
    }
    return true;
  }
};

// out[j][:] += weights[j] * row, of `vectors` vectors.
VLMFAST_NOINLINE void add_outer(const float* weights, const float* row, int n, int vectors,
                                float* out) {
  for (int j = 0; j < n; j++) {
    const Vec weight = broadcast(weights[j]);
    for (int v = 0; v < vectors; v++) {
      float* target = out + ((int64_t)j * vectors + v) * kLanes;
      store(target, fma(weight, load(row + v * kLanes), load(target)));
    }
  }
}

struct RowStatistics {
  float top, sum, inverse;  // of the sum; 0 where that is 0
};

// One query's n scores become exp2(factor * score - their maximum); zero beyond n.
template <class Words>
VLMFAST_INLINE RowStatistics exponentiate_row(float* scores, int n, float factor) {
  const Vec hidden = broadcast(-kInfinity);
  Vec row_max = hidden, total = zero();
  for (int j = 0; j < n; j += kLanes) {
    const Vec x = select_ge(lane_index(j), n, hidden, load(scores + j) * broadcast(factor));
    store(scores + j, x);
    row_max = max(row_max, x);
  }
  const float top = horizontal_max(row_max);
  for (int j = 0; j < n; j += kLanes) {
    const Vec weight =
        exp2<Words::kExpDegree>(load(scores + j) - broadcast(top == -kInfinity ? 0.f : top));
    store(scores + j, weight);
    total = total + weight;
  }
  const float sum = horizontal_sum(total);
  return {top, sum, sum == 0.f ? 0.f : 1.f / sum};
}

}  // namespace
}  // namespace vlmfast::cpu::VLMFAST_VARIANT
