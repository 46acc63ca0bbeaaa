// The machine below the kernels: one wrapper per PTX primitive, and the 16-bit float types.
//
// This is the only file with two versions. NVRTC reads the PTX below; a host compiler (-DHAQ_HOST) reads
// host/primitives.h, which gives every wrapper the same meaning on a CPU. All other sources are one text.
// No CUDA header is included, so NVRTC needs no include path.
#pragma once

typedef signed char i8;
struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };

// Turing (sm_75) has no cp.async and only the small int8 mma; what follows from that is decided here and nowhere else.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define HAQ_TURING 1
#else
#define HAQ_TURING 0
#endif

#ifdef HAQ_HOST
#include "host/primitives.h"
#else

#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

__device__ __forceinline__ float to_float(f16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}

__device__ __forceinline__ f16 to_f16(float v) {
  f16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(v));
  return h;
}

// Four 8 x 16-byte matrices from shared memory. Lane 8*i + r gives the address of row r of matrix i;
// lane 4*r + c receives in out[i] the bytes 4*c .. 4*c + 3 of row r of matrix i.
__device__ __forceinline__ void load_matrix_x4(unsigned (&out)[4], const void* row) {
  unsigned address = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(address) : "memory");
}

#if HAQ_TURING
// d (8 x 8) += a (8 x 16) * b (16 x 8). Lane 4*g + q holds a[g][4q..], b[4q..][g], d[g][2q], d[g][2q + 1].
__device__ __forceinline__ void mma_8x8x16(int& d0, int& d1, unsigned a, unsigned b) {
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
               : "+r"(d0), "+r"(d1) : "r"(a), "r"(b));
}
#else
// d (16 x 8) += a (16 x 32) * b (32 x 8). Lane 4*g + q holds four 8-row quarters of a, all at row g, bytes 4q..:
// a[0] rows 0-7, k 0-15; a[1] rows 8-15, k 0-15; a[2] rows 0-7, k 16-31; a[3] rows 8-15, k 16-31;
// b[0] k 0-15 and b[1] k 16-31 of column g; d[0], d[1] row g and d[2], d[3] row g + 8, columns 2q, 2q + 1.
__device__ __forceinline__ void mma_16x8x32_instruction(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void copy_async_16_instruction(void* shared, const void* global, bool valid) {
  unsigned address = (unsigned)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(address), "l"(global), "r"(valid ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy_commit_instruction() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING> __device__ __forceinline__ void copy_wait_instruction() {
  asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}
#endif
#endif

// The wrappers that the kernels call; from here on one text for device and host.

__device__ __forceinline__ void mma_16x8x32(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if HAQ_TURING
  mma_8x8x16(d[0], d[1], a[0], b[0]);
  mma_8x8x16(d[0], d[1], a[2], b[1]);
  mma_8x8x16(d[2], d[3], a[1], b[0]);
  mma_8x8x16(d[2], d[3], a[3], b[1]);
#else
  mma_16x8x32_instruction(d, a, b);
#endif
}

// 16 bytes from global to shared memory, or 16 zero bytes where the source is not valid (it is not read then).
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
#if HAQ_TURING
  *(int4*)shared = valid ? *(const int4*)global : make_int4(0, 0, 0, 0);
#else
  copy_async_16_instruction(shared, global, valid);
#endif
}

__device__ __forceinline__ void copy_commit() {
#if !HAQ_TURING
  copy_commit_instruction();
#endif
}

// Until at most PENDING of this thread's committed groups are still under way.
template <int PENDING> __device__ __forceinline__ void copy_wait() {
#if !HAQ_TURING
  copy_wait_instruction<PENDING>();
#endif
}
