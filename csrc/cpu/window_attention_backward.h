// Backward: recomputes the weights of each window.
#pragma once
#include "cpu/tile/dropout.h"
#include "cpu/window_attention_bias.h"
#include "cpu/window_attention_scores.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

template <class Words, class T>
struct Backward {
  enum Tensors { kQuery, kKey, kValue, kGradOut, kGradQuery, kGradKey, kGradValue, kTensors };
  static constexpr bool kPairs = Words::kElements == 2;
  const WindowAttentionBackward& problem;
  WindowTiling tiling;
  bool wants_products;
  int words, columns, vectors, row_words;
  float* biases;
  // Where the gradient of the bias is wanted and the task runs all windows of its heads, else
  // nullptr.
  float* own_bias_sums;
  float *keys, *values, *key_pairs, *key_factors, *grad_keys, *grad_values;
  float *query, *grad_out, *query_rows, *grad_out_rows, *scores, *grad_scores, *left, *grad_left,
      *keep, *grad_query;
  float *row, *grad_row, *exact_row, *exact_grad_row, *row_scores, *row_grads;
  mutable Window<T, kTensors> windows[2];
  ShrunkRows<T, kTensors> key_copies, query_copies;  // where there are cosines
  T *sink, *zeros;
  int64_t scratch_size;

  Backward(const WindowAttentionBackward& p, float* scratch)
      : problem(p), tiling(p.window_height * p.window_width) {
    wants_products = p.wants_qkv || p.grad_pad != nullptr || p.grad_logit_scale != nullptr;
    words = word_count<Words>(p.head_dim);
    columns = round_up(p.head_dim, kRowStep);
    vectors = (p.head_dim + kLanes - 1) / kLanes;
    row_words = round_up(words, kLanes);
    Arena arena{scratch};
    const int64_t padded = tiling.padded_tokens;
    biases = p.bias.data == nullptr ? nullptr : arena.take(p.heads_per_task * tiling.bias_size());
    own_bias_sums = p.grad_bias.data == nullptr || p.bias_sums != nullptr
                        ? nullptr
                        : arena.take(p.heads_per_task * tiling.bias_size());
    keys = arena.take(padded * words);
    values = arena.take(padded * words);
    key_pairs = kPairs ? arena.take(padded / 2 * columns + kLanes) : keys;
    key_factors = p.logit_scale == nullptr ? nullptr : arena.take(padded);
    grad_keys = arena.take(padded * vectors * kLanes);
    grad_values = arena.take(padded * vectors * kLanes);
    query = arena.take((int64_t)row_words * kMaxTile);
    grad_out = arena.take((int64_t)row_words * kMaxTile);
    query_rows = arena.take((int64_t)kMaxTile / Words::kElements * vectors * kLanes);
    grad_out_rows = arena.take((int64_t)kMaxTile / Words::kElements * vectors * kLanes);
    scores = arena.take(padded * kMaxTile);
    grad_scores = arena.take(padded * kMaxTile);
    left = kPairs ? arena.take(padded * kMaxTile / 2) : scores;
    grad_left = kPairs ? arena.take(padded * kMaxTile / 2) : grad_scores;
    keep = p.dropout_p > 0 ? arena.take(padded * kMaxTile) : nullptr;
    grad_query = arena.take((int64_t)columns * kMaxTile);
    row = arena.take(row_words);
    grad_row = arena.take(row_words);
    exact_row = arena.take((int64_t)vectors * kLanes);
    exact_grad_row = arena.take((int64_t)vectors * kLanes);
    row_scores = arena.take(padded);
    row_grads = arena.take(padded);
    sink = (T*)arena.take((int64_t)p.heads * p.head_dim);
    zeros = (T*)arena.take((int64_t)p.heads * p.head_dim);
    for (auto& window : windows) window.take(&arena, tiling);
    if (p.logit_scale != nullptr) {
      key_copies.take(&arena, tiling.tokens, p.head_dim);
      query_copies.take(&arena, kMaxTile, p.head_dim);
    }
    scratch_size = arena.used;
  }

