// What launch functions share: facts about the current device, and errors as text.
#pragma once

#include <cstddef>

namespace fastmix {

inline const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

struct Device {
  int index, multiprocessors, shared_memory,
      capability;  // shared_memory: bytes a block may ask for; capability: 9.0 is 90
};

constexpr int kMostDevices = 64;  // that are told apart

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

}  // namespace fastmix
