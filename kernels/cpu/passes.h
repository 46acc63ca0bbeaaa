// A panel in several passes over its columns, for instruction sets with too few registers for all its sums.
#pragma once
#include "values.h"

namespace haq {
namespace {

constexpr int64_t kBlockGroups = 64; // 8 KiB of weights

// First and Rest are tile loops over `Columns` columns of R rows. Where memory is the limit (Ask), First asks ahead for
// the weights of all columns, which are taken a block of k at a time: Rest then finds them in the nearest cache.
template <int R, int Columns, bool Ask, auto First, auto Rest, class W>
HAQ_TARGET void by_passes(const uint8_t* x, const W* w, int64_t groups, bool add, int32_t* acc) {
  constexpr int64_t x_bytes = R * kGroup * static_cast<int64_t>(sizeof(HAQ_STAGED)); // of a group
  const int64_t block = Ask && Columns < kPanel ? kBlockGroups : groups;
  do { // at least once, so that K = 0 gives zeros
    const int64_t some = groups < block ? groups : block;
    First(x, w, some, add, acc);
    for (int column = Columns; column < kPanel; column += Columns)
      Rest(x, w + column * kGroup, some, add, acc + column);
    x += block * x_bytes;
    w += block * kGroupBytes;
    groups -= block;
    add = true;
  } while (groups > 0);
}

} // namespace
} // namespace haq
