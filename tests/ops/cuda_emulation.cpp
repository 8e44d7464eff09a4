// Runs csrc/cuda/returns.cu on the CPU: a block's warps one after another, a warp's lanes as 32 threads that meet at
// every shuffle. The test has turned the launches into calls of emulated_launch, and gives the file's path as KERNELS.
#include <barrier>
#include <cstdint>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads)

namespace {

struct Dim {
  unsigned x;
};
thread_local Dim threadIdx, blockIdx, gridDim;

constexpr int kLanes = 32;
double slots[kLanes];
std::barrier meeting(kLanes);

template <class T>
T exchange(T value, int from) {
  slots[threadIdx.x % kLanes] = static_cast<double>(value);
  meeting.arrive_and_wait();
  const T received = from < kLanes ? static_cast<T>(slots[from]) : value;
  meeting.arrive_and_wait();
  return received;
}

template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  return exchange(value, static_cast<int>(threadIdx.x % kLanes) + offset);
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return exchange(value, lane);
}

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return ""; }

template <class Kernel>
void emulated_launch(unsigned blocks, int threads, const Kernel& kernel) {
  for (unsigned block = 0; block < blocks; ++block) {
    for (int warp = 0; warp < threads / kLanes; ++warp) {
      std::vector<std::thread> lanes;
      for (int lane = 0; lane < kLanes; ++lane) {
        lanes.emplace_back([&, lane] {
          threadIdx.x = static_cast<unsigned>(warp * kLanes + lane);
          blockIdx.x = block;
          gridDim.x = blocks;
          kernel();
        });
      }
      for (auto& lane : lanes) lane.join();
    }
  }
}

}  // namespace

#include KERNELS

namespace {

template <class T>
const char* forward(const fastmix::ReturnsShape& s, void* const* arrays) {
  const auto in = [&](int i) { return static_cast<const T*>(arrays[i]); };
  const fastmix::ReturnsForward<T> p{s, in(0), in(1), in(2), in(3), in(4), static_cast<T*>(arrays[5])};
  return fastmix::returns_forward_cuda(p, nullptr);
}

template <class T>
const char* backward(const fastmix::ReturnsShape& s, void* const* arrays) {
  const auto in = [&](int i) { return static_cast<const T*>(arrays[i]); };
  const auto out = [&](int i) { return static_cast<T*>(arrays[i]); };
  const fastmix::ReturnsBackward<T> p{s, in(0), in(1), in(2), out(3), out(4), out(5)};
  return fastmix::returns_backward_cuda(p, nullptr);
}

}  // namespace

extern "C" const char* run(bool is_backward, bool is_double, void* const* arrays, const int64_t* sizes, double gamma,
                           int kind, double td_lambda, int64_t n_step) {
  const fastmix::ReturnsShape s{sizes[0], sizes[1],  sizes[2], sizes[3], static_cast<fastmix::ReturnKind>(kind),
                                gamma,    td_lambda, n_step,   1};
  if (is_backward) return is_double ? backward<double>(s, arrays) : backward<float>(s, arrays);
  return is_double ? forward<double>(s, arrays) : forward<float>(s, arrays);
}
