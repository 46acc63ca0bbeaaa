// Decode: the W8A8 product for at most ROWS (1, 2, 4 or 8) rows of x, bound by the reading of w.
//
// A warp computes two columns: each lane reads 16 bytes of both rows of w, 512 bytes of K a step, multiplies them with
// every row of x by dp4a, and the lanes' sums are added at the end. Same arguments and contract as gemm.cu.
#include "numeric.cuh"

#define GEMV_WARPS 4
#define COLUMNS 2

__device__ __forceinline__ int warp_sum(int v) {
  for (int lanes = 16; lanes > 0; lanes >>= 1) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}


template <int ROWS, class Out>
__device__ __forceinline__ void gemv(const i8* x, const i8* w, const float* sx, const float* sw, const float* bias,
                                     Out* out, int M, int N, int K) {
  int lane = threadIdx.x & 31, column0 = (blockIdx.x * GEMV_WARPS + (threadIdx.x >> 5)) * COLUMNS;
  if (column0 >= N) return;  // the whole warp
  // A missing last row or column repeats the one before it; its sum is not stored.
  const i8* w_rows[COLUMNS];
  for (int c = 0; c < COLUMNS; c++) w_rows[c] = w + (long long)min(column0 + c, N - 1) * K;

  int acc[ROWS][COLUMNS] = {};
#pragma unroll(ROWS <= 2 ? 4 : ROWS == 4 ? 2 : 1)
  for (int k = lane * 16; k < K; k += 512) {
    int4 weights[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) weights[c] = *(const int4*)(w_rows[c] + k);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      int4 inputs = *(const int4*)(x + (long long)min(r, M - 1) * K + k);
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) acc[r][c] = dot_16(inputs, weights[c], acc[r][c]);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      int sum = warp_sum(acc[r][c]), column = column0 + c;
      if (lane == r * COLUMNS + c && r < M && column < N)
        out[(long long)r * N + column] = from_float<Out>(epilogue(sum, sx[r], sw[column], bias_of(bias, column)));
    }
}

#define GEMV_KERNEL(name, ROWS, Out)                                                                               \
  extern "C" __global__ void __launch_bounds__(GEMV_WARPS * 32, 4)                                                  \
  name(const i8* __restrict__ x, const i8* __restrict__ w, const float* __restrict__ sx,                           \
       const float* __restrict__ sw, const float* __restrict__ bias, Out* __restrict__ out, int M, int N, int K) { \
    gemv<ROWS, Out>(x, w, sx, sw, bias, out, M, N, K);                                                             \
  }

GEMV_KERNEL(gemv_1_f16, 1, f16)
GEMV_KERNEL(gemv_1_bf16, 1, bf16)
GEMV_KERNEL(gemv_1_f32, 1, float)
GEMV_KERNEL(gemv_2_f16, 2, f16)
GEMV_KERNEL(gemv_2_bf16, 2, bf16)
GEMV_KERNEL(gemv_2_f32, 2, float)
GEMV_KERNEL(gemv_4_f16, 4, f16)
GEMV_KERNEL(gemv_4_bf16, 4, bf16)
GEMV_KERNEL(gemv_4_f32, 4, float)
GEMV_KERNEL(gemv_8_f16, 8, f16)
GEMV_KERNEL(gemv_8_bf16, 8, bf16)
GEMV_KERNEL(gemv_8_f32, 8, float)
