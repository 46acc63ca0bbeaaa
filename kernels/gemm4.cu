// W4A8 product of many rows: the arguments and the contract of gemv4.cu, the tiles and the grid of gemm.cu.
//
// K is not split, because the groups are added in order.
#include "tile4.cuh"

template <class T, class Out>
__device__ __forceinline__ void gemm4(const i8* x, const i8* w, const float* sx, const float* sw, const float* bias,
                                      Out* out, int M, int N, int K, int group) {
  DYNAMIC_SHARED(shared);
  int m0 = blockIdx.x * T::BM, n0 = blockIdx.y * T::BN;
  int rows = min(T::BM, M - m0), columns = min(T::BN, N - n0);
  Operands in = {x + (long long)m0 * K, w + (long long)n0 * (K / 2), rows, columns, K, 0, K};
  GroupSums<T> sums(sw + n0, N, columns, K, group);
  multiply_tile<T>(shared, in, sums);
  Destination<Out> to = {sx + m0, sw + n0, bias ? bias + n0 : nullptr, out + (long long)m0 * N + n0, rows, columns, N};
  store_tile(sums.total, to, false);
}

#define FOUR_BIT_GEMM_KERNEL(name, T, Out)                                                                         \
  extern "C" __global__ void __launch_bounds__(T::THREADS, T::MIN_BLOCKS)                                          \
  name(const i8* __restrict__ x, const i8* __restrict__ w, const float* __restrict__ sx,                           \
       const float* __restrict__ sw, const float* __restrict__ bias, Out* __restrict__ out, int M, int N, int K,   \
       int group) {                                                                                                \
    gemm4<T, Out>(x, w, sx, sw, bias, out, M, N, K, group);                                                        \
  }

FOUR_BIT_GEMM_KERNEL(gemm4_64x64_f16, Tile4_64x64, f16)
FOUR_BIT_GEMM_KERNEL(gemm4_64x64_bf16, Tile4_64x64, bf16)
FOUR_BIT_GEMM_KERNEL(gemm4_64x64_f32, Tile4_64x64, float)
FOUR_BIT_GEMM_KERNEL(gemm4_16x64_f16, Tile4_16x64, f16)
FOUR_BIT_GEMM_KERNEL(gemm4_16x64_bf16, Tile4_16x64, bf16)
FOUR_BIT_GEMM_KERNEL(gemm4_16x64_f32, Tile4_16x64, float)
