// Flash attention on one tile of queries at a time: forward by online softmax, backward by
// recomputation.
//
// Dao et al., "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
// 2023. Nothing of size L x S is ever held: keys are packed a panel at a time (one panel lies in
// the second-level cache), and scores live in blocks of kBlock keys by one tile of queries
// (first-level cache). Everything is computed in units of log2, so that exp2 needs no further
// factor.
#include "cpu/flash_attention.h"
#include "cpu/tile.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

constexpr int kBlock = 96;
constexpr int kMaxTile = kMaxGroups * kLanes;
// Beyond this |logsumexp| its rounding to fp32 would show in exp(score - logsumexp), beside the
// rounding of the inputs; see Backward::row_statistics.
template <class T>
constexpr float kImpreciseLogsumexp = sizeof(T) == 4 ? 16.f : 1024.f;

// How much of the second-level cache a packed panel may take, in floats.
constexpr int64_t kForwardPanel = 96 * 1024;
constexpr int64_t kBackwardPanel = 144 * 1024;

int panel_keys(int64_t budget, int64_t floats_per_key, int keys) {
  const int most = maximum((int)(budget / floats_per_key) / kBlock * kBlock, kBlock);
  const int panels = (keys + most - 1) / most;
  return panels <= 1 ? keys : round_up((keys + panels - 1) / panels, kBlock);
}

// Queries are cut into tiles of nearly equal size: a short last tile would use few lanes and few
// accumulators.
struct Tiling {
  int vectors, tiles;

  // Narrow tiles under a causal mask: they compute less of what the diagonal hides.
  Tiling(int queries, bool causal) : vectors((queries + kLanes - 1) / kLanes) {
    const int most = causal ? minimum(2, kMaxGroups) : kMaxGroups;
    tiles = (vectors + most - 1) / most;
  }
  VLMFAST_INLINE int first_vector(int tile) const { return (int)((int64_t)vectors * tile / tiles); }
};

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
VLMFAST_INLINE Rows<T> rows_of(const Strided& tensor, int batch, int head, int row) {
  return {tensor.at<T>(batch, head, row), tensor.stride[2], tensor.stride[3]};
}

// The packed panel that a task's tiles are being run against.
struct Panel {
  int begin, end;
  bool is_first, is_last;  // of the task
  Prefetcher ahead;
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

  // Scores of keys [key, key + n), with `factor` still to be multiplied in; `most` is their
  // maximum, times factor. False where a mask hides all of them; `scores` is then not written.
  template <int kGroups>
  VLMFAST_INLINE bool block(const float* keys, int words, int key, int n, float* scores,
                            float* factor, Vec* most) const {
    constexpr int kWidth = kGroups * kLanes;
    const bool masked = problem.mask.data != nullptr, diagonal = crosses_diagonal(key, n);
    if (masked && !load_mask<kGroups>(key, n)) return false;
    // Not 0, which would turn a hidden key's -inf into NaN.
    *factor = Words::kElements == 1 ? 1.f : __builtin_fabsf(problem.scale) * kLog2E;
    if (*factor == 0.f) *factor = 1e-37f;
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) most[g] = broadcast(-kInfinity);
    // The first query sees rows up to `shift`; rows before `open` need no look at the mask or the
    // diagonal.
    const int64_t shift = (int64_t)first_query + task.causal_shift - key;
    const int open = masked     ? 0
                     : diagonal ? (int)(shift < 0 ? 0 : (shift + 1) / kRowStep * kRowStep)
                                : n;
    if (open > 0) multiply_rows<Words, kGroups>(query, keys, words, open, scores, most, ahead);
    if (open < n)
      multiply_rows<Words, kGroups>(query, keys + (int64_t)open * words, words, n - open,
                                    scores + open * kWidth, nullptr, ahead);
    if (masked) {
      const Vec f = broadcast(*factor), hidden = broadcast(-kInfinity);
      for (int j = 0; j < n; j++) VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
          float* s = scores + j * kWidth + g * kLanes;
          const Vec m = load(mask_tile + j * kWidth + g * kLanes);
          // A hidden key's score is dropped, not added to -inf: it may be NaN.
          const Vec x = select_eq(m, hidden, hidden, fma(f, load(s), m));
          store(s, x);
          if (!diagonal) most[g] = max(most[g], x);
        }
      *factor = 1.f;
    }
    if (diagonal) {
      for (int j = open; j < n; j++) VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
          float* s = scores + j * kWidth + g * kLanes;
          const Vec x =
              select_ge(lane_index((int32_t)shift + g * kLanes), j, load(s), broadcast(-kInfinity));
          store(s, x);
          most[g] = max(most[g], x);
        }
    }
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) most[g] = most[g] * broadcast(*factor);
    return true;
  }
};

template <class Words, class T>
struct Forward {
  const FlashAttentionForward& problem;
  int words, value_columns, keys_at_once;
  bool keeps_state;
  float *keys, *values, *query, *scores, *mask_tile, *keep, *state;
  int64_t state_size;
  int64_t scratch_size;

