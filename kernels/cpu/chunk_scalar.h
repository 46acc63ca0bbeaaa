// The scalar chunk: 64 values quantised, or 64 int8 copied, to where they are staged. The vector versions do the
// same.
#pragma once
#include "values.h"

namespace haq {
namespace {

struct Vec {
  float v[16];
};
HAQ_TARGET inline Vec vec_load(const float* x) {
  Vec out;
  std::memcpy(out.v, x, sizeof out.v);
  return out;
}
HAQ_TARGET inline void vec_store(float* out, const Vec& a) { std::memcpy(out, a.v, sizeof a.v); }
HAQ_TARGET inline Vec vec_set(float x) {
  Vec out;
  for (float& lane : out.v) lane = x;
  return out;
}
HAQ_TARGET inline Vec vec_fma(const Vec& a, const Vec& b, Vec c) {
  for (int i = 0; i < 16; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
HAQ_TARGET inline Vec vec_add(Vec a, const Vec& b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
HAQ_TARGET inline Vec vec_sub(Vec a, const Vec& b) {
  for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i];
  return a;
}
// In each pair of lanes i and i + H (H a power of two): their sum and their difference.
template <int H>
HAQ_TARGET inline Vec vec_mix(const Vec& a) {
  Vec out;
  for (int i = 0; i < 16; ++i) out.v[i] = i & H ? a.v[i ^ H] - a.v[i] : a.v[i] + a.v[i ^ H];
  return out;
}
HAQ_TARGET inline Vec vec_mul(Vec a, const Vec& b) {
  for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
  return a;
}
HAQ_TARGET inline Vec vec_div(Vec a, const Vec& b) {
  for (int i = 0; i < 16; ++i) a.v[i] /= b.v[i];
  return a;
}
HAQ_TARGET inline Vec vec_min(Vec a, const Vec& b) {
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
HAQ_TARGET inline Vec vec_power_of_two(Vec shifted) { // 2^n of the n that `kRound + n` holds
  for (float& lane : shifted.v) lane = from_bits((to_bits(lane) + 127u) << 23);
  return shifted;
}
HAQ_TARGET inline Vec vec_max(Vec a, const Vec& b) {
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}

HAQ_TARGET inline Vec vec_bfloat16(const uint16_t* x) {
  Vec out;
  for (int i = 0; i < 16; ++i) out.v[i] = load(x + i);
  return out;
}
HAQ_TARGET inline Vec vec_float16(const uint16_t* x) { // of finite values
  Vec out;
  for (int i = 0; i < 16; ++i) {
    const float magnitude = from_bits(static_cast<uint32_t>(x[i] & 0x7fff) << 13) * from_bits(239u << 23); // 2^112
    out.v[i] = from_bits(to_bits(magnitude) | static_cast<uint32_t>(x[i] & 0x8000) << 16);
  }
  return out;
}
HAQ_TARGET inline float vec_sum(const Vec& a) {
  float sum = 0.0f;
  for (const float lane : a.v) sum += lane;
  return sum;
}
HAQ_TARGET inline float vec_most(const Vec& a) {
  float most = a.v[0];
  for (const float lane : a.v) most = lane > most ? lane : most;
  return most;
}

// q = clamp(round_half_even(x / scale)), written as one chunk; returns the sum of the 64. `fast` allows the
// inverse (see kSure); Clamp is false where no value can leave the range or be NaN. The int16 versions elsewhere write
// two chunks of 32, `stride` elements apart.
template <bool Clamp, class T>
HAQ_TARGET int32_t quantize_chunk(const T* x, float scale, float inverse, bool fast, int8_t* q, int64_t) {
  int32_t sum = 0;
  for (int i = 0; i < kChunk; ++i) {
    float v = clamp127(load(x + i) * inverse);
    const float distance = v - ((v + kRound) - kRound);
    if (!fast || distance > kSure || distance < -kSure) v = clamp127(load(x + i) / scale);
    sum += q[i] = static_cast<int8_t>(to_bits(v + kRound));
  }
  return sum;
}

HAQ_TARGET inline int32_t copy_chunk(const int8_t* x, int8_t* out, int64_t) {
  int32_t sum = 0;
  for (int i = 0; i < kChunk; ++i) sum += out[i] = x[i];
  return sum;
}

} // namespace
} // namespace haq
