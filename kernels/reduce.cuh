// Reductions over a warp and over a block. The order of additions is fixed: butterfly over the lanes (16, 8, 4, 2, 1),
// then the same over the warps' results, so that a sum has the same bits on every run.
#pragma once
#include "device.cuh"

struct Sum { static __device__ __forceinline__ float of(float a, float b) { return __fadd_rn(a, b); } };
struct Max { static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); } };

template <class Op> __device__ __forceinline__ float warp_reduce(float v) {
  for (int lanes = 16; lanes > 0; lanes >>= 1) v = Op::of(v, __shfl_xor_sync(0xffffffffu, v, lanes));
  return v;
}

// Every thread of the block gets the result. Uses the first 128 bytes of shared memory. 0 must be neutral for Op.
template <class Op> __device__ __forceinline__ float block_reduce(float v) {
  DYNAMIC_SHARED(shared);
  float* scratch = (float*)shared;  // one a warp
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  v = warp_reduce<Op>(v);
  if (lane == 0) scratch[warp] = v;
  __syncthreads();  // all warps' results are there
  v = warp_reduce<Op>(lane < warps ? scratch[lane] : 0.0f);
  __syncthreads();  // all have read them: the next reduction may overwrite scratch
  return v;
}
