// What lies between the products of a decoder layer, in float32: norms, rotation of queries and keys, attention.
// Included through instruction_set.h; `Vec` (16 floats) is the chunk header's.
#pragma once
#include <cmath>
#include <limits>

#include "values.h"

namespace haq {
namespace {

// x * weight / sqrt(mean(x^2) + eps)
HAQ_TARGET void rms_norm(const float* x, const float* weight, float eps, int64_t k, float* out) {
  Vec sums = vec_set(0.0f);
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) sums = vec_fma(vec_load(x + i), vec_load(x + i), sums);
  float sum = vec_sum(sums);
  for (; i < k; ++i) sum += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(k) + eps);
  for (int64_t j = 0; j < k; ++j) out[j] = weight[j] * (x[j] * factor);
}

// (x - mean) * weight / sqrt(mean((x - mean)^2) + eps) + bias
HAQ_TARGET void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t k, float* out) {
  const Vec one = vec_set(1.0f);
  Vec sums = vec_set(0.0f);
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) sums = vec_fma(vec_load(x + i), one, sums);
  float sum = vec_sum(sums);
  for (; i < k; ++i) sum += x[i];
  const float mean = sum / static_cast<float>(k);
  const Vec shift = vec_set(-mean);
  sums = vec_set(0.0f);
  for (i = 0; i + 16 <= k; i += 16) {
    const Vec centered = vec_fma(vec_load(x + i), one, shift);
    sums = vec_fma(centered, centered, sums);
  }
  sum = vec_sum(sums);
  for (; i < k; ++i) sum += (x[i] - mean) * (x[i] - mean);
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(k) + eps);
  for (int64_t j = 0; j < k; ++j) out[j] = weight[j] * ((x[j] - mean) * factor) + bias[j];
}

// Rotary embedding in place. Value i turns with value i + d / 2: x * cos + (-second half, first half) * sin. If `pairs`,
// value 2 i turns with value 2 i + 1, both by the angle of i.
HAQ_TARGET void rotate(float* x, const float* __restrict cosines, const float* __restrict sines, int64_t d, bool pairs) {
  const int64_t half = d / 2;
  if (pairs) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cosines[i] - b * sines[i];
      x[2 * i + 1] = b * cosines[i] + a * sines[i];
    }
    return;
  }
  float* __restrict low = x;
  float* __restrict high = x + half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = low[i], b = high[i];
    low[i] = a * cosines[i] - b * sines[i];
    high[i] = b * cosines[half + i] + a * sines[half + i];
  }
}

// What one token's attention reads from memory, in order: a head's keys, its values, the next head's first keys. Asked
// for some way ahead, across the ends.
class Reading {
 public:
  static constexpr int64_t kLead = kAhead / 4; // values

  HAQ_TARGET Reading(const Attention& a, int64_t key_values, int64_t value_values)
      : parts_{{a.keys, a.keys + key_values},
               {a.values, a.values + value_values},
               {a.next_keys, a.next_keys ? a.next_keys + kLead : nullptr}},
        count_(a.next_keys ? 3 : 2) {}
  HAQ_TARGET void ask(int64_t count) { // of values; whole lines
    for (; count > 0 && part_ < count_; count -= 16) {
      Part& part = parts_[part_];
      __builtin_prefetch(part.at, 0, 2);
      part.at += 16;
      if (part.at >= part.end) ++part_;
    }
  }

 private:
  struct Part {
    const float *at, *end;
  };
  Part parts_[3];
  int count_, part_ = 0;
};

