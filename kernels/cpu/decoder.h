// Decoder layers of int8 linears over a batch of sequences, whose keys and values stay in a cache from step to step.
#pragma once
#include "kernels.h"
#include "linear.h"
#include "moe.h"

namespace haq {

// As haq_lab/runtime/layer_parts.py fills them in (ctypes): all fields are 8 bytes, but for those named float.

// A norm of each `width` values on their own.
struct Norm {
  const float* gain; // (width,); null: there is no such norm
  const float* bias; // (width,) of a LayerNorm; null: an RMS norm
  int64_t width;
  float eps;
};

struct Layer {
  int64_t heads, kv_heads, head_dim;
  int64_t window;     // positions that a query sees, its own among them; 0: all before it
  int64_t rotary;     // first channels of each query and key that are rotated by its position
  int64_t pairs;      // they turn in neighbouring pairs; 0: the first half with the second half
  int64_t activation; // of the MLP: an Activation
  float scaling;
  float soft_cap;     // of the attention scores; 0: none
  float residual;     // factor of what a half adds
  Norm attention, mlp;               // before the two halves
  Norm attention_output, mlp_output; // after them, of what they add
  Norm queries, keys; // before the rotation: of one head's width, or of all heads'
  Linear qkv, output;
  const float* sinks;   // (heads,): a score of each head that has no value; or null
  // Of the MLP, or of the shared expert of a Mixture of Experts; null: there is none. `gate_up` is as wide as the input
  // of `down` if the MLP has no gate.
  Linear gate_up, down;
  const float* shared_gate; // (hidden size,): the shared expert is weighted by the sigmoid of this product; or null
  Moe moe;                  // where it is a Mixture of Experts whose `experts` are not null
};

// The next tokens of one sequence. Its rows of `hidden` follow those of the sequences before it, without padding. So a
// sequence has the same bits alone and in a batch.
struct Sequence {
  int64_t tokens; // may be 0
  int64_t past;   // positions that are already in the cache
};

struct Batch {
  const Sequence* sequences;
  int64_t count;
};

// The cache of all layers, which have the same heads. Keys (layers, sequences, kv_heads, capacity / 32, head_dim, 32): a
// panel's 32 positions lie together, as the weights of a product do.
// Values (layers, sequences, kv_heads, capacity, value_width): head_dim, padded with zeros to a multiple of 32.
struct KeyValues {
  float *keys, *values;
  int64_t layers;   // 1 if a layer may overwrite the keys and values of the layer before, because nobody reads them again
  int64_t capacity; // of each sequence; a multiple of 32
};

// hidden (tokens of all sequences, hidden size) float32, in place; cosines and sines (tokens of all sequences, head_dim),
// of which a layer reads the first `rotary`. Throw std::bad_alloc.

// Whole layers, one after the other.
void run_layers(const Kernels& isa, int threads, const Layer* layers, int64_t count, float* hidden, Batch batch,
                const float* cosines, const float* sines, KeyValues kv);

// The attention half of layers[index] and then the norm before the other half, of `hidden` into `normed`: what experts
// read. The shared expert, where there is one, is added to `hidden`.
void run_attention(const Kernels& isa, int threads, const Layer* layers, int64_t index, float* hidden, float* normed,
                   Batch batch, const float* cosines, const float* sines, KeyValues kv);

} // namespace haq
