// CUDA's names, types and intrinsics for a host compiler, over simt.h. device.cuh includes it under -DHAQ_HOST;
// __CUDA_ARCH__ (750 or 800) chooses the path as it does on the device.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt.h"

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())
#define DYNAMIC_SHARED(name) unsigned char* name = simt::dynamic_shared()

using std::max;
using std::min;

// Aligned as on the device, so that the undefined-behaviour sanitizer sees a misaligned vector access.
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Round to nearest, each operation by itself: the build has -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __int2float_rn(int x) { return (float)x; }
inline int __float2int_rn(float x) {
  if (!(x >= -2147483648.0f && x < 2147483648.0f)) simt::fail("float to int out of range");
  return (int)std::nearbyint(x);
}
inline unsigned __float_as_uint(float v) {
  unsigned bits;
  memcpy(&bits, &v, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
inline float to_float(f16 v) {
  _Float16 h;
  memcpy(&h, &v.bits, 2);
  return (float)h;
}
inline f16 to_f16(float v) {
  auto h = (_Float16)v;
  f16 out;
  memcpy(&out.bits, &h, 2);
  return out;
}

inline int __ffs(unsigned bits) { return __builtin_ffs((int)bits); }
inline int atomicAdd(int* p, int v) {  // blocks and threads run one at a time
  int before = *p;
  *p = (int)((unsigned)before + (unsigned)v);
  return before;
}
inline int __dp4a(int a, int b, int c) {
  unsigned sum = (unsigned)c;
  for (int i = 0; i < 4; i++) sum += (unsigned)((int)(int8_t)(a >> (8 * i)) * (int8_t)(b >> (8 * i)));
  simt::counters.dot_multiplies += 4;
  return (int)sum;
}

// The default argument is evaluated at the call: the line tells call sites apart.
inline void __syncthreads(int line = __builtin_LINE()) { simt::barrier(line); }
inline unsigned __ballot_sync(unsigned mask, bool predicate, int line = __builtin_LINE()) {
  return simt::ballot(mask, predicate, line);
}
inline int simt_lane() { return (int)(simt::thread_index().x & 31); }
template <class T> T shuffle_from(unsigned mask, T value, int source, int line) {
  static_assert(sizeof(T) == 4, "shuffles move 32 bits");
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = simt::shuffle(mask, bits, source, line);
  memcpy(&value, &bits, 4);
  return value;
}
template <class T> T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  return shuffle_from(mask, value, source & 31, line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  return shuffle_from(mask, value, simt_lane() ^ lanes, line);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, int distance, int line = __builtin_LINE()) {
  int source = simt_lane() - distance;
  return shuffle_from(mask, value, source < 0 ? simt_lane() : source, line);
}

// The primitives of device.cuh.
inline void load_matrix_x4(unsigned (&out)[4], const void* row, int line = __builtin_LINE()) {
  simt::load_matrix_x4(out, row, line);
}
inline void mma_8x8x16(int& d0, int& d1, unsigned a, unsigned b, int line = __builtin_LINE()) {
  int d[2] = {d0, d1};
  simt::mma_8x8x16(d, a, b, line);
  d0 = d[0];
  d1 = d[1];
}
inline void mma_16x8x32_instruction(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                    int line = __builtin_LINE()) {
  simt::mma_16x8x32(d, a, b, line);
}
inline void copy_async_16_instruction(void* shared, const void* global, bool valid) {
  simt::copy_async_16(shared, global, valid);
}
inline void copy_commit_instruction() { simt::copy_commit(); }
template <int PENDING> void copy_wait_instruction() { simt::copy_wait(PENDING); }
