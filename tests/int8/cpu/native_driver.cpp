// Runs the C functions over ragged shapes from buffers of exactly the needed size, for the sanitizers.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "decoder.h"

extern "C" {
const char* haq_level_name(int);
int haq_level_supported(int);
int64_t haq_packed_bytes(int64_t, int64_t);
void haq_pack(const int8_t*, int64_t, int64_t, int64_t, uint8_t*, int);
int haq_linear(int, int, const void*, int, int64_t, int64_t, const uint8_t*, int64_t, const float*, const float*,
               float, int64_t, void*, int);
int haq_quantize(int, int, const void*, int, int64_t, int64_t, float, int64_t, int8_t*, float*);
void haq_float_linear(int, int, const float*, int64_t, int64_t, const void*, int, int64_t, float*);
void haq_silu_mul(int, int, const void*, int, int64_t, int64_t, void*);
int haq_decoder_layers(int, int, const haq::Layer*, int64_t, float*, const haq::Sequence*, int64_t, const float*,
                       const float*, float*, float*, int64_t, int64_t);
int haq_attention(int, int, const haq::Layer*, int64_t, float*, float*, const haq::Sequence*, int64_t, const float*,
                  const float*, float*, float*, int64_t, int64_t);
int haq_route(int, int, const haq::Router*, const float*, int64_t, int64_t, float*, float*, int64_t*);
int haq_expert(int, int, const int8_t*, const float*, int64_t, int64_t, int64_t, const uint8_t*, const float*, int64_t,
               const uint8_t*, const float*, int64_t, const uint8_t*, const float*, int64_t, float, int64_t, float*);
int64_t haq_packed4_bytes(int64_t, int64_t);
void haq_pack4(const int8_t*, int64_t, int64_t, int64_t, uint8_t*, int);
int haq_linear4(int, int, const void*, int, int64_t, int64_t, const uint8_t*, int64_t, int64_t, const float*,
                const float*, const float*, float, int64_t, void*, int);
}

static bool run(int level, int threads, int64_t m, int64_t n, int64_t k) {
  std::vector<int8_t> w(n * k), qx(m * k), q(m * k);
  std::vector<float> x(m * k), scale(n, 0.5f), bias(n, 1.0f), y(m * n), row_scale(m), half(m * (n / 2));
  std::vector<float> floats(n * k, 0.5f);
  std::vector<uint16_t> narrow(m * k, 0x3f80), narrow_y(m * n), halves(n * k, 0x3f80);
  std::vector<int32_t> acc(m * n);
  for (int64_t i = 0; i < n * k; ++i) w[i] = static_cast<int8_t>(i * 37 % 255 - 127);
  for (int64_t i = 0; i < m * k; ++i) qx[i] = static_cast<int8_t>(i * 53 % 255 - 127), x[i] = 0.01f * qx[i];
  std::vector<uint8_t> packed(haq_packed_bytes(n, k));
  haq_pack(w.data(), n, k, 0, packed.data(), threads);
  haq_linear(level, threads, qx.data(), 3, m, k, packed.data(), n, nullptr, nullptr, 0, 1, acc.data(), 0);
  haq_linear(level, threads, x.data(), 1, m, k, packed.data(), n, scale.data(), bias.data(), 0, 1, y.data(), 1);
  haq_linear(level, threads, narrow.data(), 2, m, k, packed.data(), n, scale.data(), nullptr, 0.1f,
             1, narrow_y.data(), 2);
  if (k % 4 == 0) // a rotation in blocks of 4
    haq_linear(level, threads, x.data(), 1, m, k, packed.data(), n, scale.data(), bias.data(), 0, 4, y.data(), 1);
  haq_quantize(level, threads, x.data(), 1, m, k, 0, k % 4 ? 1 : 4, q.data(), row_scale.data());
  for (const int kind : {2, 4}) haq_float_linear(level, threads, x.data(), m, k, halves.data(), kind, n, y.data());
  haq_float_linear(level, threads, x.data(), m, k, floats.data(), 1, n, y.data());
  haq_silu_mul(level, threads, y.data(), 1, m, n / 2, half.data());
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      int64_t sum = 0;
      for (int64_t d = 0; d < k; ++d) sum += qx[i * k + d] * w[j * k + d];
      if (acc[i * n + j] != sum) return false;
    }
  return true;
}

