// Attention within windows of a map that is shifted and padded by index arithmetic alone.
//
// Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 2021; with
// `logit_scale` "Swin Transformer V2: Scaling Up Capacity and Resolution", 2022. A task gathers the
// rows of a window by their addresses, head after head, and scatters results the same way. All keys
// of a window form one block, so that softmax needs no second look. Everything is computed in units
// of log2, so that exp2 needs no further factor.
#include "cpu/softmax.h"
#include "cpu/tile/dropout.h"
#include "cpu/tile/pack.h"
#include "cpu/tile/prefetch.h"
#include "cpu/tile/products.h"
#include "cpu/tile/scratch.h"
#include "cpu/window_attention.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

constexpr int kMaxTile = kMaxGroups * kLanes;
// Sums over keys are made of sums of so many. In a window that is mostly padding most terms are
// equal, and in one long sum their roundings would all go the same way.
constexpr int kRun = 8;
constexpr float kSmallestNorm = 1e-12f;       // of torch.nn.functional.normalize
constexpr float kShortestInverse = 0x1p-32f;  // of norms of rows that are taken as they are

// How the queries of a window are spread over the lanes: in tiles of nearly equal size, and a last
// one, which would have a vector to itself, apart (7 x 7 = 3 x 16 + 1).
struct Tiling {
  int tokens, vectors, tiles, padded_tokens;
  bool has_last;

  explicit Tiling(int tokens)
      : tokens(tokens),
        vectors((tokens + kLanes - 1) / kLanes),
        padded_tokens(round_up(tokens, maximum(kLanes, kRowStep))),
        has_last(tokens % kLanes == 1) {
    if (has_last) vectors--;
    tiles = (vectors + kMaxGroups - 1) / kMaxGroups;
  }
  VLMFAST_INLINE int first_vector(int tile) const { return vectors * tile / tiles; }
  VLMFAST_INLINE int tiled_queries() const { return has_last ? tokens - 1 : tokens; }

  // A packed bias holds [key][the tile's vectors * kLanes], tile after tile, and then the last
  // query's row [padded_tokens].
  VLMFAST_INLINE int64_t bias_tile(int first_vector) const {
    return (int64_t)tokens * first_vector * kLanes;
  }
  VLMFAST_INLINE int64_t bias_tiles_size() const { return bias_tile(vectors); }
  VLMFAST_INLINE int64_t bias_size() const {
    return bias_tiles_size() + (has_last ? padded_tokens : 0);
  }
};

// Where the tokens of one window lie, and in which region of the map.
template <class T, int kTensors>
struct Window {
  T** rows;        // [tokens][kTensors]
  float* regions;  // [padded_tokens]
  bool wraps;
  bool* is_padding;  // [tokens]

  static constexpr int kFloatsPerPointer = (sizeof(T*) + sizeof(float) - 1) / sizeof(float);

  void take(Arena* arena, const Tiling& tiling) {
    rows = (T**)arena->take((int64_t)tiling.tokens * kTensors * kFloatsPerPointer);
    regions = arena->take(tiling.padded_tokens);
    is_padding = (bool*)arena->take(tiling.tokens);
  }

  // A tensor's rows from a token on, each from a column on.
  VLMFAST_INLINE ScatteredRows<T, kTensors> of(int tensor, int column, int token = 0) const {
    return {rows + token * kTensors + tensor, column};
  }
};

// One side of the map: where the place `at` of the shifted, padded map lies, or -1 for padding.
struct Side {
  int size, padded, shift;
  bool wrap_padded;

  Side(int size, int windows, int window, int shift, bool wrap_padded)
      : size(size), padded(windows * window), shift(shift), wrap_padded(wrap_padded) {}
  VLMFAST_INLINE int place(int at) const {
    if (wrap_padded) {
      at += shift;
      if (at >= padded) at -= padded;
      return at < size ? at : -1;
    }
    return at < size ? (at + shift) % size : -1;
  }
  VLMFAST_INLINE bool came_round(int at) const { return at >= padded - shift; }
};

// A tensor (B, H, W, C) and the row that stands for it where there is padding.
template <class T>
struct Map {
  Strided tensor;
  T* padding;
};

