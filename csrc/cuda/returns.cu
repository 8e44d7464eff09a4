// `returns` on CUDA, one launch for episodes of any length.
//
// Forward, few columns: a warp takes one column of one episode and walks it backwards in chunks of 32 steps. A step is
// the affine map y_t = x_t + a_t y_{t+1}; five shuffles compose the maps of a chunk, and the carry of the chunk behind
// it finishes them. Four chunks are loaded and composed side by side, so that 120 steps, coalesced along time, wait for
// memory once. Many columns (quantiles): a thread takes one, loads are coalesced along the columns and several steps
// ahead of the recursion. Backward: a thread takes one column (or one episode, where the columns share a reward), since
// learners detach targets.
#include "cuda/launch.h"
#include "fastmix/returns_scan.h"

namespace fastmix {
namespace {

using FASTMIX_ISA::blocks;
using FASTMIX_ISA::kAllLanes;
using FASTMIX_ISA::kWarp;
using FASTMIX_ISA::launched;
using FASTMIX_ISA::times;
using FASTMIX_ISA::transpose;
using FASTMIX_ISA::window;
using FASTMIX_ISA::window_return;

constexpr int kThreads = 128;
constexpr int kChunks = 4;           // of 32 steps, side by side
constexpr int64_t kFewWarps = 4096;  // up to here each has a block of its own, so that all multiprocessors get some
constexpr int64_t kManyColumns = 32;
constexpr int kColumnThreads = 64;
constexpr int kAhead = 8;  // steps that a thread with a column loads at once

// The arrays of one column of one episode, and what its recursion multiplies by.
template <class T>
struct Column {
  const T *rewards, *ended, *mask, *qs, *behaviour;
  T *targets, gamma, decay, bootstrap;
  int64_t steps, columns, reward_columns;
  ReturnKind kind;

  __device__ Column(const ReturnsForward<T>& p, int64_t episode, int64_t k)
      : rewards(p.rewards + episode * p.steps * p.reward_columns + (p.reward_columns == 1 ? 0 : k)),
        ended(p.terminated + episode * p.steps),
        mask(p.mask + episode * p.steps),
        qs(p.target_qs + episode * (p.steps + 1) * p.columns + k),
        behaviour(p.kind == ReturnKind::q_lambda ? p.behaviour_qs + episode * (p.steps + 1) * p.columns + k : nullptr),
        targets(p.targets + episode * p.steps * p.columns + k),
        gamma(static_cast<T>(p.gamma)),
        decay(static_cast<T>(p.td_lambda * p.gamma)),
        bootstrap(static_cast<T>((1 - p.td_lambda) * p.gamma)),
        steps(p.steps),
        columns(p.columns),
        reward_columns(p.reward_columns),
        kind(p.kind) {}
};

// What a step's target is made of. Loads are without branches: those of several steps are in flight together.
template <class T>
struct Step {
  T live, live_next, ended, reward, q_next, advantage;

