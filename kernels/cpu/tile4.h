// The tile loop of 4-bit weights, around an instruction set's product of one span.
#pragma once
#include "values.h"

namespace haq {
namespace {

constexpr int kMostRows = 32; // of a tile, of all instruction sets

// Where the groups g and g + 1 of a tile's first row are staged, if g is even. The next row is a chunk further on.
HAQ_TARGET inline const uint8_t* staged_pair(const uint8_t* x, int64_t rows, int64_t g) {
  constexpr uint64_t bytes = kGroup * sizeof(HAQ_STAGED), chunk = kChunk / bytes; // of a group; groups
  const auto group = static_cast<uint64_t>(g);
  return x + group / chunk * static_cast<uint64_t>(rows * kChunk) + group % chunk * bytes;
}

// sums = or += (acc - offset) * scale, for one span and `rows` rows. 0 is added first, so that -0 never results.
HAQ_TARGET inline void add_scaled(const int32_t* __restrict acc, const Tile4& t, int64_t span, bool add) {
  const float* __restrict scale = t.scale + span * t.scale_stride;
  for (int r = 0; r < t.rows; ++r) {
    const int32_t offset = t.offset[r * t.offset_stride + span];
    float* __restrict sums = t.sums + r * kPanel;
    const int32_t* __restrict own = acc + r * kPanel;
    if (add)
      for (int c = 0; c < kPanel; ++c) sums[c] += static_cast<float>(own[c] - offset) * scale[c];
    else
      for (int c = 0; c < kPanel; ++c) sums[c] = 0.0f + static_cast<float>(own[c] - offset) * scale[c];
  }
}

// Product(rows, x, panel, first, last, acc): acc (rows, 32) = the groups [first, last) of the tile and the panel, whose
// weights are still off by 8.
template <auto Product>
HAQ_TARGET void by_spans(const Tile4& t) {
  alignas(64) int32_t acc[kMostRows * kPanel];
  bool add = t.add;
  for (int64_t first = 0, span = 0; first < t.groups; first += t.span) {
    const int64_t last = first + t.span < t.groups ? first + t.span : t.groups;
    Product(t.rows, t.x, t.panel, first, last, acc);
    add_scaled(acc, t, span++, add);
    add = true;
  }
}

} // namespace
} // namespace haq
