// Decode with 4-bit weights: the W4A8 product for at most ROWS (1, 2, 4 or 8) rows of x, bound by the reading of w.
//
// out (M, N) = (sum over groups g of (x . w^T in g) * sw (g, N)) * sx (M) + bias (N); w packed (N, K / 2), four_bit.cuh.
// A warp computes four columns, eight lanes each: a lane reads one block of 32 columns of K a step and multiplies it with
// every row of x by dp4a. The lanes of a group add their exact sums; the groups then are added as floats, in the order
// of the columns, by all lanes alike. K a multiple of 32, `group` a multiple of 32 of at most 128, or K.
#include "four_bit.cuh"

#define GEMV4_WARPS 4
#define LANES 8  // of a column
#define COLUMNS (32 / LANES)

template <int ROWS, class Out>
__device__ __forceinline__ void gemv4(const i8* x, const i8* w, const float* sx, const float* sw, const float* bias,
                                      Out* out, int M, int N, int K, int group) {
  int lane = threadIdx.x & 31, part = lane % LANES, first_lane = lane - part;
  int column = (blockIdx.x * GEMV4_WARPS + (threadIdx.x >> 5)) * COLUMNS + lane / LANES;
  // A missing last row or column repeats the one before it; its sum is not stored.
  int own = min(column, N - 1);
  const i8* w_row = w + (long long)own * (K / 2);
  bool whole = group >= K;  // one scale a row
  int sharing = whole ? LANES : group / BLOCK_COLUMNS;  // lanes that share a group
  const float* scale = sw + (long long)(part / sharing) * N + own;

  int acc[ROWS] = {};
  float total[ROWS] = {};
#pragma unroll(ROWS <= 2 ? 4 : ROWS == 4 ? 2 : 1)
  for (int k0 = 0; k0 < K; k0 += LANES * BLOCK_COLUMNS) {  // the same for all lanes, which exchange sums
    int k = k0 + part * BLOCK_COLUMNS;
    float group_scale = 0.0f;  // no group beyond K: adding +0 changes nothing
    if (k < K) {
      uint4 weights = *(const uint4*)(w_row + k / 2);
      group_scale = *scale;
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const int4* inputs = (const int4*)(x + (long long)min(r, M - 1) * K + k);
        acc[r] = dot_block(weights, inputs[0], inputs[1], acc[r]);
      }
    }
    if (whole && k0 + LANES * BLOCK_COLUMNS < K) continue;
    if (!whole) scale += (long long)(LANES / sharing) * N;
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes >>= 1)
      if (lanes < sharing)
#pragma unroll
        for (int r = 0; r < ROWS; r++) acc[r] += __shfl_xor_sync(0xffffffffu, acc[r], lanes);
    float term[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      term[r] = add_group(0.0f, true_sum(acc[r]), group_scale);
      acc[r] = 0;
    }
    for (int of = 0; of < LANES; of += sharing)
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        total[r] = __fadd_rn(total[r], __shfl_sync(0xffffffffu, term[r], first_lane + of));
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++)
    if (part == r && r < M && column < N)
      out[(long long)r * N + column] = from_float<Out>(epilogue(total[r], sx[r], 1.0f, bias_of(bias, column)));
}

#define FOUR_BIT_GEMV_KERNEL(name, ROWS, Out)                                                                      \
  extern "C" __global__ void __launch_bounds__(GEMV4_WARPS * 32, 4)                                                \
  name(const i8* __restrict__ x, const i8* __restrict__ w, const float* __restrict__ sx,                           \
       const float* __restrict__ sw, const float* __restrict__ bias, Out* __restrict__ out, int M, int N, int K,   \
       int group) {                                                                                                \
    gemv4<ROWS, Out>(x, w, sx, sw, bias, out, M, N, K, group);                                                     \
  }

FOUR_BIT_GEMV_KERNEL(gemv4_1_f16, 1, f16)
FOUR_BIT_GEMV_KERNEL(gemv4_1_bf16, 1, bf16)
FOUR_BIT_GEMV_KERNEL(gemv4_1_f32, 1, float)
FOUR_BIT_GEMV_KERNEL(gemv4_2_f16, 2, f16)
FOUR_BIT_GEMV_KERNEL(gemv4_2_bf16, 2, bf16)
FOUR_BIT_GEMV_KERNEL(gemv4_2_f32, 2, float)
FOUR_BIT_GEMV_KERNEL(gemv4_4_f16, 4, f16)
FOUR_BIT_GEMV_KERNEL(gemv4_4_bf16, 4, bf16)
FOUR_BIT_GEMV_KERNEL(gemv4_4_f32, 4, float)
FOUR_BIT_GEMV_KERNEL(gemv4_8_f16, 8, f16)
FOUR_BIT_GEMV_KERNEL(gemv4_8_bf16, 8, bf16)
FOUR_BIT_GEMV_KERNEL(gemv4_8_f32, 8, float)
