// Contrastive losses by tiles of the logits, which are never held together: forward gives the
// maximum and sum of each row and column in one pass, backward recomputes each tile once, turns it
// into its gradient G and multiplies that out to both sides.
//
// Lanes are rows. A tile is kWidth rows by a panel of kPanel columns. Both towers exceed the
// second-level cache, so that a product takes the feature dimension in parts: a part of a tile's
// rows stays in the first-level cache while all columns of the panel pass by. Sums of parts also
// round less than one long sum.
#include "cpu/contrastive_loss.h"
#include "cpu/simd/math.h"
#include "cpu/tile/pack.h"
#include "cpu/tile/prefetch.h"
#include "cpu/tile/products.h"
#include "cpu/tile/scratch.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

constexpr int kGroups = kMaxGroups;
constexpr int kWidth = kGroups * kLanes;
constexpr int kPanel = 96;
constexpr int kPartWords = 128;  // of a product: 32 KiB of packed rows at most
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

// e^x for x <= 88.
VLMFAST_INLINE Vec exponential(Vec x) { return exp2<5>(x * broadcast(kLog2E)); }

// A maximum as what may be subtracted: that of nothing must not turn -inf into NaN.
VLMFAST_INLINE Vec shift_of(Vec most) {
  return select_eq(most, broadcast(-kInfinity), zero(), most);
}

VLMFAST_INLINE Vec magnitude(Vec x) { return max(zero() - x, x); }

// log(1 + e) for e in [0, 1], also where e is tiny.
VLMFAST_INLINE Vec log1p_of_fraction(Vec e) {
  const Vec s = e / (e + broadcast(2.f)), s2 = s * s;  // log(1 + e) = 2 atanh(s), s <= 1/3
  Vec p = broadcast(2.f / 15);
  p = fma(p, s2, broadcast(2.f / 13));
  p = fma(p, s2, broadcast(2.f / 11));
  p = fma(p, s2, broadcast(2.f / 9));
  p = fma(p, s2, broadcast(2.f / 7));
  p = fma(p, s2, broadcast(2.f / 5));
  p = fma(p, s2, broadcast(2.f / 3));
  return s * fma(p, s2, broadcast(2.f));
}

VLMFAST_INLINE Vec softplus(Vec x) {
  return max(zero(), x) + log1p_of_fraction(exponential(zero() - magnitude(x)));
}

VLMFAST_INLINE Vec sigmoid(Vec x) {
  const Vec e = exponential(zero() - magnitude(x));
  const Vec small = e / (e + broadcast(1.f));  // of the negative one of x and -x
  return select_eq(max(zero(), x), x, broadcast(1.f) - small, small);
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
        const Vec old = load(logits + i), most = max(old, load(one_query + i));
        const Vec index = q == 1 ? zero() : load(query_index + i);
        // The first of equals, and NaN once there is one.
        const Vec stays = select_eq(most, old, index, broadcast((float)q));
        store(query_index + i, select_eq(old, old, stays, index));
        store(logits + i, select_eq(old, old, most, old));
      }
    }
  }
};

template <class Words, class T>
struct Forward : Tiles<Words, T> {
  using Base = Tiles<Words, T>;
  using Base::logits;
  const ContrastiveLossForward& problem;
  float *state, *tile_max, *tile_sum;
  int64_t scratch_size;

  enum { kMax, kSum, kTotal, kPositive, kStates };

  Forward(const ContrastiveLossForward& p, Arena arena) : Base(p, arena), problem(p) {
    state = arena.take(kStates * kWidth * p.tiles_per_block);
    tile_max = arena.take(kPanel);
    tile_sum = arena.take(kPanel);
    scratch_size = arena.used;
  }

  VLMFAST_INLINE float* state_of(int tile, int which, int g) const {
    return state + ((tile * kStates + which) * kGroups + g) * kLanes;
  }

  void begin(int block) const {
    Base::pack_block(block);
    for (int t = 0; t < problem.tiles_per_block; t++)
      for (int which = 0; which < kStates; which++)
        for (int g = 0; g < kGroups; g++)
          store(state_of(t, which, g),
                which == kMax && !problem.sigmoid ? broadcast(-kInfinity) : zero());
  }