template <class T, int kTensors>
VLMFAST_NOINLINE void locate(const WindowAttentionProblem& problem, int64_t index,
                             const Map<T> (&maps)[kTensors], Window<T, kTensors>* window) {
  const int64_t windows = (int64_t)problem.windows_down * problem.windows_across;
  const int64_t image = index / windows, at = index % windows;
  const int down = (int)(at / problem.windows_across);
  const int across = (int)(at % problem.windows_across);
  const Side rows(problem.height, problem.windows_down, problem.window_height, problem.shift_height,
                  problem.wrap_padded);
  const Side columns(problem.width, problem.windows_across, problem.window_width,
                     problem.shift_width, problem.wrap_padded);
  const int top = down * problem.window_height, left = across * problem.window_width;
  window->wraps = (problem.shift_height > 0 && down == problem.windows_down - 1) ||
                  (problem.shift_width > 0 && across == problem.windows_across - 1);
  int64_t stride[kTensors];
  VLMFAST_UNROLL for (int t = 0; t < kTensors; t++) stride[t] = maps[t].tensor.stride[2];
  int token = 0;
  for (int i = 0; i < problem.window_height; i++) {
    const int y = rows.place(top + i);
    T* row[kTensors];
    VLMFAST_UNROLL for (int t = 0; t < kTensors; t++) row[t] =
        maps[t].tensor.template at<T>(image, y < 0 ? 0 : y, 0);
    const float region = rows.came_round(top + i) ? 2.f : 0.f;
    for (int j = 0; j < problem.window_width; j++, token++) {
      const int x = columns.place(left + j);
      const bool padding = y < 0 || x < 0;
      T** target = window->rows + token * kTensors;
      if (padding) {
        VLMFAST_UNROLL for (int t = 0; t < kTensors; t++) target[t] = maps[t].padding;
      } else {
        VLMFAST_UNROLL for (int t = 0; t < kTensors; t++) target[t] = row[t] + x * stride[t];
      }
      window->regions[token] = region + (columns.came_round(left + j) ? 1.f : 0.f);
      window->is_padding[token] = padding;
    }
  }
  for (; token % kLanes != 0; token++) window->regions[token] = 0.f;
}

// Asks for the rows of the next window, a few at a time between other work: the hardware does not
// foresee them, also where a cache holds them. It goes token by token, because in a packed
// projection a token's query, key and value are neighbours, and so are tokens.
class WindowPrefetcher {
 public:
  // Of each row `columns` columns from `column` on; spread over `products` products of all queries
  // and keys.
  template <class T, int kTensors>
  VLMFAST_INLINE WindowPrefetcher(const Window<T, kTensors>& window, const Tiling& tiling,
                                  int column, int columns, int products, int words)
      : row_((const char* const*)window.rows),
        end_(row_ + (int64_t)tiling.tokens * kTensors),
        first_(column * (int64_t)sizeof(T)),
        last_(first_ + columns * (int64_t)sizeof(T) - 1),
        at_(first_) {
    parts_ = (end_ - row_) * ((last_ - first_) / kPart + 1);
    steps_ = (int64_t)products * tiling.tiles * (tiling.tokens / kRowStep) * (words / kWordStep);
    if (steps_ < 1) steps_ = 1;
  }

  VLMFAST_INLINE void step() {
    for (due_ += parts_; due_ > 0 && row_ < end_; due_ -= steps_) {
      const char* row = *row_;
      const int64_t end = at_ + kPart;
      for (; at_ < end && at_ <= last_; at_ += 64) __builtin_prefetch(row + at_);
      if (at_ <= last_) continue;
      at_ = first_;
      row_++;
    }
  }

