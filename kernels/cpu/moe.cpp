#include "moe.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "gemm.h"
#include "parallel.h"
#include "scratch.h"

namespace haq {
namespace {

thread_local Scratch inner_scratch, route_scratch, quantized_scratch, gathered_scratch, result_scratch;

Epilogue into(float* out, const Linear& linear) {
  return {nullptr, nullptr, linear.scale, linear.bias, out, kFloat, linear.n};
}

constexpr float kTaken = -std::numeric_limits<float>::infinity(); // no score

// The place of the largest of `values` (count,), the first of equals. NaNs come last.
int64_t find_largest(const float* values, int64_t count) {
  int64_t best = -1;
  for (int64_t i = 0; i < count; ++i)
    if (values[i] != kTaken && (best < 0 || values[i] > values[best] || values[best] != values[best])) best = i;
  return best < 0 ? 0 : best;
}

// The places of the largest of `values` (count,), largest first; `values` is used up.
void choose(float* values, int64_t count, int64_t wanted, int64_t* where) {
  for (int64_t rank = 0; rank < wanted; ++rank) {
    where[rank] = find_largest(values, count);
    values[where[rank]] = kTaken;
  }
}

// Takes the values of all groups but the chosen ones.
void keep_groups(const Router& r, float* values) {
  const int64_t size = r.experts / r.groups;
  for (int64_t left = r.groups; left > r.chosen_groups; --left) {
    float* worst = nullptr;
    float least = 0.0f;
    for (float* group = values; group != values + r.groups * size; group += size) {
      if (*group == kTaken) continue;
      float best = kTaken, second = kTaken;
      for (int64_t i = 0; i < size; ++i) {
        second = std::max(second, std::min(best, group[i]));
        best = std::max(best, group[i]);
      }
      const float sum = best + second;
      if (!worst || sum <= least) worst = group, least = sum; // of equals the last
    }
    std::fill(worst, worst + size, kTaken);
  }
}

void score(const Router& r, const float* logits, float* scores) {
  if (r.scores == kSigmoid) {
    for (int64_t i = 0; i < r.experts; ++i) scores[i] = 1.0f / (1.0f + std::exp(-logits[i]));
    return;
  }
  const float most = *std::max_element(logits, logits + r.experts);
  float sum = 0.0f;
  for (int64_t i = 0; i < r.experts; ++i) sum += scores[i] = std::exp(logits[i] - most);
  for (int64_t i = 0; i < r.experts; ++i) scores[i] /= sum;
}

// `left` (experts,) is work.
void mix(const Router& r, const float* logits, float* left, float* weights, int64_t* chosen) {
  std::copy(logits, logits + r.experts, left);
  for (int64_t rank = 0; rank < r.chosen; ++rank) {
    const int64_t best = find_largest(left, r.experts);
    const float most = left[best];
    float sum = 0.0f;
    for (int64_t i = 0; i < r.experts; ++i) {
      const bool far = (most - left[i]) / std::max(std::fabs(left[i]), most) > 2.0f * r.jitter;
      if (left[i] != kTaken && !far) sum += std::exp(left[i] - most);
    }
    chosen[rank] = best;
    weights[rank] = 1.0f / sum;
    left[best] = kTaken;
  }
}

// `scores` (2, experts) is work.
void route_row(const Router& r, const float* logits, float* scores, float* weights, int64_t* chosen) {
  if (r.scores == kSparseMixer) return mix(r, logits, scores, weights, chosen);
  float* corrected = scores + r.experts;
  score(r, logits, scores);
  for (int64_t i = 0; i < r.experts; ++i) corrected[i] = r.correction ? scores[i] + r.correction[i] : scores[i];
  keep_groups(r, corrected);
  choose(corrected, r.experts, r.chosen, chosen);
  float sum = 0.0f;
  for (int64_t i = 0; i < r.chosen; ++i) sum += weights[i] = scores[chosen[i]];
  for (int64_t i = 0; i < r.chosen; ++i) weights[i] = r.factor * (r.normalized ? weights[i] / (sum + 1e-20f) : weights[i]);
}

} // namespace

void route(const Kernels& isa, int threads, const Router& r, const float* x, int64_t m, int64_t width, float* logits,
           float* weights, int64_t* chosen) {
  float* scores = route_scratch.floats(2 * m * r.experts);
  parallel_for(threads_for(threads, m * width), m, [&](int64_t row) {
    float* own = logits + row * r.experts;
    isa.float_product(x + row * width, 1, r.weight, kFloat, r.experts, width, own, r.experts);
    route_row(r, own, scores + 2 * row * r.experts, weights + row * r.chosen, chosen + row * r.chosen);
  });
}

void run_expert(const Kernels& isa, int threads, const int8_t* x, const float* row_scale, int64_t m,
                const Expert& expert, float* out) {
  const int64_t f = expert.gate.n;
  float* gate = inner_scratch.floats(3 * m * f);
  float *up = gate + m * f, *inner = up + m * f;
  const auto read = [&](const Linear& linear, float* y) {
    multiply({&isa, threads, x, kInt8, 0, linear.packed, m, f, linear.k, linear.group, row_scale}, into(y, linear));
  };
  read(expert.gate, gate);
  read(expert.up, up);
  parallel_for(threads_for(threads, m * f), m,
               [&](int64_t row) { isa.silu_mul(gate + row * f, up + row * f, kFloat, f, inner + row * f); });
  const Linear& down = expert.down;
  multiply({&isa, threads, inner, kFloat, down.activation_scale, down.packed, m, down.n, f, down.group, nullptr,
            down.rotation},
           into(out, down));
}

void add_experts(const Kernels& isa, int threads, const Moe& moe, const float* x, int64_t m, int64_t width,
                 float residual, float* hidden) {
  const Router& r = moe.router;
  const int64_t pairs = m * r.chosen; // of a token and one of its experts: numbered token by token
  // Eight-byte values first.
  auto* chosen = reinterpret_cast<int64_t*>(quantized_scratch.get(8 * (2 * pairs + r.experts + 1) +
                                                                  4 * (m * (r.experts + 1) + pairs) + m * width));
  int64_t *sorted = chosen + pairs, *first = sorted + pairs; // pairs by expert, and where each expert's begin
  auto* logits = reinterpret_cast<float*>(first + r.experts + 1);
  float *weights = logits + m * r.experts, *scales = weights + pairs;
  auto* levels = reinterpret_cast<int8_t*>(scales + m);
  route(isa, threads, r, x, m, width, logits, weights, chosen);
  quantize_rows(isa, threads, x, kFloat, m, width, moe.activation_scale, moe.rotation, levels, scales);

  std::fill(first, first + r.experts + 1, 0);
  for (int64_t pair = 0; pair < pairs; ++pair) ++first[chosen[pair] + 1];
  for (int64_t expert = 0; expert < r.experts; ++expert) first[expert + 1] += first[expert];
  for (int64_t pair = 0; pair < pairs; ++pair) sorted[first[chosen[pair]]++] = pair; // `first` is now where they end

  float* results = result_scratch.floats(2 * pairs * width); // by pair, and an expert's as they come
  float* own = results + pairs * width;
  uint8_t* gathered = gathered_scratch.get(pairs * (width + 4));
  for (int64_t expert = 0, begin = 0; expert < r.experts; begin = first[expert++]) {
    const int64_t count = first[expert] - begin;
    if (count == 0) continue;
    auto* row_scales = reinterpret_cast<float*>(gathered);
    auto* rows = reinterpret_cast<int8_t*>(row_scales + count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = sorted[begin + i] / r.chosen;
      row_scales[i] = scales[token];
      std::memcpy(rows + i * width, levels + token * width, static_cast<size_t>(width));
    }
    run_expert(isa, threads, rows, row_scales, count, moe.experts[expert], own);
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(results + sorted[begin + i] * width, own + i * width, static_cast<size_t>(width) * sizeof(float));
  }

  parallel_for(threads_for(threads, pairs * width), m, [&](int64_t row) {
    float* total = own + row * width; // which are done with
    std::fill(total, total + width, 0.0f);
    for (int64_t pair = row * r.chosen; pair < (row + 1) * r.chosen; ++pair)
      for (int64_t i = 0; i < width; ++i) total[i] += results[pair * width + i] * weights[pair];
    for (int64_t i = 0; i < width; ++i) hidden[row * width + i] += residual * total[i];
  });
}

} // namespace haq
