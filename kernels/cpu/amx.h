// AMX: tile registers of 16 rows x 64 bytes. A full tile of the product is 32 rows x 32 columns, the sums of which fill
// four of the eight registers. Packed weights and staged activations lie as the registers want them. The rest is
// AVX512-VNNI's: included at the end of avx512vnni.cpp.
#pragma once

#define HAQ_AMX \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8")))

namespace haq {
namespace {

constexpr int kAmxRows = 32;
constexpr int kHalf = 16;   // rows or columns of one register
constexpr int kFewRows = 8; // up to which AVX512-VNNI is as fast: memory is the limit
constexpr int64_t kSumBytes = kPanel * 4;

struct RegisterShapes { // as LDTILECFG reads it
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
// A constant: GCC before 12.4 would drop stores to a variable, as it takes LDTILECFG to read 8 bytes.
constexpr RegisterShapes kShapes = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {kHalf, kHalf, kHalf, kHalf, kHalf, kHalf, kHalf, kHalf}};

HAQ_AMX void configure(int64_t m) {
  if (m > kFewRows) _tile_loadconfig(&kShapes);
}
HAQ_AMX void release() { _tile_release(); }

// A chunk of k. Registers 0 to 3: sums; 4 and 5: rows; 6 and 7: columns.
template <bool Upper>
HAQ_AMX inline void multiply_chunk(const uint8_t* x, const uint8_t* w) {
  _tile_loadd(6, w, kGroupBytes);
  _tile_loadd(4, x, kChunk);
  _tile_dpbsud(0, 4, 6);
  _tile_loadd(7, w + kChunk, kGroupBytes);
  _tile_dpbsud(1, 4, 7);
  if constexpr (Upper) {
    _tile_loadd(5, x + kHalf * kChunk, kChunk);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
}

template <bool Upper> // whether there are more than 16 rows
HAQ_AMX void multiply_panel(int rows, const uint8_t* x, const uint8_t* w, int64_t groups, bool add, int32_t* acc) {
  int32_t* const upper = acc + kHalf * kPanel;
  if (add) {
    _tile_loadd(0, acc, kSumBytes);
    _tile_loadd(1, acc + kHalf, kSumBytes);
    if constexpr (Upper) {
      _tile_loadd(2, upper, kSumBytes);
      _tile_loadd(3, upper + kHalf, kSumBytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (Upper) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (; groups >= kGroups; groups -= kGroups, x += rows * kChunk, w += kGroups * kGroupBytes)
    multiply_chunk<Upper>(x, w);
  if (groups > 0) {
    alignas(64) uint8_t rest[kGroups * kGroupBytes] = {};
    std::memcpy(rest, w, static_cast<size_t>(groups * kGroupBytes));
    __asm__ volatile("" ::"r"(rest) : "memory"); // the loads are assembly that doesn't tell that it reads
    multiply_chunk<Upper>(x, rest);
  }
  _tile_stored(0, acc, kSumBytes);
  _tile_stored(1, acc + kHalf, kSumBytes);
  if constexpr (Upper) {
    _tile_stored(2, upper, kSumBytes);
    _tile_stored(3, upper + kHalf, kSumBytes);
  }
}

HAQ_AMX void amx_tile(int rows, const uint8_t* x, const void* panel, bool, int64_t groups, bool add, int32_t* acc) {
  if (rows <= kFewRows) return tile(rows, x, panel, false, groups, add, acc);
  const auto* w = static_cast<const uint8_t*>(panel);
  if (rows <= kHalf) return multiply_panel<false>(rows, x, w, groups, add, acc);
  multiply_panel<true>(rows, x, w, groups, add, acc);
}

// 4-bit weights are unpacked for the tile registers, a span at a time.
HAQ_AMX void unpack4(const uint8_t* panel, int64_t pairs, uint8_t* out) {
  const __m512i lower = _mm512_set1_epi8(15);
  for (int64_t i = 0; i < pairs * kGroupBytes; i += 64) {
    const __m512i both = _mm512_loadu_si512(panel + i);
    uint8_t* const to = out + i / kGroupBytes * 2 * kGroupBytes + i % kGroupBytes;
    _mm512_storeu_si512(to, _mm512_and_si512(both, lower));
    _mm512_storeu_si512(to + kGroupBytes, _mm512_and_si512(_mm512_srli_epi16(both, 4), lower));
  }
}

// acc = the groups [first, last), a block of chunks of the staged rows at a time. The block's groups outside of them
// are zeros.
HAQ_AMX void amx_product4(int rows, const uint8_t* x, const uint8_t* panel, int64_t first, int64_t last, int32_t* acc) {
  constexpr int64_t block = 2 * kGroups;
  alignas(64) uint8_t weights[block * kGroupBytes];
  bool add = false;
  int64_t g = first / kGroups * kGroups;
  do {
    const int64_t begin = first > g ? first - g : 0, end = ((last - g < block ? last - g : block) + 1) / 2 * 2;
    const int64_t chunks = (end + kGroups - 1) / kGroups * kGroups;
    std::memset(weights, 0, static_cast<size_t>(chunks * kGroupBytes));
    unpack4(panel + (g + begin) / 2 * kGroupBytes, (end - begin) / 2, weights + begin * kGroupBytes);
    __asm__ volatile("" ::"r"(weights) : "memory");
    if (rows <= kHalf)
      multiply_panel<false>(rows, x + g / kGroups * rows * kChunk, weights, chunks, add, acc);
    else
      multiply_panel<true>(rows, x + g / kGroups * rows * kChunk, weights, chunks, add, acc);
    add = true;
    g += block;
  } while (g < last);
}

HAQ_AMX void amx_tile4(const Tile4& t) {
  if (t.rows <= kFewRows) return tile4(t);
  by_spans<amx_product4>(t);
}

constexpr Kernels with_tile_registers() {
  Kernels kernels = table("amx", kAmxRows, amx_tile, amx_tile4, attend<8, 2>, float_product<8, 2>);
  kernels.begin = configure;
  kernels.end = release;
  return kernels;
}

} // namespace

constexpr Kernels kAmx = with_tile_registers();

} // namespace haq