// 4-bit weights of scale 0.5: products of quantised rows are exact in fp32.
static bool run4(int level, int threads, int64_t m, int64_t n, int64_t k, int64_t group) {
  std::vector<int8_t> w(n * k), qx(m * k);
  for (int64_t i = 0; i < n * k; ++i) w[i] = static_cast<int8_t>(i * 37 % 15 - 7);
  for (int64_t i = 0; i < m * k; ++i) qx[i] = static_cast<int8_t>(i * 53 % 255 - 127);
  std::vector<uint8_t> packed(haq_packed4_bytes(n, k));
  haq_pack4(w.data(), n, k, 0, packed.data(), threads);
  std::vector<float> scale((k + group - 1) / group * n, 0.5f), row_scale(m, 2.0f), y(m * n), x(m * k, 0.1f);
  haq_linear4(level, threads, x.data(), 1, m, k, packed.data(), n, group, scale.data(), nullptr, nullptr, 0,
              k % 4 ? 1 : 4, y.data(), 1);
  haq_linear4(level, threads, qx.data(), 3, m, k, packed.data(), n, group, scale.data(), nullptr, row_scale.data(), 0,
              1, y.data(), 1);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      int64_t sum = 0;
      for (int64_t d = 0; d < k; ++d) sum += qx[i * k + d] * w[j * k + d];
      if (y[i * n + j] != static_cast<float>(sum)) return false;
    }
  return true;
}

struct Weights {
  Weights(int64_t n, int64_t k) : packed(haq_packed_bytes(n, k)), scale(n, 0.001f), bias(n, 0.1f) {
    std::vector<int8_t> w(n * k);
    for (int64_t i = 0; i < n * k; ++i) w[i] = static_cast<int8_t>(i * 37 % 255 - 127);
    haq_pack(w.data(), n, k, 0, packed.data(), 1);
    linear = {packed.data(), scale.data(), bias.data(), n, k, 0};
  }
  std::vector<uint8_t> packed;
  std::vector<float> scale, bias;
  haq::Linear linear;
};

// A batch in two calls, with sequences that add many tokens, one and none, over more rows than are taken at a time. Each
// has the bits that it has alone.
static bool run_batch(int level, int threads, const haq::Layer* layers, int64_t width, int64_t d, int64_t kv_heads) {
  const int64_t capacity = 320, count = 4, added[2][4] = {{300, 5, 0, 300}, {1, 13, 1, 0}};
  const auto keys_of = [&](int64_t sequences) { return 2 * sequences * kv_heads * capacity * d; };
  const auto values_of = [&](int64_t sequences) { return 2 * sequences * kv_heads * capacity * 32; };
  std::vector<float> keys(keys_of(count)), values(values_of(count));
  std::vector<std::vector<float>> own_keys, own_values;
  for (int64_t i = 0; i < count; ++i) own_keys.emplace_back(keys_of(1)), own_values.emplace_back(values_of(1));
  int64_t past[4] = {};
  for (const auto& more : added) {
    std::vector<haq::Sequence> batch;
    int64_t tokens = 0;
    for (int64_t i = 0; i < count; ++i) batch.push_back({more[i], past[i]}), tokens += more[i];
    std::vector<float> hidden(tokens * width), angles(tokens * d, 0.5f);
    for (size_t i = 0; i < hidden.size(); ++i) hidden[i] = 0.01f * static_cast<float>(i * 53 % 255);
    std::vector<float> alone = hidden;
    haq_decoder_layers(level, threads, layers, 2, hidden.data(), batch.data(), count, angles.data(), angles.data(),
                       keys.data(), values.data(), 2, capacity);
    float* own = alone.data();
    for (int64_t i = 0; i < count; own += more[i] * width, past[i] += more[i], ++i)
      haq_decoder_layers(level, threads, layers, 2, own, &batch[i], 1, angles.data(), angles.data(),
                         own_keys[i].data(), own_values[i].data(), 2, capacity);
    if (alone != hidden) return false;
  }
  return true;
}