 private:
  static constexpr int64_t kPart = 512;  // bytes: more requests at once would stall the core
  const char *const *row_, *const *end_;
  int64_t first_, last_, at_;
  int64_t parts_, steps_, due_ = 0;
};

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
      Vec most = zero();
      for (int d = 0; d < columns; d += kLanes) {
        const Vec x = load_first(from + d, minimum(kLanes, columns - d));
        most = max(most, max(x, zero() - x));
      }
      factors[i] = factor(horizontal_max(most));
      pointers[i * kStep] = to;
      for (int d = 0; d < columns; d += kLanes) {
        const int n = minimum(kLanes, columns - d);
        store_first(to + d, load_first(from + d, n) * broadcast(factors[i]), n);
      }
    }
    return {pointers, 0};
  }

 private:
  static VLMFAST_INLINE float factor(float most) {
    uint32_t bits;
    __builtin_memcpy(&bits, &most, sizeof bits);
    bits = (uint32_t)minimum(127, maximum(1, 255 - (int)(bits >> 23))) << 23;
    __builtin_memcpy(&most, &bits, sizeof bits);
    return most;
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

// These and the inverse norms; where some are too long, `rows` and `packed` become shrunk copies.
// Gives whether they did.
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

template <int kValue>
struct Count {
  static constexpr int kCount = kValue;
};

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
  const Tiling& tiling;
  const float* keys;         // pack_rows
  const float* key_factors;  // inverse norms, or nullptr
  int words;
  const float* bias;     // packed, or nullptr
  const float* regions;  // nullptr where the window does not wrap
  float mask;

  // logits[key][lane] for the tile's queries from the vector `first` on, and their maxima.
  template <int kGroups>
  VLMFAST_INLINE void tile(const float* query, int first, const Vec* factor, float* logits,
                           Vec* most, WindowPrefetcher& ahead) const {
    with_rows<kGroups>(tiling.tokens, [&](auto rows) VLMFAST_INLINE_LAMBDA {
      constexpr int kRows = decltype(rows)::kCount;
      if (bias != nullptr && key_factors == nullptr && regions == nullptr)
        tile<kGroups, kRows, true>(query, first, factor, logits, most, ahead);
      else
        tile<kGroups, kRows, false>(query, first, factor, logits, most, ahead);
    });
  }

  // kPlain: a bias, and neither cosines nor regions.
  template <int kGroups, int kRows, bool kPlain>
  VLMFAST_NOINLINE void tile(const float* query, int first, const Vec* factor, float* logits,
                             Vec* most, WindowPrefetcher& ahead) const {
    const int n = tiling.tokens;
    const float* added = bias == nullptr ? nullptr : bias + tiling.bias_tile(first);
    Vec top[kGroups];  // in registers, which `most` cannot be
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
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) most[g] = top[g];
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
VLMFAST_INLINE float exponentiate_row(float* logits, int n, float* most) {
  Vec top = broadcast(-kInfinity), sum = zero();
  for (int j = 0; j < n; j += kLanes) top = max(top, load(logits + j));
  *most = horizontal_max(top);
  for (int j = 0; j < n; j += kLanes) {
    const Vec p = exp2<Words::kExpDegree>(load(logits + j) - broadcast(*most));
    sum = sum + p;
    store(logits + j, p);
  }
  return horizontal_sum(sum);
}

// Calls body(Count<groups>()) for a tile of that many vectors.
template <class Body>
VLMFAST_INLINE void with_groups(int groups, Body body) {
  switch (groups) {
    case 1:
      return body(Count<1>());
    case 2:
      return body(Count<2>());
#if VLMFAST_LEVEL >= 1
    case 3:
      return body(Count<3>());
#endif
#if VLMFAST_LEVEL >= 2
    case 4:
      return body(Count<4>());
#endif
  }
}

// Runs `body` with the element type of a bias.
template <class Body>
VLMFAST_INLINE void with_element(ElementType dtype, Body body) {
  switch (dtype) {
    case ElementType::kFloat:
      return body(float());
    case ElementType::kHalf:
      return body(Half());
    default:
      return body(BFloat16());
  }
}

// Calls body(vector, at, stride) for every vector of queries in a tile: there a packed bias holds
// the row of key j at `at` + j * stride.
template <class Body>
void for_each_bias_vector(const Tiling& tiling, Body body) {
  for (int t = 0; t < tiling.tiles; t++) {
    const int first = tiling.first_vector(t), end = tiling.first_vector(t + 1);
    for (int v = first; v < end; v++)
      body(v, tiling.bias_tile(first) + (v - first) * kLanes, (end - first) * kLanes);
  }
}

// load(query, key, n) gives n elements of a query's row.
template <class Load>
VLMFAST_INLINE void pack_bias_rows(const Tiling& tiling, Load load_keys, float* packed) {
  const int tokens = tiling.tokens;
  for_each_bias_vector(tiling, [&](int v, int64_t at, int stride) {
    const int queries = minimum(kLanes, tokens - v * kLanes);
    for (int key = 0; key < tokens; key += kLanes) {
      const int n = minimum(kLanes, tokens - key);
      Vec r[kLanes];
      VLMFAST_UNROLL for (int i = 0; i < kLanes; i++) r[i] =
          i < queries ? load_keys(v * kLanes + i, key, n) : zero();
      transpose(r);
      float* target = packed + at + (int64_t)key * stride;
      VLMFAST_UNROLL for (int i = 0; i < kLanes; i++) if (i < n) store(target + i * stride, r[i]);
    }
  });
  if (tiling.has_last)
    for (int key = 0; key < tokens; key += kLanes)
      store(packed + tiling.bias_tiles_size() + key,
            load_keys(tokens - 1, key, minimum(kLanes, tokens - key)));
}

// Packs the biases of a task's heads in log2 units.
VLMFAST_NOINLINE void pack_biases(const WindowBias& bias, const Tiling& tiling, int head_begin,
                                  int head_end, float* packed) {
  const int64_t size = tiling.bias_size();
  with_element(bias.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr float kMost = 1.5e38f;  // to which a mask of -1e38 may be added
    const int64_t query_stride = bias.query_stride, key_stride = bias.key_stride;
    const uintptr_t ahead = kLanes * query_stride * sizeof(T);
    for (int head = head_begin; head < head_end; head++, packed += size) {
      const T* base = static_cast<const T*>(bias.data) + head * bias.head_stride;
      if (key_stride == 1)
        pack_bias_rows(
            tiling,
            [=](int query, int key, int n) VLMFAST_INLINE_LAMBDA {
              const T* p = base + query * query_stride + key;
              // For the next vector of queries; maybe beyond the end, where no pointer may point.
              __builtin_prefetch((const void*)((uintptr_t)p + ahead));
              return in_log2_units(load_first(p, n), kMost);
            },
            packed);
      else
        pack_bias_rows(
            tiling,
            [=](int query, int key, int n) VLMFAST_INLINE_LAMBDA {
              const T* p = base + query * query_stride + key * key_stride;
              return in_log2_units(gather_words<Fp32Words>(p, key_stride, n), kMost);
            },
            packed);
    }
  });
}

