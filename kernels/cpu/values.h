// Single values: their bits, types and rounding. Included by the chunk headers; HAQ_TARGET is the function attribute of
// the instruction set being compiled, and everything has internal linkage.
#pragma once
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

// The 64 bytes at `line` are about to be read, of many that come from memory one after the other. Those further on are
// asked for into the second-level cache (for the first, fewer requests can be under way than memory takes). The next
// are asked for into the first: a line that is asked for twice sets off the processor's own prefetching as well.
constexpr int64_t kAhead = 3584, kNext = 96; // bytes
HAQ_TARGET inline void ask_ahead(const void* line) {
  __builtin_prefetch(static_cast<const char*>(line) + kAhead, 0, 2);
  __builtin_prefetch(static_cast<const char*>(line) + kNext, 0, 3);
}

constexpr float kRound = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer, half to even

// Quantisation multiplies by 1 / scale instead of dividing: the product is within 3 * 2^-24 * 127 < 2.3e-5 of
// the correctly rounded quotient, so both round to the same integer unless it lies that near to a half. Chunks
// with a value further than this from its integer are done again with divisions.
constexpr float kSure = 0.49997f;

HAQ_TARGET inline float clamp127(float v) { // NaN becomes 0, as in torch
  v = v == v ? v : 0.0f;
  v = v < -127.0f ? -127.0f : v;
  return v > 127.0f ? 127.0f : v;
}

} // namespace
} // namespace haq
