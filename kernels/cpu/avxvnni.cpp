// AVX-VNNI: vpdpbusd on 8 columns at a time; 16 registers hold a tile of 6 rows x 16 columns, so that a panel
// takes two passes (one when there are no more than 3 rows).
#if defined(__x86_64__)
#define HAQ_TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#define HAQ_STAGED int8_t
#include "chunk_avx2.h"
#include "instruction_set.h"
#include "passes.h"

namespace haq {
namespace {

constexpr int kRows = 6;
constexpr int kGroups = kChunk / kGroup;

template <int R, int V, bool Ask> // R rows, V vectors of 8 columns
HAQ_TARGET void tile_rows(const uint8_t* x, const uint8_t* w, int64_t groups, bool add, int32_t* acc) {
  __m256i sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const auto* before = reinterpret_cast<const __m256i*>(acc + r * kPanel + v * 8);
      sum[r][v] = add ? _mm256_loadu_si256(before) : _mm256_setzero_si256();
    }
  for (; groups > 0; groups -= kGroups, x += R * kChunk) {
    const int count = static_cast<int>(groups < kGroups ? groups : kGroups);
    for (int g = 0; g < count; ++g, w += kGroupBytes) {
      if (Ask) {
        ask_ahead(w);
        ask_ahead(w + 64);
      }
      __m256i weights[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) weights[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + v);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int32_t four;
        std::memcpy(&four, x + r * kChunk + g * kGroup, 4);
        const __m256i q = _mm256_set1_epi32(four);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sum[r][v] = _mm256_dpbusd_avx_epi32(sum[r][v], weights[v], q);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + r * kPanel + v * 8), sum[r][v]);
}

template <int R, int V, bool Ask = R <= 4>
constexpr auto tile_panel = by_passes<R, V * 8, Ask, tile_rows<R, V, Ask>, tile_rows<R, V, false>, uint8_t>;

HAQ_TARGET void tile(int rows, const uint8_t* x, const void* panel, bool, int64_t groups, bool add,
                     int32_t* acc) {
  const auto* w = static_cast<const uint8_t*>(panel);
  switch (rows) {
    case 1: return tile_panel<1, 4>(x, w, groups, add, acc);
    case 2: return tile_panel<2, 4>(x, w, groups, add, acc);
    case 3: return tile_panel<3, 4>(x, w, groups, add, acc);
    case 4: return tile_panel<4, 2>(x, w, groups, add, acc);
    case 5: return tile_panel<5, 2>(x, w, groups, add, acc);
    default: return tile_panel<6, 2>(x, w, groups, add, acc);
  }
}

template <int R, int V, bool Ask> // as tile_rows, of 4-bit weights
HAQ_TARGET void product4_rows(const uint8_t* x, const uint8_t* panel, int64_t first, int64_t last, int32_t* acc) {
  const __m256i lower = _mm256_set1_epi8(15);
  for (int column = 0; column < kPanel; column += V * 8) {
    __m256i sum[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[r][v] = _mm256_setzero_si256();
    const uint8_t* w = panel + first / 2 * kGroupBytes;
    for (int64_t g = first; g < last; g += 2, w += kGroupBytes) {
      const uint8_t* const pair = staged_pair(x, R, g);
      if (Ask && column == 0) {
        ask_ahead(w);
        ask_ahead(w + 64);
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m256i weights[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
          __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + (column + v * 8) * kGroup));
          if (half == 1) both = _mm256_srli_epi16(both, 4);
          weights[v] = _mm256_and_si256(both, lower);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          int32_t four;
          std::memcpy(&four, pair + r * kChunk + half * kGroup, 4);
          const __m256i q = _mm256_set1_epi32(four);
#pragma GCC unroll 16
          for (int v = 0; v < V; ++v) sum[r][v] = _mm256_dpbusd_avx_epi32(sum[r][v], weights[v], q);
        }
        __asm__ volatile("" ::: "memory"); // or the weights of both halves take registers that the sums need
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + r * kPanel + column + v * 8), sum[r][v]);
  }
}

HAQ_TARGET void product4(int rows, const uint8_t* x, const uint8_t* panel, int64_t first, int64_t last, int32_t* acc) {
  switch (rows) {
    case 1: return product4_rows<1, 4, true>(x, panel, first, last, acc);
    case 2: return product4_rows<2, 4, true>(x, panel, first, last, acc);
    case 3: return product4_rows<3, 2, true>(x, panel, first, last, acc);
    case 4: return product4_rows<4, 2, true>(x, panel, first, last, acc);
    case 5: return product4_rows<5, 2, false>(x, panel, first, last, acc);
    default: return product4_rows<6, 2, false>(x, panel, first, last, acc);
  }
}

} // namespace

constexpr Kernels kAvxVnni = table("avxvnni", kRows, tile, by_spans<product4>, attend<4, 1>, float_product<2, 2>);

} // namespace haq
#endif
