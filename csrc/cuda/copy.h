// Copies from global to shared memory that need no registers and do not wait: as many are in flight as a block issues.
#pragma once

#include <cstdint>

namespace fastmix::FASTMIX_ISA {

// kBytes (4, 8 or 16) bytes, aligned so at both ends. Before sm_80, and on the host, a plain copy.
template <int kBytes>
__device__ inline void copy_async(void* to, const void* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(__cvta_generic_to_global(from)), "n"(kBytes)
               : "memory");
#else
  for (int i = 0; i < kBytes / 4; ++i) static_cast<uint32_t*>(to)[i] = static_cast<const uint32_t*>(from)[i];
#endif
}

// Waits for the thread's copies; other threads see them behind a barrier.
__device__ inline void copies_done() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace fastmix::FASTMIX_ISA
