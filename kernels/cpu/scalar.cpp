// Plain C++: the fallback for every CPU, and what the vector versions are tested against.
#define HAQ_TARGET
#define HAQ_STAGED int8_t
#include "chunk_scalar.h"
#include "instruction_set.h"

namespace haq {
namespace {

constexpr int kRows = 4;

void tile(int rows, const uint8_t* x, const void* panel, bool, int64_t groups, bool add, int32_t* acc) {
  const auto* w = static_cast<const uint8_t*>(panel);
  for (int r = 0; r < rows; ++r) {
    uint32_t sums[kPanel] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const auto* q = reinterpret_cast<const int8_t*>(x + g / 16 * rows * kChunk + r * kChunk + g % 16 * 4);
      for (int c = 0; c < kPanel; ++c)
        for (int j = 0; j < kGroup; ++j)
          sums[c] += static_cast<uint32_t>(q[j] * w[g * kGroupBytes + c * kGroup + j]);
    }
    for (int c = 0; c < kPanel; ++c) {
      const uint32_t before = add ? static_cast<uint32_t>(acc[r * kPanel + c]) : 0u;
      acc[r * kPanel + c] = static_cast<int32_t>(before + sums[c]);
    }
  }
}

void product4(int rows, const uint8_t* x, const uint8_t* panel, int64_t first, int64_t last, int32_t* acc) {
  std::memset(acc, 0, static_cast<size_t>(rows) * kPanel * sizeof(int32_t));
  for (int64_t g = first; g < last; g += 2) {
    const uint8_t* w = panel + g / 2 * kGroupBytes;
    for (int r = 0; r < rows; ++r) {
      const auto* q = reinterpret_cast<const int8_t*>(staged_pair(x, rows, g) + r * kChunk);
      for (int i = 0; i < kGroupBytes; ++i)
        acc[r * kPanel + i / kGroup] += q[i % kGroup] * (w[i] & 15) + q[kGroup + i % kGroup] * (w[i] >> 4);
    }
  }
}

} // namespace

constexpr Kernels kScalar = table("scalar", kRows, tile, by_spans<product4>, attend<4, 1>, float_product<2, 2>);

} // namespace haq
