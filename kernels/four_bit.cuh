// 4-bit weights as haq_lab/int8/cuda/four_bit.py packs them: a row is blocks of 32 columns in 16 bytes. Byte i holds
// column i in its lower and column 16 + i in its upper four bits, both in two's complement.
//
// So a word of four bytes gives, without a permutation, four columns of either half, which are what dp4a multiplies
// with a word of x and what a lane of mma holds. Levels come out as 16 times themselves, in the upper bits of a byte,
// and an exact sum of them is a multiple of 16.
#pragma once
#include "numeric.cuh"

#define BLOCK_COLUMNS 32

__device__ __forceinline__ unsigned lower_levels(unsigned word) { return (word << 4) & 0xf0f0f0f0u; }
__device__ __forceinline__ unsigned upper_levels(unsigned word) { return word & 0xf0f0f0f0u; }
__device__ __forceinline__ int true_sum(int sum) { return sum >> 4; }

// The exact sum of a block's 32 products, 16 times.
__device__ __forceinline__ int dot_block(uint4 w, int4 lower_x, int4 upper_x, int acc) {
  int4 lower = make_int4((int)lower_levels(w.x), (int)lower_levels(w.y), (int)lower_levels(w.z), (int)lower_levels(w.w));
  int4 upper = make_int4((int)upper_levels(w.x), (int)upper_levels(w.y), (int)upper_levels(w.z), (int)upper_levels(w.w));
  return dot_16(upper, upper_x, dot_16(lower, lower_x, acc));
}
