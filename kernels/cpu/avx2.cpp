// AVX2: no instruction multiplies bytes without saturating sums of pairs, so both sides are widened to 16 bits
// and vpmaddwd, which is exact, gives a column's 4 products as two sums of two. Activations are staged as
// int16; weights are widened on the fly, or once for all tiles of a large product.
#if defined(__x86_64__)
#define HAQ_TARGET __attribute__((target("avx2,fma,f16c")))
#define HAQ_STAGED int16_t
#include "chunk_avx2.h"
#include "instruction_set.h"
#include "passes.h"

namespace haq {
namespace {

constexpr int kRows = 6;
constexpr int kGroups = kChunk / 2 / kGroup; // groups in a chunk of a staged row of int16

HAQ_TARGET inline __m256i load_weights(const uint8_t* w) { // 4 columns of 4 k
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
}
HAQ_TARGET inline __m256i load_weights(const uint16_t* w) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
}

template <int R, int V, bool Ask, class W> // R rows, V vectors of 4 columns (V even)
HAQ_TARGET void tile_rows(const uint8_t* x, const W* w, int64_t groups, bool add, int32_t* acc) {
  __m256i sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[r][v] = _mm256_setzero_si256();
  for (; groups > 0; groups -= kGroups, x += R * kChunk) {
    const int count = static_cast<int>(groups < kGroups ? groups : kGroups);
    for (int g = 0; g < count; ++g, w += kGroupBytes) {
      if (Ask) {
        ask_ahead(w);
        ask_ahead(w + 64);
      }
      __m256i weights[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) weights[v] = load_weights(w + v * 16);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int64_t four;
        std::memcpy(&four, x + r * kChunk + g * kGroup * 2, 8);
        const __m256i q = _mm256_set1_epi64x(four);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
          // By hand, to keep the order: compilers let the products pile up and spill the sums.
          const __m256i product = _mm256_madd_epi16(weights[v], q);
          __asm__ volatile("vpaddd %1, %0, %0" : "+x"(sum[r][v]) : "x"(product));
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; v += 2) {
      // Add each column's two halves: (0 1 4 5 | 2 3 6 7), then in order.
      __m256i columns = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sum[r][v], sum[r][v + 1]), 0xd8);
      auto* out = reinterpret_cast<__m256i*>(acc + r * kPanel + v * 4);
      if (add) columns = _mm256_add_epi32(columns, _mm256_loadu_si256(out));
      _mm256_storeu_si256(out, columns);
    }
}

template <int R, int V, class W, bool Ask = R <= 4 && sizeof(W) == 1> // widened weights are in a cache
constexpr auto tile_panel = by_passes<R, V * 4, Ask, tile_rows<R, V, Ask, W>, tile_rows<R, V, false, W>, W>;

template <class W>
HAQ_TARGET void tile_any(int rows, const uint8_t* x, const W* w, int64_t groups, bool add, int32_t* acc) {
  switch (rows) {
    case 1: return tile_panel<1, 8, W>(x, w, groups, add, acc);
    case 2: return tile_panel<2, 4, W>(x, w, groups, add, acc);
    case 3: return tile_panel<3, 4, W>(x, w, groups, add, acc);
    case 4: return tile_panel<4, 2, W>(x, w, groups, add, acc);
    case 5: return tile_panel<5, 2, W>(x, w, groups, add, acc);
    default: return tile_panel<6, 2, W>(x, w, groups, add, acc);
  }
}

HAQ_TARGET void tile(int rows, const uint8_t* x, const void* panel, bool wide, int64_t groups, bool add,
                     int32_t* acc) {
  if (wide) return tile_any(rows, x, static_cast<const uint16_t*>(panel), groups, add, acc);
  return tile_any(rows, x, static_cast<const uint8_t*>(panel), groups, add, acc);
}

HAQ_TARGET void widen(const uint8_t* panel, int64_t groups, uint16_t* out) {
  for (int64_t i = 0; i < groups * kGroupBytes; ++i) out[i] = panel[i];
}

template <int R, int V, bool Ask> // as tile_rows, of 4-bit weights
HAQ_TARGET void product4_rows(const uint8_t* x, const uint8_t* panel, int64_t first, int64_t last, int32_t* acc) {
  const __m128i lower = _mm_set1_epi8(15);
  for (int column = 0; column < kPanel; column += V * 4) {
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
          __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + (column + v * 4) * kGroup));
          if (half == 1) both = _mm_srli_epi16(both, 4);
          weights[v] = _mm256_cvtepu8_epi16(_mm_and_si128(both, lower));
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          int64_t four;
          std::memcpy(&four, pair + r * kChunk + half * kGroup * 2, 8);
          const __m256i q = _mm256_set1_epi64x(four);
#pragma GCC unroll 16
          for (int v = 0; v < V; ++v) {
            const __m256i product = _mm256_madd_epi16(weights[v], q);
            __asm__ volatile("vpaddd %1, %0, %0" : "+x"(sum[r][v]) : "x"(product)); // as in tile_rows
          }
        }
        __asm__ volatile("" ::: "memory"); // or the weights of both halves take registers that the sums need
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < V; v += 2) {
        const __m256i columns = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sum[r][v], sum[r][v + 1]), 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + r * kPanel + column + v * 4), columns);
      }
  }
}

HAQ_TARGET void product4(int rows, const uint8_t* x, const uint8_t* panel, int64_t first, int64_t last, int32_t* acc) {
  switch (rows) {
    case 1: return product4_rows<1, 8, true>(x, panel, first, last, acc);
    case 2: return product4_rows<2, 4, true>(x, panel, first, last, acc);
    case 3: return product4_rows<3, 2, true>(x, panel, first, last, acc);
    case 4: return product4_rows<4, 2, true>(x, panel, first, last, acc);
    case 5: return product4_rows<5, 2, false>(x, panel, first, last, acc);
    default: return product4_rows<6, 2, false>(x, panel, first, last, acc);
  }
}

constexpr Kernels with_wide_panels() {
  Kernels kernels = table("avx2", kRows, tile, by_spans<product4>, attend<4, 1>, float_product<2, 2>);
  kernels.widen = widen;
  return kernels;
}

} // namespace

constexpr Kernels kAvx2 = with_wide_panels();

} // namespace haq
#endif