  void panel(int block, int index) const {
    const Panel panel = Base::load_panel(index);
    Prefetcher ahead = Base::next_columns(block, index);
    for (int t = 0; t < Base::tile_count(block); t++) {
      const Lanes lanes = Base::lanes(block, t, panel);
      Base::similarities(t, panel, ahead);
      if (Base::is_plain(lanes, panel.n))
        add_tile<false>(lanes, t, panel);
      else
        add_tile<true>(lanes, t, panel);
    }
  }

  template <bool kMasked>
  VLMFAST_NOINLINE void add_tile(const Lanes& lanes, int tile, const Panel& panel) const {
    if (problem.sigmoid) {
      add_softplus<kMasked>(lanes, tile, panel.n);
    } else {
      scale_and_find_maxima<kMasked>(lanes, tile, panel.n);
      add_exponentials(tile, panel.n);
      if (problem.column_max != nullptr) merge_columns(panel);
    }
  }

  // The logit of row `g` and `column`, with total and positive kept up.
  template <bool kMasked>
  VLMFAST_INLINE Vec logit(const Lanes& lanes, int g, int column, Vec* total, Vec* positive) const {
    const Vec x = fma(load(logits + column * kWidth + g * kLanes), broadcast(problem.scale),
                      broadcast(problem.bias));
    if constexpr (kMasked) {
      total[g] = total[g] + lanes.paired(g, column, zero(), x);
      positive[g] = positive[g] + lanes.paired(g, column, x, zero());
    } else {
      total[g] = total[g] + x;
    }
    return x;
  }

  VLMFAST_INLINE void add_state(int tile, int which, const Vec* values) const {
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      float* p = state_of(tile, which, g);
      store(p, load(p) + values[g]);
    }
  }

  template <bool kMasked>
  VLMFAST_INLINE void scale_and_find_maxima(const Lanes& lanes, int tile, int n) const {
    Vec most[kGroups], total[kGroups], positive[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      most[g] = broadcast(-kInfinity);
      total[g] = positive[g] = zero();
    }
    for (int j = 0; j < n; j++) {
      Vec column_most = broadcast(-kInfinity);
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        Vec x = logit<kMasked>(lanes, g, j, total, positive);
        if constexpr (kMasked) {
          const Vec hidden = broadcast(-kInfinity);
          x = lanes.existing(g, lanes.paired(g, j, hidden, x), hidden);
        }
        store(logits + j * kWidth + g * kLanes, x);
        most[g] = max(most[g], x);
        column_most = max(column_most, x);
      }
      tile_max[j] = horizontal_max(column_most);
    }
    add_state(tile, kTotal, total);
    if (kMasked) add_state(tile, kPositive, positive);
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      const Vec old = load(state_of(tile, kMax, g)), now = max(old, most[g]);
      store(state_of(tile, kMax, g), now);
      float* sum = state_of(tile, kSum, g);
      store(sum, load(sum) * exponential(old - shift_of(now)));
    }
  }

  VLMFAST_INLINE void add_exponentials(int tile, int n) const {
    Vec shift[kGroups], sum[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      shift[g] = shift_of(load(state_of(tile, kMax, g)));
      sum[g] = zero();
    }
    const bool columns = problem.column_max != nullptr;
    for (int j = 0; j < n; j++) {
      const Vec column_shift = shift_of(broadcast(tile_max[j]));
      Vec column_sum = zero();
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        const Vec x = load(logits + j * kWidth + g * kLanes);
        sum[g] = sum[g] + exponential(x - shift[g]);
        if (columns) column_sum = column_sum + exponential(x - column_shift);
      }
      if (columns) tile_sum[j] = horizontal_sum(column_sum);
    }
    add_state(tile, kSum, sum);
  }

  VLMFAST_INLINE void merge_columns(const Panel& panel) const {
    float* maxima = problem.column_max + panel.index * kPanel;
    float* sums = problem.column_sum + panel.index * kPanel;
    for (int j = 0; j < panel.n; j += kLanes) {
      const int m = minimum(kLanes, panel.n - j);
      const Vec old = load_first(maxima + j, m), here = load_first(tile_max + j, m);
      const Vec most = max(old, here), shift = shift_of(most);
      const Vec sum = load_first(sums + j, m) * exponential(old - shift) +
                      load_first(tile_sum + j, m) * exponential(here - shift);
      store_first(maxima + j, most, m);
      store_first(sums + j, sum, m);
    }
  }

  template <bool kMasked>
  VLMFAST_INLINE void add_softplus(const Lanes& lanes, int tile, int n) const {
    Vec sum[kGroups], total[kGroups], positive[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) sum[g] = total[g] = positive[g] = zero();
    for (int j = 0; j < n; j++) VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        Vec x = softplus(logit<kMasked>(lanes, g, j, total, positive));
        if constexpr (kMasked) x = lanes.paired(g, j, zero(), x);
        sum[g] = sum[g] + x;
      }
    add_state(tile, kSum, sum);
    add_state(tile, kTotal, total);
    if (kMasked) add_state(tile, kPositive, positive);
  }

  void end(int block) const {
    float* const outputs[kStates] = {problem.row_max, problem.row_sum, problem.row_total,
                                     problem.positive};
    for (int t = 0; t < Base::tile_count(block); t++) {
      const int first = Base::first_row(block, t), count = Base::row_count(block, t);
      for (int which = 0; which < kStates; which++)
        for (int g = 0; g * kLanes < count; g++)
          store_first(outputs[which] + first + g * kLanes, load(state_of(t, which, g)),
                      minimum(kLanes, count - g * kLanes));
    }
  }
};

