// What the kernel files of this folder share: sizes of grids, what a launch failed with, and a block's sum.
#pragma once

#include <cstdint>

namespace fastmix::FASTMIX_ISA {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMostBlocks = 65535;  // further work is done by the same blocks in a loop

inline unsigned blocks(int64_t items, int64_t per_block, int64_t most = kMostBlocks) {
  const int64_t wanted = (items + per_block - 1) / per_block;
  return static_cast<unsigned>(wanted < most ? wanted : most);
}

// Null, or what the last launch failed with.
inline const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// index = quotient * size + remainder. A division of 64 bits takes a hundred instructions, one of 32 bits twenty.
__device__ inline void split(int64_t index, int64_t size, int64_t& quotient, int64_t& remainder) {
  if (((index | size) >> 32) == 0) {
    quotient = static_cast<uint32_t>(index) / static_cast<uint32_t>(size);
  } else {
    quotient = index / size;
  }
  remainder = index - quotient * size;
}

// Sum over a block of kThreads threads, always in the same order; every thread gets it.
template <int kThreads>
__device__ double block_sum(double value) {
  __shared__ double sums[kThreads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(kAllLanes, value, offset);
  __syncthreads();  // whoever still reads the last sum
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  double total = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += sums[warp];
  return total;
}

}  // namespace fastmix::FASTMIX_ISA
