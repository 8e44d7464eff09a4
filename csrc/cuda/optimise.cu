// `optimise` on CUDA: the norm of all gradients as one sum per block, then the update, in which every block adds the
// sums up again, in one order, and so knows the clip without waiting for a third kernel.
//
// Tensors travel as kernel arguments, so that a CUDA graph holds them; those that do not fit go into further launches
// of both kernels. The count of steps lives on the device, since a graph replays its arguments as they were.
#include <cmath>

#include "cuda/launch.h"
#include "fastmix/optimise.h"

namespace fastmix {
namespace {

using FASTMIX_ISA::block_sum;
using FASTMIX_ISA::kWarp;
using FASTMIX_ISA::launched;

constexpr int kThreads = 256;
constexpr int kInFlight = 4;              // numbers of a tensor that a thread loads before it uses the first
constexpr int64_t kSmallestChunk = 1024;  // numbers that a block takes on
constexpr int kTensors = 64;              // of a launch: 4 KB of arguments hold them

template <class T>
struct Group {
  int count = 0;
  int chunks = 0;  // of all tensors: the blocks of the launch
  int first_chunk[kTensors];
  int64_t chunk, sizes[kTensors];
  T *parameters[kTensors], *means[kTensors], *squares[kTensors];
  const T* grads[kTensors];
};
static_assert(sizeof(Group<float>) + 128 < 4096, "kernel arguments");

// A block's share of its group: numbers [begin, end) of a tensor.
struct Share {
  int tensor;
  int64_t begin, end;

