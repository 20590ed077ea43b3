// Where the tokens of a window lie in memory, and how its queries are cut into tiles.
#pragma once
#include "cpu/tile/elements.h"
#include "cpu/tile/scratch.h"
#include "cpu/tiling.h"
#include "cpu/window_attention.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

constexpr int kMaxTile = kMaxGroups * kLanes;
// Sums over keys are made of sums of so many. In a window that is mostly padding most terms are
// equal, and in one long sum their roundings would all go the same way.
constexpr int kRun = 8;
constexpr float kSmallestNorm = 1e-12f;       // of torch.nn.functional.normalize
constexpr float kShortestInverse = 0x1p-32f;  // of norms of rows that are taken as they are

// The tiles of a window's queries; a query left to itself is the last one.
struct WindowTiling : Tiling {
  int tokens, padded_tokens;

  explicit WindowTiling(int tokens)
      : Tiling(tokens, kMaxGroups, true),
        tokens(tokens),
        padded_tokens(round_up(tokens, maximum(kLanes, kRowStep))) {}
  VLMFAST_INLINE int tiled_queries() const { return leaves_one ? tokens - 1 : tokens; }

  // A packed bias holds [key][the tile's vectors * kLanes], tile after tile, and then the last
  // query's row [padded_tokens].
  VLMFAST_INLINE int64_t bias_tile(int first_vector) const {
    return (int64_t)tokens * first_vector * kLanes;
  }
  VLMFAST_INLINE int64_t bias_tiles_size() const { return bias_tile(vectors); }
  VLMFAST_INLINE int64_t bias_size() const {
    return bias_tiles_size() + (leaves_one ? padded_tokens : 0);
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

  void take(Arena* arena, const WindowTiling& tiling) {
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
  VLMFAST_INLINE bool wrapped(int at) const { return at >= padded - shift; }
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
    const float region = rows.wrapped(top + i) ? 2.f : 0.f;
    for (int j = 0; j < problem.window_width; j++, token++) {
      const int x = columns.place(left + j);
      const bool padding = y < 0 || x < 0;
      T** target = window->rows + token * kTensors;
      if (padding) {
        VLMFAST_UNROLL for (int t = 0; t < kTensors; t++) target[t] = maps[t].padding;
      } else {
        VLMFAST_UNROLL for (int t = 0; t < kTensors; t++) target[t] = row[t] + x * stride[t];
      }
      window->regions[token] = region + (columns.wrapped(left + j) ? 1.f : 0.f);
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
  VLMFAST_INLINE WindowPrefetcher(const Window<T, kTensors>& window, const WindowTiling& tiling,
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

}  // namespace
}  // namespace vlmfast::cpu::VLMFAST_VARIANT
