// A Mixture of Experts: which experts a token has, and what they make of it.
#pragma once
#include "linear.h"

namespace haq {

// As haq_lab/runtime/layer_parts.py fills them in (ctypes).

// What becomes of the logits of a token: probabilities; numbers between 0 and 1, each on its own; or SparseMixer's
// weights (arXiv 2409.12136), of which each is a softmax over the logits that are left and nearly as large.
enum Scores : int64_t { kSoftmax = 0, kSigmoid = 1, kSparseMixer = 2 };

struct Router {
  const float* weight;     // (experts, width)
  const float* correction; // (experts,) of the scores, for the choice alone; null: none
  int64_t experts, chosen; // how many there are, and how many a token has
  int64_t scores;          // a Scores
  int64_t groups, chosen_groups; // of equally many experts: those whose two best experts have the largest sums
  int64_t normalized;            // whether a token's weights sum to 1, but for the factor
  float factor;                  // of a token's weights
  float jitter;                  // of kSparseMixer: logits are near if they differ by at most twice this share
};

struct Expert {
  Linear gate, up, down;
};

struct Moe {
  Router router;
  const Expert* experts;  // one after the other
  float activation_scale; // of what they all read; 0: a scale per row
  int64_t rotation;       // of what they all read, but not the router; see linear.h
};

// Of each row of x (m, width) the experts of largest score, largest first: `chosen` and their `weights` (m, r.chosen), and
// all `logits` (m, r.experts). Throws std::bad_alloc.
void route(const Kernels& isa, int threads, const Router& r, const float* x, int64_t m, int64_t width, float* logits,
           float* weights, int64_t* chosen);

// out (m, down.n) = down(silu(gate x) * up x) of x (m, gate.k) int8 with its row scales (m,). Operation for operation
// what the products, haq_silu_mul and quantising give one by one. Throws std::bad_alloc.
void run_expert(const Kernels& isa, int threads, const int8_t* x, const float* row_scale, int64_t m,
                const Expert& expert, float* out);

// hidden (m, width) += residual times, for each row of x (m, width), its experts' results times their weights, summed in
// the order of `route`. Bit for bit what haq_lab/models/experts.py does with `run_expert`. Throws std::bad_alloc.
void add_experts(const Kernels& isa, int threads, const Moe& moe, const float* x, int64_t m, int64_t width,
                 float residual, float* hidden);

} // namespace haq