template <class Words, class T>
struct Backward : Tiles<Words, T> {
  using Base = Tiles<Words, T>;
  using Base::logits;
  using Base::query_index;
  const ContrastiveLossBackward& problem;
  int dim_columns, vectors;
  int64_t row_sums_tile, plain_rows_tile;
  float *column_pairs, *plain_rows, *row_sums, *weights, *left, *state;
  int64_t scratch_size;

  static constexpr bool kPairs = Words::kElements == 2;
  static constexpr int kDepth = kWidth / Words::kElements;  // words along the rows of a tile

  enum { kShift, kOfSum, kOfTotal, kOfPositive, kGradScale, kGradBias, kStates };

  Backward(const ContrastiveLossBackward& p, Arena arena) : Base(p, arena), problem(p) {
    dim_columns = round_up(p.dim, kRowStep);
    vectors = (p.dim + kLanes - 1) / kLanes;
    const int64_t units = (int64_t)p.tiles_per_block * p.queries;
    row_sums_tile = (int64_t)dim_columns * kWidth;
    plain_rows_tile = (int64_t)kDepth * vectors * kLanes;
    column_pairs = kPairs && wants_rows() ? arena.take((int64_t)kPanel / 2 * dim_columns) : nullptr;
    plain_rows = wants_columns() ? arena.take(plain_rows_tile * units) : nullptr;
    row_sums = wants_rows() ? arena.take(row_sums_tile * units) : nullptr;
    const bool in_place = !kPairs && p.queries == 1;
    weights = in_place ? logits : arena.take(kPanel * kDepth);
    left = kPairs ? arena.take(kPanel * kDepth) : weights;
    state = arena.take(kStates * kWidth * p.tiles_per_block);
    scratch_size = arena.used;
  }

  VLMFAST_INLINE bool wants_rows() const { return problem.grad_rows != nullptr; }
  VLMFAST_INLINE bool wants_columns() const { return problem.grad_columns != nullptr; }
  VLMFAST_INLINE float* state_of(int tile, int which, int g) const {
    return state + ((tile * kStates + which) * kGroups + g) * kLanes;
  }

