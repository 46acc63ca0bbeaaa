// The experts' product in one launch: tokens sorted by expert, rows offsets[e] .. offsets[e + 1] of x (T, K) times
// w[e] (N, K), scales sw (E, N), bias (E, N) or null, out (T, N).
//
// The offsets stay on the device, so the host launches as many row tiles as there can be at most,
// T / BM + E, and each block finds its expert; blocks beyond the last tile leave at once. K a multiple of 16.
#include "experts.cuh"
#include "tile.cuh"

template <class T, class Out>
__device__ __forceinline__ void grouped(const i8* x, const i8* w, const int* offsets, const float* sx, const float* sw,
                                        const float* bias, Out* out, int experts, int N, int K) {
  DYNAMIC_SHARED(shared);
  Found found = find_tile<T::BM>(offsets, experts, blockIdx.x);
  if (found.expert < 0) return;  // the same for the whole block
  int n0 = blockIdx.y * T::BN, rows = found.end - found.begin, columns = min(T::BN, N - n0);
  long long channel = (long long)found.expert * N + n0;
  Operands in = {x + (long long)found.begin * K, w + channel * K, rows, columns, K, 0, K};
  Accumulators<T> acc;
  multiply_tile<T>(shared, in, acc);
  Destination<Out> to = {sx + found.begin, sw + channel, bias ? bias + channel : nullptr,
                         out + (long long)found.begin * N + n0, rows, columns, N};
  store_tile(acc, to, false);
}

#define GROUPED_KERNEL(name, T, Out)                                                                               \
  extern "C" __global__ void __launch_bounds__(T::THREADS, T::MIN_BLOCKS)                                          \
  name(const i8* __restrict__ x, const i8* __restrict__ w, const int* __restrict__ offsets,                        \
       const float* __restrict__ sx, const float* __restrict__ sw, const float* __restrict__ bias,                 \
       Out* __restrict__ out, int experts, int N, int K) {                                                         \
    grouped<T, Out>(x, w, offsets, sx, sw, bias, out, experts, N, K);                                              \
  }

GROUPED_KERNEL(grouped_128x128_f16, Tile128x128, f16)
GROUPED_KERNEL(grouped_128x128_bf16, Tile128x128, bf16)
GROUPED_KERNEL(grouped_128x128_f32, Tile128x128, float)
GROUPED_KERNEL(grouped_64x64_f16, Tile64x64, f16)
GROUPED_KERNEL(grouped_64x64_bf16, Tile64x64, bf16)
GROUPED_KERNEL(grouped_64x64_f32, Tile64x64, float)
GROUPED_KERNEL(grouped_16x64_f16, Tile16x64, f16)
GROUPED_KERNEL(grouped_16x64_bf16, Tile16x64, bf16)
GROUPED_KERNEL(grouped_16x64_f32, Tile16x64, float)