// The gradient of a head's bias from its partial sums, which lie `split_stride` apart.
VLMFAST_NOINLINE void store_bias_gradient(const float* partial, int splits, int64_t split_stride,
                                          const Tiling& tiling, int head,
                                          const WindowBias& gradient) {
  with_element(gradient.dtype, [&](auto element) {
    using T = decltype(element);
    const int tokens = tiling.tokens;
    const auto total = [&](int64_t at) {
      Vec sum = load(partial + at);
      for (int split = 1; split < splits; split++)
        sum = sum + load(partial + split * split_stride + at);
      return sum;
    };
    T* out = static_cast<T*>(gradient.data) + head * gradient.head_stride;
    for_each_bias_vector(tiling, [&](int v, int64_t at, int stride) {
      const int queries = minimum(kLanes, tiling.tiled_queries() - v * kLanes);
      for (int key = 0; key < tokens; key += kLanes) {
        const int n = minimum(kLanes, tokens - key);
        Vec r[kLanes];
        VLMFAST_UNROLL for (int i = 0; i < kLanes; i++) r[i] =
            i < n ? total(at + (int64_t)(key + i) * stride) : zero();
        transpose(r);
        for (int i = 0; i < queries; i++)
          store_first(out + (v * kLanes + i) * gradient.query_stride + key, r[i], n);
      }
    });
    if (tiling.has_last)
      for (int key = 0; key < tokens; key += kLanes)
        store_first(out + (tokens - 1) * gradient.query_stride + key,
                    total(tiling.bias_tiles_size() + key), minimum(kLanes, tokens - key));
  });
}

template <class Words, class T>
struct Forward {
  enum Tensors { kQuery, kKey, kValue, kOut, kTensors };
  const WindowAttentionForward& problem;
  Tiling tiling;
  int words, value_columns, row_words;
  float *biases, *keys, *values, *key_factors, *query, *scores, *keep, *sums, *row, *row_scores;
  mutable Window<T, kTensors> windows[2];
  ShrunkRows<T, kTensors> key_copies, query_copies;  // where there are cosines
  T* sink;
  int64_t scratch_size;

