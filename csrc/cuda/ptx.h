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

#if defined(FASTMIX_EMULATED)
namespace fastmix::FASTMIX_ISA {
using namespace emulation::instructions;
}
#else
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
// The sum may take its eight terms in any order. Where a and b both take column 2t as t and column 2t + 1 as t + 4,
// sums (d0, d2, d1, d3) are the `a` of a next product: results become factors without leaving the lane.
__device__ __forceinline__ void multiply_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// Rounded to the nearest tf32 (10 bits of mantissa), ties away from zero; the matrix unit by itself would cut the low
// 13 bits off.
__device__ __forceinline__ float to_tf32(float x) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return __uint_as_float(rounded);
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

// ---- Global memory ----

// kBytes (4, 8 or 16; both addresses on a multiple of it) from global to shared memory, zeros where not `inside`. It
// does not wait: this thread sees them after `copies_arrived`, others behind a barrier after that. Nothing is read from
// where it is not inside.
template <int kBytes = 16>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside = true) {
#if __CUDA_ARCH__ >= 800
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const auto global = __cvta_generic_to_global(from);
  const int bytes = inside ? kBytes : 0;
  if constexpr (kBytes == 16) {  // past the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(global), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
#else
  for (int i = 0; i < kBytes / 4; ++i) {
    static_cast<uint32_t*>(to)[i] = inside ? static_cast<const uint32_t*>(from)[i] : 0;
  }
#endif
}

// Ends a group of this thread's copies. Empty groups count.
__device__ __forceinline__ void end_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for this thread's groups but for the last kPending.
template <int kPending>
__device__ __forceinline__ void copies_arrived() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Global memory that no thread writes while the kernel runs, or zeros where not `inside`, without a branch. (A compiler
// makes branches of several such loads, and around them moves registers that matrix products are waiting for.)
__device__ __forceinline__ float load_if(bool inside, const float* from) {
  float x;
  asm("{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\nmov.f32 %0, 0f00000000;\n@p ld.global.nc.f32 %0, [%1];\n}"
      : "=f"(x)
      : "l"(from), "r"(static_cast<int>(inside)));
  return x;
}
__device__ __forceinline__ float2 load2_if(bool inside, const float* from) {
  float2 x;
  asm("{\n.reg .pred p;\nsetp.ne.s32 p, %3, 0;\nmov.f32 %0, 0f00000000;\nmov.f32 %1, 0f00000000;\n"
      "@p ld.global.nc.v2.f32 {%0, %1}, [%2];\n}"
      : "=f"(x.x), "=f"(x.y)
      : "l"(from), "r"(static_cast<int>(inside)));
  return x;
}

// The line that `p` is in shall come to the second-level cache.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---- Order ----

// All `threads` threads of the block, wherever in the code they meet: __syncthreads wants one place.
__device__ __forceinline__ void meet(int threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }

// From here on the compiler does not know how `x` came about, and keeps it in a register instead of what it could make
// it from (again and again, in front of the load that everything waits for).
__device__ __forceinline__ void keep(int& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void keep(float& x) { asm volatile("" : "+f"(x)); }

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
