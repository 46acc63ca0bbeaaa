// W8A8 product: out (M, N) = (x (M, K) . w (N, K)^T) * sx (M) * sw (N) + bias (N), or the raw int32 sums.
//
// Grid: x the tiles of M (neighbours share their rows of w, which then come from DRAM once), y the tiles of N, z the
// parts of K. Split K: each of gridDim.z blocks sums k_part columns (a multiple of 64); they add into int32 `out`,
// zeroed by the caller, and a finish kernel applies the epilogue. K a multiple of 16, M and N any.
#include "tile.cuh"

template <class T, class Out>
__device__ __forceinline__ void gemm(const i8* x, const i8* w, const float* sx, const float* sw, const float* bias,
                                     Out* out, int M, int N, int K, int k_part) {
  DYNAMIC_SHARED(shared);
  int m0 = blockIdx.x * T::BM, n0 = blockIdx.y * T::BN, k_begin = blockIdx.z * k_part;
  int rows = min(T::BM, M - m0), columns = min(T::BN, N - n0);
  Operands in = {x + (long long)m0 * K, w + (long long)n0 * K, rows, columns, K, k_begin, min(K, k_begin + k_part)};
  Accumulators<T> acc;
  multiply_tile<T>(shared, in, acc);
  Destination<Out> to = {sx + m0, sw + n0, bias ? bias + n0 : nullptr, out + (long long)m0 * N + n0, rows, columns, N};
  store_tile(acc, to, gridDim.z > 1);
}

#define GEMM_KERNEL(name, T, Out)                                                                                  \
  extern "C" __global__ void __launch_bounds__(T::THREADS, T::MIN_BLOCKS)                                          \
  name(const i8* __restrict__ x, const i8* __restrict__ w, const float* __restrict__ sx,                           \
       const float* __restrict__ sw, const float* __restrict__ bias, Out* __restrict__ out, int M, int N, int K,   \
       int k_part) {                                                                                               \
    gemm<T, Out>(x, w, sx, sw, bias, out, M, N, K, k_part);                                                        \
  }

// The epilogue on its own; a thread an element, grid x over columns, y over rows.
#define FINISH_KERNEL(name, Out)                                                                                   \
  extern "C" __global__ void __launch_bounds__(128)                                                                \
  name(const int* __restrict__ acc, const float* __restrict__ sx, const float* __restrict__ sw,                    \
       const float* __restrict__ bias, Out* __restrict__ out, int N) {                                             \
    int column = blockIdx.x * 128 + threadIdx.x, row = blockIdx.y;                                                 \
    long long i = (long long)row * N + column;                                                                     \
    if (column >= N) return;                                                                                       \
    out[i] = from_float<Out>(epilogue(acc[i], sx[row], sw[column], bias_of(bias, column)));                        \
  }

GEMM_KERNEL(gemm_128x128_f16, Tile128x128, f16)
GEMM_KERNEL(gemm_128x128_bf16, Tile128x128, bf16)
GEMM_KERNEL(gemm_128x128_f32, Tile128x128, float)
GEMM_KERNEL(gemm_128x128_i32, Tile128x128, int)
GEMM_KERNEL(gemm_64x64_f16, Tile64x64, f16)
GEMM_KERNEL(gemm_64x64_bf16, Tile64x64, bf16)
GEMM_KERNEL(gemm_64x64_f32, Tile64x64, float)
GEMM_KERNEL(gemm_64x64_i32, Tile64x64, int)
GEMM_KERNEL(gemm_16x64_f16, Tile16x64, f16)
GEMM_KERNEL(gemm_16x64_bf16, Tile16x64, bf16)
GEMM_KERNEL(gemm_16x64_f32, Tile16x64, float)
GEMM_KERNEL(gemm_16x64_i32, Tile16x64, int)
FINISH_KERNEL(finish_f16, f16)
FINISH_KERNEL(finish_bf16, bf16)
FINISH_KERNEL(finish_f32, float)
