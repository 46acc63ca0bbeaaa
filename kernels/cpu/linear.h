// An int8 linear as the layers' code takes it.
#pragma once
#include "kernels.h"

namespace haq {

// As haq_lab/runtime/layer_parts.py fills it in (ctypes): all fields are 8 bytes, but for those named float.
struct Linear {
  const uint8_t* packed;     // (n, k)
  const float* scale;        // (n,), or (groups, n)
  const float* bias;         // (n,) or null
  int64_t n, k;
  int64_t group;             // 0: 8-bit weights; else 4-bit, and so many columns share a scale
  float activation_scale;    // 0: a scale per row
  int64_t rotation;          // block of its input's transform (hadamard.h); at most 1: none
};

} // namespace haq
