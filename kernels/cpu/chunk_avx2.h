// The chunk operations of chunk_scalar.h for AVX2 (also used at the AVX-VNNI level).
#pragma once
#include <immintrin.h>

#include "values.h"

namespace haq {
namespace {

struct Vec {
  __m256 low, high;
};
HAQ_TARGET inline Vec vec_load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
HAQ_TARGET inline void vec_store(float* out, Vec v) {
  _mm256_storeu_ps(out, v.low);
  _mm256_storeu_ps(out + 8, v.high);
}
HAQ_TARGET inline Vec vec_set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
HAQ_TARGET inline Vec vec_fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
HAQ_TARGET inline Vec vec_add(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
HAQ_TARGET inline Vec vec_sub(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
// In each pair of lanes i and i + H: their sum and their difference. A product with 1 or -1 is exact, so a sum is rounded once.
template <int H>
HAQ_TARGET inline __m256 mix8(__m256 a) {
  const __m256 sign = H == 4 ? _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1)
                    : H == 2 ? _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1)
                             : _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1);
  const __m256 other = H == 4 ? _mm256_permute2f128_ps(a, a, 1) : _mm256_permute_ps(a, H == 2 ? 0x4e : 0xb1);
  return _mm256_fmadd_ps(a, sign, other);
}
template <int H>
HAQ_TARGET inline Vec vec_mix(Vec a) {
  if constexpr (H == 8) return {_mm256_add_ps(a.low, a.high), _mm256_sub_ps(a.low, a.high)};
  else return {mix8<H>(a.low), mix8<H>(a.high)};
}
HAQ_TARGET inline Vec vec_mul(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
HAQ_TARGET inline Vec vec_div(Vec a, Vec b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
HAQ_TARGET inline Vec vec_min(Vec a, Vec b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
HAQ_TARGET inline __m256 power_of_two(__m256 shifted) {
  const __m256i n = _mm256_add_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(n, 23));
}
// 2^n of the n that `kRound + n` holds
HAQ_TARGET inline Vec vec_power_of_two(Vec shifted) { return {power_of_two(shifted.low), power_of_two(shifted.high)}; }
HAQ_TARGET inline Vec vec_max(Vec a, Vec b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }

HAQ_TARGET inline __m256 load8(const float* x) { return _mm256_loadu_ps(x); }
HAQ_TARGET inline __m256 load8(const uint16_t* x) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

HAQ_TARGET inline Vec vec_bfloat16(const uint16_t* x) { return {load8(x), load8(x + 8)}; }
HAQ_TARGET inline __m256 half8(const uint16_t* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
HAQ_TARGET inline Vec vec_float16(const uint16_t* x) { return {half8(x), half8(x + 8)}; }
HAQ_TARGET inline float vec_sum(Vec a) {
  const __m256 eight = _mm256_add_ps(a.low, a.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
HAQ_TARGET inline float vec_most(Vec a) {
  const __m256 eight = _mm256_max_ps(a.low, a.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

template <bool Clamp>
HAQ_TARGET inline __m256 clamp127(__m256 v) {
  if (!Clamp) return v;
  v = _mm256_and_ps(v, _mm256_cmp_ps(v, v, _CMP_ORD_Q));
  return _mm256_min_ps(_mm256_max_ps(v, _mm256_set1_ps(-127.0f)), _mm256_set1_ps(127.0f));
}

HAQ_TARGET inline int32_t sum8(__m256i v) { // of eight int32
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

// Rounds 32 values, half to even, and stores them; returns their sums. Packing works within 128-bit halves,
// hence the permutations.
HAQ_TARGET inline __m256i store32(const __m256 v[4], int8_t* out) {
  const __m256i a = _mm256_cvtps_epi32(v[0]), b = _mm256_cvtps_epi32(v[1]);
  const __m256i c = _mm256_cvtps_epi32(v[2]), d = _mm256_cvtps_epi32(v[3]);
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(bytes, order));
  return _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
}
HAQ_TARGET inline __m256i store32(const __m256 v[4], int16_t* out) {
  const __m256i a = _mm256_cvtps_epi32(v[0]), b = _mm256_cvtps_epi32(v[1]);
  const __m256i c = _mm256_cvtps_epi32(v[2]), d = _mm256_cvtps_epi32(v[3]);
  auto* to = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(to, _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8));
  _mm256_storeu_si256(to + 1, _mm256_permute4x64_epi64(_mm256_packs_epi32(c, d), 0xd8));
  return _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
}

// The second half of 64 values: after the first, or in the next chunk of int16.
HAQ_TARGET inline int8_t* second_half(int8_t* out, int64_t) { return out + 32; }
HAQ_TARGET inline int16_t* second_half(int16_t* out, int64_t stride) { return out + stride; }

template <bool Clamp, class T, class Out>
HAQ_TARGET int32_t quantize_chunk(const T* x, float scale, float inverse, bool fast, Out* out,
                                  int64_t stride) {
  const __m256 round = _mm256_set1_ps(kRound), sign = _mm256_set1_ps(-0.0f);
  __m256 v[8];
  __m256 farthest = _mm256_setzero_ps();
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    v[i] = clamp127<Clamp>(_mm256_mul_ps(load8(x + 8 * i), _mm256_set1_ps(inverse)));
    const __m256 integer = _mm256_sub_ps(_mm256_add_ps(v[i], round), round);
    farthest = _mm256_max_ps(farthest, _mm256_andnot_ps(sign, _mm256_sub_ps(v[i], integer)));
  }
  const __m256 unsure = _mm256_cmp_ps(farthest, _mm256_set1_ps(kSure), _CMP_GT_OQ);
  if (!fast || _mm256_movemask_ps(unsure) != 0)
    for (int i = 0; i < 8; ++i)
      v[i] = clamp127<Clamp>(_mm256_div_ps(load8(x + 8 * i), _mm256_set1_ps(scale)));
  const __m256i sum = store32(v, out);
  return sum8(_mm256_add_epi32(sum, store32(v + 4, second_half(out, stride))));
}

HAQ_TARGET inline int32_t copy_chunk(const int8_t* x, int8_t* out, int64_t) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 32));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32), b);
  const __m256i one = _mm256_set1_epi8(1); // sums of two fit 16 bits by far
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(one, a), _mm256_maddubs_epi16(one, b));
  return sum8(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

HAQ_TARGET inline int32_t copy_chunk(const int8_t* x, int16_t* out, int64_t stride) {
  __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 16 * i));
    const __m256i words = _mm256_cvtepi8_epi16(bytes);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i / 2 * stride + i % 2 * 16), words);
    sum = _mm256_add_epi16(sum, words);
  }
  return sum8(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
}

} // namespace
} // namespace haq
