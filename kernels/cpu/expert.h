// One expert of a Mixture-of-Experts layer over rows that are int8 already.
#pragma once
#include "decoder.h"

namespace haq {

// As haq_lab/int8/native.py passes them: no biases, an activation scale for `down` alone.
struct Expert {
  Linear gate, up, down;
};

// out (m, down.n) = down(silu(gate x) * up x) of x (m, gate.k) int8 with its row scales (m,). Operation for operation
// what the products, haq_silu_mul and quantising give one by one. Throws std::bad_alloc.
void run_expert(const Kernels& isa, int threads, const int8_t* x, const float* row_scale, int64_t m,
                const Expert& expert, float* out);

} // namespace haq
