// The experts' product with 4-bit weights in one launch: grouped.cu with w (E, N, K / 2) packed as four_bit.cuh says and
// scales sw (E, groups, N). K and `group` as in gemv4.cu.
#include "experts.cuh"
#include "tile4.cuh"

template <class T, class Out>
__device__ __forceinline__ void grouped4(const i8* x, const i8* w, const int* offsets, const float* sx, const float* sw,
                                         const float* bias, Out* out, int experts, int N, int K, int group) {
  DYNAMIC_SHARED(shared);
  Found found = find_tile<T::BM>(offsets, experts, blockIdx.x);
  if (found.expert < 0) return;  // the same for the whole block
  int n0 = blockIdx.y * T::BN, rows = found.end - found.begin, columns = min(T::BN, N - n0);
  long long channel = (long long)found.expert * N + n0;
  const float* scales = sw + (long long)found.expert * ((K + group - 1) / group) * N + n0;
  Operands in = {x + (long long)found.begin * K, w + channel * (K / 2), rows, columns, K, 0, K};
  GroupSums<T> sums(scales, N, columns, K, group);
  multiply_tile<T>(shared, in, sums);
  Destination<Out> to = {sx + found.begin, scales, bias ? bias + channel : nullptr,
                         out + (long long)found.begin * N + n0, rows, columns, N};
  store_tile(sums.total, to, false);
}

#define FOUR_BIT_GROUPED_KERNEL(name, T, Out)                                                                      \
  extern "C" __global__ void __launch_bounds__(T::THREADS, T::MIN_BLOCKS)                                          \
  name(const i8* __restrict__ x, const i8* __restrict__ w, const int* __restrict__ offsets,                        \
       const float* __restrict__ sx, const float* __restrict__ sw, const float* __restrict__ bias,                 \
       Out* __restrict__ out, int experts, int N, int K, int group) {                                              \
    grouped4<T, Out>(x, w, offsets, sx, sw, bias, out, experts, N, K, group);                                      \
  }

FOUR_BIT_GROUPED_KERNEL(grouped4_64x64_f16, Tile4_64x64, f16)
FOUR_BIT_GROUPED_KERNEL(grouped4_64x64_bf16, Tile4_64x64, bf16)
FOUR_BIT_GROUPED_KERNEL(grouped4_64x64_f32, Tile4_64x64, float)
FOUR_BIT_GROUPED_KERNEL(grouped4_16x64_f16, Tile4_16x64, f16)
FOUR_BIT_GROUPED_KERNEL(grouped4_16x64_bf16, Tile4_16x64, bf16)
FOUR_BIT_GROUPED_KERNEL(grouped4_16x64_f32, Tile4_16x64, float)