  void begin(int block) const {
    Base::pack_block(block);
    const float* const inputs[] = {problem.row_max, problem.grad_row_sum, problem.grad_row_total,
                                   problem.grad_positive};
    for (int t = 0; t < Base::tile_count(block); t++) {
      const int first = Base::first_row(block, t), count = Base::row_count(block, t);
      for (int which = 0; which < kStates; which++)
        for (int g = 0; g < kGroups; g++) {
          const int n = maximum(0, minimum(kLanes, count - g * kLanes));
          const bool given = which < 4 && inputs[which] != nullptr;
          const Vec x = given ? load_first(inputs[which] + first + g * kLanes, n) : zero();
          store(state_of(t, which, g), which == kShift ? shift_of(x) : x);
        }
      if (wants_rows() && problem.n_columns == 0)
        for (int64_t i = 0; i < problem.queries * row_sums_tile; i += kLanes)
          store(row_sums + t * problem.queries * row_sums_tile + i, zero());
      if (!wants_columns()) continue;
      for (int q = 0; q < problem.queries; q++)
        pack_row_pairs<Words>(Base::rows_of(block, t, q), count, kWidth, problem.dim,
                              vectors * kLanes,
                              plain_rows + (t * problem.queries + q) * plain_rows_tile);
    }
  }

  void panel(int block, int index) const {
    const Panel panel = Base::load_panel(index);
    if (column_pairs != nullptr)
      pack_row_pairs<Words>(Base::columns_of(index), panel.n, round_up(panel.n, kRowStep),
                            problem.dim, dim_columns, column_pairs);
    Prefetcher ahead = Base::next_columns(block, index);
    Prefetcher sums = column_sums_ahead(index);
    for (int t = 0; t < Base::tile_count(block); t++) {
      const Lanes lanes = Base::lanes(block, t, panel);
      Base::similarities(t, panel, t == 0 ? sums : ahead);
      if (Base::is_plain(lanes, panel.n))
        gradients<false>(lanes, t, panel);
      else
        gradients<true>(lanes, t, panel);
      for (int q = 0; q < problem.queries; q++) multiply_out(block, t, q, panel);
    }
  }

  // Requests what the first tile will add to.
  VLMFAST_INLINE Prefetcher column_sums_ahead(int panel) const {
    Prefetcher result;
    if (!wants_columns()) return result;
    const int64_t stride = (int64_t)vectors * kLanes;
    float* first = problem.column_sums + (int64_t)panel * kPanel * stride;
    result.add(Rows<float>{first, stride, 1}, Base::column_count(panel), vectors * kLanes);
    result.spread_over(Base::steps(Base::column_count(panel)));
    return result;
  }

