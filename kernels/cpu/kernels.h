// The inner loops that each instruction set provides, and the two data layouts they share.
//
// Packed weights: panels of 32 output columns; in a panel, for each group of 4 consecutive k, the 32
// columns' 4 bytes lie together (128 bytes a group). A byte holds w + 128, because the VNNI instruction
// multiplies unsigned by signed: acc = sum x * (w + 128), and 128 * sum x is taken off in the epilogue.
// That is exact for every int8, -128 included: sums wrap modulo 2^32 and the true result fits in 32 bits.
//
// Packed 4-bit weights: the same panels, and a byte holds two of them as w + 8: in its lower half one of the first group
// of 4 consecutive k, in its upper half the same column's of the next group. So 128 bytes are a pair of groups.
//
// Staged activations: tiles of `row_tile` rows, the last of what is left; a tile holds, for each 64-byte chunk of
// k, the chunks of its rows one after the other. Rows are zero beyond K. Addresses in the tile loop are thus
// constants, and no row stride can make the rows of a tile fall on the same cache sets.
#pragma once
#include <cstddef>
#include <cstdint>

namespace haq {

constexpr int kPanel = 32;
constexpr int kGroup = 4;
constexpr int kChunk = 64;
constexpr int kGroupBytes = kPanel * kGroup;
constexpr int kPair = 2 * kGroup; // consecutive k of a pair of groups of 4-bit weights

enum Kind : int { kInt32 = 0, kFloat = 1, kBFloat16 = 2, kInt8 = 3, kFloat16 = 4 };

// What becomes of the int32 sums: y = (acc * row_scale) * column_scale + bias in fp32, or acc itself.
struct Epilogue {
  const int32_t* row_sum;    // (M,) sum of a row's quantised activations
  const float* row_scale;    // (M,)
  const float* column_scale; // (N,)
  const float* bias;         // (N,) or null
  void* out;                 // (M, N), contiguous
  Kind kind;                 // of out
  int64_t columns;           // N
};

// A staged tile times a panel of 4-bit weights, of which each `span` groups of 4 k have scales of their own:
// sums (rows, 32) = or += (int32 sum of a span) * scale in fp32, span by span.
struct Tile4 {
  int rows;
  const uint8_t* x;
  const uint8_t* panel;
  int64_t groups, span;  // `span` is even, and divides 16 or is a multiple of 16, or is all groups
  const float* scale;    // of the first span's 32 columns
  int64_t scale_stride;  // to the next span's
  const int32_t* offset; // of the first row's first span: 8 times the sum of the activations
  int64_t offset_stride; // to the next row's
  bool add;
  float* sums;
};

// Attention of `rows` queries of one head over the keys and values of decoder.h. Row r sees the last `window` of the
// first seen + r * more_seen positions.
struct Attention {
  int rows; // at most kAttendRows
  const float* queries;
  int64_t query_stride;
  const float *keys, *values, *next_keys; // next: of the head that comes after it, or null
  int64_t head_dim, seen, more_seen, window;
  float scaling;
  float soft_cap; // c: a score s becomes c * tanh(s / c); 0: it stays
  const float* sinks; // the first row's sink, a score without a value that takes a share of the attention; or null
  int64_t sink_stride; // to the next row's
  float* scores; // (rows, score_stride): work; score_stride is a multiple of 32, at least what the last row sees
  int64_t score_stride;
  float* out;
  int64_t out_stride;
};

constexpr int kAttendRows = 8;

enum Activation : int64_t { kSilu = 0, kGeluTanh = 1, kRelu = 2 }; // the second is gelu in tanh's approximation

struct Kernels {
  const char* name;
  int row_tile;      // rows of a full tile
  int element_bytes; // of a staged activation: 1, or 2 where the instruction set multiplies int16

  // Quantises one row of k values (float, bfloat16; an int8 row is only copied) and stages it: `out` is the
  // row's place in the first chunk of its tile, which has `rows`. A static_scale of 0 asks for the row's own scale.
  void (*stage)(const void* x, Kind kind, int64_t k, float static_scale, int64_t rows, uint8_t* out, float* scale,
                int32_t* sum);
  // The same quantisation into a plain row.
  void (*quantize)(const void* x, Kind kind, int64_t k, float static_scale, int8_t* out, float* scale);
  // out (k,) = x (k,), kFloat or kBFloat16, with each `block` of values transformed (hadamard.h). out may be x. scale is
  // 1 / sqrt(block).
  void (*hadamard)(const void* x, Kind kind, int64_t k, int64_t block, float scale, float* out);
  // acc (rows, 32) = or += staged tile times `groups` groups of a panel. `panel` is what `widen` wrote when
  // `wide`, else packed weights.
  void (*tile)(int rows, const uint8_t* x, const void* panel, bool wide, int64_t groups, bool add,
               int32_t* acc);
  // Optional: the packed weights as 16-bit values in the same order, for panels used by many tiles.
  void (*widen)(const uint8_t* panel, int64_t groups, uint16_t* out);
  void (*finish)(const int32_t* acc, int rows, int64_t row, int64_t column, const Epilogue& e);
  // The same for 4-bit weights: what `tile` and `finish` do.
  void (*tile4)(const Tile4& t);
  void (*finish4)(const float* sums, int rows, int64_t row, int64_t column, const Epilogue& e);
  // offset[i] = 8 times the sum of the i-th `span` groups of a staged row of `groups`, in a tile of `rows` rows.
  void (*offsets)(const uint8_t* staged, int64_t rows, int64_t groups, int64_t span, int32_t* offset);
  void (*silu_mul)(const void* gate, const void* up, Kind kind, int64_t n, void* out);
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t k, float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t k, float* out);
  void (*rotate)(float* x, const float* cosines, const float* sines, int64_t d, bool pairs);
  // activation(gate) * up; activation(gate) if `up` is null
  void (*gate_up)(Activation activation, const float* gate, const float* up, int64_t n, float* out);
  void (*attend)(const Attention& a);
  // out (m, rows) = x (m, k) times w (rows, k) transposed, the weights in bfloat16, float16 or fp32, sums in fp32
  // (float_product.h). The rows of out are out_stride values apart.
  void (*float_product)(const float* x, int64_t m, const void* w, Kind kind, int64_t rows, int64_t k, float* out,
                        int64_t out_stride);
  uint64_t (*read)(const uint8_t* data, int64_t bytes); // sums 64-bit words, as fast as memory gives them
  // Optional: what a thread calls before its calls of `tile` in a product of m rows, and after them.
  void (*begin)(int64_t m);
  void (*end)();
};

extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvxVnni, kAvx512Vnni, kAmx;
#endif

} // namespace haq
