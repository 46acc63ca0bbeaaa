// The block Hadamard transform in front of a quantised input: haq_lab/int8/rotation.py, bit for bit. Each sum has two
// terms and is rounded on its own, so the vector width changes no bit. Included through instruction_set.h.
#include "values.h"

namespace haq {
namespace {

constexpr int64_t kLanes = 16; // of a Vec

// Stages of `Half` vectors and more, between the N vectors.
template <int N, int Half>
HAQ_TARGET inline void mix_vectors(Vec* v) {
  if constexpr (Half < N) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      if (i & Half) continue;
      const Vec sum = vec_add(v[i], v[i + Half]);
      v[i + Half] = vec_sub(v[i], v[i + Half]);
      v[i] = sum;
    }
    mix_vectors<N, 2 * Half>(v);
  }
}

// All stages of 16 N channels, held in registers, and the scale. x and out may be the same.
template <int N>
HAQ_TARGET inline void transform_held(const float* x, Vec scale, float* out) {
  Vec v[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) v[i] = vec_mix<8>(vec_mix<4>(vec_mix<2>(vec_mix<1>(vec_load(x + kLanes * i)))));
  mix_vectors<N, 1>(v);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) vec_store(out + kLanes * i, vec_mul(v[i], scale));
}

template <int N>
HAQ_TARGET void transform_pieces(const float* x, int64_t k, float scale, float* out) {
  const Vec all = vec_set(scale);
  for (int64_t i = 0; i < k; i += kLanes * N) transform_held<N>(x + i, all, out + i);
}

// Blocks of 2, 4 or 8 channels, several in one vector; a row's rest one by one.
HAQ_TARGET inline void transform_small(const float* x, int64_t k, int64_t block, float scale, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    Vec v = vec_mix<1>(vec_load(x + i));
    if (block > 2) v = vec_mix<2>(v);
    if (block > 4) v = vec_mix<4>(v);
    vec_store(out + i, vec_mul(v, vec_set(scale)));
  }
  for (; i < k; i += block) {
    for (int64_t j = 0; j < block; ++j) out[i + j] = x[i + j];
    for (int64_t half = 1; half < block; half *= 2)
      for (int64_t j = 0; j < block; ++j) {
        if (j & half) continue;
        const float a = out[i + j], b = out[i + j + half];
        out[i + j] = a + b;
        out[i + j + half] = a - b;
      }
    for (int64_t j = 0; j < block; ++j) out[i + j] *= scale;
  }
}

// One more stage, of `half` channels, of blocks that do not fit into registers.
HAQ_TARGET inline void mix_memory(float* x, int64_t k, int64_t half, Vec scale) {
  for (int64_t i = 0; i < k; i += 2 * half)
    for (int64_t j = i; j < i + half; j += kLanes) {
      const Vec a = vec_load(x + j), b = vec_load(x + j + half);
      vec_store(x + j, vec_mul(vec_add(a, b), scale));
      vec_store(x + j + half, vec_mul(vec_sub(a, b), scale));
    }
}

HAQ_TARGET void transform(const float* x, int64_t k, int64_t block, float scale, float* out) {
  constexpr int64_t held = 8 * kLanes;
  if (block < 16) return transform_small(x, k, block, scale, out);
  if (block == 16) return transform_pieces<1>(x, k, scale, out);
  if (block == 32) return transform_pieces<2>(x, k, scale, out);
  if (block == 64) return transform_pieces<4>(x, k, scale, out);
  transform_pieces<8>(x, k, block == held ? scale : 1.0f, out);
  for (int64_t half = held; half < block; half *= 2) mix_memory(out, k, half, vec_set(2 * half == block ? scale : 1.0f));
}

// out (k,) = the transform of x (k,), kFloat or kBFloat16. `block` is a power of two that divides k, at least 2.
HAQ_TARGET void hadamard(const void* x, Kind kind, int64_t k, int64_t block, float scale, float* out) {
  if (kind == kFloat) return transform(static_cast<const float*>(x), k, block, scale, out);
  for (int64_t i = 0; i < k; ++i) out[i] = load(static_cast<const uint16_t*>(x) + i);
  transform(out, k, block, scale, out);
}

} // namespace
} // namespace haq
