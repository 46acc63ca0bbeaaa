// Activations -> int8, one block of 128 threads a row, plain or fused with what stands before the product:
// RMSNorm, LayerNorm (smoothing is already folded into their weights) or SwiGLU. The `rotate` variants apply a block
// Hadamard transform before the rounding.
//
// A thread takes eight columns at a time (16 bytes of a 16-bit type) and always the same ones, so the row is read once
// from global memory, kept as fp32 in shared memory, and needs no barrier but those of the reductions. A row too long
// for shared memory is read again from where the staged part ends.
//   static_scale  null: one scale a row, max|row| / 127; else one scale for all, from calibration
//   q (M, K) int8, scales (M) fp32, K a multiple of 16, shared: 128 bytes + 32 bytes a staged group of eight columns
#include "numeric.cuh"
#include "reduce.cuh"

#define ROW_THREADS 128
#define SCRATCH_BYTES 128

struct Eight { float v[8]; };

__device__ __forceinline__ Eight load_eight(const float* p) {
  float4 a = ((const float4*)p)[0], b = ((const float4*)p)[1];
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

template <class T> __device__ __forceinline__ Eight load_eight(const T* p) {
  uint4 packed = *(const uint4*)p;
  unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
  Eight e;
  for (int i = 0; i < 4; i++) {
    T low, high;
    low.bits = (unsigned short)(words[i] & 0xffffu);
    high.bits = (unsigned short)(words[i] >> 16);
    e.v[2 * i] = to_float(low);
    e.v[2 * i + 1] = to_float(high);
  }
  return e;
}

// Where a row's values come from.
template <class T> struct PlainSource {
  const T* x;
  __device__ __forceinline__ Eight load(int group) const { return load_eight(x + 8 * group); }
};

template <class T> struct SwigluSource {  // silu(gate) * up
  const T* gate;
  const T* up;
  __device__ __forceinline__ Eight load(int group) const {
    Eight g = load_eight(gate + 8 * group), u = load_eight(up + 8 * group);
    for (int i = 0; i < 8; i++) g.v[i] = __fmul_rn(silu(g.v[i]), u.v[i]);
    return g;
  }
};

// The staged part of the row: two planes of four columns a group, so that neighbouring threads hit different banks.
// Asked for where it is used, never kept in a struct: NVRTC 12.9 took a global pointer in a struct beside it for a
// shared one (seen in the PTX, by interpreting it).
__device__ __forceinline__ float4* staged_planes() {
  DYNAMIC_SHARED(shared);
  return (float4*)(shared + SCRATCH_BYTES);
}

// A source whose first `staged` groups are kept in shared memory.
template <class Source> struct StagedRow {
  Source source;
  int staged;
  __device__ __forceinline__ Eight first_read(int group) const {
    Eight e = source.load(group);
    if (group < staged) {
      float4* planes = staged_planes();
      planes[group] = make_float4(e.v[0], e.v[1], e.v[2], e.v[3]);
      planes[staged + group] = make_float4(e.v[4], e.v[5], e.v[6], e.v[7]);
    }
    return e;
  }
  __device__ __forceinline__ Eight read_again(int group) const {
    if (group >= staged) return source.load(group);
    const float4* planes = staged_planes();
    float4 a = planes[group], b = planes[staged + group];
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
  }
};

// What happens to a value on its way to the quantizer.
struct Identity {
  __device__ __forceinline__ float operator()(float x, int) const { return x; }
};

struct Normalize {  // ((x - mean) * inverse) * weight [+ bias]; RMSNorm has mean 0
  const float* weight;
  const float* bias;
  float mean, inverse;
  __device__ __forceinline__ float operator()(float x, int k) const {
    float y = __fmul_rn(__fmul_rn(__fsub_rn(x, mean), inverse), weight[k]);
    return bias ? __fadd_rn(y, bias[k]) : y;
  }
};

struct Output {
  const float* static_scale;
  i8* q;
  float* scales;
};

// The last two steps of every kernel here: largest magnitude, then rounding. FIRST: nothing has read the row yet.
template <bool FIRST, class Source, class Map>
__device__ __forceinline__ void quantize_row(const StagedRow<Source>& row, const Map& map, const Output& out,
                                             int groups) {
  float scale;
  if (out.static_scale) {
    scale = *out.static_scale;
  } else {
    float largest = 0.0f;
    for (int group = threadIdx.x; group < groups; group += blockDim.x) {
      Eight e = FIRST ? row.first_read(group) : row.read_again(group);
      for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(map(e.v[i], 8 * group + i)));
    }
    scale = scale_of(block_reduce<Max>(largest));
  }
  bool unread = FIRST && out.static_scale;
  i8* q = out.q + (long long)blockIdx.x * groups * 8;
  for (int group = threadIdx.x; group < groups; group += blockDim.x) {
    Eight e = unread ? row.source.load(group) : row.read_again(group);
    unsigned packed[2] = {0, 0};
    for (int i = 0; i < 8; i++)
      packed[i >> 2] |= ((unsigned)quantized(map(e.v[i], 8 * group + i), scale) & 0xffu) << (8 * (i & 3));
    *(uint2*)(q + 8 * group) = make_uint2(packed[0], packed[1]);
  }
  if (threadIdx.x == 0) out.scales[blockIdx.x] = scale;
}