  VLMFAST_INLINE void locate_window(int64_t index, Window<T, kTensors>* window) const {
    const int channels = problem.heads * problem.head_dim;
    T* pad = (T*)problem.pad_value;
    Strided nowhere;
    nowhere.data = sink;
    const bool wanted = problem.wants_qkv;
    const Map<T> maps[kTensors] = {{problem.query, pad},
                                   {problem.key, pad + channels},
                                   {problem.value, pad + 2 * channels},
                                   {problem.grad_out, zeros},
                                   {wanted ? problem.grad_query : nowhere, sink},
                                   {wanted ? problem.grad_key : nowhere, sink},
                                   {wanted ? problem.grad_value : nowhere, sink}};
    locate(problem, index, maps, window);
  }

  // A task's first window begins its partial sums.
  VLMFAST_INLINE void add_to(float* sum, bool is_first, Vec x) const {
    store(sum, load_first(sum, is_first ? 0 : kLanes) + x);
  }

  // P (after dropout) and dS of a tile, from its logits in `scores` and its dP in `grad_scores`, as
  // store_gradients leaves them. dS is times the inverse norms of query and key where there are
  // any, but not in the gradient of the bias.
  // kPlain: neither dropout nor cosines.
  template <int kGroups, bool kPlain>
  VLMFAST_NOINLINE void gradients(const Vec* row_max, const Vec* query_factor, float* grad_bias,
                                  bool is_first) const {
    constexpr int kWidth = kGroups * kLanes;
    const int n = tiling.tokens;
    const Vec kept_factor = broadcast(kept_scale(problem.dropout_p));
    Vec sum[kGroups], delta[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) sum[g] = delta[g] = zero();
    for (int begin = 0; begin < n; begin += kRun) {
      const int end = minimum(begin + kRun, n);
      Vec run_sum[kGroups], run_delta[kGroups];
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) run_sum[g] = run_delta[g] = zero();
      for (int j = begin; j < end; j++) VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
          const int at = j * kWidth + g * kLanes;
          const Vec p = exp2<Words::kExpDegree>(load(scores + at) - row_max[g]);
          Vec grad = load(grad_scores + at);
          if (!kPlain && keep != nullptr) {
            grad = grad * (load(keep + at) * kept_factor);
            store(grad_scores + at, grad);
          }
          store(scores + at, p);
          run_sum[g] = run_sum[g] + p;
          run_delta[g] = fma(p, grad, run_delta[g]);
        }
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        sum[g] = sum[g] + run_sum[g];
        delta[g] = delta[g] + run_delta[g];
      }
    }
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      delta[g] = delta[g] / sum[g];  // rounded once: the error of delta is that of every key
      sum[g] = broadcast(1.f) / sum[g];
    }
    write_gradients<Words, kGroups>(
        n, n, left, grad_left, grad_scores,
        [&](int key, int at, int g, Vec* weight, Vec* grad) VLMFAST_INLINE_LAMBDA {
          *weight = load(scores + at) * sum[g];
          *grad = *weight * (load(grad_scores + at) - delta[g]);
          if (grad_bias != nullptr) add_to(grad_bias + at, is_first, *grad);
          if (!kPlain && keep != nullptr) *weight = *weight * (load(keep + at) * kept_factor);
          if (!kPlain && key_factors != nullptr)
            *grad = *grad * (query_factor[g] * broadcast(key_factors[key]));
        });
  }

  template <int kGroups>
  VLMFAST_NOINLINE void tile(const Window<T, kTensors>& window, const Logits<Words>& logits,
                             int head, int first, uint32_t dropout_row, bool overwrite,
                             float* grad_bias, bool is_first, Vec* grad_logit_scale,
                             WindowPrefetcher& ahead) const {
    constexpr int kWidth = kGroups * kLanes, kDepth = kWidth / Words::kElements;
    const int column = head * problem.head_dim, n = tiling.tokens, dim = problem.head_dim;
    const int first_query = first * kLanes,
              count = minimum(kWidth, tiling.tiled_queries() - first_query);
    auto query_in = window.of(kQuery, column, first_query);
    const auto grad_in = window.of(kGradOut, column, first_query);
    pack_transposed<Words, kGroups>(query_in, count, dim, 1.f, query);
    pack_transposed<Words, kGroups>(grad_in, count, dim, 1.f, grad_out);
    bool are_copies = false;
    Vec factor[kGroups], inverse[kGroups], square[kGroups], row_max[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) inverse[g] = broadcast(1.f);
    if (key_factors == nullptr) {
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) factor[g] =
          broadcast(problem.scale * kLog2E);
    } else {
      are_copies = norms_of_queries<Words, kGroups>(&query_in, count, dim, words, query_copies,
                                                    query, square, inverse);
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) factor[g] =
          inverse[g] * broadcast(problem.logit_scale[head] * kLog2E);
    }
    pack_row_pairs<Words>(query_in, count, kWidth, dim, vectors * kLanes, query_rows);
    pack_row_pairs<Words>(grad_in, count, kWidth, dim, vectors * kLanes, grad_out_rows);
    logits.template tile<kGroups>(query, first, factor, scores, row_max, ahead);
    with_rows<kGroups>(n, [&](auto rows) VLMFAST_INLINE_LAMBDA {
      multiply_rows<Words, kGroups, decltype(rows)::value>(grad_out, values, words, words, n,
                                                           grad_scores, nullptr, ahead);
    });
    if (keep != nullptr)
      philox(problem.dropout_p, problem.dropout_seed)
          .keep(0, n, first_query, kWidth, dropout_row, keep);
    float* grad_bias_tile = grad_bias == nullptr ? nullptr : grad_bias + tiling.bias_tile(first);
    if (keep == nullptr && key_factors == nullptr)
      gradients<kGroups, true>(row_max, inverse, grad_bias_tile, is_first);
    else
      gradients<kGroups, false>(row_max, inverse, grad_bias_tile, is_first);
    if (!wants_products) return;
    outer_accumulate<Words>(left, kDepth, grad_out_rows, kDepth, n, overwrite, grad_values,
                            vectors);
    outer_accumulate<Words>(grad_left, kDepth, query_rows, kDepth, n, overwrite, grad_keys,
                            vectors);
    sum_grad_query<kGroups>();
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) factor[g] = broadcast(problem.scale);
    if (key_factors != nullptr) {
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        factor[g] = broadcast(problem.logit_scale[head]);
        if (are_copies) factor[g] = factor[g] * load(query_copies.factors + g * kLanes);
      }
      project_queries<kGroups>(square, inverse, grad_logit_scale);
    }
    store_transposed<kGroups>(grad_query, factor, window.of(kGradQuery, column, first_query), count,
                              dim);
  }

  // The gradients of a tile's queries, but for their factor. That of a logit scale is a sum over
  // them in which nearly all cancels out: it wants runs.
  template <int kGroups>
  VLMFAST_INLINE void sum_grad_query() const {
    constexpr int kWidth = kGroups * kLanes;
    const int rows = (tiling.tokens + Words::kElements - 1) / Words::kElements;
    const int step = problem.grad_logit_scale == nullptr ? rows : 2 * kRun;
    Vec ones[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) ones[g] = broadcast(1.f);
    for (int r = 0; r < rows; r += step)
      weighted_sum<Words, kGroups>(grad_scores + r * kWidth, key_pairs + (int64_t)r * columns,
                                   columns, minimum(step, rows - r), columns, grad_query,
                                   r == 0 ? nullptr : ones);
  }

  // Calls body(column, x) with the fp32 vectors of a column of the packed queries.
  template <int kGroups, class Body>
  VLMFAST_INLINE void for_each_column(Body body) const {
    for (int w = 0; w < words; w++) VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        const Vec x = load(query + (w * kGroups + g) * kLanes);
#ifdef VLMFAST_BF16_WORDS
        if constexpr (kPairs) {
          body(2 * w, g, low_of_pairs(x));
          body(2 * w + 1, g, high_of_pairs(x));
          continue;
        }
#endif
        body(w, g, x);
      }
  }

  // The gradient of q from that of q / |q|, times 1 / |q|: what lies along q drops out, and is the
  // gradient of the logits' scale.
  template <int kGroups>
  VLMFAST_NOINLINE void project_queries(const Vec* square, const Vec* inverse,
                                        Vec* grad_logit_scale) const {
    Vec along[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) along[g] = zero();
    for_each_column<kGroups>([&](int d, int g, Vec x) VLMFAST_INLINE_LAMBDA {
      along[g] = fma(x, load(grad_query + (d * kGroups + g) * kLanes), along[g]);
    });
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      *grad_logit_scale = *grad_logit_scale + along[g];
      along[g] = projected(along[g], square[g], inverse[g]);
    }
    for_each_column<kGroups>([&](int d, int g, Vec x) VLMFAST_INLINE_LAMBDA {
      float* target = grad_query + (d * kGroups + g) * kLanes;
      store(target, load(target) - along[g] * x);
    });
  }

  // What of x to subtract from a gradient that is `along` in the direction of x. Below the smallest
  // norm x is divided by a constant, and nothing drops out.
  VLMFAST_INLINE Vec projected(Vec along, Vec square, Vec inverse) const {
    const Vec smallest = broadcast(kSmallestNorm);
    const Vec is_small = max(smallest, sqrt(square));
    return select_eq(is_small, smallest, zero(), along * inverse * inverse);
  }

  VLMFAST_INLINE void load_exact_row(ScatteredRows<T, kTensors> row, float* out) const {
    pack_rows<Fp32Words>(row, 1, 1, problem.head_dim, vectors * kLanes, out);
  }

  // The query that has no tile: it comes first, so that grad_keys and grad_values start from it.
  VLMFAST_NOINLINE void last_query(const Window<T, kTensors>& window, const Logits<Words>& logits,
                                   int head, uint32_t dropout_row, float* grad_bias, bool is_first,
                                   Vec* grad_logit_scale) const {
    const int column = head * problem.head_dim, n = tiling.tokens, q = n - 1;
    const int dim = problem.head_dim;
    auto query_in = window.of(kQuery, column, q);
    pack_rows<Words>(query_in, 1, 1, dim, row_words, row);
    pack_rows<Words>(window.of(kGradOut, column, q), 1, 1, dim, row_words, grad_row);
    float inverse = 1.f, factor = problem.scale, shrinking = 1.f;
    if (key_factors != nullptr) {
      float norm[kLanes];
      if (norms_of_rows<Words>(&query_in, 1, dim, row_words, query_copies, row, norm))
        shrinking = query_copies.factors[0];
      inverse = norm[0];
      factor = problem.logit_scale[head];
    }
    load_exact_row(query_in, exact_row);
    load_exact_row(window.of(kGradOut, column, q), exact_grad_row);
    logits.last(row, factor * inverse * kLog2E, row_scores);
    multiply_row<Words>(grad_row, values, words, words, n, row_grads);
    float row_max;
    const float normalise = 1.f / exponentiate_row<Words>(row_scores, n, &row_max);
    if (keep != nullptr) {
      philox(problem.dropout_p, problem.dropout_seed).keep(0, n, q, 1, dropout_row, keep);
      const float kept = kept_scale(problem.dropout_p);
      for (int j = 0; j < n; j++) {
        keep[j] *= kept;
        row_grads[j] *= keep[j];
      }
    }
    Vec sum = zero();
    for (int j = 0; j < n; j += kLanes) {
      const Vec p = load(row_scores + j) * broadcast(normalise);
      store(row_scores + j, p);
      sum = fma(p, load(row_grads + j), sum);
    }
    const Vec delta = broadcast(horizontal_sum(sum));
    for (int j = 0; j < n; j += kLanes) {
      Vec grad = load(row_scores + j) * (load(row_grads + j) - delta);
      if (grad_bias != nullptr) add_to(grad_bias + tiling.bias_tiles_size() + j, is_first, grad);
      if (key_factors != nullptr)
        grad =
            select_ge(lane_index(j), n, zero(), grad * broadcast(inverse) * load(key_factors + j));
      store(row_grads + j, grad);
    }
    if (!wants_products) return;
    if (keep != nullptr)
      for (int j = 0; j < n; j++) row_scores[j] *= keep[j];
    set_outer(row_scores, exact_grad_row, n, vectors, grad_values);
    set_outer(row_grads, exact_row, n, vectors, grad_keys);
    round_weights<Words>(row_grads, n);
    float* gradient = exact_grad_row;
    combine_rows<Words>(row_grads, key_pairs, columns,
                        (n + Words::kElements - 1) / Words::kElements, dim, gradient);
    store_row(exact_row, gradient, factor * shrinking, window.of(kGradQuery, column, q).row(0),
              grad_logit_scale);
  }

  // Writes a row of the gradient of queries or keys; with cosines, from that of x / |x|, as in
  // project_queries. `gradient` becomes what is written.
  VLMFAST_INLINE void store_row(const float* x, float* gradient, float factor, T* out,
                                Vec* grad_logit_scale) const {
    const int dim = problem.head_dim;
    Vec coefficient = zero();
    if (key_factors != nullptr) {
      Vec along = zero(), square = zero();
      for (int d = 0; d < dim; d += kLanes) {
        const int left_over = minimum(kLanes, dim - d);
        const Vec v = load_first(x + d, left_over);
        along = fma(v, load_first(gradient + d, left_over), along);
        square = fma(v, v, square);
      }
      if (grad_logit_scale != nullptr) *grad_logit_scale = *grad_logit_scale + along;
      const Vec total = broadcast(horizontal_sum(square));
      coefficient = projected(broadcast(horizontal_sum(along)), total, inverse_norm(total));
    }
    for (int d = 0; d < dim; d += kLanes) {
      Vec grad = load(gradient + d);
      if (key_factors != nullptr) grad = grad - coefficient * load(x + d);
      grad = grad * broadcast(factor);
      store(gradient + d, grad);
      store_first(out + d, grad, minimum(kLanes, dim - d));
    }
  }

  VLMFAST_NOINLINE void store_keys_and_values(const Window<T, kTensors>& window,
                                              const WindowAttentionTask& task, int head,
                                              ScatteredRows<T, kTensors> keys_in,
                                              const float* key_shrinking) const {
    const int column = head * problem.head_dim, dim = problem.head_dim;
    for (int j = 0; j < tiling.tokens; j++) {
      float* grad_key = grad_keys + (int64_t)j * vectors * kLanes;
      float* grad_value = grad_values + (int64_t)j * vectors * kLanes;
      float factor = problem.scale;
      if (key_factors != nullptr) {
        load_exact_row({keys_in.rows + j * kTensors, keys_in.column}, exact_row);
        factor = problem.logit_scale[head];
        if (key_shrinking != nullptr) factor *= key_shrinking[j];
      }
      store_row(exact_row, grad_key, factor, window.of(kGradKey, column, j).row(0), nullptr);
      for (int d = 0; d < dim; d += kLanes)
        store_first(window.of(kGradValue, column, j).row(0) + d, load(grad_value + d),
                    minimum(kLanes, dim - d));
      if (problem.grad_pad == nullptr || !window.is_padding[j]) continue;
      const int channels = problem.heads * dim;
      double* sum = problem.grad_pad + (int64_t)task.split * 2 * channels + column;
      for (int d = 0; d < dim; d++) {
        sum[d] += grad_key[d];
        sum[channels + d] += grad_value[d];
      }
    }
  }

  void run_head(const Window<T, kTensors>& window, const WindowAttentionTask& task, int64_t index,
                int head, const float* bias, float* grad_bias, WindowPrefetcher& ahead) const {
    const int column = head * problem.head_dim, n = tiling.tokens, dim = problem.head_dim;
    auto key_rows = window.of(kKey, column);
    const auto value_rows = window.of(kValue, column);
    pack_rows<Words>(key_rows, n, tiling.padded_tokens, dim, words, keys);
    pack_rows<Words>(value_rows, n, tiling.padded_tokens, dim, words, values);
    const float* key_shrinking = nullptr;  // where keys are copies
    if (key_factors != nullptr &&
        norms_of_rows<Words>(&key_rows, n, dim, words, key_copies, keys, key_factors))
      key_shrinking = key_copies.factors;
    if (kPairs) pack_row_pairs<Words>(key_rows, n, round_up(n, 2), dim, columns, key_pairs);
    const Logits<Words> logits{tiling,      keys, key_factors,
                               words,       bias, window.wraps ? window.regions : nullptr,
                               problem.mask};
    const uint32_t at = (uint32_t)(index * problem.heads + head);
    Vec grad_logit_scale = zero();
    const bool is_first = index == task.window_begin;
    if (tiling.leaves_one)
      last_query(window, logits, head, at, grad_bias, is_first, &grad_logit_scale);
    for (int t = 0; t < tiling.tiles; t++) {
      const int first = tiling.first_vector(t), vectors = tiling.first_vector(t + 1) - first;
      with_count<kMaxGroups>(vectors, [&](auto groups) VLMFAST_INLINE_LAMBDA {
        tile<decltype(groups)::value>(window, logits, head, first, at, t == 0 && !tiling.leaves_one,
                                      grad_bias, is_first, &grad_logit_scale, ahead);
      });
    }
    if (problem.grad_logit_scale != nullptr)
      problem.grad_logit_scale[(int64_t)task.split * problem.heads + head] +=
          horizontal_sum(grad_logit_scale);
    if (wants_products) store_keys_and_values(window, task, head, key_rows, key_shrinking);
  }

  void run(const WindowAttentionTask& task, const WindowAttentionTask& next,
           bool has_biases) const {
    const int channels = problem.heads * problem.head_dim;
    for (int i = 0; i < channels; i++) zeros[i] = T();
    const int64_t bias_size = tiling.bias_size();
    if (biases != nullptr && !has_biases)
      pack_biases(problem.bias, tiling, task.head_begin, task.head_end, biases);
    float* sums = own_bias_sums;
    if (problem.bias_sums != nullptr)
      sums =
          problem.bias_sums + ((int64_t)task.split * problem.heads + task.head_begin) * bias_size;
    Window<T, kTensors>*window = windows, *following = windows + 1;
    locate_window(task.window_begin, window);
    for (int64_t index = task.window_begin; index < task.window_end; index++) {
      const bool is_last = index + 1 == task.window_end;
      const WindowAttentionTask& upcoming = is_last ? next : task;
      locate_window(is_last ? next.window_begin : index + 1, following);
      const int column = upcoming.head_begin * problem.head_dim;
      const int columns = (upcoming.head_end - upcoming.head_begin) * problem.head_dim;
      WindowPrefetcher ahead(*following, tiling, column, columns,
                             2 * (task.head_end - task.head_begin), words);
      for (int head = task.head_begin; head < task.head_end; head++) {
        const int64_t at = (head - task.head_begin) * bias_size;
        run_head(*window, task, index, head, biases == nullptr ? nullptr : biases + at,
                 sums == nullptr ? nullptr : sums + at, ahead);
      }
      Window<T, kTensors>* free = window;
      window = following;
      following = free;
    }
    if (own_bias_sums == nullptr) return;
    for (int head = task.head_begin; head < task.head_end; head++)
      store_bias_gradient(own_bias_sums + (head - task.head_begin) * bias_size, 1, 0, tiling, head,
                          problem.grad_bias);
  }
};

}  // namespace
}  // namespace vlmfast::cpu::VLMFAST_VARIANT
