// Runs the C functions over ragged shapes from buffers of exactly the needed size, for the sanitizers.
#include <cstdint>
#include <cstdio>
#include <vector>

extern "C" {
const char* haq_level_name(int);
int haq_level_supported(int);
int64_t haq_packed_bytes(int64_t, int64_t);
void haq_pack(const int8_t*, int64_t, int64_t, int64_t, uint8_t*, int);
int haq_linear(int, int, const void*, int, int64_t, int64_t, const uint8_t*, int64_t, const float*, const float*,
               float, void*, int);
void haq_quantize(int, int, const void*, int, int64_t, int64_t, float, int8_t*, float*);
void haq_silu_mul(int, int, const void*, int, int64_t, int64_t, void*);
}

static bool run(int level, int threads, int64_t m, int64_t n, int64_t k) {
  std::vector<int8_t> w(n * k), qx(m * k), q(m * k);
  std::vector<float> x(m * k), scale(n, 0.5f), bias(n, 1.0f), y(m * n), row_scale(m), half(m * (n / 2));
  std::vector<uint16_t> narrow(m * k, 0x3f80), narrow_y(m * n);
  std::vector<int32_t> acc(m * n);
  for (int64_t i = 0; i < n * k; ++i) w[i] = static_cast<int8_t>(i * 37 % 255 - 127);
  for (int64_t i = 0; i < m * k; ++i) qx[i] = static_cast<int8_t>(i * 53 % 255 - 127), x[i] = 0.01f * qx[i];
  std::vector<uint8_t> packed(haq_packed_bytes(n, k));
  haq_pack(w.data(), n, k, 0, packed.data(), threads);
  haq_linear(level, threads, qx.data(), 3, m, k, packed.data(), n, nullptr, nullptr, 0, acc.data(), 0);
  haq_linear(level, threads, x.data(), 1, m, k, packed.data(), n, scale.data(), bias.data(), 0, y.data(), 1);
  haq_linear(level, threads, narrow.data(), 2, m, k, packed.data(), n, scale.data(), nullptr, 0.1f,
             narrow_y.data(), 2);
  haq_quantize(level, threads, x.data(), 1, m, k, 0, q.data(), row_scale.data());
  haq_silu_mul(level, threads, y.data(), 1, m, n / 2, half.data());
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      int64_t sum = 0;
      for (int64_t d = 0; d < k; ++d) sum += qx[i * k + d] * w[j * k + d];
      if (acc[i * n + j] != sum) return false;
    }
  return true;
}

int main() {
  int levels = 0;
  const int64_t shapes[][3] = {{1, 1, 1},   {1, 33, 65},   {2, 64, 128},  {5, 32, 63},  {14, 40, 100},
                               {29, 70, 7}, {25, 33, 2053}, {300, 12, 130}, {40, 400, 96}};
  for (int level = 0; haq_level_name(level); ++level) {
    if (!haq_level_supported(level)) continue;
    ++levels;
    for (const auto& s : shapes)
      for (const int threads : {1, 3})
        if (!run(level, threads, s[0], s[1], s[2])) {
          std::printf("wrong sums at %s\n", haq_level_name(level));
          return 1;
        }
  }
  std::printf("ok %d\n", levels);
  return 0;
}