// The block Hadamard transform of haq_lab/int8/rotation.py, between a row's map and its rounding. Every sum has two
// terms, so the threads that share a block change no bit.
struct Rotation {
  int block;    // columns, a power of two that divides K
  float scale;  // 1 / sqrt(block)
};

#define WARP_COLUMNS 256  // columns of a warp: larger blocks are finished in shared memory

// The stages within a thread's eight columns, then those between lanes. All lanes of the warp must call it.
__device__ __forceinline__ void mix(Eight& e, int block) {
  for (int half = 1; half < 8; half *= 2) {
    if (half >= block) return;
    for (int i = 0; i < 8; i++) {
      if (i & half) continue;
      float a = e.v[i], b = e.v[i + half];
      e.v[i] = __fadd_rn(a, b);
      e.v[i + half] = __fsub_rn(a, b);
    }
  }
  for (int half = 8; half < block && half < WARP_COLUMNS; half *= 2) {
    bool second = threadIdx.x & (half >> 3);
    for (int i = 0; i < 8; i++) {
      float other = __shfl_xor_sync(0xffffffffu, e.v[i], half >> 3);
      e.v[i] = second ? __fsub_rn(other, e.v[i]) : __fadd_rn(e.v[i], other);
    }
  }
}

__device__ __forceinline__ void scale_all(Eight& e, float scale) {
  for (int i = 0; i < 8; i++) e.v[i] = __fmul_rn(e.v[i], scale);
}

__device__ __forceinline__ float4 sum_of(float4 a, float4 b, float sign) {
  return make_float4(__fadd_rn(a.x, sign * b.x), __fadd_rn(a.y, sign * b.y), __fadd_rn(a.z, sign * b.z),
                     __fadd_rn(a.w, sign * b.w));
}

// The stages of blocks larger than a warp's columns, on a row that is staged as a whole.
__device__ __forceinline__ void mix_staged(int block, int groups) {
  float4* planes = staged_planes();
  for (int distance = WARP_COLUMNS >> 3; distance < block >> 3; distance *= 2) {
    __syncthreads();  // the stage before is finished
    for (int pair = threadIdx.x; pair < groups; pair += blockDim.x) {  // in both planes
      int plane = pair & 1, place = pair >> 1;
      int first = plane * groups + place / distance * 2 * distance + place % distance;
      float4 a = planes[first], b = planes[first + distance];
      planes[first] = sum_of(a, b, 1.0f);
      planes[first + distance] = sum_of(a, b, -1.0f);
    }
  }
  __syncthreads();
}