  Forward(const FlashAttentionForward& p, float* scratch) : problem(p) {
    words = word_count<Words>(p.head_dim);
    value_columns = round_up(p.value_dim, kRowStep);
    const int tiles = Tiling(p.queries_most, p.causal).tiles;
    // A panel that only a tile or two will read need not stay in the cache, and a short one lets
    // the next be fetched meanwhile.
    const int64_t panel = tiles <= 2 ? kForwardPanel / 4 : kForwardPanel;
    keys_at_once = panel_keys(panel, words + value_columns / Words::kElements, p.keys_most);
    keeps_state = keys_at_once < p.keys_most;
    state_size = (value_columns + 2) * kMaxTile + 16;
    Arena arena{scratch};
    const int64_t padded = round_up(keys_at_once, kRowStep);
    keys = arena.take(padded * words);
    values = arena.take(padded / Words::kElements * value_columns);
    query = arena.take((int64_t)round_up(words, kLanes) * kMaxTile);
    scores = arena.take(kBlock * kMaxTile);
    mask_tile = p.mask.data == nullptr ? nullptr : arena.take(kBlock * kMaxTile);
    keep = p.dropout_p > 0 ? arena.take(kBlock * kMaxTile) : nullptr;
    state = arena.take(state_size * (keeps_state ? tiles : 1));
    scratch_size = arena.used;
  }

  template <int kGroups>
  VLMFAST_NOINLINE void weights(int n, float factor, const Vec* most, Vec* sum,
                                const float* kept) const {
    exponentiate<Words, kGroups>(scores, n, factor, most, sum, kept);
  }

