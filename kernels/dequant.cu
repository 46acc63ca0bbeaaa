// int8 weights (rows, K) with one scale a row -> 16-bit floats: q * scale in fp32, then rounded.
// Used on load, where a device runs an expert in fp16. A thread 16 columns; grid x rows, y 2,048 columns each.
#include "numeric.cuh"

template <class Out> __device__ __forceinline__ void dequant(const i8* q, const float* scale, Out* out, int K) {
  int k = (blockIdx.y * 128 + threadIdx.x) * 16;
  if (k >= K) return;
  long long at = (long long)blockIdx.x * K + k;
  float s = scale[blockIdx.x];
  int4 packed = *(const int4*)(q + at);
  int words[4] = {packed.x, packed.y, packed.z, packed.w};
  unsigned halves[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int word = words[i >> 1] >> (16 * (i & 1));
    unsigned low = from_float<Out>(__fmul_rn(__int2float_rn((i8)(word & 0xff)), s)).bits;
    unsigned high = from_float<Out>(__fmul_rn(__int2float_rn((i8)((word >> 8) & 0xff)), s)).bits;
    halves[i] = low | high << 16;
  }
  ((uint4*)(out + at))[0] = make_uint4(halves[0], halves[1], halves[2], halves[3]);
  ((uint4*)(out + at))[1] = make_uint4(halves[4], halves[5], halves[6], halves[7]);
}

#define DEQUANT_KERNEL(name, Out)                                                                                  \
  extern "C" __global__ void __launch_bounds__(128)                                                                \
  name(const i8* __restrict__ q, const float* __restrict__ scale, Out* __restrict__ out, int K) {                  \
    dequant(q, scale, out, K);                                                                                     \
  }

DEQUANT_KERNEL(dequant_f16, f16)
DEQUANT_KERNEL(dequant_bf16, bf16)
