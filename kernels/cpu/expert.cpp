#include "expert.h"

#include "gemm.h"
#include "parallel.h"
#include "scratch.h"

namespace haq {
namespace {

constexpr int64_t kSerial = 32768; // values below which threads cost more than they gain

thread_local Scratch inner_scratch;

Epilogue into(float* out, const Linear& linear) {
  return {nullptr, nullptr, linear.scale, linear.bias, out, kFloat, linear.n};
}

} // namespace

void run_expert(const Kernels& isa, int threads, const int8_t* x, const float* row_scale, int64_t m,
                const Expert& expert, float* out) {
  const int64_t f = expert.gate.n;
  float* gate = inner_scratch.floats(3 * m * f);
  float *up = gate + m * f, *inner = up + m * f;
  const auto read = [&](const Linear& linear, float* y) {
    multiply({&isa, threads, x, kInt8, 0, linear.packed, m, f, linear.k, row_scale}, into(y, linear));
  };
  read(expert.gate, gate);
  read(expert.up, up);
  parallel_for(m * f < kSerial ? 1 : threads, m,
               [&](int64_t row) { isa.silu_mul(gate + row * f, up + row * f, kFloat, f, inner + row * f); });
  const Linear& down = expert.down;
  multiply({&isa, threads, inner, kFloat, down.activation_scale, down.packed, m, down.n, f}, into(out, down));
}

} // namespace haq