// A prompt of 70 tokens and one after it: nothing is read or written beyond the buffers, and all is finite.
static bool run_layer(int level, int threads) {
  const int64_t heads = 6, kv_heads = 2, d = 20, width = 50, inner = 33, tokens = 70, capacity = 96;
  Weights qkv((heads + 2 * kv_heads) * d, width), output(width, heads * d), gate_up(2 * inner, width);
  Weights down(width, inner);
  std::vector<float> norm(width, 1.0f), hidden((tokens + 1) * width), angles((tokens + 1) * d, 0.5f);
  for (size_t i = 0; i < hidden.size(); ++i) hidden[i] = 0.01f * static_cast<float>(i * 53 % 255);
  std::vector<float> keys(2 * kv_heads * capacity * d), values(2 * kv_heads * capacity * 32);
  const haq::Norm whole = {norm.data(), width, 1e-5f}, head = {norm.data(), d, 1e-5f};
  // Keys within a window of 33 positions, a soft cap, a factor and norms of what a half adds, and a gate with GELU.
  const haq::Layer dense = {heads, kv_heads, d, 33, 1, 1, 0.2f, 5.0f, 0.5f, whole, whole, whole, whole, {}, {},
                            qkv.linear, output.linear, gate_up.linear, down.linear, nullptr, {}};
  Weights gate(inner, width), up(inner, width);
  const haq::Expert expert = {gate.linear, up.linear, down.linear};
  const std::vector<haq::Expert> experts(5, expert);
  std::vector<float> router(experts.size() * width);
  for (size_t i = 0; i < router.size(); ++i) router[i] = 0.01f * static_cast<float>(i * 37 % 101);
  haq::Layer moe = {heads, kv_heads, d, 0, 1, 0, 0.2f, 0.0f, 1.0f, whole, whole, {}, {}, {}, {},
                    qkv.linear, output.linear, gate_up.linear, down.linear, norm.data(), {}}; // and a shared expert
  moe.queries = moe.keys = head;
  const auto count = static_cast<int64_t>(experts.size());
  moe.moe = {{router.data(), nullptr, count, 2, haq::kSoftmax, 1, 1, 1, 1.0f, 0.0f}, experts.data(), 0};
  const haq::Layer layers[] = {dense, moe};
  const haq::Sequence prompt = {tokens, 0}, next = {1, tokens};
  haq_decoder_layers(level, threads, layers, 2, hidden.data(), &prompt, 1, angles.data(), angles.data(), keys.data(),
                     values.data(), 2, capacity);
  haq_decoder_layers(level, threads, layers, 2, hidden.data() + tokens * width, &next, 1, angles.data() + tokens * d,
                     angles.data() + tokens * d, keys.data(), values.data(), 2, capacity);
  if (!run_batch(level, threads, layers, width, d, kv_heads)) return false;
  std::vector<float> normed(tokens * width), logits(tokens * experts.size()), weights(tokens * 2), out(tokens * width);
  std::vector<int64_t> chosen(tokens * 2);
  haq_attention(level, threads, layers, 1, hidden.data(), normed.data(), &prompt, 1, angles.data(), angles.data(),
                keys.data(), values.data(), 2, capacity);
  haq_route(level, threads, &moe.moe.router, normed.data(), tokens, width, logits.data(), weights.data(),
            chosen.data());
  const std::vector<float> correction(experts.size(), -0.5f);
  for (const haq::Router& r : {haq::Router{router.data(), correction.data(), 4, 2, haq::kSigmoid, 2, 1, 1, 2.5f, 0.0f},
                               haq::Router{router.data(), nullptr, 4, 2, haq::kSparseMixer, 1, 1, 0, 1.0f, 0.01f}})
    haq_route(level, threads, &r, normed.data(), tokens, width, logits.data(), weights.data(), chosen.data());
  std::vector<int8_t> levels(tokens * width, 3);
  haq_expert(level, threads, levels.data(), weights.data(), tokens, width, inner, gate.packed.data(),
             gate.scale.data(), 0, up.packed.data(), up.scale.data(), 0, down.packed.data(), down.scale.data(), 0, 0,
             1, out.data());
  for (const auto* some : {&hidden, &normed, &logits, &weights, &out})
    for (const float x : *some)
      if (!(x - x == 0.0f)) return false;
  for (const int64_t one : chosen)
    if (one < 0 || one >= static_cast<int64_t>(experts.size())) return false;
  return true;
}

int main() {
  int levels = 0;
  const int64_t shapes[][3] = {{1, 1, 1},   {1, 33, 65},   {2, 64, 128},  {5, 32, 63},  {14, 40, 100},
                               {29, 70, 7}, {25, 33, 2053}, {300, 12, 130}, {40, 400, 96}, {33, 290, 700}};
  for (int level = 0; haq_level_name(level); ++level) {
    if (!haq_level_supported(level)) continue;
    ++levels;
    for (const auto& s : shapes)
      for (const int threads : {1, 3})
        if (!run(level, threads, s[0], s[1], s[2])) {
          std::printf("wrong sums at %s\n", haq_level_name(level));
          return 1;
        }
    for (const auto& s : shapes)
      for (const int64_t group : {32, 64, 128, 4096})
        if (!run4(level, 1 + static_cast<int>(group % 3), s[0], s[1], s[2], group)) {
          std::printf("wrong sums of 4-bit weights at %s\n", haq_level_name(level));
          return 1;
        }
    for (const int threads : {1, 3})
      if (!run_layer(level, threads)) {
        std::printf("not finite, or a batch is not its sequences, at %s\n", haq_level_name(level));
        return 1;
      }
  }
  std::printf("ok %d\n", levels);
  return 0;
}