  template <int kGroups>
  void tile(const FlashAttentionTask& task, Panel& panel, int first_query, int count,
            float* slot) const {
    constexpr int kWidth = kGroups * kLanes;
    float* out = slot + 2 * kWidth + 16;
    float* started = slot + 2 * kWidth;
    const Scores<Words, T> tile{problem, task,  task.head,   first_query,
                                count,   query, panel.ahead, mask_tile};
    const Rows<T> rows = rows_of<T>(problem.query, task.batch, task.head, first_query);
    pack_transposed<Words, kGroups>(rows, count, problem.head_dim, problem.scale * kLog2E, query);
    Vec most[kGroups], sum[kGroups];
    if (panel.is_first) *started = 0.f;
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      most[g] = panel.is_first ? broadcast(-kInfinity) : load(slot + g * kLanes);
      sum[g] = panel.is_first ? zero() : load(slot + kWidth + g * kLanes);
    }
    const int end = tile.visible_end(panel.end);
    for (int key = panel.begin; key < end; key += kBlock) {
      const int n = minimum(kBlock, end - key);
      float factor;
      Vec block_most[kGroups], rescale[kGroups];
      if (!tile.template block<kGroups>(keys + (int64_t)(key - panel.begin) * words, words, key, n,
                                        scores, &factor, block_most))
        continue;
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        const Vec next = max(most[g], block_most[g]);
        // Where nothing is visible yet the maximum is -inf; subtracting 0 instead gives weights of
        // 0, not NaN.
        const Vec subtracted = select_eq(next, broadcast(-kInfinity), zero(), next);
        rescale[g] = exp2<5>(most[g] - subtracted);
        sum[g] = sum[g] * rescale[g];
        most[g] = next;
        block_most[g] = subtracted;
      }
      if (keep != nullptr) {
        dropout(problem).keep(key, n, first_query, kWidth,
                              (uint32_t)(task.batch * problem.heads + task.head), keep);
        weights<kGroups>(n, factor, block_most, sum, keep);
      } else {
        weights<kGroups>(n, factor, block_most, sum, nullptr);
      }
      const int n_rows = (n + Words::kElements - 1) / Words::kElements;
      weighted_sum<Words, kGroups>(
          scores, values + (int64_t)(key - panel.begin) / Words::kElements * value_columns,
          value_columns, n_rows, value_columns, out, *started != 0.f ? rescale : nullptr);
      *started = 1.f;
    }
    if (!panel.is_last) {
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        store(slot + g * kLanes, most[g]);
        store(slot + kWidth + g * kLanes, sum[g]);
      }
      return;
    }
    if (*started == 0.f)
      for (int i = 0; i < value_columns * kWidth; i += kLanes) store(out + i, zero());
    finish<kGroups>(task, first_query, count, most, sum, out);
  }

  template <int kGroups>
  VLMFAST_INLINE void finish(const FlashAttentionTask& task, int first_query, int count,
                             const Vec* most, const Vec* sum, const float* out) const {
    constexpr int kWidth = kGroups * kLanes;
    const Vec kept = broadcast(kept_scale(problem.dropout_p));
    float logs[kWidth], tops[kWidth];
    Vec factor[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      // Rows that see no key have a sum of 0 and give 0.
      factor[g] = select_eq(sum[g], zero(), zero(), kept / sum[g]);
      store(logs + g * kLanes, select_eq(sum[g], zero(), broadcast(1.f), sum[g]));
      store(tops + g * kLanes, most[g]);
    }
    log2_in_place(logs, kWidth);
    float* logsumexp = problem.logsumexp +
                       ((int64_t)task.batch * problem.heads + task.head) * problem.query_length +
                       first_query;
    // A row of nothing but the lowest mask was clamped there in log2 units.
    for (int i = 0; i < count; i++)
      logsumexp[i] = tops[i] == kLowest ? kLowest : (float)(((double)tops[i] + logs[i]) * kLn2);
    const auto target = rows_of<T>(problem.out, task.batch, task.head, first_query);
    store_transposed<kGroups>(out, factor, target, count, problem.value_dim);
  }

  // Requests what `next` reads and writes, spread over the last panel of this task.
  VLMFAST_INLINE Prefetcher prefetcher(const FlashAttentionTask& task,
                                       const FlashAttentionTask& next, int tiles,
                                       int keys_left) const {
    Prefetcher result;
    if (!problem.prefetch) return result;
    const int head = next.head / problem.group;
    const int n = minimum(next.k_end - next.k_begin, keys_at_once);
    if (next.batch != task.batch || head != task.head / problem.group) {
      result.add(rows_of<T>(problem.key, next.batch, head, next.k_begin), n, problem.head_dim);
      result.add(rows_of<T>(problem.value, next.batch, head, next.k_begin), n, problem.value_dim);
    }
    result.add(rows_of<T>(problem.query, next.batch, next.head, next.q_begin),
               next.q_end - next.q_begin, problem.head_dim);
    result.add(rows_of<T>(problem.out, next.batch, next.head, next.q_begin),
               next.q_end - next.q_begin, problem.value_dim);
    result.spread_over((int64_t)tiles * keys_left / kRowStep / (problem.causal ? 2 : 1));
    return result;
  }

  // Requests the keys and values of the panel that begins at key `begin`.
  VLMFAST_INLINE Prefetcher panel_prefetcher(const FlashAttentionTask& task, int key_head,
                                             int begin, int tiles, int keys_left) const {
    Prefetcher result;
    if (!problem.prefetch) return result;
    const int n = minimum(task.k_end - begin, keys_at_once);
    result.add(rows_of<T>(problem.key, task.batch, key_head, begin), n, problem.head_dim);
    result.add(rows_of<T>(problem.value, task.batch, key_head, begin), n, problem.value_dim);
    result.spread_over((int64_t)tiles * keys_left / kRowStep / (problem.causal ? 2 : 1));
    return result;
  }

  // `next` is what this thread will probably run afterwards.
  void run(const FlashAttentionTask& task, const FlashAttentionTask& next) const {
    const Tiling tiling(task.q_end - task.q_begin, problem.causal);
    const int key_head = task.head / problem.group;
    int begin = task.k_begin;
    do {
      const int end = minimum(begin + keys_at_once, task.k_end), n = end - begin;
      Panel panel{begin, end, begin == task.k_begin, end == task.k_end, {}};
      panel.ahead = panel.is_last ? prefetcher(task, next, tiling.tiles, n)
                                  : panel_prefetcher(task, key_head, end, tiling.tiles, n);
      const Rows<T> key_rows = rows_of<T>(problem.key, task.batch, key_head, begin);
      const Rows<T> value_rows = rows_of<T>(problem.value, task.batch, key_head, begin);
      pack_rows<Words>(key_rows, n, round_up(n, kRowStep), problem.head_dim, words, keys);
      pack_row_pairs<Words>(value_rows, n, round_up(n, kRowStep), problem.value_dim, value_columns,
                            values);
      for (int t = 0; t < tiling.tiles; t++) {
        const int first = tiling.first_vector(t), groups = tiling.first_vector(t + 1) - first;
        const int first_query = task.q_begin + first * kLanes;
        const int count = minimum(groups * kLanes, task.q_end - first_query);
        float* slot = state + (keeps_state ? t * state_size : 0);
        switch (groups) {
          case 1:
            tile<1>(task, panel, first_query, count, slot);
            break;
          case 2:
            tile<2>(task, panel, first_query, count, slot);
            break;
#if VLMFAST_LEVEL >= 1
          case 3:
            tile<3>(task, panel, first_query, count, slot);
            break;
#endif
#if VLMFAST_LEVEL >= 2
          case 4:
            tile<4>(task, panel, first_query, count, slot);
            break;
#endif
        }
      }
      begin = end;
    } while (begin < task.k_end);
  }
};

template <class Words, class T>
struct Backward {
  const FlashAttentionBackward& problem;
  int words, value_words, columns, vectors, value_vectors, keys_at_once;
  float *keys, *values, *key_pairs, *grad_keys, *grad_values;
  float *query, *grad_out, *query_rows, *grad_out_rows, *scores, *grad_scores, *exact_grad_scores,
      *left, *grad_left, *mask_tile, *keep;
  float *grad_query, *temporary_keys;
  int64_t grad_query_tile;
  int64_t scratch_size;

  static constexpr bool kPairs = Words::kElements == 2;

