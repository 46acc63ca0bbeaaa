// Decoder layers of int8 linears over one sequence, with their keys and values kept from step to step.
#pragma once
#include "kernels.h"
#include "linear.h"
#include "moe.h"

namespace haq {

// As haq_lab/runtime/layer_parts.py fills them in (ctypes): all fields are 8 bytes, but for those named float.

// An RMS norm of each `width` values on their own.
struct Norm {
  const float* weight; // (width,); null: there is no such norm
  int64_t width;
  float eps;
};

struct Layer {
  int64_t heads, kv_heads, head_dim;
  float scaling;
  Norm attention, mlp;  // before the two halves
  Norm queries, keys;   // before the rotation: of one head's width, or of all heads'
  Linear qkv, output;
  Linear gate_up, down; // where the MLP is dense
  Moe moe;              // where it is a Mixture of Experts whose `experts` are not null
};

// Of all layers, which have the same heads. Keys (layers, kv_heads, capacity / 32, head_dim, 32): a panel's 32
// positions lie together, as the weights of a product do.
// Values (layers, kv_heads, capacity, value_width): head_dim, padded with zeros to a multiple of 32.
struct KeyValues {
  float *keys, *values;
  int64_t capacity; // a multiple of 32
  int64_t past;     // positions already there
};

// hidden (tokens, hidden size) float32, in place; cosines and sines (tokens, head_dim). Throw std::bad_alloc.

// Whole layers, one after the other.
void run_layers(const Kernels& isa, int threads, const Layer* layers, int64_t count, float* hidden, int64_t tokens,
                const float* cosines, const float* sines, KeyValues kv);

// The attention half of layers[index], and then the norm before the other half: of `hidden` into `normed`.
void run_attention(const Kernels& isa, int threads, const Layer* layers, int64_t index, float* hidden, float* normed,
                   int64_t tokens, const float* cosines, const float* sines, KeyValues kv);

} // namespace haq
