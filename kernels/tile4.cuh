// The product of one block with 4-bit weights, in the pipeline of tile.cuh: w stays packed in shared memory and is
// unpacked in registers. The exact sums of a group are scaled and added as floats when its last columns are multiplied.
#pragma once
#include "four_bit.cuh"
#include "tile.cuh"

typedef Tile<64, 64, 32, 32, 4, 3, 2> Tile4_64x64;
typedef Tile<16, 64, 16, 16, 4, 4, 2> Tile4_16x64;

// The sums of a warp's tile, and where its groups are. Counts are in blocks of 32 columns.
template <class T> struct GroupSums {
  Accumulators<T> acc;           // of the group under way, 16 times
  Accumulators<T, float> total;  // of the groups before it
  float sw[T::WN / 8][2];        // of this thread's columns in the group under way
  const float* scales;           // of the tile's first column in the next group
  int N, columns, group_blocks, left_in_group, left;  // columns: of the tile

  // scales: those (groups, N) of the tile's first column.
  __device__ __forceinline__ GroupSums(const float* scales, int N, int columns, int K, int group)
      : scales(scales), N(N), columns(columns), group_blocks(group / BLOCK_COLUMNS), left_in_group(0),
        left(K / BLOCK_COLUMNS) {}
};

template <class T> __device__ __forceinline__ void clear(GroupSums<T>& sums) {
  clear(sums.acc);
  clear(sums.total);
}

template <class T> __device__ __forceinline__ void load_scales(GroupSums<T>& sums, int warp_n) {
  int column = warp_n + (threadIdx.x & 3) * 2, last = sums.columns - 1;
#pragma unroll
  for (int j = 0; j < T::WN / 8; j++)
#pragma unroll
    for (int c = 0; c < 2; c++) sums.sw[j][c] = sums.scales[min(column + 8 * j + c, last)];
  sums.scales += sums.N;
  sums.left_in_group = sums.group_blocks;
}

template <class T> __device__ __forceinline__ void finish_group(GroupSums<T>& sums) {
#pragma unroll
  for (int i = 0; i < T::WM / 16; i++)
#pragma unroll
    for (int j = 0; j < T::WN / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        sums.total.v[i][j][e] = add_group(sums.total.v[i][j][e], true_sum(sums.acc.v[i][j][e]), sums.sw[j][e & 1]);
  clear(sums.acc);
}

// One step's products of this warp. A lane's word of a packed block holds what mma takes of it as b[0] and b[1].
template <class T>
__device__ __forceinline__ void multiply_step(const unsigned char* stage, GroupSums<T>& sums, int warp_m, int warp_n) {
  int lane = threadIdx.x & 31;
  const unsigned char* x = stage;
  const unsigned char* w = stage + T::BM * STEP;
  unsigned packed[T::WN / 16][4];  // columns 16j .. 16j + 7 in [0] and [1], the step's first and second block; then 8 more
#pragma unroll
  for (int j = 0; j < T::WN / 16; j++)
    load_matrix_x4(packed[j], w + swizzled<2>(warp_n + 16 * j + (lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1));
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (sums.left == 0) return;  // the second block of the last step may lie beyond K
    if (sums.left_in_group == 0) load_scales(sums, warp_n);
    unsigned a[T::WM / 16][4];
#pragma unroll
    for (int i = 0; i < T::WM / 16; i++)
      load_matrix_x4(a[i], x + swizzled(warp_m + 16 * i + (lane & 15), 2 * half + (lane >> 4)));
#pragma unroll
    for (int j = 0; j < T::WN / 8; j++) {
      unsigned word = packed[j >> 1][2 * (j & 1) + half], b[2] = {lower_levels(word), upper_levels(word)};
#pragma unroll
      for (int i = 0; i < T::WM / 16; i++) mma_16x8x32(sums.acc.v[i][j], a[i], b);
    }
    sums.left--;
    sums.left_in_group--;
    if (sums.left_in_group == 0 || sums.left == 0) finish_group(sums);
  }
}