  // Of step `t`, which may lie outside the episode; then of the nearest one inside.
  __device__ void load(const Column<T>& c, int64_t t) {
    const int64_t at = t < 0 ? 0 : t < c.steps ? t : c.steps - 1;
    live = c.mask[at];
    live_next = c.mask[at + 1 < c.steps ? at + 1 : at];
    ended = c.ended[at];
    reward = c.rewards[at * c.reward_columns];
    q_next = c.qs[(at + 1) * c.columns];
    advantage = c.behaviour == nullptr ? T(0) : c.qs[at * c.columns] - c.behaviour[at * c.columns];
  }
  // (1 - d) Q
  __device__ T next() const { return times(1 - ended, q_next); }
  // The lambda forms' x and a, as y_t = x + a y_{t+1}.
  __device__ void map(const Column<T>& c, int64_t t, T& x, T& a) const {
    const bool ends = t == c.steps - 1 || live_next == 0 || ended != 0;
    const T value = live * (reward + advantage + c.bootstrap * next()) + (ends ? c.decay * next() : T(0));
    x = live != 0 ? value : T(0);
    a = live == 0 || ends ? T(0) : c.decay;
  }
};

// Composes y_t = x_t + a_t y_{t+1} over the lanes of each chunk: y_t from what is behind the chunk.
template <class T>
__device__ void compose(T (&x)[kChunks], T (&a)[kChunks], int lane) {
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      const T next_x = __shfl_down_sync(kAllLanes, x[j], offset);
      const T next_a = __shfl_down_sync(kAllLanes, a[j], offset);
      if (lane + offset < kWarp) {
        x[j] += times(a[j], next_x);
        a[j] *= next_a;
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const ReturnsForward<T> p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warps_per_block = static_cast<int>(blockDim.x) / kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * warps_per_block;
  for (int64_t work = static_cast<int64_t>(blockIdx.x) * warps_per_block + threadIdx.x / kWarp;
       work < p.episodes * p.columns; work += warps) {
    const Column<T> c(p, work / p.columns, work % p.columns);
    T carry = 0;  // target (or number of live steps) behind the chunk
    for (int64_t last = (c.steps - 1) / kWarp; last >= 0; last -= kChunks) {
      Step<T> step[kChunks];
      T x[kChunks], a[kChunks];
#pragma unroll
      for (int j = 0; j < kChunks; ++j) step[j].load(c, (last - j) * kWarp + lane);
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        const int64_t t = (last - j) * kWarp + lane;
        if (c.kind == ReturnKind::one_step) {
          x[j] = step[j].reward + c.gamma * step[j].next();
        } else if (c.kind == ReturnKind::n_step) {
          x[j] = t < c.steps ? step[j].live : T(0);
          a[j] = 1;
        } else {
          step[j].map(c, t, x[j], a[j]);
          if (t >= c.steps) x[j] = a[j] = 0;
        }
      }
      if (c.kind != ReturnKind::one_step) compose(x, a, lane);
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        const int64_t t = (last - j) * kWarp + lane;
        T value = x[j];
        if (c.kind != ReturnKind::one_step) {
          value += times(a[j], carry);
          carry = __shfl_sync(kAllLanes, value, 0);
        }
        if (t < 0 || t >= c.steps) continue;
        if (c.kind == ReturnKind::n_step) {
          value = window_return(c.rewards, c.reward_columns, c.ended, c.mask, c.qs, c.columns, c.gamma, t,
                                window(value, p.n_step));
        }
        c.targets[t * c.columns] = value;
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kColumnThreads) forward_columns_kernel(const ReturnsForward<T> p) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kColumnThreads;
  for (int64_t work = static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x; work < p.episodes * p.columns;
       work += threads) {
    const Column<T> c(p, work / p.columns, work % p.columns);
    T carry = 0;
    for (int64_t last = c.steps - 1; last >= 0; last -= kAhead) {
      Step<T> step[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) step[j].load(c, last - j);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int64_t t = last - j;
        if (t < 0) break;
        T value;
        if (c.kind == ReturnKind::one_step) {
          value = step[j].reward + c.gamma * step[j].next();
        } else if (c.kind == ReturnKind::n_step) {
          carry += step[j].live;
          value = window_return(c.rewards, c.reward_columns, c.ended, c.mask, c.qs, c.columns, c.gamma, t,
                                window(carry, p.n_step));
        } else {
          T x, a;
          step[j].map(c, t, x, a);
          value = carry = x + times(a, carry);
        }
        c.targets[t * c.columns] = value;
      }
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

template <class T>
const char* forward(const ReturnsForward<T>& p, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const int64_t work = p.episodes * p.columns;
  if (work == 0 || p.steps == 0) return nullptr;
  if (p.columns >= kManyColumns) {
    forward_columns_kernel<<<blocks(work, kColumnThreads), kColumnThreads, 0, stream>>>(p);
  } else {
    const int threads = work <= kFewWarps ? kWarp : kThreads;
    forward_kernel<<<blocks(work, threads / kWarp), threads, 0, stream>>>(p);
  }
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