// As quantize_row, with the rotation after the map. A part of the row that is not staged is computed twice; `staged` is
// then a multiple of a warp's groups. A block larger than a warp's columns needs the whole row staged.
template <bool FIRST, class Source, class Map>
__device__ __forceinline__ void quantize_rotated(const StagedRow<Source>& row, const Map& map, const Output& out,
                                                 int groups, const Rotation& rotation) {
  bool large = rotation.block > WARP_COLUMNS;
  int staged = row.staged, all = (groups + 31) & ~31;  // whole warps, because their lanes exchange values
  float4* planes = staged_planes();
  float largest = 0.0f;
  for (int group = threadIdx.x; group < all; group += blockDim.x) {
    Eight e = {};
    if (group < groups) e = FIRST ? row.source.load(group) : row.read_again(group);
    if (group < groups)
      for (int i = 0; i < 8; i++) e.v[i] = map(e.v[i], 8 * group + i);
    mix(e, rotation.block);
    if (!large) scale_all(e, rotation.scale);
    for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(e.v[i]));
    if (group < staged) {
      planes[group] = make_float4(e.v[0], e.v[1], e.v[2], e.v[3]);
      planes[staged + group] = make_float4(e.v[4], e.v[5], e.v[6], e.v[7]);
    }
  }
  if (large) {
    mix_staged(rotation.block, groups);
    largest = 0.0f;
    for (int group = threadIdx.x; group < groups; group += blockDim.x) {
      Eight e = row.read_again(group);
      scale_all(e, rotation.scale);
      for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(e.v[i]));
    }
  }
  float scale = out.static_scale ? *out.static_scale : scale_of(block_reduce<Max>(largest));
  i8* q = out.q + (long long)blockIdx.x * groups * 8;
  for (int group = threadIdx.x; group < all; group += blockDim.x) {
    Eight e = {};
    if (group < staged) {
      e = row.read_again(group);
      if (large) scale_all(e, rotation.scale);
    } else if (staged < groups) {
      if (group < groups) {
        e = row.source.load(group);
        for (int i = 0; i < 8; i++) e.v[i] = map(e.v[i], 8 * group + i);
      }
      mix(e, rotation.block);
      scale_all(e, rotation.scale);
    }
    if (group >= groups) continue;
    unsigned packed[2] = {0, 0};
    for (int i = 0; i < 8; i++)
      packed[i >> 2] |= ((unsigned)quantized(e.v[i], scale) & 0xffu) << (8 * (i & 3));
    *(uint2*)(q + 8 * group) = make_uint2(packed[0], packed[1]);
  }
  if (threadIdx.x == 0) out.scales[blockIdx.x] = scale;
}

// The last step of every kernel: as it is, or rotated.
struct Plain {
  template <bool FIRST, class Source, class Map>
  __device__ __forceinline__ void finish(const StagedRow<Source>& row, const Map& map, const Output& out,
                                         int groups) const {
    quantize_row<FIRST>(row, map, out, groups);
  }
};

struct Rotated {
  Rotation rotation;
  template <bool FIRST, class Source, class Map>
  __device__ __forceinline__ void finish(const StagedRow<Source>& row, const Map& map, const Output& out,
                                         int groups) const {
    quantize_rotated<FIRST>(row, map, out, groups, rotation);
  }
};

template <class T, class Last>
__device__ __forceinline__ void rmsnorm_quantize(const T* x, const float* weight, float eps, const Output& out,
                                                 int K, int staged, const Last& last) {
  int groups = K >> 3;
  StagedRow<PlainSource<T>> row = {{x + (long long)blockIdx.x * K}, staged};
  float squares = 0.0f;
  for (int group = threadIdx.x; group < groups; group += blockDim.x) {
    Eight e = row.first_read(group);
    for (int i = 0; i < 8; i++) squares = __fadd_rn(squares, __fmul_rn(e.v[i], e.v[i]));
  }
  float mean_square = __fdiv_rn(block_reduce<Sum>(squares), __int2float_rn(K));
  float inverse = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean_square, eps)));
  last.template finish<false>(row, Normalize{weight, nullptr, 0.0f, inverse}, out, groups);
}

