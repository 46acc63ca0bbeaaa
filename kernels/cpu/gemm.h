// The product, blocked for the caches and shared among threads; see gemm.cpp.
#pragma once
#include "kernels.h"

namespace haq {

struct Product {
  const Kernels* isa;
  int threads;
  const void* x; // (M, K) contiguous
  Kind x_kind;   // kFloat, kBFloat16 or kInt8
  float static_scale;
  const uint8_t* packed;
  int64_t m, n, k;
  int64_t group; // 0: 8-bit weights; else 4-bit, k > 0, and so many columns share a scale: 32, 64, 128, or k and more
  const float* row_scale = nullptr; // (M,) of rows that are int8 already
  int64_t rotation = 1; // block of the transform of a row before it is quantised (hadamard.h); at most 1: none
};

// `e` comes with what the caller knows; row sums, and row scales where none are given, are filled in here. Throws
// std::bad_alloc.
void multiply(const Product& p, Epilogue e);

// x (m, k), kFloat or kBFloat16, into plain rows q and their scales (m,); a static_scale of 0 asks for a row's own.
// `rotation` as for a product. Throws std::bad_alloc.
void quantize_rows(const Kernels& isa, int threads, const void* x, Kind kind, int64_t m, int64_t k, float static_scale,
                   int64_t rotation, int8_t* q, float* scale);

} // namespace haq
