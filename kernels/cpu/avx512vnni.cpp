// AVX512-VNNI: vpdpbusd on 16 columns at a time; a full tile is 14 rows x 32 columns in 28 registers.
#if defined(__x86_64__)
#define HAQ_TARGET \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define HAQ_STAGED int8_t
#include <array>
#include <utility>

#include "chunk_avx512.h"
#include "instruction_set.h"

namespace haq {
namespace {

constexpr int kRows = 14;
constexpr int kGroups = kChunk / kGroup; // groups in a chunk of a staged row

template <int R> // rows of the tile
HAQ_TARGET void tile_rows(const uint8_t* x, const uint8_t* w, int64_t groups, bool add, int32_t* acc) {
  // Independent sums for each output, where few rows leave too few to hide the latency.
  constexpr int kChains = R == 1 ? 4 : R <= 4 ? 2 : 1;
  __m512i sum[kChains][R][2];
#pragma GCC unroll 64
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      sum[0][r][v] = add ? _mm512_loadu_si512(acc + r * kPanel + v * 16) : _mm512_setzero_si512();
#pragma GCC unroll 8
      for (int c = 1; c < kChains; ++c) sum[c][r][v] = _mm512_setzero_si512();
    }
  for (; groups > 0; groups -= kGroups, x += R * kChunk) {
    const int count = static_cast<int>(groups < kGroups ? groups : kGroups);
    int g = 0;
    for (; g + kChains <= count; g += kChains, w += kChains * kGroupBytes) {
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c) {
        if (R <= 8) { // memory is the limit
          ask_ahead(w + c * kGroupBytes);
          ask_ahead(w + c * kGroupBytes + 64);
        }
        const __m512i w0 = _mm512_loadu_si512(w + c * kGroupBytes);
        const __m512i w1 = _mm512_loadu_si512(w + c * kGroupBytes + 64);
#pragma GCC unroll 64
        for (int r = 0; r < R; ++r) {
          int32_t four;
          std::memcpy(&four, x + r * kChunk + (g + c) * kGroup, 4);
          const __m512i q = _mm512_set1_epi32(four);
          sum[c][r][0] = _mm512_dpbusd_epi32(sum[c][r][0], w0, q);
          sum[c][r][1] = _mm512_dpbusd_epi32(sum[c][r][1], w1, q);
        }
      }
    }
    for (; kChains > 1 && g < count; ++g, w += kGroupBytes) {
#pragma GCC unroll 64
      for (int r = 0; r < R; ++r) {
        int32_t four;
        std::memcpy(&four, x + r * kChunk + g * kGroup, 4);
        const __m512i q = _mm512_set1_epi32(four);
        sum[0][r][0] = _mm512_dpbusd_epi32(sum[0][r][0], _mm512_loadu_si512(w), q);
        sum[0][r][1] = _mm512_dpbusd_epi32(sum[0][r][1], _mm512_loadu_si512(w + 64), q);
      }
    }
  }
#pragma GCC unroll 64
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
#pragma GCC unroll 8
      for (int c = 1; c < kChains; ++c) sum[0][r][v] = _mm512_add_epi32(sum[0][r][v], sum[c][r][v]);
      _mm512_storeu_si512(acc + r * kPanel + v * 16, sum[0][r][v]);
    }
}

template <int... Before>
constexpr std::array<decltype(&tile_rows<1>), sizeof...(Before)> up_to_all(std::integer_sequence<int, Before...>) {
  return {tile_rows<Before + 1>...};
}
constexpr auto kTileRows = up_to_all(std::make_integer_sequence<int, kRows>());

HAQ_TARGET void tile(int rows, const uint8_t* x, const void* panel, bool, int64_t groups, bool add,
                     int32_t* acc) {
  kTileRows[static_cast<size_t>(rows - 1)](x, static_cast<const uint8_t*>(panel), groups, add, acc);
}