template <class T, class Last>
__device__ __forceinline__ void layernorm_quantize(const T* x, const float* weight, const float* bias, float eps,
                                                   const Output& out, int K, int staged, const Last& last) {
  int groups = K >> 3;
  StagedRow<PlainSource<T>> row = {{x + (long long)blockIdx.x * K}, staged};
  float sum = 0.0f;
  for (int group = threadIdx.x; group < groups; group += blockDim.x) {
    Eight e = row.first_read(group);
    for (int i = 0; i < 8; i++) sum = __fadd_rn(sum, e.v[i]);
  }
  float mean = __fdiv_rn(block_reduce<Sum>(sum), __int2float_rn(K));
  float squares = 0.0f;
  for (int group = threadIdx.x; group < groups; group += blockDim.x) {
    Eight e = row.read_again(group);
    for (int i = 0; i < 8; i++) {
      float centred = __fsub_rn(e.v[i], mean);
      squares = __fadd_rn(squares, __fmul_rn(centred, centred));
    }
  }
  float variance = __fdiv_rn(block_reduce<Sum>(squares), __int2float_rn(K));
  float inverse = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(variance, eps)));
  last.template finish<false>(row, Normalize{weight, bias, mean, inverse}, out, groups);
}

#define QUANTIZE_KERNEL(name, T)                                                                                   \
  extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                        \
  name(const T* __restrict__ x, const float* __restrict__ static_scale, i8* __restrict__ q,                        \
       float* __restrict__ scales, int K, int staged) {                                                            \
    StagedRow<PlainSource<T>> row = {{x + (long long)blockIdx.x * K}, staged};                                     \
    Plain{}.template finish<true>(row, Identity{}, Output{static_scale, q, scales}, K >> 3);                       \
  }

#define SWIGLU_KERNEL(name, T)                                                                                     \
  extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                        \
  name(const T* __restrict__ gate, const T* __restrict__ up, const float* __restrict__ static_scale,               \
       i8* __restrict__ q, float* __restrict__ scales, int row_stride, int K, int staged) {                        \
    long long start = (long long)blockIdx.x * row_stride;                                                          \
    StagedRow<SwigluSource<T>> row = {{gate + start, up + start}, staged};                                         \
    Plain{}.template finish<true>(row, Identity{}, Output{static_scale, q, scales}, K >> 3);                       \
  }

#define RMSNORM_KERNEL(name, T)                                                                                    \
  extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                        \
  name(const T* __restrict__ x, const float* __restrict__ weight, float eps,                                       \
       const float* __restrict__ static_scale, i8* __restrict__ q, float* __restrict__ scales, int K,              \
       int staged) {                                                                                               \
    rmsnorm_quantize(x, weight, eps, Output{static_scale, q, scales}, K, staged, Plain{});                         \
  }

#define LAYERNORM_KERNEL(name, T)                                                                                  \
  extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                        \
  name(const T* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias, float eps,       \
       const float* __restrict__ static_scale, i8* __restrict__ q, float* __restrict__ scales, int K,              \
       int staged) {                                                                                               \
    layernorm_quantize(x, weight, bias, eps, Output{static_scale, q, scales}, K, staged, Plain{});                 \
  }

#define ROTATED_QUANTIZE_KERNEL(name, T)                                                                           \
  extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                        \
  name(const T* __restrict__ x, const float* __restrict__ static_scale, i8* __restrict__ q,                        \
       float* __restrict__ scales, int K, int staged, int block, float block_scale) {                              \
    StagedRow<PlainSource<T>> row = {{x + (long long)blockIdx.x * K}, staged};                                     \
    Rotated{{block, block_scale}}.template finish<true>(row, Identity{}, Output{static_scale, q, scales}, K >> 3); \
  }

