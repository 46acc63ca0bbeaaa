// The chunk operations of chunk_scalar.h for AVX-512.
#pragma once
#include <immintrin.h>

#include "values.h"

namespace haq {
namespace {

using Vec = __m512;
HAQ_TARGET inline Vec vec_load(const float* x) { return _mm512_loadu_ps(x); }
HAQ_TARGET inline void vec_store(float* out, Vec v) { _mm512_storeu_ps(out, v); }
HAQ_TARGET inline Vec vec_set(float x) { return _mm512_set1_ps(x); }
HAQ_TARGET inline Vec vec_fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
HAQ_TARGET inline Vec vec_add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
HAQ_TARGET inline Vec vec_sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
// In each pair of lanes i and i + H: their sum and their difference. A product with 1 or -1 is exact, so a sum is rounded
// once.
template <int H>
HAQ_TARGET inline Vec vec_mix(Vec a) {
  constexpr __mmask16 second = H == 8 ? 0xff00 : H == 4 ? 0xf0f0 : H == 2 ? 0xcccc : 0xaaaa;
  const __m512 sign = _mm512_mask_blend_ps(second, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
  __m512 other;
  if constexpr (H >= 4) other = _mm512_shuffle_f32x4(a, a, H == 8 ? 0x4e : 0xb1);
  else other = _mm512_permute_ps(a, H == 2 ? 0x4e : 0xb1);
  return _mm512_fmadd_ps(a, sign, other);
}
HAQ_TARGET inline Vec vec_mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
HAQ_TARGET inline Vec vec_div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
HAQ_TARGET inline Vec vec_min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
HAQ_TARGET inline Vec vec_power_of_two(Vec shifted) { // 2^n of the n that `kRound + n` holds
  const __m512i n = _mm512_add_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(n, 23));
}
HAQ_TARGET inline Vec vec_max(Vec a, Vec b) { return _mm512_max_ps(a, b); }

HAQ_TARGET inline __m512 load16(const float* x) { return _mm512_loadu_ps(x); }
HAQ_TARGET inline __m512 load16(const uint16_t* x) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

HAQ_TARGET inline Vec vec_bfloat16(const uint16_t* x) { return load16(x); }
HAQ_TARGET inline Vec vec_float16(const uint16_t* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
HAQ_TARGET inline float vec_sum(Vec a) { return _mm512_reduce_add_ps(a); }
HAQ_TARGET inline float vec_most(Vec a) { return _mm512_reduce_max_ps(a); }

template <bool Clamp>
HAQ_TARGET inline __m512 clamp127(__m512 v) {
  if (!Clamp) return v;
  v = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v);
  return _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(-127.0f)), _mm512_set1_ps(127.0f));
}

// The 64 bytes' sum.
HAQ_TARGET inline int32_t sum_of(__m512i bytes) {
  return _mm512_reduce_add_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), bytes));
}

template <bool Clamp, class T>
HAQ_TARGET int32_t quantize_chunk(const T* x, float scale, float inverse, bool fast, int8_t* out, int64_t) {
  constexpr int nearest_even = 0, larger_magnitude = 0x0b;
  __m512 v[4];
  __m512 farthest = _mm512_setzero_ps(); // from an integer
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = clamp127<Clamp>(_mm512_mul_ps(load16(x + 16 * i), _mm512_set1_ps(inverse)));
    farthest = _mm512_range_ps(farthest, _mm512_reduce_ps(v[i], nearest_even), larger_magnitude);
  }
  if (!fast || _mm512_cmp_ps_mask(farthest, _mm512_set1_ps(kSure), _CMP_GT_OQ) != 0)
    for (int i = 0; i < 4; ++i)
      v[i] = clamp127<Clamp>(_mm512_div_ps(load16(x + 16 * i), _mm512_set1_ps(scale)));
  __m512i q[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) q[i] = _mm512_cvtps_epi32(v[i]); // rounds, half to even
  const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
  // Packing works within 128 bits: each quarter holds 4 values of every q.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i in_order = _mm512_permutexvar_epi32(order, bytes);
  _mm512_storeu_si512(out, in_order);
  return sum_of(in_order);
}

HAQ_TARGET inline int32_t copy_chunk(const int8_t* x, int8_t* out, int64_t) {
  const __m512i values = _mm512_loadu_si512(x);
  _mm512_storeu_si512(out, values);
  return sum_of(values);
}

} // namespace
} // namespace haq
