#include "moe.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "gemm.h"
#include "parallel.h"
#include "scratch.h"

namespace haq {
namespace {

thread_local Scratch inner_scratch, route_scratch, quantized_scratch, gathered_scratch, result_scratch;

Epilogue into(float* out, const Linear& linear) {
  return {nullptr, nullptr, linear.scale, linear.bias, out, kFloat, linear.n};
}

// The largest of `values` (count,), largest first, the first of equals; `values` is used up. NaNs come last.
void choose(float* values, int64_t count, int64_t wanted, float* largest, int64_t* where) {
  constexpr float taken = -1.0f; // no probability
  for (int64_t rank = 0; rank < wanted; ++rank) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; ++i)
      if (values[i] != taken && (best < 0 || values[i] > values[best] || values[best] != values[best])) best = i;
    where[rank] = best;
    largest[rank] = values[best];
    values[best] = taken;
  }
}

void route_row(const Router& r, const float* logits, float* probabilities, float* weights, int64_t* chosen) {
  const float most = *std::max_element(logits, logits + r.experts);
  float sum = 0.0f;
  for (int64_t i = 0; i < r.experts; ++i) sum += probabilities[i] = std::exp(logits[i] - most);
  for (int64_t i = 0; i < r.experts; ++i) probabilities[i] /= sum;
  choose(probabilities, r.experts, r.chosen, weights, chosen);
  if (!r.normalized) return;
  sum = 0.0f;
  for (int64_t i = 0; i < r.chosen; ++i) sum += weights[i];
  for (int64_t i = 0; i < r.chosen; ++i) weights[i] /= sum;
}

} // namespace

void route(const Kernels& isa, int threads, const Router& r, const float* x, int64_t m, int64_t width, float* logits,
           float* weights, int64_t* chosen) {
  float* probabilities = route_scratch.floats(m * r.experts);
  parallel_for(threads_for(threads, m * width), m, [&](int64_t row) {
    float* own = logits + row * r.experts;
    isa.float_product(x + row * width, 1, r.weight, kFloat, r.experts, width, own, r.experts);
    route_row(r, own, probabilities + row * r.experts, weights + row * r.chosen, chosen + row * r.chosen);
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