  // Turns the similarities into G, the gradient of the logits.
  template <bool kMasked>
  VLMFAST_NOINLINE void gradients(const Lanes& lanes, int tile, const Panel& panel) const {
    const int n = panel.n;
    const float *of_column_sum = problem.grad_column_sum, *column_max = problem.column_max;
    if (of_column_sum != nullptr) {
      of_column_sum += panel.index * kPanel;
      column_max += panel.index * kPanel;
    }
    const bool of_rows = problem.grad_row_sum != nullptr;
    const Vec scale = broadcast(problem.scale), bias = broadcast(problem.bias);
    Vec grad_scale[kGroups], grad_bias[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) grad_scale[g] = grad_bias[g] = zero();
    for (int j = 0; j < n; j++) {
      Vec of_column = zero(), column_shift = zero();
      if (of_column_sum != nullptr) {
        of_column = broadcast(of_column_sum[j]);
        column_shift = shift_of(broadcast(column_max[j]));
      }
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        float* p = logits + j * kWidth + g * kLanes;
        const Vec similarity = load(p), x = fma(similarity, scale, bias);
        Vec grad = load(state_of(tile, kOfTotal, g));
        const Vec of_row = load(state_of(tile, kOfSum, g));
        if (problem.sigmoid) {
          grad = fma(of_row, sigmoid(x), grad);
        } else {
          if (of_rows) grad = fma(of_row, exponential(x - load(state_of(tile, kShift, g))), grad);
          if (of_column_sum != nullptr) grad = fma(of_column, exponential(x - column_shift), grad);
        }
        if constexpr (kMasked) {
          grad = lanes.paired(g, j, load(state_of(tile, kOfPositive, g)), grad);
          grad = lanes.existing(g, grad, zero());
        }
        grad_scale[g] = fma(grad, similarity, grad_scale[g]);
        grad_bias[g] = grad_bias[g] + grad;
        store(p, grad);
      }
    }
    for (int i = n * kWidth; i < round_up(n, kRowStep) * kWidth; i += kLanes)
      store(logits + i, zero());
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      float *s = state_of(tile, kGradScale, g), *b = state_of(tile, kGradBias, g);
      store(s, load(s) + grad_scale[g]);
      store(b, load(b) + grad_bias[g]);
    }
  }

  // G as the operands of both products: of a query, where it is the one that counts.
  VLMFAST_NOINLINE void to_operands(int query, int n) const {
    constexpr int kRows = Words::kElements;
    for (int j = 0; j < round_up(n, kRowStep); j += kRows) {
      Vec grad[kRows][kGroups];
      VLMFAST_UNROLL for (int i = 0; i < kRows; i++)
          VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
        const int at = (j + i) * kWidth + g * kLanes;
        grad[i][g] = load(logits + at);
        if (query_index != nullptr && j + i < n)
          grad[i][g] =
              select_eq(load(query_index + at), broadcast((float)query), grad[i][g], zero());
      }
#if VLMFAST_LEVEL >= 3
      if constexpr (kPairs) {
        VLMFAST_UNROLL for (int i = 0; i < 2; i++)
            VLMFAST_UNROLL for (int g = 0; g < kGroups; g += 2)
                store(left + (j + i) * kDepth + g * kLanes / 2,
                      (Vec)_mm512_cvtne2ps_pbh(grad[i][g + 1], grad[i][g]));
        VLMFAST_UNROLL for (int g = 0; g < kGroups; g++)
            store(weights + (j / 2 * kGroups + g) * kLanes, interleave(grad[0][g], grad[1][g]));
        continue;
      }
#endif
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++)
          store(weights + j * kWidth + g * kLanes, grad[0][g]);
    }
  }

  void multiply_out(int block, int tile, int query, const Panel& panel) const {
    if (!wants_rows() && !wants_columns()) return;
    const int unit = tile * problem.queries + query, padded = round_up(panel.n, kRowStep);
    if (weights != logits) to_operands(query, panel.n);
    if (wants_rows()) {
      Vec one[kGroups];
      VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) one[g] = broadcast(1.f);
      weighted_sum<Words, kGroups>(weights, kPairs ? column_pairs : panel.columns,
                                   kPairs ? dim_columns : panel.stride, padded / Words::kElements,
                                   dim_columns, row_sums + unit * row_sums_tile,
                                   panel.index == 0 ? nullptr : one);
    }
    if (wants_columns()) {
      const bool is_first = block == 0 && unit == 0;
      float* sums = problem.column_sums + (int64_t)panel.index * kPanel * vectors * kLanes;
      outer_accumulate<Words>(left, kDepth, plain_rows + unit * plain_rows_tile, kDepth, panel.n,
                              is_first, sums, vectors);
    }
  }

  template <class Out>
  void end(int block) const {
    Vec scale[kGroups];
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) scale[g] = broadcast(problem.scale);
    const int64_t row_stride = (int64_t)problem.queries * problem.dim;
    for (int t = 0; t < Base::tile_count(block); t++) {
      const int first = Base::first_row(block, t), count = Base::row_count(block, t);
      for (int g = 0; g * kLanes < count; g++) {
        const int n = minimum(kLanes, count - g * kLanes), at = first + g * kLanes;
        store_first(problem.grad_scale + at, load(state_of(t, kGradScale, g)), n);
        store_first(problem.grad_bias + at, load(state_of(t, kGradBias, g)), n);
      }
      if (!wants_rows()) continue;
      for (int q = 0; q < problem.queries; q++)
        store_transposed<kGroups>(
            row_sums + (t * problem.queries + q) * row_sums_tile, scale,
            Rows<Out>{(Out*)problem.grad_rows + first * row_stride + (int64_t)q * problem.dim,
                      row_stride, 1},
            count, problem.dim);
    }
  }
};

