// Instructions that CUDA C++ has no words for: matrix units, asynchronous copies, approximate functions, pairs of half
// precision numbers in one register. From sm_80 on; on the host, tests/cuda/instructions.h has the same functions.
#pragma once

#include <cstdint>

namespace fastmix::FASTMIX_ISA {

// Kernels that need these instructions return at once where they are not, and so compile for every device.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kTooOld = true;
#else
constexpr bool kTooOld = false;
#endif

}  // namespace fastmix::FASTMIX_ISA

#if !defined(FASTMIX_EMULATED)
namespace fastmix::FASTMIX_ISA {

// ---- Matrix units. `g` = lane / 4, `t` = lane % 4; all lanes of the warp take part. ----

// d[16, 8] += a[16, 16] b[16, 8], half precision factors, float sums. A lane has
//   a: rows g, g + 8, g, g + 8 and columns 2t + {0, 1}, the last two registers 8 columns further (low half first);
//   b: column g and rows 2t + {0, 1}, the second register 8 rows further;
//   d: row g and columns 2t + {0, 1}, then row g + 8.
__device__ __forceinline__ void multiply_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d[16, 8] += a[16, 8] b[8, 8], factors as to_tf32 makes them. A lane has
//   a: rows g, g + 8, g, g + 8 and column t, the last two t + 4;  b: column g and rows t, t + 4;  d: as above.
__device__ __forceinline__ void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounded to nearest: the matrix unit by itself would cut the low 13 bits off.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
  return result;
}

// Four matrices of 8 rows of 16 bytes in shared memory; lane i passes the address of row i % 8 of matrix i / 8.
// Register j gets of matrix j row g, the two halves 2t + {0, 1}; transposed: column g, rows 2t + {0, 1}.
__device__ __forceinline__ void load_matrices(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// ---- Copies from global to shared memory that do not wait. Where not `valid`, zeros are written and nothing is read.
// ----

__device__ __forceinline__ void copy_16(void* to, const void* from, bool valid) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
      : "memory");
}
__device__ __forceinline__ void copy_8(void* to, const void* from, bool valid) {
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(__cvta_generic_to_global(from)), "r"(valid ? 8 : 0)
      : "memory");
}
__device__ __forceinline__ void copy_4(void* to, const void* from, bool valid) {
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(__cvta_generic_to_global(from)), "r"(valid ? 4 : 0)
      : "memory");
}
// Ends a group of this thread's copies.
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's groups but for the last kPending; other threads see them behind a barrier.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// All `threads` threads of the block, wherever in the code they meet: __syncthreads wants one place.
__device__ __forceinline__ void meet(int threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }

// Keeps an offset in a register. The compiler would rather compute it again, in front of the load that everything waits
// for.
__device__ __forceinline__ void keep(int& x) { asm volatile("" : "+r"(x)); }

// ---- Arithmetic ----

// Relative errors of 2^-22 and one unit in the last place; denormal numbers become zero, NaN stays NaN.
__device__ __forceinline__ float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Two half precision numbers, `low` in the low 16 bits, rounded to nearest.
__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
__device__ __forceinline__ float2 unpack_half(uint32_t pair) {
  float2 result;
  asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(result.x), "=f"(result.y)
      : "r"(pair));
  return result;
}
__device__ __forceinline__ uint32_t times_half(uint32_t x, uint32_t y) {
  uint32_t result;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(x), "r"(y));
  return result;
}

}  // namespace fastmix::FASTMIX_ISA
#endif
