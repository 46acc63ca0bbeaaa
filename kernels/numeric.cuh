// The arithmetic contract, one function each: every backend gives the same bits.
//
// fp32 throughout, each operation rounded on its own (no fused multiply-add), true division.
#pragma once
#include "device.cuh"

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __uint_as_float((unsigned)v.bits << 16); }

__device__ __forceinline__ bf16 to_bf16(float v) {
  unsigned bits = __float_as_uint(v);
  bf16 out;
  if ((bits & 0x7fffffffu) > 0x7f800000u) out.bits = 0x7fc0;                          // NaN
  else out.bits = (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);      // half to even
  return out;
}

template <class T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ f16 from_float<f16>(float v) { return to_f16(v); }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float v) { return to_bf16(v); }

// The exact sum of 16 products, by dp4a.
__device__ __forceinline__ int dot_16(int4 a, int4 b, int acc) {
  acc = __dp4a(a.x, b.x, acc);
  acc = __dp4a(a.y, b.y, acc);
  acc = __dp4a(a.z, b.z, acc);
  return __dp4a(a.w, b.w, acc);
}

// max|x| / 127; a row of zeros (or one too small for a quotient) has scale 1.
__device__ __forceinline__ float scale_of(float largest) {
  float scale = __fdiv_rn(largest, 127.0f);
  return scale > 0.0f ? scale : 1.0f;
}

// Half to even; clamped as a float, since converting a NaN or a value out of range is not defined everywhere.
__device__ __forceinline__ int quantized(float x, float scale) {
  return __float2int_rn(fmaxf(-127.0f, fminf(127.0f, __fdiv_rn(x, scale))));
}

// (acc * sx) * sw + bias, in this order.
__device__ __forceinline__ float epilogue(int acc, float sx, float sw, float bias) {
  return __fadd_rn(__fmul_rn(__fmul_rn(__int2float_rn(acc), sx), sw), bias);
}

// 4-bit weights: the groups are added as floats, in order, each with its scale; that sum has its own epilogue.
__device__ __forceinline__ float add_group(float total, int acc, float sw) {
  return __fadd_rn(total, __fmul_rn(__int2float_rn(acc), sw));
}
__device__ __forceinline__ float epilogue(float total, float sx, float, float bias) {
  return __fadd_rn(__fmul_rn(total, sx), bias);
}

// No bias is a bias of -0, the number that changes no bit of what it is added to (+0 would turn -0 into +0).
__device__ __forceinline__ float bias_of(const float* bias, int column) { return bias ? bias[column] : -0.0f; }

// exp(x) of multiplications and additions only, so that its bits don't depend on a math library: x = n ln 2 + r with
// ln 2 in two parts (n * 355/512 is exact), the degree-5 polynomial of Cephes' expf, then 2^n from its bits.
__device__ __forceinline__ float exp_exactly_specified(float x) {
  x = fmaxf(-87.0f, fminf(88.0f, x));
  int n = __float2int_rn(__fmul_rn(x, 1.44269504f));
  float fn = __int2float_rn(n);
  float r = __fsub_rn(__fsub_rn(x, __fmul_rn(fn, 0.693359375f)), __fmul_rn(fn, -2.12194440e-4f));
  float p = 1.9875691500e-4f;
  p = __fadd_rn(__fmul_rn(p, r), 1.3981999507e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 8.3334519073e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 4.1665795894e-2f);
  p = __fadd_rn(__fmul_rn(p, r), 1.6666665459e-1f);
  p = __fadd_rn(__fmul_rn(p, r), 5.0000001201e-1f);
  float y = __fadd_rn(__fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), r), 1.0f);
  return __fmul_rn(y, __uint_as_float((unsigned)(n + 127) << 23));
}

__device__ __forceinline__ float silu(float x) {
  return __fdiv_rn(x, __fadd_rn(1.0f, exp_exactly_specified(-x)));
}
