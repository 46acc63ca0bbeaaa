// The int8 product of one block: rows of x (M, K) times rows of w (N, K), both row-major, over a range of K.
//
// A BM x BN tile, STEP bytes of K at a time, through a ring of STAGES buffers in shared memory that cp.async fills
// STAGES - 1 steps ahead. Each warp computes WM x WN of it with mma m16n8k32 on fragments from ldmatrix.
#pragma once
#include "numeric.cuh"

#define STEP 64  // bytes of K a step: four chunks of 16

// W_CHUNKS: chunks of 16 bytes that a row of w has in a step: four of int8, two of packed 4-bit weights (tile4.cuh).
template <int BM_, int BN_, int WM_, int WN_, int STAGES_, int MIN_BLOCKS_, int W_CHUNKS_ = 4> struct Tile {
  static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_, MIN_BLOCKS = MIN_BLOCKS_,
                       W_CHUNKS = W_CHUNKS_;
  // Without cp.async two buffers are all that a barrier a step can use.
  static constexpr int STAGES = HAQ_TURING ? 2 : STAGES_;
  static constexpr int WARPS_N = BN / WN;
  static constexpr int THREADS = (BM / WM) * WARPS_N * 32;
  static constexpr int STAGE_BYTES = BM * STEP + BN * W_CHUNKS * 16;
};
typedef Tile<128, 128, 64, 32, 3, 2> Tile128x128;
typedef Tile<64, 64, 32, 32, 4, 3> Tile64x64;
typedef Tile<16, 64, 16, 16, 4, 4> Tile16x64;

// What a block multiplies: rows [0, rows_x) of x by rows [0, rows_w) of w over columns [k_begin, k_end) of K.
struct Operands {
  const i8* x;
  const i8* w;
  int rows_x, rows_w, K, k_begin, k_end;
};

// Where chunk (row, chunk) of a tile lies. Two rows of four chunks share 128 bytes, all banks once; the exclusive or
// spreads the same chunk of eight following rows over all eight 16-byte bank groups, so neither ldmatrix nor the copies
// conflict.
template <int CHUNKS = 4> __device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * (CHUNKS * 16) + ((chunk ^ ((row >> (CHUNKS == 4 ? 1 : 2)) & (CHUNKS - 1))) << 4);
}

// One operand's part of one step into shared memory; what lies outside the matrix becomes zero. K, k0, k_end in bytes.
template <int ROWS, int THREADS, int CHUNKS>
__device__ __forceinline__ void copy_rows(unsigned char* tile, const i8* matrix, int rows, int K, int k0, int k_end) {
  for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
    int row = i >> (CHUNKS == 4 ? 2 : 1), chunk = i & (CHUNKS - 1), k = k0 + chunk * 16;
    bool valid = row < rows && k < k_end;
    copy_async_16(tile + swizzled<CHUNKS>(row, chunk), valid ? matrix + (long long)row * K + k : matrix, valid);
  }
}

template <class T> __device__ __forceinline__ void copy_step(unsigned char* stage, const Operands& in, int step) {
  int k0 = in.k_begin + step * STEP;
  copy_rows<T::BM, T::THREADS, 4>(stage, in.x, in.rows_x, in.K, k0, in.k_end);
  constexpr int W = T::W_CHUNKS, PER_BYTE = 4 / W;  // columns
  copy_rows<T::BN, T::THREADS, W>(stage + T::BM * STEP, in.w, in.rows_w, in.K / PER_BYTE, k0 / PER_BYTE,
                                  in.k_end / PER_BYTE);
}

template <class T, class Sum = int> struct Accumulators { Sum v[T::WM / 16][T::WN / 8][4]; };

template <class T, class Sum> __device__ __forceinline__ void clear(Accumulators<T, Sum>& acc) {
#pragma unroll
  for (int i = 0; i < T::WM / 16; i++)
#pragma unroll
    for (int j = 0; j < T::WN / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc.v[i][j][e] = 0;
}

// One step's products of this warp.
template <class T>
__device__ __forceinline__ void multiply_step(const unsigned char* stage, Accumulators<T>& acc, int warp_m, int warp_n) {
  int lane = threadIdx.x & 31;
  const unsigned char* x = stage;
  const unsigned char* w = stage + T::BM * STEP;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    unsigned a[T::WM / 16][4], b[T::WN / 8][2];
#pragma unroll
    for (int i = 0; i < T::WM / 16; i++)
      load_matrix_x4(a[i], x + swizzled(warp_m + 16 * i + (lane & 15), 2 * half + (lane >> 4)));
#pragma unroll
    for (int j = 0; j < T::WN / 16; j++) {
      unsigned pair[4];  // columns 16j .. 16j + 7 in [0], [1]; the next eight in [2], [3]
      load_matrix_x4(pair, w + swizzled(warp_n + 16 * j + (lane & 7) + (lane >> 4) * 8, 2 * half + ((lane >> 3) & 1)));
      b[2 * j][0] = pair[0];
      b[2 * j][1] = pair[1];
      b[2 * j + 1][0] = pair[2];
      b[2 * j + 1][1] = pair[3];
    }
#pragma unroll
    for (int i = 0; i < T::WM / 16; i++)
#pragma unroll
      for (int j = 0; j < T::WN / 8; j++) mma_16x8x32(acc.v[i][j], a[i], b[j]);
  }
}