  Forward(const WindowAttentionForward& p, float* scratch)
      : problem(p), tiling(p.window_height * p.window_width) {
    words = word_count<Words>(p.head_dim);
    value_columns = round_up(p.head_dim, kRowStep);
    row_words = round_up(words, kLanes);
    Arena arena{scratch};
    const int64_t padded = tiling.padded_tokens;
    biases = p.bias.data == nullptr ? nullptr : arena.take(p.heads_per_task * tiling.bias_size());
    keys = arena.take(padded * words);
    values = arena.take(padded / Words::kElements * value_columns + kLanes);
    key_factors = p.logit_scale == nullptr ? nullptr : arena.take(padded);
    query = arena.take((int64_t)row_words * kMaxTile);
    scores = arena.take(padded * kMaxTile);
    keep = p.dropout_p > 0 ? arena.take(padded * kMaxTile) : nullptr;
    sums = arena.take((int64_t)value_columns * kMaxTile);
    row = arena.take(maximum(row_words, round_up(p.head_dim, kLanes)));
    row_scores = arena.take(padded);
    sink = (T*)arena.take((int64_t)p.heads * p.head_dim);
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
    const Map<T> maps[kTensors] = {{problem.query, pad},
                                   {problem.key, pad + channels},
                                   {problem.value, pad + 2 * channels},
                                   {problem.out, sink}};
    locate(problem, index, maps, window);
  }

