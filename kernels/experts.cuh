// Which expert a block computes, where tokens are sorted by expert and only the device knows how many each has.
#pragma once
#include "device.cuh"

struct Found {
  int expert, begin, end;  // rows of x; expert -1: none
};

// The expert and rows of row tile `tile`. Each warp looks for itself, 32 experts at a time, so no barrier is needed.
template <int BM> __device__ __forceinline__ Found find_tile(const int* offsets, int experts, int tile) {
  int lane = threadIdx.x & 31, before = 0;  // tiles of the experts looked at so far
  for (int first = 0; first < experts; first += 32) {
    int expert = first + lane;
    int begin = expert < experts ? offsets[expert] : 0, end = expert < experts ? offsets[expert + 1] : 0;
    int tiles = (end - begin + BM - 1) / BM, through = tiles;  // inclusive prefix sum over the lanes
    for (int distance = 1; distance < 32; distance <<= 1) {
      int below = __shfl_up_sync(0xffffffffu, through, distance);
      if (lane >= distance) through += below;
    }
    unsigned reached = __ballot_sync(0xffffffffu, before + through > tile);
    if (reached) {
      int owner = __ffs(reached) - 1;
      int skipped = tile - before - __shfl_sync(0xffffffffu, through - tiles, owner);
      int row = __shfl_sync(0xffffffffu, begin, owner) + skipped * BM;
      return {first + owner, row, min(row + BM, __shfl_sync(0xffffffffu, end, owner))};
    }
    before += __shfl_sync(0xffffffffu, through, 31);
  }
  return {-1, 0, 0};
}