// 4-bit weights. Few rows have sums of their own for the upper halves of the bytes, which are taken 16-fold as they are:
// that saves a shift, and hides the latency.
template <int R>
HAQ_TARGET void tile4_rows(const Tile4& t) {
  constexpr bool kFew = R <= 3;
  constexpr int kSums = kFew ? 2 : 1;
  const __m512i lower = _mm512_set1_epi8(15), upper = _mm512_set1_epi8(static_cast<char>(0xf0));
  __m512 total[kFew ? R : 1][2];
  if (kFew)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v)
        total[kFew ? r : 0][v] = t.add ? _mm512_loadu_ps(t.sums + r * kPanel + v * 16) : _mm512_setzero_ps();
  bool add = t.add;
  for (int64_t first = 0, span = 0; first < t.groups; first += t.span, ++span) {
    const int64_t last = first + t.span < t.groups ? first + t.span : t.groups;
    const float* const scale = t.scale + span * t.scale_stride;
    if (kFew) { // the next panel's
      __builtin_prefetch(scale + kPanel);
      __builtin_prefetch(scale + kPanel + 16);
    }
    __m512i sum[R][2][kSums];
#pragma GCC unroll 64
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        sum[r][v][0] = _mm512_set1_epi32(-t.offset[r * t.offset_stride + span]);
        if (kSums == 2) sum[r][v][kSums - 1] = _mm512_setzero_si512();
      }
    const uint8_t* w = t.panel + first / 2 * kGroupBytes;
    for (int64_t g = first; g < last; g += 2, w += kGroupBytes) {
      const uint8_t* const pair = staged_pair(t.x, R, g);
      if (R <= 8) { // memory is the limit
        ask_ahead(w);
        ask_ahead(w + 64);
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m512i own[2];
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          own[v] = _mm512_loadu_si512(w + v * 64);
          if (half == 1 && !kFew) own[v] = _mm512_srli_epi16(own[v], 4);
          own[v] = _mm512_and_si512(own[v], half == 1 && kFew ? upper : lower);
        }
        constexpr int last_sum = kSums - 1;
#pragma GCC unroll 64
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) {
            __m512i& own_sum = sum[r][v][half * last_sum];
            const uint8_t* const q = pair + r * kChunk + half * kGroup;
            if (kFew) {
              int32_t four;
              std::memcpy(&four, q, 4);
              own_sum = _mm512_dpbusd_epi32(own_sum, own[v], _mm512_set1_epi32(four));
            } else { // by hand, to keep the order: compilers spill the sums otherwise
              __asm__ volatile("vpdpbusd %1%{1to16%}, %2, %0"
                               : "+v"(own_sum)
                               : "m"(*reinterpret_cast<const uint32_t(*)[1]>(q)), "v"(own[v]));
            }
          }
      }
    }
#pragma GCC unroll 64
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const __m512i whole = kSums == 2 ? _mm512_add_epi32(sum[r][v][0], _mm512_srai_epi32(sum[r][v][kSums - 1], 4))
                                         : sum[r][v][0];
        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_loadu_ps(scale + v * 16));
        if (kFew) {
          total[kFew ? r : 0][v] = _mm512_add_ps(total[kFew ? r : 0][v], scaled);
        } else {
          float* const to = t.sums + r * kPanel + v * 16;
          _mm512_storeu_ps(to, _mm512_add_ps(add ? _mm512_loadu_ps(to) : _mm512_setzero_ps(), scaled));
        }
      }
    add = true;
  }
  if (kFew)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) _mm512_storeu_ps(t.sums + r * kPanel + v * 16, total[kFew ? r : 0][v]);
}

template <int... Before>
constexpr std::array<decltype(&tile4_rows<1>), sizeof...(Before)> up_to_all4(std::integer_sequence<int, Before...>) {
  return {tile4_rows<Before + 1>...};
}
constexpr auto kTile4Rows = up_to_all4(std::make_integer_sequence<int, kRows>());

HAQ_TARGET void tile4(const Tile4& t) { kTile4Rows[static_cast<size_t>(t.rows - 1)](t); }

} // namespace

constexpr Kernels kAvx512Vnni = table("avx512vnni", kRows, tile, tile4, attend<8, 2>, float_product<8, 2>);

} // namespace haq

#include "amx.h"
#endif
