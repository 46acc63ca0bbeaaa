// The scalar chunk: 64 values quantised, or 64 int8 copied, to where they are staged. The vector versions do the
// same.
#pragma once
#include "values.h"

namespace haq {
namespace {

// q = clamp(round_half_even(x / scale)), written as one chunk; returns the sum of the 64. `fast` allows the
// inverse (see kSure); Clamp is false where no value can leave the range or be NaN. The int16 versions elsewhere write two chunks of 32, `stride` elements apart.
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