  Backward(const FlashAttentionBackward& p, float* scratch) : problem(p) {
    words = word_count<Words>(p.head_dim);
    value_words = word_count<Words>(p.value_dim);
    columns = round_up(p.head_dim, kRowStep);
    vectors = (p.head_dim + kLanes - 1) / kLanes;
    value_vectors = (p.value_dim + kLanes - 1) / kLanes;
    const int64_t per_key = words + value_words + (kPairs ? columns / 2 : 0) +
                            (p.wants_key_value ? (vectors + value_vectors) * kLanes : 0);
    keys_at_once = panel_keys(kBackwardPanel, per_key, p.keys_most);
    grad_query_tile = (int64_t)columns * kMaxTile;
    Arena arena{scratch};
    const int64_t padded = round_up(keys_at_once, kRowStep);
    keys = arena.take(padded * words);
    values = arena.take(padded * value_words);
    key_pairs = kPairs ? arena.take(padded / 2 * columns) : keys;
    grad_keys = arena.take(p.wants_key_value ? padded * vectors * kLanes : 0);
    grad_values = arena.take(p.wants_key_value ? padded * value_vectors * kLanes : 0);
    query = arena.take((int64_t)round_up(words, kLanes) * kMaxTile);
    grad_out = arena.take((int64_t)round_up(value_words, kLanes) * kMaxTile);
    query_rows = arena.take((int64_t)kMaxTile / Words::kElements * vectors * kLanes);
    grad_out_rows = arena.take((int64_t)kMaxTile / Words::kElements * value_vectors * kLanes);
    scores = arena.take(kBlock * kMaxTile);
    grad_scores = arena.take(kBlock * kMaxTile);
    exact_grad_scores = p.grad_mask == nullptr ? nullptr
                        : kPairs               ? arena.take(kBlock * kMaxTile)
                                               : grad_scores;
    left = kPairs ? arena.take(kBlock * kMaxTile / 2) : scores;
    grad_left = kPairs ? arena.take(kBlock * kMaxTile / 2) : grad_scores;
    mask_tile = p.mask.data == nullptr ? nullptr : arena.take(kBlock * kMaxTile);
    keep = p.dropout_p > 0 ? arena.take(kBlock * kMaxTile) : nullptr;
    temporary_keys = arena.take((int64_t)kBlock * words);
    const bool many_panels = keys_at_once < p.keys_most || p.grad_query_splits != nullptr;
    grad_query =
        arena.take(grad_query_tile *
                   (many_panels ? (int64_t)Tiling(p.queries_most, p.causal).tiles * p.group : 1));
    scratch_size = arena.used;
  }

  VLMFAST_INLINE int64_t first_row(const Scores<Words, T>& tile) const {
    return ((int64_t)tile.task.batch * problem.heads + tile.head) * problem.query_length +
           tile.first_query;
  }

  // grad_out . out - grad_logsumexp of each row, and the logsumexp in log2 units as `top` +
  // `log_sum`.
  template <int kGroups>
  VLMFAST_INLINE void row_values(const Scores<Words, T>& tile, Rows<T> grad, float* delta,
                                 float* top, float* log_sum) const {
    constexpr int kWidth = kGroups * kLanes;
    const T* out = problem.out.at<T>(tile.task.batch, tile.head, tile.first_query);
    const int64_t row = first_row(tile);
    for (int g = 0; g < kGroups; g++) {
      Vec sums[kLanes];
      VLMFAST_UNROLL for (int i = 0; i < kLanes; i++) sums[i] = zero();
      for (int i = 0; i < minimum(kLanes, tile.count - g * kLanes); i++) {
        const int at = g * kLanes + i;
        constexpr int kStep = kLanes * Words::kElements;
        for (int d = 0; d < problem.value_dim; d += kStep) {
          const int n = minimum(kStep, problem.value_dim - d);
          const T* p = grad.row(at) + d * grad.column_stride;
          const Vec grads = grad.column_stride == 1 ? load_words<Words>(p, n)
                                                    : gather_words<Words>(p, grad.column_stride, n);
          sums[i] = Words::multiply_add(
              grads, load_words<Words>(out + at * problem.out.stride[2] + d, n), sums[i]);
        }
      }
      transpose(sums);
      Vec total = sums[0];
      VLMFAST_UNROLL for (int i = 1; i < kLanes; i++) total = total + sums[i];
      store(delta + g * kLanes, total);
    }
    bool imprecise = false;
    for (int i = 0; i < kWidth; i++) {
      const float logsumexp = i < tile.count ? problem.logsumexp[row + i] : -kInfinity;
      log_sum[i] = 0.f;
      if (logsumexp == -kInfinity) {
        // Lanes without a query, and queries that see no key, get weights of exp2(-inf) = 0.
        top[i] = kInfinity;
        delta[i] = 0.f;
        continue;
      }
      if (problem.grad_logsumexp != nullptr) delta[i] -= problem.grad_logsumexp[row + i];
      top[i] = logsumexp * kLog2E;
      log_sum[i] = __builtin_fmaf(logsumexp, kLog2E, -top[i]) + logsumexp * kLog2ELow;
      imprecise |= __builtin_fabsf(logsumexp) > kImpreciseLogsumexp<T>;
    }
    if (imprecise) row_statistics<kGroups>(tile, top, log_sum);
  }

