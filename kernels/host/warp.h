// What a warp's collectives compute, given what its lanes brought. Pure functions of 32 lanes.
#pragma once
#include <cstdint>

namespace simt {

enum class Collective { none, shuffle, ballot, load_matrix, mma_8x8x16, mma_16x8x32 };

// One lane's part: `in` as documented at each function in warp.cpp, `out` what it takes away.
struct Request {
  Collective kind = Collective::none;
  uint32_t mask = 0;
  int line = 0;
  uint32_t in[10] = {};
  uint32_t out[4] = {};
  const unsigned char* address = nullptr;
};

// lanes[i] is lane i's request; `present` the lanes of the mask.
void perform(Request* (&lanes)[32], uint32_t present, const unsigned char* shared, unsigned shared_bytes);

}  // namespace simt
