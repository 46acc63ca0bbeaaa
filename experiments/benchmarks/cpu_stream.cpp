// The rate at which products of few rows stream their weights, called one after the other without Python between, as in
// a deployed model's layers; cpu_gemm.py builds and runs this. Prints a JSON object.
//
//   cpu_stream LIBRARY LEVEL N K POOL_BYTES REPEATS
//
// The matrices lie side by side in huge pages, as `deploy` lays them. Each turn reads a second pool of the same size
// plainly, as every instruction set up to this one does it, then multiplies all matrices by 1, 2, 3 and 4 rows. The
// best turns count.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace {

using LinearFunction = int (*)(int, int, const void*, int, int64_t, int64_t, const uint8_t*, int64_t, const float*,
                               const float*, float, void*, int);
using ReadFunction = uint64_t (*)(int, int, const uint8_t*, int64_t);
using SupportedFunction = int (*)(int);

template <class Function>
Function find(void* library, const char* name) {
  auto* const found = reinterpret_cast<Function>(dlsym(library, name));
  if (!found) std::fprintf(stderr, "%s\n", dlerror()), std::exit(1);
  return found;
}

uint8_t* huge_pages(size_t bytes) {
  constexpr size_t page = 2 << 20;
  void* const data = mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) std::perror("mmap"), std::exit(1);
  auto* const first = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(data) + page - 1) / page * page);
  madvise(first, bytes, MADV_HUGEPAGE);
  return first;
}

template <class Body>
double seconds(const Body& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

} // namespace

int main(int count, char** arguments) {
  if (count != 7) return std::fprintf(stderr, "cpu_stream LIBRARY LEVEL N K POOL_BYTES REPEATS\n"), 2;
  void* const library = dlopen(arguments[1], RTLD_NOW);
  if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  const auto linear = find<LinearFunction>(library, "haq_linear");
  const auto read = find<ReadFunction>(library, "haq_read");
  const int level = std::atoi(arguments[2]), repeats = std::atoi(arguments[6]);
  const auto supported = find<SupportedFunction>(library, "haq_level_supported");
  if (!supported(level)) return std::fprintf(stderr, "level %d is not supported\n", level), 1;
  const int64_t n = std::atoll(arguments[3]), k = std::atoll(arguments[4]), size = n * k; // n and k as packed: no padding
  const int64_t matrices = std::max<int64_t>(1, std::atoll(arguments[5]) / size), pool = matrices * size;
  constexpr int rows = 4, one_thread = 1, as_float = 1;

  uint8_t* const weights = huge_pages(static_cast<size_t>(pool));
  uint8_t* const plain = huge_pages(static_cast<size_t>(pool));
  std::minstd_rand random(0);
  std::vector<uint8_t> some(1 << 20);
  for (uint8_t& byte : some) byte = static_cast<uint8_t>(random() >> 8);
  for (int64_t i = 0; i < pool; i += 1 << 20)
    for (uint8_t* data : {weights, plain})
      std::memcpy(data + i, some.data(), static_cast<size_t>(std::min<int64_t>(1 << 20, pool - i)));
  std::vector<float> x(static_cast<size_t>(rows * k)), out(static_cast<size_t>(rows * n));
  std::vector<float> scale(static_cast<size_t>(n), 1e-3f);
  std::normal_distribution<float> normal;
  for (float& value : x) value = normal(random);

  double best[rows + 1];
  std::fill(best, best + rows + 1, 1e9);
  volatile uint64_t sum = 0;
  for (int turn = 0; turn <= repeats; ++turn) { // the first warms up
    for (int reader = 1; reader <= level; ++reader) {
      if (!supported(reader)) continue;
      const double took = seconds([&] { sum = sum + read(reader, one_thread, plain, pool); });
      if (turn) best[0] = std::min(best[0], took);
    }
    for (int m = 1; m <= rows; ++m) {
      const double took = seconds([&] {
        for (int64_t i = 0; i < matrices; ++i)
          linear(level, one_thread, x.data(), as_float, m, k, weights + i * size, n, scale.data(), nullptr, 0.0f,
                 out.data(), as_float);
      });
      if (turn) best[m] = std::min(best[m], took);
    }
  }
  std::printf("{\"read\": %.6g", static_cast<double>(pool) / best[0]);
  for (int m = 1; m <= rows; ++m) std::printf(", \"M=%d\": %.6g", m, static_cast<double>(pool) / best[m]);
  std::printf("}\n");
}
