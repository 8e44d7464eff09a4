// Matrix units and asynchronous copies: the few instructions that CUDA C++ has no words for. Compute capability 8.0 on.
//
// A warp multiplies A [16, 8] by B [8, 8] into C [16, 8]. With lane = 4 g + t (g = 0..7, t = 0..3) a lane holds
//   A: a0 = (g, t)   a1 = (g + 8, t)   a2 = (g, t + 4)   a3 = (g + 8, t + 4)
//   B: b0 = (t, g)   b1 = (t + 4, g)
//   C: c0 = (g, 2t)  c1 = (g, 2t + 1)  c2 = (g + 8, 2t)  c3 = (g + 8, 2t + 1)
// The sum over k may take k in any order. Where A and B both take column 2t as k = t and column 2t + 1 as k = t + 4, an
// accumulator (c0, c2, c1, c3) is the fragment A of a next product: results become operands without leaving the lane.
#pragma once

#include <cstdint>

namespace fastmix {

// Rounded to the nearest tf32 (10 bits of mantissa), ties away from zero; the units ignore what is behind those bits.
__device__ __forceinline__ float to_tf32(float x) {
#if defined(FASTMIX_EMULATED)
  return emulation::to_tf32(x);
#elif __CUDA_ARCH__ >= 800
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return __uint_as_float(rounded);
#else
  __trap();
#endif
}

// c += a b, of operands that are tf32.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
#if defined(FASTMIX_EMULATED)
  emulation::mma_tf32(c, a, b0, b1);
#elif __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#else
  __trap();
#endif
}

// Global memory that no thread writes while the kernel runs, or zeros where not `inside`, without a branch. (A compiler
// makes branches of several such loads, and around them moves registers that matrix products are waiting for.)
__device__ __forceinline__ float load_if(bool inside, const float* from) {
#if defined(FASTMIX_EMULATED)
  return inside ? *from : 0;
#else
  float x;
  asm("{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\nmov.f32 %0, 0f00000000;\n@p ld.global.nc.f32 %0, [%1];\n}"
      : "=f"(x)
      : "l"(from), "r"(static_cast<int>(inside)));
  return x;
#endif
}
__device__ __forceinline__ float2 load2_if(bool inside, const float* from) {
#if defined(FASTMIX_EMULATED)
  return inside ? *reinterpret_cast<const float2*>(from) : make_float2(0, 0);
#else
  float2 x;
  asm("{\n.reg .pred p;\nsetp.ne.s32 p, %3, 0;\nmov.f32 %0, 0f00000000;\nmov.f32 %1, 0f00000000;\n"
      "@p ld.global.nc.v2.f32 {%0, %1}, [%2];\n}"
      : "=f"(x.x), "=f"(x.y)
      : "l"(from), "r"(static_cast<int>(inside)));
  return x;
#endif
}

// From here on the compiler does not know how `x` came about, and keeps it instead of what it could make it from.
__device__ __forceinline__ void opaque(float& x) {
#if !defined(FASTMIX_EMULATED)
  asm volatile("" : "+f"(x));
#endif
}
__device__ __forceinline__ void opaque(int& x) {
#if !defined(FASTMIX_EMULATED)
  asm volatile("" : "+r"(x));
#endif
}

// The line of global memory that `p` is in shall come to the second-level cache.
__device__ __forceinline__ void prefetch(const void* p) {
#if !defined(FASTMIX_EMULATED)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// `kBytes` (4, 8 or 16; both addresses on a multiple of it) from global to shared memory, zeros where not `inside`;
// seen by this thread after `copies_arrived`. Nothing is read from where it is not inside.
template <int kBytes = 16>
__device__ __forceinline__ void copy_async(float* to, const float* from, bool inside = true) {
#if defined(FASTMIX_EMULATED)
  emulation::copy_async(to, from, kBytes, inside);
#elif __CUDA_ARCH__ >= 800
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = inside ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(from), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
#else
  __trap();
#endif
}

// Ends a group of copies. Empty groups count.
__device__ __forceinline__ void end_copies() {
#if defined(FASTMIX_EMULATED)
  emulation::end_copies();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups but the last `kPending`.
template <int kPending>
__device__ __forceinline__ void copies_arrived() {
#if defined(FASTMIX_EMULATED)
  emulation::copies_arrived(kPending);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace fastmix
