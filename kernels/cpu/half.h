// Dot products of a float32 row with weights kept in 16 bits, which widen exactly: the head at decode, where reading
// the weights is all the time it takes. Included through instruction_set.h; `Vec` is the chunk header's.
#pragma once
#include "values.h"

namespace haq {
namespace {

constexpr int kDots = 4; // weight rows that go together: sums enough to hide the latency

template <Kind kind>
HAQ_TARGET inline Vec widen16(const uint16_t* w) {
  if constexpr (kind == kFloat16)
    return vec_float16(w);
  else
    return vec_bfloat16(w);
}

// out (C,) = w (C, k) x
template <Kind kind, int C>
HAQ_TARGET inline void dots(const float* x, const uint16_t* w, int64_t k, float* out) {
  Vec sum[C];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) sum[c] = vec_set(0.0f);
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    const Vec v = vec_load(x + i);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      ask_ahead(w + c * k + i);
      sum[c] = vec_fma(v, widen16<kind>(w + c * k + i), sum[c]);
    }
  }
  if (i < k) {
    const auto left = static_cast<size_t>(k - i);
    float x_left[16] = {};
    std::memcpy(x_left, x + i, 4 * left);
    for (int c = 0; c < C; ++c) {
      uint16_t w_left[16] = {};
      std::memcpy(w_left, w + c * k + i, 2 * left);
      sum[c] = vec_fma(vec_load(x_left), widen16<kind>(w_left), sum[c]);
    }
  }
  for (int c = 0; c < C; ++c) out[c] = vec_sum(sum[c]);
}

template <Kind kind>
HAQ_TARGET void half_rows(const float* x, const uint16_t* w, int64_t rows, int64_t k, float* out) {
  int64_t row = 0;
  for (; row + kDots <= rows; row += kDots) dots<kind, kDots>(x, w + row * k, k, out + row);
  for (; row < rows; ++row) dots<kind, 1>(x, w + row * k, k, out + row);
}

// out (rows,) = w (rows, k) x, w in bfloat16 or float16
HAQ_TARGET void half_product(const float* x, const uint16_t* w, Kind kind, int64_t rows, int64_t k, float* out) {
  if (kind == kFloat16)
    half_rows<kFloat16>(x, w, rows, k, out);
  else
    half_rows<kBFloat16>(x, w, rows, k, out);
}

} // namespace
} // namespace haq
