// What is done row by row - quantisation, epilogue, SiLU - for staged activations of type HAQ_STAGED. Included through
// instruction_set.h. The loops here are plain: the compiler vectorises them for the target.
#include "values.h"

namespace haq {
namespace {

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

HAQ_TARGET inline bool inverse_is_accurate(float scale) { return scale > 1e-36f && scale < 1e36f; }

template <class T>
HAQ_TARGET void quantize_row(const T* x, int64_t k, float static_scale, int8_t* out, float* scale) {
  *scale = static_scale != 0.0f ? static_scale : row_scale(x, k);
  const float inverse = 1.0f / *scale;
  const bool fast = inverse_is_accurate(*scale);
  int64_t i = 0;
  for (; i + kChunk <= k; i += kChunk) quantize_chunk<true>(x + i, *scale, inverse, fast, out + i, 0);
  if (i < k) {
    T rest[kChunk] = {};
    int8_t q[kChunk];
    std::memcpy(rest, x + i, static_cast<size_t>(k - i) * sizeof(T));
    quantize_chunk<true>(rest, *scale, inverse, fast, q, 0);
    std::memcpy(out + i, q, static_cast<size_t>(k - i));
  }
}

HAQ_TARGET void quantize(const void* x, Kind kind, int64_t k, float static_scale, int8_t* out, float* scale) {
  if (kind == kFloat)
    quantize_row(static_cast<const float*>(x), k, static_scale, out, scale);
  else
    quantize_row(static_cast<const uint16_t*>(x), k, static_scale, out, scale);
}

template <bool Clamp, class T>
HAQ_TARGET int32_t stage_chunks(const T* x, int64_t k, float scale, bool fast, HAQ_STAGED* out,
                                int64_t stride) {
  const float inverse = 1.0f / scale;
  int32_t sum = 0;
  int64_t i = 0;
  for (; i + kChunk <= k; i += kChunk, out += sizeof(HAQ_STAGED) * stride)
    sum += quantize_chunk<Clamp>(x + i, scale, inverse, fast, out, stride);
  if (i == k) return sum;
  T rest[kChunk] = {};
  std::memcpy(rest, x + i, static_cast<size_t>(k - i) * sizeof(T));
  return sum + quantize_chunk<Clamp>(rest, scale, inverse, fast, out, stride);
}

template <class T>
HAQ_TARGET int32_t stage_row(const T* x, int64_t k, float static_scale, float* scale, HAQ_STAGED* out,
                             int64_t stride) {
  const bool dynamic = static_scale == 0.0f;
  *scale = dynamic ? row_scale(x, k) : static_scale;
  const bool fast = inverse_is_accurate(*scale); // not so for NaN, infinite and tiny scales
  return dynamic && fast ? stage_chunks<false>(x, k, *scale, fast, out, stride)
                         : stage_chunks<true>(x, k, *scale, fast, out, stride);
}

HAQ_TARGET int32_t copy_row(const int8_t* x, int64_t k, HAQ_STAGED* out, int64_t stride) {
  int32_t sum = 0;
  int64_t i = 0;
  for (; i + kChunk <= k; i += kChunk, out += sizeof(HAQ_STAGED) * stride)
    sum += copy_chunk(x + i, out, stride);
  if (i == k) return sum;
  int8_t rest[kChunk] = {};
  std::memcpy(rest, x + i, static_cast<size_t>(k - i));
  return sum + copy_chunk(rest, out, stride);
}

HAQ_TARGET void stage(const void* x, Kind kind, int64_t k, float static_scale, int64_t rows, uint8_t* out,
                      float* scale, int32_t* sum) {
  const int64_t stride = rows * kChunk / static_cast<int64_t>(sizeof(HAQ_STAGED)); // in elements
  auto* staged = reinterpret_cast<HAQ_STAGED*>(out);
  if (kind == kInt8)
    *sum = copy_row(static_cast<const int8_t*>(x), k, staged, stride);
  else if (kind == kFloat)
    *sum = stage_row(static_cast<const float*>(x), k, static_scale, scale, staged, stride);
  else
    *sum = stage_row(static_cast<const uint16_t*>(x), k, static_scale, scale, staged, stride);
}

template <class T>
HAQ_TARGET inline void finish_row(const int32_t* __restrict acc, int count, uint32_t offset, float row_scale,
                                  const float* __restrict column_scale, const float* __restrict bias,
                                  T* __restrict out) {
  for (int c = 0; c < count; ++c) {
    const auto sum = static_cast<int32_t>(static_cast<uint32_t>(acc[c]) - offset);
    const float y = (static_cast<float>(sum) * row_scale) * column_scale[c];
    store(out + c, bias ? y + bias[c] : y);
  }
}

HAQ_TARGET inline void finish_row(const int32_t* __restrict acc, int count, uint32_t offset, float,
                                  const float*, const float*, int32_t* __restrict out) {
  for (int c = 0; c < count; ++c) out[c] = static_cast<int32_t>(static_cast<uint32_t>(acc[c]) - offset);
}

template <class T>
HAQ_TARGET inline void finish_rows(const int32_t* acc, int rows, int64_t row, int64_t column,
                                   const Epilogue& e) {
  const int64_t left = e.columns - column;
  const float* scale = e.column_scale ? e.column_scale + column : nullptr;
  const float* bias = e.bias ? e.bias + column : nullptr;
  for (int r = 0; r < rows; ++r, acc += kPanel) {
    T* out = static_cast<T*>(e.out) + (row + r) * e.columns + column;
    const uint32_t offset = 128u * static_cast<uint32_t>(e.row_sum[row + r]);
    if (left >= kPanel && !bias) // constant counts make straight vector code
      finish_row(acc, kPanel, offset, e.row_scale[row + r], scale, nullptr, out);
    else if (left >= kPanel)
      finish_row(acc, kPanel, offset, e.row_scale[row + r], scale, bias, out);
    else
      finish_row(acc, static_cast<int>(left), offset, e.row_scale[row + r], scale, bias, out);
  }
}

HAQ_TARGET void finish(const int32_t* acc, int rows, int64_t row, int64_t column, const Epilogue& e) {
  if (e.kind == kInt32) return finish_rows<int32_t>(acc, rows, row, column, e);
  if (e.kind == kFloat) return finish_rows<float>(acc, rows, row, column, e);
  finish_rows<uint16_t>(acc, rows, row, column, e);
}

template <class T>
HAQ_TARGET inline void finish4_row(const float* __restrict sums, int count, float row_scale,
                                   const float* __restrict bias, T* __restrict out) {
  for (int c = 0; c < count; ++c) {
    const float y = sums[c] * row_scale;
    store(out + c, bias ? y + bias[c] : y);
  }
}

template <class T>
HAQ_TARGET inline void finish4_rows(const float* sums, int rows, int64_t row, int64_t column, const Epilogue& e) {
  const int count = static_cast<int>(e.columns - column < kPanel ? e.columns - column : kPanel);
  const float* bias = e.bias ? e.bias + column : nullptr;
  for (int r = 0; r < rows; ++r, sums += kPanel) {
    T* out = static_cast<T*>(e.out) + (row + r) * e.columns + column;
    if (count == kPanel && !bias)
      finish4_row(sums, kPanel, e.row_scale[row + r], nullptr, out);
    else
      finish4_row(sums, count, e.row_scale[row + r], bias, out);
  }
}

HAQ_TARGET void finish4(const float* sums, int rows, int64_t row, int64_t column, const Epilogue& e) {
  if (e.kind == kFloat) return finish4_rows<float>(sums, rows, row, column, e);
  finish4_rows<uint16_t>(sums, rows, row, column, e);
}

HAQ_TARGET void offsets(const uint8_t* staged, int64_t rows, int64_t groups, int64_t span, int32_t* offset) {
  constexpr int64_t chunk = kChunk / static_cast<int64_t>(sizeof(HAQ_STAGED)) / kGroup; // groups
  constexpr int64_t step = 8; // groups: the smallest span
  for (int64_t first = 0; first < groups; first += span, ++offset) {
    int32_t sum = 0;
    for (int64_t g = first; g < first + span && g < groups; g += step) { // beyond the last are zeros
      const auto* q = reinterpret_cast<const HAQ_STAGED*>(staged + g / chunk * rows * kChunk) + g % chunk * kGroup;
      for (int i = 0; i < step * kGroup; ++i) sum += q[i];
    }
    *offset = 8 * sum;
  }
}

// exp by 2^n * polynomial (Cephes' coefficients), within 2 ulp; the range keeps 2^n a normal number. Operation for
// operation what kernels/numeric.cuh does, so that an expert has the same bits on a GPU and beside it.
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
  p = p * (r * r) + r + 1.0f;
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
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
    for (int j = 0; j < 256; j += 64) ask_ahead(data + i + j);
    for (int j = 0; j < 32; ++j) {
      uint64_t word;
      std::memcpy(&word, data + i + 8 * j, 8);
      lanes[j] += word;
    }
  }
  for (const uint64_t lane : lanes) sum += lane;
  return sum;
}

} // namespace
} // namespace haq
