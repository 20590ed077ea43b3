// Softmax of scores in tiles: their exponentials, and the operands of the products that follow.
// Exponents are in units of log2, so that exp2 needs no further factor.
#pragma once
#include "cpu/simd/math.h"
#include "cpu/tile/elements.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {

// What is added to logits, in units of log2. Finite values stay finite, as torch adds them: a row
// of equal lowest values is uniform, not empty.
VLMFAST_INLINE Vec in_log2_units(Vec raw, float limit) {
  const Vec scaled = min(broadcast(limit), max(broadcast(-limit), raw * broadcast(kLog2E)));
  const Vec magnitude = max(raw, broadcast(0.f) - raw);
  return select_eq(magnitude, broadcast(kInfinity), raw, scaled);
}

// What to subtract from scores whose maximum is `row_max`. Where that is -inf, as nothing is
// visible, it is 0: weights are 0 then, not NaN.
VLMFAST_INLINE Vec shift_of(Vec row_max) {
  return select_eq(row_max, broadcast(-kInfinity), zero(), row_max);
}

// Takes the maxima of further scores into the running ones: `subtracted` is what their exponents
// lose. Returns the factor of what was summed up before.
VLMFAST_INLINE Vec raise_maximum(Vec block_max, Vec* row_max, Vec* subtracted) {
  const Vec old = *row_max;
  *row_max = max(old, block_max);
  *subtracted = shift_of(*row_max);
  return exp2<5>(old - *subtracted);
}

// The logsumexp of scores in units of log2 from their maximum and the log2 of their sum.
VLMFAST_INLINE float natural_logsumexp(float top, float log2_sum) {
  return (float)(((double)top + log2_sum) * kLn2);
}

// Stores row j of the weights or, with bf16 words, rows j and j + 1 joined into words of pairs.
template <class Words, int kGroups>
VLMFAST_INLINE void store_weight(float* rows, int j, int g, Vec first, Vec second) {
#ifdef VLMFAST_BF16_WORDS
  if constexpr (Words::kElements == 2) {
    store(rows + (j / 2 * kGroups + g) * kLanes, interleave(first, second));
    return;
  }
#endif
  store(rows + (j * kGroups + g) * kLanes, first);
}

// The factor that scores still need before exp2. A maximum is a product rounded, which exact
// products exceed or miss by what rounding took: by so much, where logits are huge, that exp2
// overflows or all weights vanish. There scores are multiplied here, rounded as the maximum
// was, and no longer exceed it.
template <int kGroups>
VLMFAST_INLINE float remaining_factor(float* scores, int n, float factor, const Vec* row_max) {
  constexpr float kLarge = 1024.f;  // up to there rounding takes up to 2^-14
  if (factor == 1.f) return factor;
  Vec largest = zero();
  VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
    const Vec size = max(row_max[g], zero() - row_max[g]);
    largest = max(select_eq(size, broadcast(kInfinity), zero(), size), largest);
  }
  if (!(horizontal_max(largest) > kLarge)) return factor;
  for (int i = 0; i < n * kGroups * kLanes; i += kLanes)
    store(scores + i, load(scores + i) * broadcast(factor));
  return 1.f;
}

// scores[row][kGroups * kLanes] become exp2(factor * score - row_max), times `kept` (or nullptr),
// in words of Words; their sums over the rows, before `kept`, are added to `sum`.
template <class Words, int kGroups>
VLMFAST_INLINE void exponentiate(float* scores, int n, float factor, const Vec* row_max, Vec* sum,
                                 const float* kept) {
  const Vec f = broadcast(factor);
  constexpr int kStep = Words::kElements, kWidth = kGroups * kLanes;
  Vec total[kGroups];
  VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) total[g] = zero();
  for (int j = 0; j < n; j += kStep) {
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      Vec p[2] = {zero(), zero()};
      VLMFAST_UNROLL for (int i = 0; i < kStep; i++) {
        if (kStep == 2 && j + i >= n) break;
        const int at = (j + i) * kWidth + g * kLanes;
        p[i] = exp2<Words::kExpDegree>(fms(f, load(scores + at), row_max[g]));
        total[g] = total[g] + p[i];
        if (kept != nullptr) p[i] = p[i] * load(kept + at);
      }
      store_weight<Words, kGroups>(scores, j, g, p[0], p[1]);
    }
  }
  VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) sum[g] = sum[g] + total[g];
}