// `sums`: accumulators, or what else a `multiply_step` adds to (tile4.cuh).
template <class T, class Sums>
__device__ __forceinline__ void multiply_tile(unsigned char* shared, const Operands& in, Sums& sums) {
  int warp = threadIdx.x >> 5;
  int warp_m = (warp / T::WARPS_N) * T::WM, warp_n = (warp % T::WARPS_N) * T::WN;
  int steps = (in.k_end - in.k_begin + STEP - 1) / STEP;
  clear(sums);

#pragma unroll
  for (int ahead = 0; ahead < T::STAGES - 1; ahead++) {
    if (ahead < steps) copy_step<T>(shared + ahead * T::STAGE_BYTES, in, ahead);
    copy_commit();
  }
  int reading = 0, filling = T::STAGES - 1;
  for (int step = 0; step < steps; step++) {
    copy_wait<T::STAGES - 2>();  // this thread's part of the step has landed ...
    __syncthreads();             // ... and everyone's; and everyone is done with the buffer that is filled next
    int next = step + T::STAGES - 1;
    if (next < steps) copy_step<T>(shared + filling * T::STAGE_BYTES, in, next);
    copy_commit();  // an empty group too, so that the count that copy_wait goes by stays right
    multiply_step(shared + reading * T::STAGE_BYTES, sums, warp_m, warp_n);
    reading = reading + 1 == T::STAGES ? 0 : reading + 1;
    filling = filling + 1 == T::STAGES ? 0 : filling + 1;
  }
}

// Scales and bias of a tile's rows and columns, and where it goes. Pointers are those of the tile's first element.
template <class Out> struct Destination {
  const float* sx;
  const float* sw;
  const float* bias;
  Out* out;
  int rows, columns, row_stride;
};

struct alignas(4) Pair16 { unsigned short low, high; };
__device__ __forceinline__ void store_pair(f16* p, float a, float b) { *(Pair16*)p = {to_f16(a).bits, to_f16(b).bits}; }
__device__ __forceinline__ void store_pair(bf16* p, float a, float b) {
  *(Pair16*)p = {to_bf16(a).bits, to_bf16(b).bits};
}
__device__ __forceinline__ void store_pair(float* p, float a, float b) { *(float2*)p = make_float2(a, b); }

// Two neighbouring columns' scale and bias, loaded once for all of a thread's rows.
struct ColumnPair { float sw[2], bias[2]; };

template <class Out> __device__ __forceinline__ ColumnPair load_columns(const Destination<Out>& to, int column) {
  int second = min(column + 1, to.columns - 1);
  return {{to.sw[column], to.sw[second]}, {bias_of(to.bias, column), bias_of(to.bias, second)}};
}
__device__ __forceinline__ ColumnPair load_columns(const Destination<int>&, int) { return {}; }

// Two neighbouring columns of one row, as scaled values ...
template <class Out, class Sum>
__device__ __forceinline__ void store_two(const Destination<Out>& to, const ColumnPair& scales, int row, int column,
                                          Sum first, Sum second, bool) {
  Out* p = to.out + (long long)row * to.row_stride + column;
  float sx = to.sx[row];
  float a = epilogue(first, sx, scales.sw[0], scales.bias[0]), b = epilogue(second, sx, scales.sw[1], scales.bias[1]);
  if (to.row_stride & 1) {  // an odd row length leaves every second row off the alignment of a pair
    p[0] = from_float<Out>(a);
    if (column + 1 < to.columns) p[1] = from_float<Out>(b);
  } else {  // an even one has no half pair
    store_pair(p, a, b);
  }
}

// ... or as raw accumulators, added where several blocks share the sum (exact, so in any order).
__device__ __forceinline__ void store_two(const Destination<int>& to, const ColumnPair&, int row, int column, int first,
                                          int second, bool shared_sum) {
  int* p = to.out + (long long)row * to.row_stride + column;
  bool both = column + 1 < to.columns;
  if (shared_sum) {
    atomicAdd(p, first);
    if (both) atomicAdd(p + 1, second);
  } else {
    p[0] = first;
    if (both) p[1] = second;
  }
}

template <class T, class Sum, class Out>
__device__ __forceinline__ void store_tile(const Accumulators<T, Sum>& acc, const Destination<Out>& to,
                                           bool shared_sum) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int row0 = (warp / T::WARPS_N) * T::WM + (lane >> 2), column0 = (warp % T::WARPS_N) * T::WN + (lane & 3) * 2;
#pragma unroll
  for (int j = 0; j < T::WN / 8; j++) {
    int column = column0 + 8 * j;
    if (column >= to.columns) return;
    ColumnPair scales = load_columns(to, column);
#pragma unroll
    for (int i = 0; i < T::WM / 16; i++)
#pragma unroll
      for (int below = 0; below < 2; below++) {
        int row = row0 + 16 * i + 8 * below;
        if (row < to.rows)
          store_two(to, scales, row, column, acc.v[i][j][2 * below], acc.v[i][j][2 * below + 1], shared_sum);
      }
  }
}