#define ROTATED_SWIGLU_KERNEL(name, T)                                                                             \
  extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                        \
  name(const T* __restrict__ gate, const T* __restrict__ up, const float* __restrict__ static_scale,               \
       i8* __restrict__ q, float* __restrict__ scales, int row_stride,                                             \
       int K, int staged, int block, float block_scale) {                                                          \
    long long start = (long long)blockIdx.x * row_stride;                                                          \
    StagedRow<SwigluSource<T>> row = {{gate + start, up + start}, staged};                                         \
    Rotated{{block, block_scale}}.template finish<true>(row, Identity{}, Output{static_scale, q, scales}, K >> 3); \
  }

#define ROTATED_RMSNORM_KERNEL(name, T)                                                                            \
  extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                        \
  name(const T* __restrict__ x, const float* __restrict__ weight, float eps,                                       \
       const float* __restrict__ static_scale, i8* __restrict__ q, float* __restrict__ scales, int K,              \
       int staged, int block, float block_scale) {                                                                 \
    rmsnorm_quantize(x, weight, eps, Output{static_scale, q, scales}, K, staged, Rotated{{block, block_scale}});   \
  }

#define ROTATED_LAYERNORM_KERNEL(name, T)                                                                          \
  extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                        \
  name(const T* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias, float eps,       \
       const float* __restrict__ static_scale, i8* __restrict__ q, float* __restrict__ scales, int K,              \
       int staged, int block, float block_scale) {                                                                 \
    layernorm_quantize(x, weight, bias, eps, Output{static_scale, q, scales}, K, staged, Rotated{{block, block_scale}});\
  }

QUANTIZE_KERNEL(quantize_f16, f16)
QUANTIZE_KERNEL(quantize_bf16, bf16)
QUANTIZE_KERNEL(quantize_f32, float)
SWIGLU_KERNEL(swiglu_quantize_f16, f16)
SWIGLU_KERNEL(swiglu_quantize_bf16, bf16)
SWIGLU_KERNEL(swiglu_quantize_f32, float)
RMSNORM_KERNEL(rmsnorm_quantize_f16, f16)
RMSNORM_KERNEL(rmsnorm_quantize_bf16, bf16)
RMSNORM_KERNEL(rmsnorm_quantize_f32, float)
LAYERNORM_KERNEL(layernorm_quantize_f16, f16)
LAYERNORM_KERNEL(layernorm_quantize_bf16, bf16)
LAYERNORM_KERNEL(layernorm_quantize_f32, float)
ROTATED_QUANTIZE_KERNEL(rotate_quantize_f16, f16)
ROTATED_QUANTIZE_KERNEL(rotate_quantize_bf16, bf16)
ROTATED_QUANTIZE_KERNEL(rotate_quantize_f32, float)
ROTATED_SWIGLU_KERNEL(swiglu_rotate_quantize_f16, f16)
ROTATED_SWIGLU_KERNEL(swiglu_rotate_quantize_bf16, bf16)
ROTATED_SWIGLU_KERNEL(swiglu_rotate_quantize_f32, float)
ROTATED_RMSNORM_KERNEL(rmsnorm_rotate_quantize_f16, f16)
ROTATED_RMSNORM_KERNEL(rmsnorm_rotate_quantize_bf16, bf16)
ROTATED_RMSNORM_KERNEL(rmsnorm_rotate_quantize_f32, float)
ROTATED_LAYERNORM_KERNEL(layernorm_rotate_quantize_f16, f16)
ROTATED_LAYERNORM_KERNEL(layernorm_rotate_quantize_bf16, bf16)
ROTATED_LAYERNORM_KERNEL(layernorm_rotate_quantize_f32, float)
