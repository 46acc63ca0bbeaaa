#include "warp.h"

#include <cstring>

#include "simt.h"

namespace simt {
namespace {

int byte_of(uint32_t word, int i) { return (int8_t)(word >> (8 * i)); }
bool has(uint32_t mask, int lane) { return mask >> lane & 1; }

// in[0]: the value, in[1]: the lane to read.
void shuffle_lanes(Request* (&lanes)[32], uint32_t present) {
  for (int i = 0; i < 32; i++) {
    if (!has(present, i)) continue;
    int source = (int)lanes[i]->in[1];
    if (source < 0 || source > 31 || !has(present, source)) fail("shuffle reads a lane outside the mask", lanes[i]->line);
    lanes[i]->out[0] = lanes[source]->in[0];
  }
}

// in[0]: the predicate.
void ballot_lanes(Request* (&lanes)[32], uint32_t present) {
  uint32_t votes = 0;
  for (int i = 0; i < 32; i++)
    if (has(present, i) && lanes[i]->in[0]) votes |= 1u << i;
  for (int i = 0; i < 32; i++)
    if (has(present, i)) lanes[i]->out[0] = votes;
}

// ldmatrix .x4: lane 8*m + r gives the address of row r of matrix m; lane 4*r + c gets bytes 4*c .. 4*c + 3 of row r.
void load_matrices(Request* (&lanes)[32], const unsigned char* shared, unsigned shared_bytes) {
  for (int m = 0; m < 4; m++) {
    uint32_t groups = 0;  // which of the eight 16-byte bank groups the eight rows lie in
    for (int r = 0; r < 8; r++) {
      const Request& row = *lanes[8 * m + r];
      if ((uintptr_t)row.address & 15) fail("ldmatrix row is not aligned to 16 bytes", row.line);
      if (row.address < shared || row.address + 16 > shared + shared_bytes)
        fail("ldmatrix row outside shared memory", row.line);
      uint32_t group = 1u << ((row.address - shared) / 16 % 8);
      if (groups & group) counters.bank_conflicts++;
      groups |= group;
    }
    for (int i = 0; i < 32; i++) memcpy(&lanes[i]->out[m], lanes[8 * m + i / 4]->address + 4 * (i % 4), 4);
  }
  counters.matrix_loads += 4;
}

// The product both mma forms share, on full matrices: c (ROWS x 8) += a (ROWS x DEPTH) * b (DEPTH x 8).
template <int ROWS, int DEPTH> void multiply(const int (&a)[ROWS][DEPTH], const int (&b)[DEPTH][8], uint32_t (&c)[ROWS][8]) {
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < 8; j++)
      for (int k = 0; k < DEPTH; k++) c[i][j] += (uint32_t)(a[i][k] * b[k][j]);
  counters.mma_multiplies += ROWS * 8 * DEPTH;
}

// in[0]: a, in[1]: b, in[2..3]: d. Lane 4*g + q: a[g][4q..], b[4q..][g], d[g][2q..].
void mma_small(Request* (&lanes)[32]) {
  int a[8][16], b[16][8];
  uint32_t d[8][8];
  for (int lane = 0; lane < 32; lane++) {
    int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; i++) {
      a[g][4 * q + i] = byte_of(lanes[lane]->in[0], i);
      b[4 * q + i][g] = byte_of(lanes[lane]->in[1], i);
    }
    for (int i = 0; i < 2; i++) d[g][2 * q + i] = lanes[lane]->in[2 + i];
  }
  multiply(a, b, d);
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 2; i++) lanes[lane]->out[i] = d[lane / 4][2 * (lane % 4) + i];
}

// in[0..3]: a, in[4..5]: b, in[6..9]: d. Lane 4*g + q; register r of a: row g + 8 (r odd), k 4q + 16 (r > 1);
// register r of b: k 4q + 16 r, column g; register r of d: row g + 8 (r > 1), column 2q + (r odd).
void mma_large(Request* (&lanes)[32]) {
  int a[16][32], b[32][8];
  uint32_t d[16][8];
  for (int lane = 0; lane < 32; lane++) {
    int g = lane / 4, q = lane % 4;
    const uint32_t* in = lanes[lane]->in;
    for (int i = 0; i < 4; i++) {
      for (int r = 0; r < 4; r++) a[g + 8 * (r & 1)][4 * q + i + 16 * (r >> 1)] = byte_of(in[r], i);
      for (int r = 0; r < 2; r++) b[4 * q + i + 16 * r][g] = byte_of(in[4 + r], i);
    }
    for (int r = 0; r < 4; r++) d[g + 8 * (r >> 1)][2 * q + (r & 1)] = in[6 + r];
  }
  multiply(a, b, d);
  for (int lane = 0; lane < 32; lane++)
    for (int r = 0; r < 4; r++) lanes[lane]->out[r] = d[lane / 4 + 8 * (r >> 1)][2 * (lane % 4) + (r & 1)];
}

}  // namespace

void perform(Request* (&lanes)[32], uint32_t present, const unsigned char* shared, unsigned shared_bytes) {
  const Request& first = *lanes[__builtin_ctz(present)];
  if (first.kind == Collective::shuffle) return shuffle_lanes(lanes, present);
  if (first.kind == Collective::ballot) return ballot_lanes(lanes, present);
  if (present != 0xffffffffu) fail("mma and ldmatrix need the whole warp", first.line);
  if (first.kind == Collective::load_matrix) return load_matrices(lanes, shared, shared_bytes);
  if (first.kind == Collective::mma_8x8x16) return mma_small(lanes);
  mma_large(lanes);
}

}  // namespace simt
