// What is done row by row - quantisation, epilogue, SiLU - in plain loops that the compiler vectorises for the
// target at hand. Each instruction set's source defines HAQ_TARGET and HAQ_STAGED (the type of a staged
// activation) and includes this once: everything here has internal linkage.
#include <cstring>

#include "kernels.h"

namespace haq {
namespace {

HAQ_TARGET inline float from_bits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

HAQ_TARGET inline uint32_t to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

HAQ_TARGET inline float load(const float* x) { return *x; }
HAQ_TARGET inline float load(const uint16_t* x) { return from_bits(static_cast<uint32_t>(*x) << 16); }

HAQ_TARGET inline void store(float* out, float v) { *out = v; }

HAQ_TARGET inline void store(uint16_t* out, float v) { // to bfloat16, to nearest even; NaN stays NaN
  const uint32_t u = to_bits(v);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  *out = static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// max|x| / 127, or 1 where that is 0. Magnitudes are compared as integers, so that a NaN or an infinity
// survives into the scale and from there into the outputs.
template <class T>
HAQ_TARGET float row_scale(const T* x, int64_t k) {
  int32_t most = 0;
  for (int64_t i = 0; i < k; ++i) {
    const int32_t magnitude = static_cast<int32_t>(to_bits(load(x + i)) & 0x7fffffff);
    most = magnitude > most ? magnitude : most;
  }
  const float scale = from_bits(static_cast<uint32_t>(most)) / 127.0f;
  return scale == 0.0f ? 1.0f : scale;
}

constexpr float kRound = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer, half to even

HAQ_TARGET inline float clamp127(float v) {
  v = v < -127.0f ? -127.0f : v;
  return v > 127.0f ? 127.0f : v;
}

// q = clamp(round_half_even(x / scale)) of 64 values. x * (1 / scale) is within 3 * 2^-24 * 127 < 2.3e-5 of
// the correctly rounded quotient, so it rounds alike unless it is that near to a half: then divide.
template <class T>
HAQ_TARGET void quantize_chunk(const T* x, float scale, float inverse, bool use_inverse, int8_t* q) {
  if (use_inverse) {
    int32_t unsure = 0;
    for (int i = 0; i < kChunk; ++i) {
      const float v = clamp127(load(x + i) * inverse);
      const float rounded = v + kRound;
      const float distance = v - (rounded - kRound);
      unsure |= (distance > 0.49997f) | (distance < -0.49997f);
      q[i] = static_cast<int8_t>(to_bits(rounded));
    }
    if (!unsure) return;
  }
  for (int i = 0; i < kChunk; ++i)
    q[i] = static_cast<int8_t>(to_bits(clamp127(load(x + i) / scale) + kRound));
}

HAQ_TARGET inline bool inverse_is_accurate(float scale) { return scale > 1e-36f && scale < 1e36f; }

template <class T>
HAQ_TARGET void quantize_row(const T* x, int64_t k, float static_scale, int8_t* out, float* scale) {
  *scale = static_scale != 0.0f ? static_scale : row_scale(x, k);
  const float inverse = 1.0f / *scale;
  const bool fast = inverse_is_accurate(*scale);
  int64_t i = 0;
  for (; i + kChunk <= k; i += kChunk) quantize_chunk(x + i, *scale, inverse, fast, out + i);
  if (i < k) {
    T rest[kChunk] = {};
    int8_t q[kChunk];
    std::memcpy(rest, x + i, static_cast<size_t>(k - i) * sizeof(T));
    quantize_chunk(rest, *scale, inverse, fast, q);
    std::memcpy(out + i, q, static_cast<size_t>(k - i));
  }
}

HAQ_TARGET void quantize(const void* x, Kind kind, int64_t k, float static_scale, int8_t* out, float* scale) {
  if (kind == kFloat)
    quantize_row(static_cast<const float*>(x), k, static_scale, out, scale);
  else
    quantize_row(static_cast<const uint16_t*>(x), k, static_scale, out, scale);
}

// 64 quantised values into their tile; returns their sum.
HAQ_TARGET inline int32_t stage_chunk(const int8_t* q, HAQ_STAGED* out, int64_t chunk_stride) {
  constexpr int per_chunk = kChunk / static_cast<int>(sizeof(HAQ_STAGED));
  int32_t sum = 0;
  for (int part = 0; part < kChunk / per_chunk; ++part)
    for (int i = 0; i < per_chunk; ++i) {
      out[part * chunk_stride + i] = q[part * per_chunk + i];
      sum += q[part * per_chunk + i];
    }
  return sum;
}

template <class T>
HAQ_TARGET int32_t stage_row(const T* x, int64_t k, float scale, HAQ_STAGED* out, int64_t chunk_stride) {
  const float inverse = 1.0f / scale;
  const bool fast = inverse_is_accurate(scale);
  int32_t sum = 0;
  for (int64_t i = 0; i < k; i += kChunk) {
    int8_t q[kChunk];
    if (i + kChunk <= k) {
      quantize_chunk(x + i, scale, inverse, fast, q);
    } else {
      T rest[kChunk] = {};
      std::memcpy(rest, x + i, static_cast<size_t>(k - i) * sizeof(T));
      quantize_chunk(rest, scale, inverse, fast, q);
    }
    sum += stage_chunk(q, out, chunk_stride);
    out += static_cast<int64_t>(sizeof(HAQ_STAGED)) * chunk_stride;
  }
  return sum;
}

template <>
HAQ_TARGET int32_t stage_row(const int8_t* x, int64_t k, float, HAQ_STAGED* out, int64_t chunk_stride) {
  int32_t sum = 0;
  for (int64_t i = 0; i < k; i += kChunk) {
    int8_t q[kChunk] = {};
    std::memcpy(q, x + i, static_cast<size_t>(k - i < kChunk ? k - i : kChunk));
    sum += stage_chunk(q, out, chunk_stride);
    out += static_cast<int64_t>(sizeof(HAQ_STAGED)) * chunk_stride;
  }
  return sum;
}

template <int RowTile>
HAQ_TARGET void stage(const void* x, Kind kind, int64_t k, float static_scale, uint8_t* out, float* scale,
                      int32_t* sum) {
  constexpr int64_t stride = RowTile * kChunk / static_cast<int64_t>(sizeof(HAQ_STAGED));
  auto* staged = reinterpret_cast<HAQ_STAGED*>(out);
  if (kind == kInt8) {
    *sum = stage_row(static_cast<const int8_t*>(x), k, 1.0f, staged, stride);
  } else if (kind == kFloat) {
    const auto* row = static_cast<const float*>(x);
    *scale = static_scale != 0.0f ? static_scale : row_scale(row, k);
    *sum = stage_row(row, k, *scale, staged, stride);
  } else {
    const auto* row = static_cast<const uint16_t*>(x);
    *scale = static_scale != 0.0f ? static_scale : row_scale(row, k);
    *sum = stage_row(row, k, *scale, staged, stride);
  }
}

template <class T>
HAQ_TARGET inline void finish_row(const int32_t* acc, int count, int32_t offset, float row_scale,
                                  const float* column_scale, const float* bias, T* out) {
  for (int c = 0; c < count; ++c) {
    const int32_t sum = static_cast<int32_t>(static_cast<uint32_t>(acc[c]) - static_cast<uint32_t>(offset));
    const float y = (static_cast<float>(sum) * row_scale) * column_scale[c];
    store(out + c, bias ? y + bias[c] : y);
  }
}

template <class T>
HAQ_TARGET inline void finish_rows(const int32_t* acc, int rows, int64_t row, int64_t column,
                                   const Epilogue& e) {
  const int64_t left = e.columns - column;
  const float* scale = e.column_scale + column;
  const float* bias = e.bias ? e.bias + column : nullptr;
  for (int r = 0; r < rows; ++r, acc += kPanel) {
    T* out = static_cast<T*>(e.out) + (row + r) * e.columns + column;
    const int32_t offset = static_cast<int32_t>(128u * static_cast<uint32_t>(e.row_sum[row + r]));
    if (left >= kPanel) // constant counts make straight vector code
      bias ? finish_row(acc, kPanel, offset, e.row_scale[row + r], scale, bias, out)
           : finish_row(acc, kPanel, offset, e.row_scale[row + r], scale, nullptr, out);
    else
      finish_row(acc, static_cast<int>(left), offset, e.row_scale[row + r], scale, bias, out);
  }
}

HAQ_TARGET void finish(const int32_t* acc, int rows, int64_t row, int64_t column, const Epilogue& e) {
  if (e.kind == kFloat) return finish_rows<float>(acc, rows, row, column, e);
  if (e.kind == kBFloat16) return finish_rows<uint16_t>(acc, rows, row, column, e);
  const int count = static_cast<int>(e.columns - column < kPanel ? e.columns - column : kPanel);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < count; ++c)
      static_cast<int32_t*>(e.out)[(row + r) * e.columns + column + c] = static_cast<int32_t>(
          static_cast<uint32_t>(acc[r * kPanel + c]) - 128u * static_cast<uint32_t>(e.row_sum[row + r]));
}

// exp by 2^n * polynomial (Cephes' coefficients), within 2 ulp; the range keeps 2^n a normal number.
HAQ_TARGET inline float exp_poly(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  return p * from_bits((to_bits(shifted) + 127u) << 23);
}

template <class T>
HAQ_TARGET inline void silu_mul_row(const T* gate, const T* up, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = load(gate + i);
    store(out + i, g / (1.0f + exp_poly(-g)) * load(up + i));
  }
}

HAQ_TARGET void silu_mul(const void* gate, const void* up, Kind kind, int64_t n, void* out) {
  if (kind == kFloat)
    silu_mul_row(static_cast<const float*>(gate), static_cast<const float*>(up), n, static_cast<float*>(out));
  else
    silu_mul_row(static_cast<const uint16_t*>(gate), static_cast<const uint16_t*>(up), n,
                 static_cast<uint16_t*>(out));
}

HAQ_TARGET uint64_t read(const uint8_t* data, int64_t bytes) {
  uint64_t lanes[32] = {}, sum = 0;
  for (int64_t i = 0; i + 256 <= bytes; i += 256)
    for (int j = 0; j < 32; ++j) {
      uint64_t word;
      std::memcpy(&word, data + i + 8 * j, 8);
      lanes[j] += word;
    }
  for (const uint64_t lane : lanes) sum += lane;
  return sum;
}

} // namespace
} // namespace haq