  // A large |logsumexp| (a row of masks as low as -1e9 or the lowest float has one) loses log(sum)
  // to rounding: compute the row's maximum and sum afresh and keep them apart.
  template <int kGroups>
  void row_statistics(const Scores<Words, T>& tile, float* top, float* log_sum) const {
    constexpr int kWidth = kGroups * kLanes;
    const FlashAttentionTask& task = tile.task;
    Vec most[kGroups], sum[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) most[g] = broadcast(-kInfinity),
                                                     sum[g] = zero();
    const int end = tile.visible_end(task.all_k_end);
    for (int key = task.all_k_begin; key < end; key += kBlock) {
      const int n = minimum(kBlock, end - key);
      const Rows<T> rows = rows_of<T>(problem.key, task.batch, tile.head / problem.group, key);
      pack_rows<Words>(rows, n, round_up(n, kRowStep), problem.head_dim, words, temporary_keys);
      float factor;
      Vec block_most[kGroups];
      if (!tile.template block<kGroups>(temporary_keys, words, key, n, scores, &factor, block_most))
        continue;
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        const Vec next = max(most[g], block_most[g]);
        const Vec subtracted = select_eq(next, broadcast(-kInfinity), zero(), next);
        sum[g] = sum[g] * exp2<5>(most[g] - subtracted);
        most[g] = next;
        for (int j = 0; j < n; j++)
          sum[g] =
              sum[g] + exp2<Words::kExpDegree>(fms(
                           broadcast(factor), load(scores + j * kWidth + g * kLanes), subtracted));
      }
    }
    float tops[kWidth], logs[kWidth];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      store(tops + g * kLanes, most[g]);
      store(logs + g * kLanes, select_eq(sum[g], zero(), broadcast(1.f), sum[g]));
    }
    log2_in_place(logs, kWidth);
    for (int i = 0; i < tile.count; i++)
      if (top[i] != kInfinity) top[i] = tops[i], log_sum[i] = logs[i];
  }

  // Where one block holds every key of the rows, neither logsumexp nor out is needed: turns scores
  // into their exponentials, and finds the reciprocal of their sum and
  // delta = sum(P * dP) - grad_logsumexp. Rows that see no key get reciprocal 0.
  template <int kGroups>
  void whole_rows(const Scores<Words, T>& tile, int n, float factor, const Vec* most, float* delta,
                  float* inverse) const {
    constexpr int kWidth = kGroups * kLanes;
    const Vec f = broadcast(factor), scale = broadcast(kept_scale(problem.dropout_p));
    Vec shift[kGroups], sum[kGroups], products[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      shift[g] = select_eq(most[g], broadcast(-kInfinity), zero(), most[g]);
      sum[g] = products[g] = zero();
    }
    for (int j = 0; j < n; j++) VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        const int at = j * kWidth + g * kLanes;
        const Vec weight = exp2<Words::kExpDegree>(fms(f, load(scores + at), shift[g]));
        const Vec kept = keep == nullptr ? weight : weight * (load(keep + at) * scale);
        store(scores + at, weight);
        sum[g] = sum[g] + weight;
        products[g] = fma(kept, load(grad_scores + at), products[g]);
      }
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      store(inverse + g * kLanes, sum[g]);
      store(delta + g * kLanes, products[g]);
    }
    const int64_t row = first_row(tile);
    for (int i = 0; i < kWidth; i++) {
      inverse[i] = i >= tile.count || inverse[i] == 0.f ? 0.f : 1.f / inverse[i];
      delta[i] = i >= tile.count ? 0.f : delta[i] * inverse[i];
      if (problem.grad_logsumexp != nullptr && inverse[i] != 0.f)
        delta[i] -= problem.grad_logsumexp[row + i];
    }
  }

  // P (after dropout) and dS of a block, from the products in `scores` and `grad_scores`. With fp32
  // words they replace them; with bf16 words `left` and `grad_left` get them as pairs along the
  // queries, and `grad_scores` gets dS as pairs along the keys. Rows [n, padded) become zero.
  // weight_at(at, g) is P before dropout.
  template <int kGroups, class Weight>
  VLMFAST_INLINE void gradients(int n, int padded, const float* delta, Weight weight_at) const {
    constexpr int kWidth = kGroups * kLanes, kRows = Words::kElements;
    const Vec scale = broadcast(kept_scale(problem.dropout_p));
    for (int j = 0; j < padded; j += kRows) {
      Vec weight[kRows][kGroups], grad[kRows][kGroups];
      VLMFAST_UNROLL for (int i = 0; i < kRows; i++)
          VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        const int at = (j + i) * kWidth + g * kLanes;
        weight[i][g] = grad[i][g] = zero();
        if (j + i < n) {
          const Vec p = weight_at(at, g);
          const Vec kept = keep == nullptr ? broadcast(1.f) : load(keep + at) * scale;
          weight[i][g] = p * kept;
          grad[i][g] = p * fms(load(grad_scores + at), kept, load(delta + g * kLanes));
        }
        if (exact_grad_scores != nullptr) store(exact_grad_scores + at, grad[i][g]);
      }
      store_gradients<Words, kGroups>(j, weight, grad, left, grad_left, grad_scores);
    }
  }

  template <int kGroups>
  VLMFAST_NOINLINE void gradients_of_part(int n, int padded, float factor, const float* delta,
                                          const float* top, const float* log_sum) const {
    gradients<kGroups>(n, padded, delta, [&](int at, int g) VLMFAST_INLINE_LAMBDA {
      return exp2<Words::kExpDegree>(
          fms(broadcast(factor), load(scores + at), load(top + g * kLanes)) -
          load(log_sum + g * kLanes));
    });
  }

  template <int kGroups>
  VLMFAST_NOINLINE void gradients_of_whole_rows(int n, int padded, const float* delta,
                                                const float* inverse) const {
    gradients<kGroups>(n, padded, delta, [&](int at, int g) VLMFAST_INLINE_LAMBDA {
      return load(scores + at) * load(inverse + g * kLanes);
    });
  }

  // Adds the block's dS to the gradient of the mask, summed over the dimensions along which the
  // mask broadcasts.
  template <int kGroups>
  void add_grad_mask(const FlashAttentionTask& task, const Scores<Words, T>& tile, int key,
                     int n) const {
    constexpr int kWidth = kGroups * kLanes;
    const int64_t* stride = problem.grad_mask_stride;
    float* base = problem.grad_mask + task.unit * problem.grad_mask_unit_size +
                  task.batch * stride[0] + tile.head * stride[1] + tile.first_query * stride[2] +
                  key * stride[3];
    if (stride[3] == 0) {  // first along the keys: the sum of a row of dS is next to nothing
      float rows[kWidth];
      for (int g = 0; g < kGroups; g++) {
        Vec sum = zero();
        for (int j = 0; j < n; j++) sum = sum + load(exact_grad_scores + j * kWidth + g * kLanes);
        store(rows + g * kLanes, sum);
      }
      for (int i = 0; i < tile.count; i++) base[i * stride[2]] += rows[i];
    } else if (stride[2] == 0) {
      for (int j = 0; j < n; j++) {
        Vec sum = zero();
        for (int g = 0; g < kGroups; g++)
          sum = sum + load(exact_grad_scores + j * kWidth + g * kLanes);
        base[j * stride[3]] += horizontal_sum(sum);
      }
    } else {
      for (int g = 0; g < kGroups; g++)
        for (int j = 0; j < n; j += kLanes) {
          Vec r[kLanes];
          for (int i = 0; i < kLanes; i++)
            r[i] = j + i < n ? load(exact_grad_scores + (j + i) * kWidth + g * kLanes) : zero();
          transpose(r);
          const int m = minimum(kLanes, n - j), rows = minimum(kLanes, tile.count - g * kLanes);
          for (int i = 0; i < rows; i++) {
            float* target = base + (g * kLanes + i) * stride[2] + j;
            store_first(target, load_first(target, m) + r[i], m);
          }
        }
    }
  }

  template <int kGroups>
  void tile(const FlashAttentionTask& task, Panel& panel, int head, int first_query, int count,
            bool is_first_tile, float* grad_query_sum) const {
    constexpr int kWidth = kGroups * kLanes, kDepth = kWidth / Words::kElements;
    const Scores<Words, T> tile{problem, task,  head,        first_query,
                                count,   query, panel.ahead, mask_tile};
    const int end = tile.visible_end(panel.end);
    Vec factors[kGroups];
    if (panel.is_first)
      for (int i = 0; i < columns * kWidth; i += kLanes) store(grad_query_sum + i, zero());
    if (panel.begin < end) {
      const Rows<T> query_in = rows_of<T>(problem.query, task.batch, head, first_query);
      const Rows<T> grad_in = rows_of<T>(problem.grad_out, task.batch, head, first_query);
      pack_transposed<Words, kGroups>(query_in, count, problem.head_dim, problem.scale * kLog2E,
                                      query);
      pack_transposed<Words, kGroups>(grad_in, count, problem.value_dim, 1.f, grad_out);
      if (problem.wants_key_value) {
        pack_row_pairs<Words>(query_in, count, kWidth, problem.head_dim, vectors * kLanes,
                              query_rows);
        pack_row_pairs<Words>(grad_in, count, kWidth, problem.value_dim, value_vectors * kLanes,
                              grad_out_rows);
      }
      float delta[kWidth], top[kWidth], log_sum[kWidth];
      const bool whole = task.all_k_begin == panel.begin &&
                         tile.visible_end(task.all_k_end) == end && end - panel.begin <= kBlock;
      if (!whole) row_values<kGroups>(tile, grad_in, delta, top, log_sum);
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) factors[g] = broadcast(1.f);
      for (int key = panel.begin; key < end; key += kBlock) {
        const int n = minimum(kBlock, end - key), padded = round_up(n, kRowStep),
                  at = key - panel.begin;
        float factor;
        Vec most[kGroups];
        if (!tile.template block<kGroups>(keys + (int64_t)at * words, words, key, n, scores,
                                          &factor, most))
          continue;
        multiply_rows<Words, kGroups>(grad_out, values + (int64_t)at * value_words, value_words, n,
                                      grad_scores, nullptr, panel.ahead);
        if (keep != nullptr)
          dropout(problem).keep(key, n, first_query, kWidth,
                                (uint32_t)(task.batch * problem.heads + head), keep);
        if (whole) {
          float inverse[kWidth];
          whole_rows<kGroups>(tile, n, factor, most, delta, inverse);
          gradients_of_whole_rows<kGroups>(n, padded, delta, inverse);
        } else {
          gradients_of_part<kGroups>(n, padded, factor, delta, top, log_sum);
        }
        if (problem.grad_mask != nullptr) add_grad_mask<kGroups>(task, tile, key, n);
        if (problem.wants_key_value) {
          outer_accumulate<Words>(
              left, kDepth, grad_out_rows, kDepth, n, is_first_tile && overwrites(),
              grad_values + (int64_t)at * value_vectors * kLanes, value_vectors);
          outer_accumulate<Words>(grad_left, kDepth, query_rows, kDepth, n,
                                  is_first_tile && overwrites(),
                                  grad_keys + (int64_t)at * vectors * kLanes, vectors);
        }
        if (problem.wants_query)
          weighted_sum<Words, kGroups>(
              grad_scores, key_pairs + (int64_t)at / Words::kElements * columns, columns,
              padded / Words::kElements, columns, grad_query_sum, factors);
      }
    }
    if (!panel.is_last || !problem.wants_query) return;
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) factors[g] = broadcast(problem.scale);
    if (problem.grad_query_splits != nullptr) {
      float* target =
          problem.grad_query_splits + task.split * problem.grad_query_split_size +
          (((int64_t)task.batch * problem.heads + head) * problem.query_length + first_query) *
              problem.head_dim;
      store_transposed<kGroups>(grad_query_sum, factors, Rows<float>{target, problem.head_dim, 1},
                                count, problem.head_dim);
    } else {
      const auto target = rows_of<T>(problem.grad_query, task.batch, head, first_query);
      store_transposed<kGroups>(grad_query_sum, factors, target, count, problem.head_dim);
    }
  }

  // Where the first tile of queries meets every key it can store its share of grad_keys and
  // grad_values; else they start from zero.
  VLMFAST_INLINE bool overwrites() const { return !problem.causal && problem.mask.data == nullptr; }

  // Requests what `next` reads and writes first, spread over the last panel of this task.
  VLMFAST_INLINE Prefetcher prefetcher(const FlashAttentionTask& next, int tiles,
                                       int keys_left) const {
    Prefetcher result;
    if (!problem.prefetch) return result;
    const int n = minimum(next.k_end - next.k_begin, keys_at_once),
              count = next.q_end - next.q_begin;
    const int head = next.head * problem.group;
    result.add(rows_of<T>(problem.key, next.batch, next.head, next.k_begin), n, problem.head_dim);
    result.add(rows_of<T>(problem.value, next.batch, next.head, next.k_begin), n,
               problem.value_dim);
    result.add(rows_of<T>(problem.query, next.batch, head, next.q_begin), count, problem.head_dim);
    result.add(rows_of<T>(problem.grad_out, next.batch, head, next.q_begin), count,
               problem.value_dim);
    result.add(rows_of<T>(problem.out, next.batch, head, next.q_begin), count, problem.value_dim);
    if (problem.wants_key_value) {
      result.add(rows_of<T>(problem.grad_key, next.batch, next.head, next.k_begin), n,
                 problem.head_dim);
      result.add(rows_of<T>(problem.grad_value, next.batch, next.head, next.k_begin), n,
                 problem.value_dim);
    }
    if (problem.wants_query)
      result.add(rows_of<T>(problem.grad_query, next.batch, head, next.q_begin), count,
                 problem.head_dim);
    result.spread_over((int64_t)tiles * problem.group * keys_left / kRowStep *
                       (problem.causal ? 1 : 2));
    return result;
  }

  // Requests the keys and values of the panel that begins at key `begin`.
  VLMFAST_INLINE Prefetcher panel_prefetcher(const FlashAttentionTask& task, int begin, int tiles,
                                             int keys_left) const {
    Prefetcher result;
    if (!problem.prefetch) return result;
    const int n = minimum(task.k_end - begin, keys_at_once);
    result.add(rows_of<T>(problem.key, task.batch, task.head, begin), n, problem.head_dim);
    result.add(rows_of<T>(problem.value, task.batch, task.head, begin), n, problem.value_dim);
    result.spread_over((int64_t)tiles * problem.group * keys_left / kRowStep *
                       (problem.causal ? 1 : 2));
    return result;
  }

  // `next` is what this thread will probably run afterwards.
  void run(const FlashAttentionTask& task, const FlashAttentionTask& next) const {
    const Tiling tiling(task.q_end - task.q_begin, problem.causal);
    const bool many_panels = task.k_end - task.k_begin > keys_at_once;
    int begin = task.k_begin;
    do {
      const int end = minimum(begin + keys_at_once, task.k_end), n = end - begin;
      const int padded = round_up(n, kRowStep);
      Panel panel{begin, end, begin == task.k_begin, end == task.k_end, {}};
      panel.ahead = panel.is_last ? prefetcher(next, tiling.tiles, n)
                                  : panel_prefetcher(task, end, tiling.tiles, n);
      const Rows<T> key_rows = rows_of<T>(problem.key, task.batch, task.head, begin);
      const Rows<T> value_rows = rows_of<T>(problem.value, task.batch, task.head, begin);
      pack_rows<Words>(key_rows, n, padded, problem.head_dim, words, keys);
      pack_rows<Words>(value_rows, n, padded, problem.value_dim, value_words, values);
      if (kPairs) pack_row_pairs<Words>(key_rows, n, padded, problem.head_dim, columns, key_pairs);
      if (problem.wants_key_value && (!overwrites() || tiling.tiles == 0)) {
        for (int64_t i = 0; i < (int64_t)padded * vectors * kLanes; i += kLanes)
          store(grad_keys + i, zero());
        for (int64_t i = 0; i < (int64_t)padded * value_vectors * kLanes; i += kLanes)
          store(grad_values + i, zero());
      }
      for (int h = 0; h < problem.group; h++)
        for (int t = 0; t < tiling.tiles; t++) {
          const int first = tiling.first_vector(t), groups = tiling.first_vector(t + 1) - first;
          const int first_query = task.q_begin + first * kLanes,
                    head = task.head * problem.group + h;
          const int count = minimum(groups * kLanes, task.q_end - first_query);
          float* sum = grad_query + (many_panels ? (h * tiling.tiles + t) * grad_query_tile : 0);
          switch (groups) {
            case 1:
              tile<1>(task, panel, head, first_query, count, h + t == 0, sum);
              break;
            case 2:
              tile<2>(task, panel, head, first_query, count, h + t == 0, sum);
              break;
#if VLMFAST_LEVEL >= 1
            case 3:
              tile<3>(task, panel, head, first_query, count, h + t == 0, sum);
              break;
#endif
#if VLMFAST_LEVEL >= 2
            case 4:
              tile<4>(task, panel, head, first_query, count, h + t == 0, sum);
              break;
#endif
          }
        }
      if (problem.wants_key_value) {
        T* grad_key = problem.grad_key.at<T>(task.batch, task.head, begin);
        T* grad_value = problem.grad_value.at<T>(task.batch, task.head, begin);
        for (int j = 0; j < n; j++) {
          for (int d = 0; d < problem.head_dim; d += kLanes)
            store_first(
                grad_key + j * problem.grad_key.stride[2] + d,
                load(grad_keys + (int64_t)j * vectors * kLanes + d) * broadcast(problem.scale),
                minimum(kLanes, problem.head_dim - d));
          for (int d = 0; d < problem.value_dim; d += kLanes)
            store_first(grad_value + j * problem.grad_value.stride[2] + d,
                        load(grad_values + (int64_t)j * value_vectors * kLanes + d),
                        minimum(kLanes, problem.value_dim - d));
        }
      }
      begin = end;
    } while (begin < task.k_end);
  }
};

