// Norm, q/k/v, rotation, attention, output, residual; norm, gate/up, activation, down, residual. The products
// are those of gemm.cpp; what lies between them is float32.
#include "decoder.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "gemm.h"
#include "parallel.h"
#include "scratch.h"

namespace haq {
namespace {

constexpr int64_t kTokens = 512; // taken at a time: bounds the scratch memory; each time reads the weights again

thread_local Scratch normed_scratch, wide_scratch, narrow_scratch, score_scratch, piece_scratch;

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Rows of a step that belong to one sequence.
struct Piece {
  int64_t sequence, first, tokens; // first: index of its first row
  int64_t past;                    // positions of the sequence before this piece
  int64_t units;                   // units of work of `attend` in the pieces up to this one
};

struct Step {
  const Kernels& isa;
  int threads;
  const Layer& layer;
  float* hidden;
  int64_t tokens, width; // width of `hidden`
  const float *cosines, *sines;
  KeyValues kv; // of the layer
  int64_t sequences; // in the cache
  const Piece *pieces, *end;
};

void apply(const Step& s, const Linear& linear, const float* x, float* out) {
  multiply({&s.isa, s.threads, x, kFloat, linear.activation_scale, linear.packed, s.tokens, linear.n, linear.k,
            linear.group, nullptr, linear.rotation},
           {nullptr, nullptr, linear.scale, linear.bias, out, kFloat, linear.n});
}

// Calls body(token) for all tokens of the step, among threads if there are many values; `width` is what a token has.
template <class Body>
void each_token(const Step& s, int64_t width, const Body& body) {
  parallel_for(threads_for(s.threads, s.tokens * width), s.tokens, body);
}

// x and out (count,), which may be the same
void normalize(const Step& s, const Norm& norm, const float* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += norm.width) {
    if (norm.bias)
      s.isa.layer_norm(x + i, norm.gain, norm.bias, norm.eps, norm.width, out + i);
    else
      s.isa.rms_norm(x + i, norm.gain, norm.eps, norm.width, out + i);
  }
}

const float* normed(const Step& s, const Norm& norm) {
  if (!norm.gain) return s.hidden;
  float* out = normed_scratch.floats(s.tokens * s.width);
  each_token(s, s.width, [&](int64_t t) { normalize(s, norm, s.hidden + t * s.width, s.width, out + t * s.width); });
  return out;
}

// Normalises (where there is such a norm) and rotates queries and keys in place, and appends the keys and values to
// those of before.
void remember(const Step& s, const Piece& piece, float* qkv) {
  const Layer& l = s.layer;
  const int64_t d = l.head_dim, value_width = round_up(d, kPanel);
  parallel_for(threads_for(s.threads, piece.tokens * l.qkv.n), piece.tokens, [&](int64_t token) {
    const int64_t t = piece.first + token, position = piece.past + token;
    float* row = qkv + t * l.qkv.n;
    if (l.queries.gain) normalize(s, l.queries, row, l.heads * d, row);
    if (l.keys.gain) normalize(s, l.keys, row + l.heads * d, l.kv_heads * d, row + l.heads * d);
    for (int64_t h = 0; l.rotary && h < l.heads + l.kv_heads; ++h)
      s.isa.rotate(row + h * d, s.cosines + t * d, s.sines + t * d, l.rotary, l.pairs != 0);
    for (int64_t h = 0; h < l.kv_heads; ++h) {
      const float* key = row + (l.heads + h) * d;
      const int64_t start = (piece.sequence * l.kv_heads + h) * s.kv.capacity; // of the head's positions
      float* panel = s.kv.keys + (start + position / kPanel * kPanel) * d + position % kPanel;
      for (int64_t i = 0; i < d; ++i) panel[i * kPanel] = key[i];
      std::memcpy(s.kv.values + (start + position) * value_width, key + l.kv_heads * d,
                  static_cast<size_t>(d) * sizeof(float));
    }
  });
}

// A unit of work is one tile of rows: consecutive tokens of one head, or, if the piece has one token, the query heads
// that share a key-value head.
int64_t tiles_of(const Layer& l, int64_t tokens) {
  return ((tokens == 1 ? l.heads / l.kv_heads : tokens) + kAttendRows - 1) / kAttendRows;
}

int64_t units_of(const Layer& l, int64_t tokens) {
  return (tokens == 1 ? l.kv_heads : l.heads) * tiles_of(l, tokens);
}

void attend_unit(const Step& s, const Piece& piece, int64_t unit, const float* qkv, float* out) {
  const Layer& l = s.layer;
  const int64_t d = l.head_dim, shared = l.heads / l.kv_heads, out_width = l.heads * d;
  const bool one = piece.tokens == 1;
  const int64_t rows = one ? shared : piece.tokens, tiles = tiles_of(l, piece.tokens);
  const int64_t head = one ? unit / tiles * shared : unit / tiles, first = unit % tiles * kAttendRows;
  const int64_t token = one ? 0 : first, row = piece.first + token;
  const int64_t kv_head = piece.sequence * l.kv_heads + head / shared; // of all sequences
  const int64_t most = round_up(piece.past + piece.tokens, kPanel);
  Attention a;
  a.rows = static_cast<int>(std::min<int64_t>(kAttendRows, rows - first));
  a.queries = qkv + row * l.qkv.n + (one ? head + first : head) * d;
  a.query_stride = one ? d : l.qkv.n;
  a.keys = s.kv.keys + kv_head * s.kv.capacity * d;
  a.values = s.kv.values + kv_head * s.kv.capacity * round_up(d, kPanel);
  a.next_keys = kv_head + 1 < s.sequences * l.kv_heads ? a.keys + s.kv.capacity * d : nullptr;
  a.head_dim = d;
  a.seen = piece.past + token + 1;
  a.more_seen = one ? 0 : 1;
  a.window = l.window > 0 ? l.window : most;
  a.scaling = l.scaling;
  a.soft_cap = l.soft_cap;
  a.sinks = l.sinks ? l.sinks + (one ? head + first : head) : nullptr;
  a.sink_stride = one ? 1 : 0;
  a.scores = score_scratch.floats(kAttendRows * most);
  a.score_stride = most;
  a.out = out + row * out_width + (one ? head + first : head) * d;
  a.out_stride = one ? d : out_width;
  s.isa.attend(a);
}

void attend(const Step& s, const float* qkv, float* out) {
  std::atomic<bool> out_of_memory{false};
  parallel_for(s.threads, s.end[-1].units, [&](int64_t unit) {
    const Piece* piece = std::upper_bound(s.pieces, s.end, unit, [](int64_t u, const Piece& p) { return u < p.units; });
    const int64_t before = piece == s.pieces ? 0 : piece[-1].units;
    try {
      attend_unit(s, *piece, unit - before, qkv, out);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

// hidden += residual * norm(y), of y (tokens, width), which is used up
void add(const Step& s, const Norm& norm, float* y) {
  each_token(s, s.width, [&](int64_t t) {
    if (norm.gain) normalize(s, norm, y + t * s.width, s.width, y + t * s.width);
    for (int64_t i = t * s.width; i < (t + 1) * s.width; ++i) s.hidden[i] += s.layer.residual * y[i];
  });
}

void attention_half(const Step& s) {
  const Layer& l = s.layer;
  float* wide = wide_scratch.floats(s.tokens * std::max(l.qkv.n, s.width));
  float* narrow = narrow_scratch.floats(s.tokens * l.output.k);
  apply(s, l.qkv, normed(s, l.attention), wide);
  for (const Piece* piece = s.pieces; piece != s.end; ++piece) remember(s, *piece, wide);
  attend(s, wide, narrow);
  apply(s, l.output, narrow, wide); // the queries are done with
  add(s, l.attention_output, wide);
}

// The MLP of x (tokens, width), which is not in the wide or the narrow scratch memory.
float* mlp(const Step& s, const float* x) {
  const Layer& l = s.layer;
  const int64_t inner = l.down.k;
  float* wide = wide_scratch.floats(s.tokens * std::max(l.gate_up.n, s.width));
  float* narrow = narrow_scratch.floats(s.tokens * inner);
  apply(s, l.gate_up, x, wide);
  each_token(s, inner, [&](int64_t t) {
    const float* gate = wide + t * l.gate_up.n;
    const float* up = l.gate_up.n == inner ? nullptr : gate + inner;
    s.isa.gate_up(static_cast<Activation>(l.activation), gate, up, inner, narrow + t * inner);
  });
  apply(s, l.down, narrow, wide);
  return wide;
}

void mlp_half(const Step& s) { add(s, s.layer.mlp_output, mlp(s, normed(s, s.layer.mlp))); }

// Adds the shared expert, if there is one, of x (tokens, width).
void add_shared(const Step& s, const float* x) {
  const Layer& l = s.layer;
  if (!l.gate_up.packed) return;
  float* y = mlp(s, x);
  if (l.shared_gate)
    each_token(s, s.width, [&](int64_t t) {
      float logit;
      s.isa.float_product(x + t * s.width, 1, l.shared_gate, kFloat, 1, s.width, &logit, 1);
      const float weight = 1.0f / (1.0f + std::exp(-logit));
      for (int64_t i = t * s.width; i < (t + 1) * s.width; ++i) y[i] *= weight;
    });
  add(s, {}, y);
}

void moe_half(const Step& s) {
  const Layer& l = s.layer;
  const float* x = normed(s, l.mlp);
  add_shared(s, x);
  add_experts(s.isa, s.threads, l.moe, x, s.tokens, s.width, l.residual, s.hidden);
}

// Calls work(step) for all tokens, some at a time, with the layer's own keys and values. A step may hold many sequences,
// and a sequence may take many steps.
template <class Work>
void in_parts(const Kernels& isa, int threads, const Layer* layers, int64_t index, float* hidden, Batch batch,
              const float* cosines, const float* sines, KeyValues kv, const Work& work) {
  const Layer& l = layers[index];
  const int64_t width = l.output.n, d = l.head_dim;
  const int64_t positions = index % kv.layers * batch.count * l.kv_heads * kv.capacity; // of the layers before
  kv.keys += positions * d;
  kv.values += positions * round_up(d, kPanel);
  auto* pieces = reinterpret_cast<Piece*>(piece_scratch.get(batch.count * static_cast<int64_t>(sizeof(Piece))));
  int64_t first = 0, some = 0, units = 0; // the step's first row, and its rows so far
  Piece* end = pieces;
  const auto finish_step = [&] {
    if (some > 0)
      work(Step{isa, threads, l, hidden + first * width, some, width, cosines + first * d, sines + first * d, kv,
                batch.count, pieces, end});
    first += some;
    some = units = 0;
    end = pieces;
  };
  for (int64_t sequence = 0; sequence < batch.count; ++sequence) {
    const Sequence& whole = batch.sequences[sequence];
    for (int64_t done = 0; done < whole.tokens;) {
      const int64_t tokens = std::min(whole.tokens - done, kTokens - some);
      units += units_of(l, tokens);
      *end++ = {sequence, some, tokens, whole.past + done, units};
      some += tokens;
      done += tokens;
      if (some == kTokens) finish_step();
    }
  }
  finish_step();
}

} // namespace

void run_layers(const Kernels& isa, int threads, const Layer* layers, int64_t count, float* hidden, Batch batch,
                const float* cosines, const float* sines, KeyValues kv) {
  for (int64_t index = 0; index < count; ++index)
    in_parts(isa, threads, layers, index, hidden, batch, cosines, sines, kv, [](const Step& s) {
      attention_half(s);
      s.layer.moe.experts ? moe_half(s) : mlp_half(s);
    });
}

void run_attention(const Kernels& isa, int threads, const Layer* layers, int64_t index, float* hidden, float* normed,
                   Batch batch, const float* cosines, const float* sines, KeyValues kv) {
  in_parts(isa, threads, layers, index, hidden, batch, cosines, sines, kv, [&](const Step& s) {
    attention_half(s);
    float* x = normed + (s.hidden - hidden);
    normalize(s, s.layer.mlp, s.hidden, s.tokens * s.width, x);
    add_shared(s, x);
  });
}

} // namespace haq
