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

} // namespace

constexpr Kernels kAvxVnni = table("avxvnni", kRows, tile, attend<4, 1>, float_product<2, 2>);

} // namespace haq
#endif
