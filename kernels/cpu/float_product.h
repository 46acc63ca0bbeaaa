// Dot products of a float32 row with weights kept in 16 bits, which widen exactly: the head at decode, where reading
// the weights is all the time it takes. Or in 32, for a router. Included through instruction_set.h; `Vec` is the chunk
// header's.
#pragma once
#include <type_traits>

#include "values.h"

namespace haq {
namespace {

constexpr int kDots = 4; // weight rows that go together: sums enough to hide the latency

template <Kind kind>
using Stored = std::conditional_t<kind == kFloat, float, uint16_t>;

template <Kind kind>
HAQ_TARGET inline Vec widened(const Stored<kind>* w) {
  if constexpr (kind == kFloat)
    return vec_load(w);
  else if constexpr (kind == kFloat16)
    return vec_float16(w);
  else
    return vec_bfloat16(w);
}

// out (C,) = w (C, k) x
template <Kind kind, int C>
HAQ_TARGET inline void dots(const float* x, const Stored<kind>* w, int64_t k, float* out) {
  Vec sum[C];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) sum[c] = vec_set(0.0f);
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    const Vec v = vec_load(x + i);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      ask_ahead(w + c * k + i);
      sum[c] = vec_fma(v, widened<kind>(w + c * k + i), sum[c]);
    }
  }
  if (i < k) {
    const auto left = static_cast<size_t>(k - i);
    float x_left[16] = {};
    std::memcpy(x_left, x + i, 4 * left);
    for (int c = 0; c < C; ++c) {
      Stored<kind> w_left[16] = {};
      std::memcpy(w_left, w + c * k + i, sizeof *w * left);
      sum[c] = vec_fma(vec_load(x_left), widened<kind>(w_left), sum[c]);
    }
  }
  for (int c = 0; c < C; ++c) out[c] = vec_sum(sum[c]);
}

template <Kind kind>
HAQ_TARGET void weight_rows(const float* x, const void* weights, int64_t rows, int64_t k, float* out) {
  const auto* w = static_cast<const Stored<kind>*>(weights);
  int64_t row = 0;
  for (; row + kDots <= rows; row += kDots) dots<kind, kDots>(x, w + row * k, k, out + row);
  for (; row < rows; ++row) dots<kind, 1>(x, w + row * k, k, out + row);
}

// out (rows,) = w (rows, k) x, w in bfloat16, float16 or float32
HAQ_TARGET void float_product(const float* x, const void* w, Kind kind, int64_t rows, int64_t k, float* out) {
  if (kind == kFloat)
    weight_rows<kFloat>(x, w, rows, k, out);
  else if (kind == kFloat16)
    weight_rows<kFloat16>(x, w, rows, k, out);
  else
    weight_rows<kBFloat16>(x, w, rows, k, out);
}

} // namespace
} // namespace haq
