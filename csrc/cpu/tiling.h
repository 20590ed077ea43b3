// How queries are cut into tiles.
#pragma once
#include "cpu/tile/elements.h"

namespace vlmfast::cpu::VLMFAST_VARIANT {

// Tiles are of nearly equal size: a short last one would use few lanes and few accumulators. A
// single query beyond whole vectors (257 = 16 * 16 + 1, as vision transformers have, or 7 * 7 =
// 3 * 16 + 1, as windows have) may be left to itself, instead of taking a vector.
struct Tiling {
  int vectors, tiles;
  bool leaves_one;

  Tiling(int queries, int max_groups, bool may_leave_one)
      : vectors((queries + kLanes - 1) / kLanes),
        leaves_one(may_leave_one && queries % kLanes == 1) {
    if (leaves_one) vectors--;
    tiles = (vectors + max_groups - 1) / max_groups;
  }
  VLMFAST_INLINE int first_vector(int tile) const { return (int)((int64_t)vectors * tile / tiles); }
};

}  // namespace vlmfast::cpu::VLMFAST_VARIANT