  template <class T>
  __device__ explicit Share(const Group<T>& group) {
    int low = 0, high = group.count;  // the last tensor whose first chunk is not behind this block
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (group.first_chunk[middle] <= static_cast<int>(blockIdx.x) ? low : high) = middle;
    }
    tensor = low;
    begin = (static_cast<int64_t>(blockIdx.x) - group.first_chunk[tensor]) * group.chunk;
    end = group.sizes[tensor] < begin + group.chunk ? group.sizes[tensor] : begin + group.chunk;
  }
};

// Sums of squares of each block, into parts[block]; with `steps` it counts the step as well.
template <class T>
__global__ void __launch_bounds__(kThreads) norm_kernel(const Group<T> group, double* parts, int64_t* steps) {
  if (steps != nullptr && blockIdx.x == 0 && threadIdx.x == 0) ++*steps;
  if (group.count == 0) return;
  const Share share(group);
  const T* grad = group.grads[share.tensor];
  double sum = 0;
  for (int64_t first = share.begin + threadIdx.x; first < share.end; first += kThreads * kInFlight) {
    T g[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) g[i] = first + i * kThreads < share.end ? grad[first + i * kThreads] : T(0);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) sum += static_cast<double>(g[i]) * static_cast<double>(g[i]);
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

template <class T>
struct Step {
  bool adam;
  double lr, beta1, beta2, eps, weight_decay, clip;
  const double* parts;
  int n_parts;
  const int64_t* steps;
  T* norm;
};

template <class T>
__global__ void __launch_bounds__(kThreads) update_kernel(const Group<T> group, const Step<T> s) {
  __shared__ T size;
  __shared__ T unbias;
  double total = 0;
  for (int i = static_cast<int>(threadIdx.x); i < s.n_parts; i += kThreads) total += s.parts[i];
  if (threadIdx.x == 0) {
    const double step = static_cast<double>(*s.steps);
    size = static_cast<T>(s.adam ? s.lr / (1 - pow(s.beta1, step)) : s.lr);
    unbias = static_cast<T>(s.adam ? 1 / sqrt(1 - pow(s.beta2, step)) : 1.0);
  }
  const double norm = sqrt(block_sum<kThreads>(total));  // its barriers are those of `size` and `unbias`, too
  if (s.norm != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *s.norm = static_cast<T>(norm);
  if (group.count == 0) return;
  const double ratio = s.clip / (norm + 1e-6);
  const T scale = static_cast<T>(ratio < 1 ? ratio : norm == norm ? 1 : norm);  // NaN goes on, as torch lets it
  const T decay = static_cast<T>(s.beta2), fresh = static_cast<T>(1 - s.beta2), keep = static_cast<T>(1 - s.beta1);
  const T eps = static_cast<T>(s.eps), penalty = static_cast<T>(s.weight_decay);
  const Share share(group);
  T* parameters = group.parameters[share.tensor];
  T* squares = group.squares[share.tensor];
  T* means = group.means[share.tensor];
  const T* grads = group.grads[share.tensor];
  for (int64_t first = share.begin + threadIdx.x; first < share.end; first += kThreads * kInFlight) {
    T parameter[kInFlight], grad[kInFlight], square[kInFlight], mean[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t at = first + i * kThreads;
      if (at < share.end) {
        parameter[i] = parameters[at];
        grad[i] = grads[at];
        square[i] = squares[at];
        if (s.adam) mean[i] = means[at];
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t at = first + i * kThreads;
      if (at >= share.end) continue;
      const T g = grad[i] * scale + penalty * parameter[i];
      const T new_square = decay * square[i] + fresh * g * g;
      T direction = g;
      if (s.adam) {
        direction = mean[i] + keep * (g - mean[i]);
        means[at] = direction;
      }
      squares[at] = new_square;
      parameters[at] = parameter[i] - size * direction / (sqrt(new_square) * unbias + eps);
    }
  }
}

// Calls run(group) on the tensors of `p`, as many at a time as a launch takes; at least once.
template <class T, class Run>
const char* in_groups(const Optimise<T>& p, int64_t chunk, const Run& run) {
  int64_t index = 0;
  do {
    Group<T> group;
    group.chunk = chunk;
    for (; index < p.count && group.count < kTensors; ++index) {
      if (p.sizes[index] == 0) continue;
      const int i = group.count++;
      group.first_chunk[i] = group.chunks;
      group.chunks += static_cast<int>((p.sizes[index] + chunk - 1) / chunk);
      group.sizes[i] = p.sizes[index];
      group.parameters[i] = p.parameters[index];
      group.grads[i] = p.grads[index];
      group.squares[i] = p.squares[index];
      group.means[i] = p.adam ? p.means[index] : nullptr;
    }
    if (const char* error = run(group)) return error;
  } while (index < p.count);
  return nullptr;
}

template <class T>
const char* run(const Optimise<T>& p, double* parts, int64_t n_parts, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  int64_t numbers = 0;
  for (int64_t i = 0; i < p.count; ++i) numbers += p.sizes[i];
  // Of a length that gives no more chunks than parts, were every tensor's last one nearly empty.
  const int64_t spare = n_parts - p.count;
  const int64_t chunk = numbers <= spare * kSmallestChunk ? kSmallestChunk : (numbers + spare - 1) / spare;
  int used = 0;
  int64_t* steps = p.steps;
  if (const char* error = in_groups(p, chunk, [&](const Group<T>& group) {
        norm_kernel<<<group.chunks + (group.count == 0), kThreads, 0, stream>>>(group, parts + used, steps);
        used += group.chunks;
        steps = nullptr;  // counted
        return launched();
      })) {
    return error;
  }
  Step<T> step{p.adam, p.lr, p.beta1, p.beta2, p.eps, p.weight_decay, p.clip, parts, used, p.steps, p.norm};
  return in_groups(p, chunk, [&](const Group<T>& group) {
    update_kernel<<<group.chunks + (group.count == 0), kThreads, 0, stream>>>(group, step);
    step.norm = nullptr;  // written
    return launched();
  });
}

}  // namespace

const char* optimise_cuda(const Optimise<float>& p, double* parts, int64_t n_parts, void* stream) {
  return run(p, parts, n_parts, stream);
}
const char* optimise_cuda(const Optimise<double>& p, double* parts, int64_t n_parts, void* stream) {
  return run(p, parts, n_parts, stream);
}

}  // namespace fastmix
