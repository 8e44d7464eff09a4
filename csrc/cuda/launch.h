// What the kernel files of this folder share: sizes of grids, the device, launches and what they failed with, and a
// block's sum.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace fastmix::FASTMIX_ISA {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMostBlocks = 65535;  // further work is done by the same blocks in a loop

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

inline unsigned blocks(int64_t items, int64_t per_block, int64_t most = kMostBlocks) {
  const int64_t wanted = ceil_div(items, per_block);
  return static_cast<unsigned>(wanted < most ? wanted : most);
}

// Null, or what the last launch failed with.
inline const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

constexpr int kMostDevices = 64;  // that are told apart

struct Device {
  int index, multiprocessors;
  int shared_memory;  // bytes that a block may ask for
  int capability;     // 9.0 is 90
};

// Of the current device; asked for once, as each question costs a good part of a launch.
inline const Device& current_device() {
  static thread_local Device known[kMostDevices] = {};
  int index = 0;
  cudaGetDevice(&index);
  Device& device = known[index % kMostDevices];
  if (device.multiprocessors == 0 || device.index != index) {
    int major = 0, minor = 0;
    device.index = index;
    cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
    cudaDeviceGetAttribute(&device.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    device.capability = 10 * major + minor;
  }
  return device;
}

// A launch on the current device with more shared memory than blocks may have without asking; asked for once, as that
// costs host time.
template <auto kKernel, class... Args>
const char* launch(const Device& device, dim3 blocks, unsigned threads, size_t shared, void* stream,
                   const Args&... args) {
  static std::atomic<size_t> allowed[kMostDevices] = {};
  std::atomic<size_t>& here = allowed[device.index % kMostDevices];
  if (here.load(std::memory_order_relaxed) < shared) {
    const auto bytes = static_cast<int>(shared);
    const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return launched();
    here.store(shared, std::memory_order_relaxed);
  }
  kKernel<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(args...);
  return launched();
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