int64_t forward_scratch(const FlashAttentionForward& problem) {
  return with_types(problem.dtype, [&](auto words, auto element) {
    return Forward<decltype(words), decltype(element)>(problem, nullptr).scratch_size;
  });
}

void forward(const FlashAttentionForward& problem, const FlashAttentionTask& task,
             const FlashAttentionTask& next, float* scratch) {
  with_types(problem.dtype, [&](auto words, auto element) {
    Forward<decltype(words), decltype(element)>(problem, scratch).run(task, next);
  });
}

int64_t backward_scratch(const FlashAttentionBackward& problem) {
  return with_types(problem.dtype, [&](auto words, auto element) {
    return Backward<decltype(words), decltype(element)>(problem, nullptr).scratch_size;
  });
}

void backward(const FlashAttentionBackward& problem, const FlashAttentionTask& task,
              const FlashAttentionTask& next, float* scratch) {
  with_types(problem.dtype, [&](auto words, auto element) {
    Backward<decltype(words), decltype(element)>(problem, scratch).run(task, next);
  });
}

// The gradient of one row of queries from its `splits` partial sums, added in order.
void sum_splits(const FlashAttentionBackward& problem, int splits, int batch, int head,
                int64_t row) {
  with_types(problem.dtype, [&](auto, auto element) {
    using T = decltype(element);
    T* out = problem.grad_query.at<T>(batch, head, row);
    const float* partial =
        problem.grad_query_splits +
        (((int64_t)batch * problem.heads + head) * problem.query_length + row) * problem.head_dim;
    for (int d = 0; d < problem.head_dim; d += kLanes) {
      const int n = minimum(kLanes, problem.head_dim - d);
      Vec sum = zero();
      for (int i = 0; i < splits; i++)
        sum = sum + load_first(partial + i * problem.grad_query_split_size + d, n);
      store_first(out + d, sum, n);
    }
  });
}

}  // namespace

extern const FlashAttentionKernel flash_attention_kernel = {
    forward_scratch, forward, backward_scratch, backward, sum_splits, kMaxTile};

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
