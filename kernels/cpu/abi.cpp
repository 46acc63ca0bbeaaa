// The C functions that haq_lab/int8/cpu/bindings.py calls. Pointers are to contiguous arrays; shapes are checked by
// the caller. Those that can fail return 0, or 1 when there is not enough memory.
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

#include "decoder.h"
#include "gemm.h"
#include "moe.h"
#include "parallel.h"

using namespace haq;

namespace {

const Kernels* const kLevels[] = {
    &kScalar,
#if defined(__x86_64__)
    &kAvx2, &kAvxVnni, &kAvx512Vnni, &kAmx,
#endif
};

#if defined(__x86_64__)
// Whether the CPU has tile registers for int8, and the system lets this process use them.
bool has_amx() {
#if defined(__linux__)
  unsigned a = 7, b, c = 0, d; // CPUID leaf 7.0, EDX bits 24 (tiles) and 25 (int8)
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  constexpr long request_permission = 0x1023, tile_data = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (d >> 24 & 3) == 3 && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

bool supported(int level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); // F16C is older
  if (level == 1) return avx2;
  if (level == 2) {
    unsigned a = 7, c = 1, b, d; // CPUID leaf 7.1, EAX bit 4; older compilers have no name for it
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return avx2 && (a >> 4 & 1);
  }
  const bool vnni512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512vnni");
  if (level == 3) return vnni512;
  if (level == 4) return vnni512 && has_amx();
#endif
  return level == 0;
}

template <class Work>
int failed(const Work& work) { // what the functions return that can run out of memory
  try {
    work();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

} // namespace

extern "C" {

// The instruction sets, worst first. Returns null past the last.
const char* haq_level_name(int level) {
  const int count = static_cast<int>(sizeof(kLevels) / sizeof(kLevels[0]));
  return level >= 0 && level < count ? kLevels[level]->name : nullptr;
}

int haq_level_supported(int level) { return supported(level); }

int64_t haq_packed_bytes(int64_t n, int64_t k) {
  return (n + kPanel - 1) / kPanel * kPanel * ((k + kGroup - 1) / kGroup * kGroup);
}

// Writes w (n, k) as the columns from `column` on of a packed matrix of depth k.
void haq_pack(const int8_t* w, int64_t n, int64_t k, int64_t column, uint8_t* packed, int threads) {
  constexpr int64_t line = 64 / kGroup; // groups of a row in one cache line, which are read together
  const int64_t whole = k / kGroup, groups = (k + kGroup - 1) / kGroup, first_panel = column / kPanel;
  const int64_t panels = (column + n + kPanel - 1) / kPanel - first_panel;
  parallel_for(n * k < 65536 ? 1 : threads, panels, [&](int64_t unit) {
    const int64_t panel = first_panel + unit;
    const int64_t begin = std::max(column, panel * kPanel), end = std::min(column + n, (panel + 1) * kPanel);
    for (int64_t block = 0; block < groups; block += line)
      for (int64_t c = begin; c < end; ++c) {
        const int8_t* row = w + (c - column) * k;
        uint8_t* out = packed + panel * groups * kGroupBytes + c % kPanel * kGroup;
        for (int64_t j = block; j < std::min(block + line, whole); ++j) {
          uint32_t values;
          std::memcpy(&values, row + j * kGroup, kGroup);
          values ^= 0x80808080u; // w + 128 in each byte
          std::memcpy(out + j * kGroupBytes, &values, kGroup);
        }
        if (block + line >= groups)
          for (int64_t i = whole * kGroup; i < groups * kGroup; ++i)
            out[whole * kGroupBytes + i % kGroup] = static_cast<uint8_t>(128 + (i < k ? row[i] : 0));
      }
  });
}

int64_t haq_packed4_bytes(int64_t n, int64_t k) {
  return (n + kPanel - 1) / kPanel * kPanel * ((k + kPair - 1) / kPair * kGroup);
}

// Writes 4-bit w (n, k), a byte each, as the columns from `column` on of a packed matrix of depth k.
void haq_pack4(const int8_t* w, int64_t n, int64_t k, int64_t column, uint8_t* packed, int threads) {
  const int64_t pairs = (k + kPair - 1) / kPair, first_panel = column / kPanel;
  const int64_t panels = (column + n + kPanel - 1) / kPanel - first_panel;
  parallel_for(n * k < 65536 ? 1 : threads, panels, [&](int64_t unit) {
    const int64_t panel = first_panel + unit;
    const int64_t begin = std::max(column, panel * kPanel), end = std::min(column + n, (panel + 1) * kPanel);
    for (int64_t c = begin; c < end; ++c) {
      const int8_t* row = w + (c - column) * k;
      uint8_t* out = packed + panel * pairs * kGroupBytes + c % kPanel * kGroup;
      for (int64_t pair = 0; pair < pairs; ++pair, out += kGroupBytes) {
        uint8_t levels[kPair];
        for (int64_t i = 0; i < kPair; ++i) {
          const int64_t at = pair * kPair + i;
          levels[i] = static_cast<uint8_t>(8 + (at < k ? row[at] : 0));
        }
        for (int i = 0; i < kGroup; ++i) out[i] = static_cast<uint8_t>(levels[i] | levels[kGroup + i] << 4);
      }
    }
  });
}

// As haq_linear with 4-bit weights and weight_scale (groups, n). `row_scale` (m,) are the scales of an int8 x, or null.
int haq_linear4(int level, int threads, const void* x, int x_kind, int64_t m, int64_t k, const uint8_t* packed,
                int64_t n, int64_t group, const float* weight_scale, const float* bias, const float* row_scale,
                float static_scale, int64_t rotation, void* out, int out_kind) {
  return failed([&] {
    multiply({kLevels[level], threads, x, static_cast<Kind>(x_kind), static_scale, packed, m, n, k, group, row_scale,
              rotation},
             {nullptr, nullptr, weight_scale, bias, out, static_cast<Kind>(out_kind), n});
  });
}

int haq_linear(int level, int threads, const void* x, int x_kind, int64_t m, int64_t k, const uint8_t* packed,
               int64_t n, const float* weight_scale, const float* bias, float static_scale, int64_t rotation,
               void* out, int out_kind) {
  return failed([&] {
    multiply({kLevels[level], threads, x, static_cast<Kind>(x_kind), static_scale, packed, m, n, k, 0, nullptr,
              rotation},
             {nullptr, nullptr, weight_scale, bias, out, static_cast<Kind>(out_kind), n});
  });
}

int haq_quantize(int level, int threads, const void* x, int x_kind, int64_t m, int64_t k, float static_scale,
                 int64_t rotation, int8_t* q, float* scale) {
  return failed([&] {
    quantize_rows(*kLevels[level], threads, x, static_cast<Kind>(x_kind), m, k, static_scale, rotation, q, scale);
  });
}

// out (m, n) = silu(gate) * up, where gate_up (m, 2n) holds gate | up in each row.
void haq_silu_mul(int level, int threads, const void* gate_up, int kind, int64_t m, int64_t n, void* out) {
  const int64_t bytes = n * (kind == kFloat ? 4 : 2);
  parallel_for(threads_for(threads, m * n), m, [&](int64_t row) {
    const auto* gate = static_cast<const uint8_t*>(gate_up) + 2 * row * bytes;
    kLevels[level]->silu_mul(gate, gate + bytes, static_cast<Kind>(kind), n,
                             static_cast<uint8_t*>(out) + row * bytes);
  });
}

// out (m, n) = x (m, k) times w (n, k) transposed; w_kind is kFloat, kBFloat16 or kFloat16. A block of weights stays in
// the second-level cache while the rows pass by.
void haq_float_linear(int level, int threads, const float* x, int64_t m, int64_t k, const void* w, int w_kind,
                      int64_t n, float* out) {
  constexpr int64_t unit_values = 1 << 16;
  const int64_t block = std::max<int64_t>(8, unit_values / std::max<int64_t>(1, k) / 8 * 8);
  const auto kind = static_cast<Kind>(w_kind);
  parallel_for(threads, (n + block - 1) / block, [&](int64_t i) {
    const int64_t first = i * block, bytes = first * k * (kind == kFloat ? 4 : 2);
    kLevels[level]->float_product(x, m, static_cast<const uint8_t*>(w) + bytes, kind, std::min(block, n - first), k,
                                  out + first, n);
  });
}

// Decoder layers one after the other over a batch of sequences, `hidden` in place, see decoder.h.
int haq_decoder_layers(int level, int threads, const Layer* layers, int64_t count, float* hidden,
                       const Sequence* sequences, int64_t batch, const float* cosines, const float* sines, float* keys,
                       float* values, int64_t kv_layers, int64_t capacity) {
  return failed([&] {
    run_layers(*kLevels[level], threads, layers, count, hidden, {sequences, batch}, cosines, sines,
               {keys, values, kv_layers, capacity});
  });
}

// A layer but for its experts, `hidden` in place; `normed` is what they read. Keys and values are of all layers.
int haq_attention(int level, int threads, const Layer* layers, int64_t index, float* hidden, float* normed,
                  const Sequence* sequences, int64_t batch, const float* cosines, const float* sines, float* keys,
                  float* values, int64_t kv_layers, int64_t capacity) {
  return failed([&] {
    run_attention(*kLevels[level], threads, layers, index, hidden, normed, {sequences, batch}, cosines, sines,
                  {keys, values, kv_layers, capacity});
  });
}

// The routing of x (m, width), see moe.h: logits (m, r.experts), weights and chosen (m, r.chosen).
int haq_route(int level, int threads, const Router* r, const float* x, int64_t m, int64_t width, float* logits,
              float* weights, int64_t* chosen) {
  return failed([&] {
    route(*kLevels[level], threads, *r, x, m, width, logits, weights, chosen);
  });
}

// out (m, k) = the expert of x (m, k) int8; weights packed, gate and up of `inner` rows. A group is 0 for 8-bit weights.
int haq_expert(int level, int threads, const int8_t* x, const float* row_scale, int64_t m, int64_t k, int64_t inner,
               const uint8_t* gate, const float* gate_scale, int64_t gate_group, const uint8_t* up,
               const float* up_scale, int64_t up_group, const uint8_t* down, const float* down_scale,
               int64_t down_group, float static_scale, int64_t rotation, float* out) {
  return failed([&] {
    run_expert(*kLevels[level], threads, x, row_scale, m,
               {{gate, gate_scale, nullptr, inner, k, gate_group, 0, 1},
                {up, up_scale, nullptr, inner, k, up_group, 0, 1},
                {down, down_scale, nullptr, k, inner, down_group, static_scale, rotation}},
               out);
  });
}

// Reads `bytes` at `data` in blocks of 128 KiB; the sum keeps the compiler honest.
uint64_t haq_read(int level, int threads, const uint8_t* data, int64_t bytes) {
  constexpr int64_t block = 1 << 17;
  std::atomic<uint64_t> sum{0};
  parallel_for(threads, (bytes + block - 1) / block, [&](int64_t i) {
    sum += kLevels[level]->read(data + i * block, std::min(block, bytes - i * block));
  });
  return sum;
}

} // extern "C"