// Runs `body` with the word and element types of the problem.
template <class Body>
VLMFAST_INLINE auto with_types(const ContrastiveLossProblem& problem, Body body) {
  switch (problem.dtype) {
    case ElementType::kFloat:
      return body(Fp32Words(), float());
    case ElementType::kHalf:
      return body(Fp32Words(), Half());
    default:
#if VLMFAST_LEVEL >= 3
      return body(Bf16Words(), BFloat16());
#else
      return body(Fp32Words(), BFloat16());
#endif
  }
}

template <class Body>
VLMFAST_INLINE auto with_forward(const ContrastiveLossForward& problem, float* scratch, Body body) {
  return with_types(problem, [&](auto words, auto element) {
    return body(Forward<decltype(words), decltype(element)>(problem, Arena{scratch}));
  });
}

template <class Body>
VLMFAST_INLINE auto with_backward(const ContrastiveLossBackward& problem, float* scratch,
                                  Body body) {
  return with_types(problem, [&](auto words, auto element) {
    return body(Backward<decltype(words), decltype(element)>(problem, Arena{scratch}), element);
  });
}

int64_t forward_scratch(const ContrastiveLossForward& problem) {
  return with_forward(problem, nullptr, [](const auto& run) { return run.scratch_size; });
}

void forward_begin(const ContrastiveLossForward& problem, int block, float* scratch) {
  with_forward(problem, scratch, [&](const auto& run) { run.begin(block); });
}

void forward_panel(const ContrastiveLossForward& problem, int block, int panel, float* scratch) {
  with_forward(problem, scratch, [&](const auto& run) { run.panel(block, panel); });
}

void forward_end(const ContrastiveLossForward& problem, int block, float* scratch) {
  with_forward(problem, scratch, [&](const auto& run) { run.end(block); });
}

int64_t backward_scratch(const ContrastiveLossBackward& problem) {
  return with_backward(problem, nullptr, [](const auto& run, auto) { return run.scratch_size; });
}

void backward_begin(const ContrastiveLossBackward& problem, int block, float* scratch) {
  with_backward(problem, scratch, [&](const auto& run, auto) { run.begin(block); });
}

void backward_panel(const ContrastiveLossBackward& problem, int block, int panel, float* scratch) {
  with_backward(problem, scratch, [&](const auto& run, auto) { run.panel(block, panel); });
}

void backward_end(const ContrastiveLossBackward& problem, int block, float* scratch) {
  with_backward(problem, scratch, [&](const auto& run, auto element) {
    if (problem.float32_grads)
      run.template end<float>(block);
    else
      run.template end<decltype(element)>(block);
  });
}

template <class Out>
void scale_columns(const ContrastiveLossBackward& problem, int first, int last) {
  const int padded = round_up(problem.dim, kLanes);
  for (int j = first; j < last; j++) {
    const float* sums = problem.column_sums + (int64_t)j * padded;
    Out* out = (Out*)problem.grad_columns + (int64_t)j * problem.dim;
    for (int d = 0; d < problem.dim; d += kLanes)
      store_first(out + d, load(sums + d) * broadcast(problem.scale),
                  minimum(kLanes, problem.dim - d));
  }
}

void store_columns(const ContrastiveLossBackward& problem, int first, int last) {
  with_types(problem, [&](auto, auto element) {
    if (problem.float32_grads)
      scale_columns<float>(problem, first, last);
    else
      scale_columns<decltype(element)>(problem, first, last);
  });
}

}  // namespace

extern const ContrastiveLossKernel contrastive_loss_kernel = {
    forward_scratch, forward_begin, forward_panel, forward_end, backward_scratch, backward_begin,
    backward_panel,  backward_end,  store_columns, kWidth,      kPanel,           kLanes};

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
