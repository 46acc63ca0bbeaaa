// Dot products of float32 rows with weights in 16 bits, which widen exactly, or in 32: the head, and a router. With few
// rows, reading the weights is all the time it takes. The sum of a product does not depend on the rows beside it.
// Included through instruction_set.h; `Vec` is the chunk header's.
#pragma once
#include <type_traits>

#include "values.h"

namespace haq {
namespace {

constexpr int kDots = 4; // weight rows that go together if there is one row: sums enough to hide the latency

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

// out (R, C) = x (R, k) times w (C, k) transposed. The weights are being read from memory if `reading`.
template <Kind kind, int R, int C>
HAQ_TARGET inline void dots(const float* x, const Stored<kind>* w, int64_t k, bool reading, float* out,
                            int64_t out_stride) {
  Vec sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[r][c] = vec_set(0.0f);
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    Vec v[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) v[r] = vec_load(x + r * k + i);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      if (reading) ask_ahead(w + c * k + i);
      const Vec wide = widened<kind>(w + c * k + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][c] = vec_fma(v[r], wide, sum[r][c]);
    }
  }
  if (i < k) {
    const auto left = static_cast<size_t>(k - i);
    for (int c = 0; c < C; ++c) {
      Stored<kind> w_left[16] = {};
      std::memcpy(w_left, w + c * k + i, sizeof *w * left);
      for (int r = 0; r < R; ++r) {
        float x_left[16] = {};
        std::memcpy(x_left, x + r * k + i, 4 * left);
        sum[r][c] = vec_fma(vec_load(x_left), widened<kind>(w_left), sum[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) out[r * out_stride + c] = vec_sum(sum[r][c]);
}

template <Kind kind, int R, int C>
HAQ_TARGET void weight_rows(const float* x, const Stored<kind>* w, int64_t rows, int64_t k, bool reading, float* out,
                            int64_t out_stride) {
  int64_t row = 0;
  for (; row + C <= rows; row += C) dots<kind, R, C>(x, w + row * k, k, reading, out + row, out_stride);
  for (; row < rows; ++row) dots<kind, R, 1>(x, w + row * k, k, reading, out + row, out_stride);
}

// R rows at a time; the first time that the weights pass by they come from memory.
template <Kind kind, int R, int C>
HAQ_TARGET void all_rows(const float* x, int64_t m, const void* weights, int64_t rows, int64_t k, float* out,
                         int64_t out_stride) {
  const auto* w = static_cast<const Stored<kind>*>(weights);
  int64_t r = 0;
  for (; r + R <= m; r += R) weight_rows<kind, R, C>(x + r * k, w, rows, k, r == 0, out + r * out_stride, out_stride);
  for (; r < m; ++r) weight_rows<kind, 1, kDots>(x + r * k, w, rows, k, r == 0, out + r * out_stride, out_stride);
}

// out (m, rows) = x (m, k) times w (rows, k) transposed, w in bfloat16, float16 or float32
template <int R, int C>
HAQ_TARGET void float_product(const float* x, int64_t m, const void* w, Kind kind, int64_t rows, int64_t k, float* out,
                              int64_t out_stride) {
  if (kind == kFloat)
    all_rows<kFloat, R, C>(x, m, w, rows, k, out, out_stride);
  else if (kind == kFloat16)
    all_rows<kFloat16, R, C>(x, m, w, rows, k, out, out_stride);
  else
    all_rows<kBFloat16, R, C>(x, m, w, rows, k, out, out_stride);
}

} // namespace
} // namespace haq
