// The bias of a window as tiles of queries read it, and its gradient.
#pragma once
#include "cpu/softmax.h"
#include "cpu/window_attention_rows.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {
namespace {

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
void for_each_bias_vector(const WindowTiling& tiling, Body body) {
  for (int t = 0; t < tiling.tiles; t++) {
    const int first = tiling.first_vector(t), end = tiling.first_vector(t + 1);
    for (int v = first; v < end; v++)
      body(v, tiling.bias_tile(first) + (v - first) * kLanes, (end - first) * kLanes);
  }
}

// load(query, key, n) gives n elements of a query's row.
template <class Load>
VLMFAST_INLINE void pack_bias_rows(const WindowTiling& tiling, Load load_keys, float* packed) {
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
  if (tiling.leaves_one)
    for (int key = 0; key < tokens; key += kLanes)
      store(packed + tiling.bias_tiles_size() + key,
            load_keys(tokens - 1, key, minimum(kLanes, tokens - key)));
}

// Packs the biases of a task's heads in log2 units.
VLMFAST_NOINLINE void pack_biases(const WindowBias& bias, const WindowTiling& tiling,
                                  int head_begin, int head_end, float* packed) {
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
                                          const WindowTiling& tiling, int head,
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
    if (tiling.leaves_one)
      for (int key = 0; key < tokens; key += kLanes)
        store_first(out + (tokens - 1) * gradient.query_stride + key,
                    total(tiling.bias_tiles_size() + key), minimum(kLanes, tokens - key));
  });
}

}  // namespace
}  // namespace vlmfast::cpu::VLMFAST_VARIANT
