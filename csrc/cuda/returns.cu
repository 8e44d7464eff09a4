// `returns` on CUDA, one launch for episodes of any length.
//
// Forward: a warp takes one column of one episode and walks it backwards in chunks of 32 steps. A step is the affine
// map y_t = x_t + a_t y_{t+1}; five shuffles compose the maps of a chunk, and the carry of the chunk behind it finishes
// them. With one column, as every mixer has, loads are coalesced along time, and 120 steps are four chunks instead of a
// chain of 120. Backward: a thread takes one column (or one episode, where the columns share a reward), since learners
// detach targets.
#include "fastmix/returns_scan.h"

namespace fastmix {
namespace {

using FASTMIX_ISA::cut;
using FASTMIX_ISA::times;
using FASTMIX_ISA::transpose;
using FASTMIX_ISA::window;
using FASTMIX_ISA::window_return;

constexpr int kWarp = 32, kWarpsPerBlock = 4, kThreads = kWarp * kWarpsPerBlock;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMostBlocks = 65535;  // further work is done by the same blocks in a loop

// y_t = x_t + a_t y_{t+1} of all 32 steps of a chunk at once, `carry` being y behind the chunk.
template <class T>
__device__ T scan_chunk(T x, T a, T carry, int lane) {
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const T next_x = __shfl_down_sync(kAllLanes, x, offset);
    const T next_a = __shfl_down_sync(kAllLanes, a, offset);
    if (lane + offset < kWarp) {
      x += times(a, next_x);
      a *= next_a;
    }
  }
  return x + times(a, carry);
}

template <class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const ReturnsForward<T> p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  const int64_t steps = p.steps, columns = p.columns;
  const T gamma = static_cast<T>(p.gamma), decay = static_cast<T>(p.td_lambda * p.gamma);
  const T bootstrap = static_cast<T>((1 - p.td_lambda) * p.gamma);
  for (int64_t work = first; work < p.episodes * columns; work += warps) {
    const int64_t episode = work / columns, k = work % columns;
    const T* rewards = p.rewards + episode * steps * p.reward_columns + (p.reward_columns == 1 ? 0 : k);
    const T* ended = p.terminated + episode * steps;
    const T* mask = p.mask + episode * steps;
    const T* qs = p.target_qs + episode * (steps + 1) * columns + k;
    const T* behaviour =
        p.kind == ReturnKind::q_lambda ? p.behaviour_qs + episode * (steps + 1) * columns + k : nullptr;
    T* targets = p.targets + episode * steps * columns + k;
    T carry = 0;  // target (or number of live steps) behind the chunk
    for (int64_t start = (steps - 1) / kWarp * kWarp; start >= 0; start -= kWarp) {
      const int64_t t = start + lane;
      const bool inside = t < steps;
      const T live = inside ? mask[t] : T(0);
      const T next = inside ? times(1 - ended[t], qs[(t + 1) * columns]) : T(0);
      T value = 0;
      if (p.kind == ReturnKind::one_step) {
        if (inside) value = rewards[t * p.reward_columns] + gamma * next;
      } else if (p.kind == ReturnKind::n_step) {
        const T count = scan_chunk(live, T(1), carry, lane);
        if (inside) {
          value = window_return(rewards, p.reward_columns, ended, mask, qs, columns, gamma, t, window(count, p.n_step));
        }
        carry = __shfl_sync(kAllLanes, count, 0);
      } else {
        T x = 0, a = 0;
        if (live != 0) {
          T reward = rewards[t * p.reward_columns];
          if (behaviour != nullptr) reward += qs[t * columns] - behaviour[t * columns];
          const bool ends = cut(ended, mask, t, steps);
          x = live * (reward + bootstrap * next) + (ends ? decay * next : T(0));
          a = ends ? T(0) : decay;
        }
        value = scan_chunk(x, a, carry, lane);
        carry = __shfl_sync(kAllLanes, value, 0);
      }
      if (inside) targets[t * columns] = value;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) backward_kernel(const ReturnsBackward<T> p) {
  // Columns that share a reward are summed by one thread, in a fixed order.
  const bool shared = p.reward_columns == 1;
  const int64_t ranges = shared ? 1 : p.columns;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t work = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; work < p.episodes * ranges;
       work += threads) {
    const int64_t range = work % ranges;
    transpose(p, work / ranges, range, shared ? p.columns : range + 1);
  }
}

const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

unsigned blocks(int64_t items, int64_t per_block) {
  const int64_t wanted = (items + per_block - 1) / per_block;
  return static_cast<unsigned>(wanted < kMostBlocks ? wanted : kMostBlocks);
}

template <class T>
const char* forward(const ReturnsForward<T>& p, void* stream) {
  const int64_t work = p.episodes * p.columns;
  if (work == 0 || p.steps == 0) return nullptr;
  forward_kernel<<<blocks(work, kWarpsPerBlock), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return launched();
}

template <class T>
const char* backward(const ReturnsBackward<T>& p, void* stream) {
  const int64_t work = p.episodes * (p.reward_columns == 1 ? 1 : p.columns);
  if (work == 0) return nullptr;
  backward_kernel<<<blocks(work, kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return launched();
}

}  // namespace

const char* returns_forward_cuda(const ReturnsForward<float>& p, void* stream) { return forward(p, stream); }
const char* returns_forward_cuda(const ReturnsForward<double>& p, void* stream) { return forward(p, stream); }
const char* returns_backward_cuda(const ReturnsBackward<float>& p, void* stream) { return backward(p, stream); }
const char* returns_backward_cuda(const ReturnsBackward<double>& p, void* stream) { return backward(p, stream); }

}  // namespace fastmix
