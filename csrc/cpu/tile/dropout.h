// Which weights dropout keeps.
#pragma once
#include "cpu/tile/elements.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {

// Dropout without state: out[row][lane], for keys row0 .. row0 + n_rows - 1 and queries lane0 ..
// lane0 + lanes - 1, is 1 where word key % 4 of philox4x32-10 at counter (key / 4, query, head, 0)
// reaches `threshold`, else 0. (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// 2011.)
struct Philox {
  uint32_t seed_low, seed_high, threshold;

  VLMFAST_INLINE void keep(int row0, int n_rows, int lane0, int lanes, uint32_t head,
                           float* out) const {
    for (int block = row0 / 4; block * 4 < row0 + n_rows; block++) {
      float kept[4][kMaxGroups * kLanes];
      for (int lane = 0; lane < lanes; lane++) {
        uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(lane0 + lane), c2 = head, c3 = 0;
        uint32_t k0 = seed_low, k1 = seed_high;
        VLMFAST_UNROLL for (int round = 0; round < 10; round++) {
          const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
          c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
          c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
          c1 = (uint32_t)p1;
          c3 = (uint32_t)p0;
          k0 += 0x9E3779B9u;
          k1 += 0xBB67AE85u;
        }
        kept[0][lane] = c0 >= threshold ? 1.f : 0.f;
        kept[1][lane] = c1 >= threshold ? 1.f : 0.f;
        kept[2][lane] = c2 >= threshold ? 1.f : 0.f;
        kept[3][lane] = c3 >= threshold ? 1.f : 0.f;
      }
      for (int i = 0; i < 4; i++) {
        const int row = block * 4 + i - row0;
        if (row >= 0 && row < n_rows)
          for (int lane = 0; lane < lanes; lane++) out[row * lanes + lane] = kept[i][lane];
      }
    }
  }
};

VLMFAST_INLINE Philox philox(double dropout_p, uint64_t seed) {
  const double threshold = dropout_p * 4294967296.0;
  return Philox{(uint32_t)seed, (uint32_t)(seed >> 32),
                threshold >= 4294967295.0 ? 4294967295u : (uint32_t)threshold};
}

// What the weights that dropout keeps are multiplied by.
VLMFAST_INLINE float kept_scale(double dropout_p) {
  return dropout_p >= 1 ? 0.f : (float)(1 / (1 - dropout_p));
}

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