// Where the scores of all keys of some rows are at hand, neither logsumexp nor output is needed:
// the scores become exp2(factor * score - row_max), `share` the reciprocals of their sums (0 of
// rows that see no key) and `delta` sum(P * dP), P after a dropout whose mask is `keep` (or
// nullptr) and whose scale is `kept_scale`.
template <class Words, int kGroups>
VLMFAST_INLINE void whole_rows(float* scores, const float* grad_scores, const float* keep,
                               float kept_scale, int n, float factor, const Vec* row_max,
                               float* delta, float* share) {
  constexpr int kWidth = kGroups * kLanes;
  const Vec f = broadcast(factor), scale = broadcast(kept_scale);
  Vec shift[kGroups], sum[kGroups], products[kGroups];
  VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
    shift[g] = shift_of(row_max[g]);
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
    const Vec inverse = select_eq(sum[g], zero(), zero(), broadcast(1.f) / sum[g]);
    store(share + g * kLanes, inverse);
    store(delta + g * kLanes, products[g] * inverse);
  }
}

// Beyond this |logsumexp| its rounding to fp32 would show in exp(score - logsumexp), beside the
// rounding of inputs of type T.
template <class T>
constexpr float kImpreciseLogsumexp = sizeof(T) == 4 ? 16.f : 1024.f;

// exp(-logsumexp) as share * exp2(-top). Rows that see nothing get weights of exp2(-inf) = 0. False
// where rounding has taken too much of the logsumexp.
template <class T>
VLMFAST_INLINE bool split_logsumexp(float logsumexp, float* top, float* share) {
  *top = kInfinity;
  *share = 1.f;
  if (logsumexp == -kInfinity) return true;
  *top = logsumexp * kLog2E;
  const float rest = __builtin_fmaf(logsumexp, kLog2E, -*top) + logsumexp * kLog2ELow;
  *share = 1.f - rest * (float)kLn2;
  return !(__builtin_fabsf(logsumexp) > kImpreciseLogsumexp<T>);
}

// Rounds fp32 weights to words of Words, in place; beyond the n there are zeros.
template <class Words>
VLMFAST_INLINE void round_weights(float* weights, int n) {
#ifdef VLMFAST_BF16_WORDS
  if constexpr (Words::kElements == 2)
    for (int j = 0; j < n; j += kLanes) store_bf16(weights + j / 2, load(weights + j));
#endif
}

// Rows j (and j + 1 with bf16 words) of P and dS, the operands of the products of a backward pass.
// With fp32 words `left` gets P and `right` dS; with bf16 words `left` and `grad_left` get them as
// pairs along the queries, and `right` gets dS as pairs along the keys.
template <class Words, int kGroups>
VLMFAST_INLINE void store_gradients(int j, const Vec (&weight)[Words::kElements][kGroups],
                                    const Vec (&grad)[Words::kElements][kGroups], float* left,
                                    float* grad_left, float* right) {
  constexpr int kWidth = kGroups * kLanes;
#ifdef VLMFAST_BF16_WORDS
  if constexpr (Words::kElements == 2) {
    VLMFAST_UNROLL for (int i = 0; i < 2; i++) {
      float *l = left + (j + i) * kWidth / 2, *gl = grad_left + (j + i) * kWidth / 2;
      VLMFAST_UNROLL for (int g = 0; g + 1 < kGroups; g += 2) {
        store_bf16(l + g * kLanes / 2, weight[i][g], weight[i][g + 1]);
        store_bf16(gl + g * kLanes / 2, grad[i][g], grad[i][g + 1]);
      }
      if constexpr (kGroups % 2 == 1) {
        constexpr int g = kGroups - 1;
        store_bf16(l + g * kLanes / 2, weight[i][g]);
        store_bf16(gl + g * kLanes / 2, grad[i][g]);
      }
    }
    VLMFAST_UNROLL for (int g = 0; g < kGroups; g++)
        store(right + (j / 2 * kGroups + g) * kLanes, interleave(grad[0][g], grad[1][g]));
    return;
  }
#endif
  VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
    store(left + j * kWidth + g * kLanes, weight[0][g]);
    store(right + j * kWidth + g * kLanes, grad[0][g]);
  }
}

// P and dS of a block of n keys, which terms(key, at, g, &weight, &grad) gives of vector g at
// scores[at]: written as store_gradients does, and zeros beyond n up to `padded`.
template <class Words, int kGroups, class Terms>
VLMFAST_INLINE void write_gradients(int n, int padded, float* left, float* grad_left, float* right,
                                    Terms terms) {
  constexpr int kRows = Words::kElements;
  for (int j = 0; j < padded; j += kRows) {
    Vec weight[kRows][kGroups], grad[kRows][kGroups];
    VLMFAST_UNROLL for (int i = 0; i < kRows; i++)
        VLMFAST_UNROLL for (int g = 0; g < kGroups; g++) {
      weight[i][g] = grad[i][g] = zero();
      if (j + i < n) terms(j + i, ((j + i) * kGroups + g) * kLanes, g, &weight[i][g], &grad[i][g]);
    }
    store_gradients<Words, kGroups>(j, weight, grad, left, grad_left, right);
  }
}

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