// out (R, 16 V) = a (R, depth) times b (depth, 16 V), rows at their strides. b is being read from memory if `reading`.
template <int R, int V>
HAQ_TARGET void small_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                              Reading* reading, float* out, int64_t out_stride) {
  Vec sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[r][v] = vec_set(0.0f);
  for (int64_t i = 0; i < depth; ++i) {
    if (reading) reading->ask(b_stride);
    Vec w[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) w[v] = vec_load(b + i * b_stride + 16 * v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec x = vec_set(a[r * a_stride + i]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] = vec_fma(x, w[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) vec_store(out + r * out_stride + 16 * v, sum[r][v]);
}

// 32 columns of any number of rows, by as many rows at a time as there are registers for. Only the first time that b
// passes by it comes from memory, if at all.
template <int R, int V>
HAQ_TARGET void product32(int rows, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                          Reading* reading, float* out, int64_t out_stride) {
  for (int c = 0; c < kPanel; c += 16 * V) {
    for (int r = 0; r < rows;) {
      const int left = rows - r;
      const auto product = left >= R ? small_product<R, V> : left >= 3 ? small_product<3, V> : small_product<1, V>;
      product(a + r * a_stride, a_stride, b + c, b_stride, depth, r + c == 0 ? reading : nullptr,
              out + r * out_stride + c, out_stride);
      r += left >= R ? R : left >= 3 ? 3 : 1;
    }
  }
}

// exp of 16 values, as exp_poly but with fused multiply-adds.
HAQ_TARGET inline Vec vec_exp(Vec x) {
  x = vec_max(vec_min(x, vec_set(88.0f)), vec_set(-87.0f));
  const Vec shifted = vec_fma(x, vec_set(1.44269504088896341f), vec_set(kRound));
  const Vec n = vec_add(shifted, vec_set(-kRound));
  const Vec r = vec_fma(n, vec_set(2.12194440e-4f), vec_fma(n, vec_set(-0.693359375f), x));
  Vec p = vec_fma(r, vec_set(1.9875691500e-4f), vec_set(1.3981999507e-3f));
  p = vec_fma(p, r, vec_set(8.3334519073e-3f));
  p = vec_fma(p, r, vec_set(4.1665795894e-2f));
  p = vec_fma(p, r, vec_set(1.6666665459e-1f));
  p = vec_fma(p, r, vec_set(5.0000001201e-1f));
  p = vec_fma(vec_mul(p, r), r, vec_add(r, vec_set(1.0f)));
  return vec_mul(p, vec_power_of_two(shifted));
}

// silu(gate) * up, or silu(gate) if `up` is null
HAQ_TARGET void silu_up(const float* gate, const float* up, int64_t n, float* out) {
  const Vec one = vec_set(1.0f), minus = vec_set(-1.0f);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const Vec g = vec_load(gate + i), divisor = vec_add(one, vec_exp(vec_mul(g, minus)));
    vec_store(out + i, vec_mul(vec_div(g, divisor), up ? vec_load(up + i) : one));
  }
  for (; i < n; ++i) out[i] = gate[i] / (1.0f + exp_poly(-gate[i])) * (up ? up[i] : 1.0f);
}

// gelu(gate) * up, or gelu(gate) if `up` is null, where gelu(x) = x / 2 * (1 + tanh(y)) = x / (1 + exp(-2 y)), y = sqrt(2 / pi) * (x + 0.044715 x^3)
HAQ_TARGET void gelu_up(const float* gate, const float* up, int64_t n, float* out) {
  constexpr float linear = -1.5957691216057308f, cubic = linear * 0.044715f; // of -2 y
  const Vec one = vec_set(1.0f);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const Vec g = vec_load(gate + i);
    const Vec factor = vec_fma(vec_mul(g, g), vec_set(cubic), vec_set(linear));
    const Vec divisor = vec_add(one, vec_exp(vec_mul(g, factor)));
    vec_store(out + i, vec_mul(vec_div(g, divisor), up ? vec_load(up + i) : one));
  }
  for (; i < n; ++i) {
    const float g = gate[i];
    out[i] = g / (1.0f + exp_poly(g * (g * g * cubic + linear))) * (up ? up[i] : 1.0f);
  }
}

// max(gate, 0) * up, or max(gate, 0) if `up` is null
HAQ_TARGET void relu_up(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = (gate[i] > 0.0f ? gate[i] : 0.0f) * (up ? up[i] : 1.0f);
}

HAQ_TARGET void gate_up(Activation activation, const float* gate, const float* up, int64_t n, float* out) {
  switch (activation) {
    case kSilu: return silu_up(gate, up, n, out);
    case kGeluTanh: return gelu_up(gate, up, n, out);
    case kRelu: return relu_up(gate, up, n, out);
  }
}

// scores (width,) = cap * tanh(scaling * score / cap) = cap - 2 cap / (1 + exp(2 scaling score / cap))
HAQ_TARGET void cap_scores(float* scores, int64_t width, float scaling, float cap) {
  const Vec factor = vec_set(2.0f * scaling / cap), one = vec_set(1.0f), most = vec_set(cap), twice = vec_set(-2.0f * cap);
  for (int64_t i = 0; i < width; i += 16) {
    const Vec divisor = vec_add(one, vec_exp(vec_mul(vec_load(scores + i), factor)));
    vec_store(scores + i, vec_add(most, vec_div(twice, divisor)));
  }
}

// exp(scaling * score - maximum) over the scores from `unseen` to `seen`, and zeros elsewhere up to `width`; returns
// 1 / their sum. The sink, unless null, is one more scaled score of the maximum and the sum.
HAQ_TARGET float soften(float* scores, int64_t unseen, int64_t seen, int64_t width, float scaling, const float* sink) {
  for (int64_t i = 0; i < unseen; ++i) scores[i] = -std::numeric_limits<float>::infinity();
  for (int64_t i = seen; i < width; ++i) scores[i] = -std::numeric_limits<float>::infinity();
  Vec most = vec_load(scores);
  for (int64_t i = 16; i < width; i += 16) most = vec_max(most, vec_load(scores + i));
  float maximum = vec_most(most) * scaling;
  if (sink && *sink > maximum) maximum = *sink;
  const Vec factor = vec_set(scaling), shift = vec_set(-maximum);
  Vec sums = vec_set(0.0f); // of which the largest is 1, so that the exp(-87) of unseen ones add nothing
  for (int64_t i = 0; i < width; i += 16) {
    const Vec weights = vec_exp(vec_fma(vec_load(scores + i), factor, shift));
    sums = vec_add(sums, weights);
    vec_store(scores + i, weights);
  }
  for (int64_t i = 0; i < unseen; ++i) scores[i] = 0.0f;
  for (int64_t i = seen; i < width; ++i) scores[i] = 0.0f;
  return 1.0f / (vec_sum(sums) + (sink ? exp_poly(*sink - maximum) : 0.0f));
}

template <int R, int V>
HAQ_TARGET void attend(const Attention& given) {
  Attention a = given;
  const int64_t d = a.head_dim, value_width = (d + kPanel - 1) / kPanel * kPanel;
  const int64_t skipped = (a.seen > a.window ? a.seen - a.window : 0) / kPanel * kPanel; // that no row sees
  a.keys += skipped * d;
  a.values += skipped * value_width;
  a.seen -= skipped;
  const int64_t all = a.seen + (a.rows - 1) * a.more_seen; // keys that the last row sees
  const int64_t width = (all + kPanel - 1) / kPanel * kPanel;
  Reading one_token(a, width * d, all * value_width);
  Reading* reading = a.more_seen == 0 ? &one_token : nullptr; // those of a prompt pass by many times
  if (reading) reading->ask(Reading::kLead);
  for (int64_t j = 0; j < width; j += kPanel)
    product32<R, V>(a.rows, a.queries, a.query_stride, a.keys + j * d, kPanel, d, reading, a.scores + j,
                    a.score_stride);
  float factor[kAttendRows];
  for (int r = 0; r < a.rows; ++r) {
    float* scores = a.scores + r * a.score_stride;
    const int64_t seen = a.seen + r * a.more_seen, unseen = seen > a.window ? seen - a.window : 0;
    if (a.soft_cap != 0.0f) cap_scores(scores, width, a.scaling, a.soft_cap);
    const float* sink = a.sinks ? a.sinks + r * a.sink_stride : nullptr;
    factor[r] = soften(scores, unseen, seen, width, a.soft_cap != 0.0f ? 1.0f : a.scaling, sink);
  }
  float block[kAttendRows * kPanel];
  for (int64_t c = 0; c < d; c += kPanel) {
    product32<R, V>(a.rows, a.scores, a.score_stride, a.values + c, value_width, all, c == 0 ? reading : nullptr, block,
                    kPanel);
    const int64_t count = d - c < kPanel ? d - c : kPanel;
    for (int r = 0; r < a.rows; ++r)
      for (int64_t i = 0; i < count; ++i)
        a.out[r * a.out_stride + c + i] = block[r * kPanel + i] * factor[r];
  }
}

} // namespace
} // namespace haq