  template <int kGroups>
  VLMFAST_NOINLINE void tile(const Window<T, kTensors>& window, const Logits<Words>& logits,
                             int head, int first, uint32_t dropout_row, float* logsumexp,
                             WindowPrefetcher& ahead) const {
    constexpr int kWidth = kGroups * kLanes;
    const int column = head * problem.head_dim, n = tiling.tokens;
    const int first_query = first * kLanes,
              count = minimum(kWidth, tiling.tiled_queries() - first_query);
    auto rows = window.of(kQuery, column, first_query);
    pack_transposed<Words, kGroups>(rows, count, problem.head_dim, 1.f, query);
    Vec factor[kGroups], most[kGroups], sum[kGroups];
    if (problem.logit_scale == nullptr) {
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) factor[g] =
          broadcast(problem.scale * kLog2E);
    } else {
      Vec square[kGroups];
      norms_of_queries<Words, kGroups>(&rows, count, problem.head_dim, words, query_copies, query,
                                       square, factor);
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) factor[g] =
          factor[g] * broadcast(problem.logit_scale[head] * kLog2E);
    }
    logits.template tile<kGroups>(query, first, factor, scores, most, ahead);
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) sum[g] = zero();
    if (keep != nullptr)
      philox(problem.dropout_p, problem.dropout_seed)
          .keep(0, n, first_query, kWidth, dropout_row, keep);
    // Pairs of rows become one, so that runs of them would leave gaps; their sums may be rougher.
    const int step = Words::kElements == 1 ? kRun : n;
    for (int j = 0; j < n; j += step) {
      const int run = minimum(step, n - j);
      if (keep != nullptr)
        exponentiate<Words, kGroups>(scores + j * kWidth, run, 1.f, most, sum, keep + j * kWidth);
      else
        exponentiate<Words, kGroups>(scores + j * kWidth, run, 1.f, most, sum, nullptr);
    }
    weighted_sum<Words, kGroups>(scores, values, value_columns,
                                 (n + Words::kElements - 1) / Words::kElements, value_columns, sums,
                                 nullptr);
    const Vec kept = broadcast(kept_scale(problem.dropout_p));
    float logs[kWidth], tops[kWidth];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      factor[g] = kept / sum[g];
      store(logs + g * kLanes, sum[g]);
      store(tops + g * kLanes, most[g]);
    }
    log2_in_place(logs, kWidth);
    for (int i = 0; i < count; i++) logsumexp[first_query + i] = (tops[i] + logs[i]) * (float)kLn2;
    const auto target = window.of(kOut, column, first_query);
    store_transposed<kGroups>(sums, factor, target, count, problem.head_dim);
  }

  VLMFAST_NOINLINE void last_query(const Window<T, kTensors>& window, const Logits<Words>& logits,
                                   int head, uint32_t dropout_row, float* logsumexp) const {
    const int column = head * problem.head_dim, n = tiling.tokens, q = n - 1;
    auto rows = window.of(kQuery, column, q);
    pack_rows<Words>(rows, 1, 1, problem.head_dim, row_words, row);
    float factor = problem.scale * kLog2E;
    if (problem.logit_scale != nullptr) {
      float norm[kLanes];
      norms_of_rows<Words>(&rows, 1, problem.head_dim, row_words, query_copies, row, norm);
      factor = norm[0] * problem.logit_scale[head] * kLog2E;
    }
    logits.last(row, factor, row_scores);
    float most, sum = exponentiate_row<Words>(row_scores, n, &most);
    if (keep != nullptr) {
      philox(problem.dropout_p, problem.dropout_seed).keep(0, n, q, 1, dropout_row, keep);
      for (int j = 0; j < n; j++) row_scores[j] *= keep[j];
    }
    round_weights<Words>(row_scores, n);
    combine_rows<Words>(row_scores, values, value_columns,
                        (n + Words::kElements - 1) / Words::kElements, problem.head_dim, row);
    T* out = window.of(kOut, column, q).row(0);
    const Vec scaled = broadcast(kept_scale(problem.dropout_p) / sum);
    for (int d = 0; d < problem.head_dim; d += kLanes)
      store_first(out + d, scaled * load(row + d), minimum(kLanes, problem.head_dim - d));
    log2_in_place(&sum, 1);
    logsumexp[q] = (most + sum) * (float)kLn2;
  }

  void run_head(const Window<T, kTensors>& window, int64_t index, int head, const float* bias,
                WindowPrefetcher& ahead) const {
    const int column = head * problem.head_dim, n = tiling.tokens;
    auto key_rows = window.of(kKey, column);
    pack_rows<Words>(key_rows, n, tiling.padded_tokens, problem.head_dim, words, keys);
    pack_row_pairs<Words>(window.of(kValue, column), n, round_up(n, Words::kElements),
                          problem.head_dim, value_columns, values);
    if (key_factors != nullptr)
      norms_of_rows<Words>(&key_rows, n, problem.head_dim, words, key_copies, keys, key_factors);
    const Logits<Words> logits{tiling,      keys, key_factors,
                               words,       bias, window.wraps ? window.regions : nullptr,
                               problem.mask};
    const int64_t at = index * problem.heads + head;
    float* logsumexp = problem.logsumexp + at * n;
    for (int t = 0; t < tiling.tiles; t++) {
      const int first = tiling.first_vector(t);
      with_groups(tiling.first_vector(t + 1) - first, [&](auto groups) VLMFAST_INLINE_LAMBDA {
        tile<decltype(groups)::kCount>(window, logits, head, first, (uint32_t)at, logsumexp, ahead);
      });
    }
    if (tiling.has_last) last_query(window, logits, head, (uint32_t)at, logsumexp);
  }

  void run(const WindowAttentionTask& task, const WindowAttentionTask& next,
           bool has_biases) const {
    Window<T, kTensors>*window = windows, *following = windows + 1;
    locate_window(task.window_begin, window);
    if (biases != nullptr && !has_biases)
      pack_biases(problem.bias, tiling, task.head_begin, task.head_end, biases);
    for (int64_t index = task.window_begin; index < task.window_end; index++) {
      const bool is_last = index + 1 == task.window_end;
      const WindowAttentionTask& upcoming = is_last ? next : task;
      locate_window(is_last ? next.window_begin : index + 1, following);
      const int column = upcoming.head_begin * problem.head_dim;
      const int columns = (upcoming.head_end - upcoming.head_begin) * problem.head_dim;
      WindowPrefetcher ahead(*following, tiling, column, columns, task.head_end - task.head_begin,
                             words);
      for (int head = task.head_begin; head < task.head_end; head++) {
        const int64_t at = (head - task.head_begin) * tiling.bias_size();
        run_head(*window, index, head, biases == nullptr ? nullptr : biases + at, ahead);
      }
      Window<T, kTensors>* free = window;
      window = following;
      following = free;
    }
  }
};

template <class Words, class T>
struct Backward {
  enum Tensors { kQuery, kKey, kValue, kGradOut, kGradQuery, kGradKey, kGradValue, kTensors };
  static constexpr bool kPairs = Words::kElements == 2;
  const WindowAttentionBackward& problem;
  Tiling tiling;
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
  VLMFAST_NOINLINE void gradients(const Vec* most, const Vec* query_factor, float* grad_bias,
                                  bool is_first) const {
    constexpr int kWidth = kGroups * kLanes, kRows = Words::kElements;
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
          const Vec p = exp2<Words::kExpDegree>(load(scores + at) - most[g]);
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
    for (int j = 0; j < n; j += kRows) {
      Vec weight[kRows][kGroups], grad[kRows][kGroups];
      VLMFAST_UNROLL for (int i = 0; i < kRows; i++)
          VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        const int at = (j + i) * kWidth + g * kLanes;
        weight[i][g] = grad[i][g] = zero();
        if (kRows == 1 || j + i < n) {
          weight[i][g] = load(scores + at) * sum[g];
          grad[i][g] = weight[i][g] * (load(grad_scores + at) - delta[g]);
          if (grad_bias != nullptr) add_to(grad_bias + at, is_first, grad[i][g]);
          if (!kPlain && keep != nullptr)
            weight[i][g] = weight[i][g] * (load(keep + at) * kept_factor);
          if (!kPlain && key_factors != nullptr)
            grad[i][g] = grad[i][g] * (query_factor[g] * broadcast(key_factors[j + i]));
        }
      }
      store_gradients<Words, kGroups>(j, weight, grad, left, grad_left, grad_scores);
    }
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
    Vec factor[kGroups], inverse[kGroups], square[kGroups], most[kGroups];
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
    logits.template tile<kGroups>(query, first, factor, scores, most, ahead);
    with_rows<kGroups>(n, [&](auto rows) VLMFAST_INLINE_LAMBDA {
      multiply_rows<Words, kGroups, decltype(rows)::kCount>(grad_out, values, words, words, n,
                                                            grad_scores, nullptr, ahead);
    });
    if (keep != nullptr)
      philox(problem.dropout_p, problem.dropout_seed)
          .keep(0, n, first_query, kWidth, dropout_row, keep);
    float* grad_bias_tile = grad_bias == nullptr ? nullptr : grad_bias + tiling.bias_tile(first);
    if (keep == nullptr && key_factors == nullptr)
      gradients<kGroups, true>(most, inverse, grad_bias_tile, is_first);
    else
      gradients<kGroups, false>(most, inverse, grad_bias_tile, is_first);
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
  // them in which most cancels out: it wants runs.
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
#if VLMFAST_LEVEL >= 3
        if constexpr (kPairs) {
          const __m512i bits = _mm512_castps_si512(x);
          body(2 * w, g, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
          body(2 * w + 1, g,
               _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000))));
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
    float most;
    const float normalise = 1.f / exponentiate_row<Words>(row_scores, n, &most);
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
    if (tiling.has_last)
      last_query(window, logits, head, at, grad_bias, is_first, &grad_logit_scale);
    for (int t = 0; t < tiling.tiles; t++) {
      const int first = tiling.first_vector(t);
      with_groups(tiling.first_vector(t + 1) - first, [&](auto groups) VLMFAST_INLINE_LAMBDA {
        tile<decltype(groups)::kCount>(window, logits, head, first, at, t == 0 && !tiling.has_last,
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

int64_t bias_size(int tokens) { return Tiling(tokens).bias_size(); }

void sum_bias(const WindowAttentionBackward& problem, int splits, int head) {
  const Tiling tiling(problem.window_height * problem.window_width);
  store_bias_gradient(problem.bias_sums + head * tiling.bias_size(), splits,
                      problem.heads * tiling.bias_size(), tiling, head, problem.grad_bias);
}

int64_t forward_scratch(const WindowAttentionForward& problem) {
  return with_types(problem.dtype, [&](auto words, auto element) {
    return Forward<decltype(words), decltype(element)>(problem, nullptr).scratch_size;
  });
}

void forward(const WindowAttentionForward& problem, const WindowAttentionTask& task,
             const WindowAttentionTask& next, bool has_biases, float* scratch) {
  with_types(problem.dtype, [&](auto words, auto element) {
    Forward<decltype(words), decltype(element)>(problem, scratch).run(task, next, has_biases);
  });
}

int64_t backward_scratch(const WindowAttentionBackward& problem) {
  return with_types(problem.dtype, [&](auto words, auto element) {
    return Backward<decltype(words), decltype(element)>(problem, nullptr).scratch_size;
  });
}

void backward(const WindowAttentionBackward& problem, const WindowAttentionTask& task,
              const WindowAttentionTask& next, bool has_biases, float* scratch) {
  with_types(problem.dtype, [&](auto words, auto element) {
    Backward<decltype(words), decltype(element)>(problem, scratch).run(task, next, has_biases);
  });
}

}  // namespace

extern const WindowAttentionKernel window_attention_kernel = {
    bias_size, forward_scratch, forward, backward_scratch, backward, sum_bias};

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
