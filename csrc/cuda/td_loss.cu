// `td_loss` on CUDA: one pass over the elements, and one block that adds up what the blocks found.
//
// The normaliser may be the mask's sum, which is known only when every block has been through. So the pass writes the
// gradient without it, and the backward pass multiplies by it together with the gradient of the loss: no array is gone
// through twice for its sake, and no number comes to the host. Sums are made in double precision, in an order that
// depends on the shape only.
#include "cuda/launch.h"
#include "cuda/loss.h"
#include "fastmix/td_loss.h"

namespace fastmix {
namespace {

using FASTMIX_ISA::block_sum;
using FASTMIX_ISA::blocks;
using FASTMIX_ISA::finish_loss;
using FASTMIX_ISA::launched;
using FASTMIX_ISA::split;

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // elements whose operands a thread loads before it uses the first
constexpr int kPerBlock = kThreads * kInFlight;

template <class T>
__device__ T read(const Strided<T>& operand, int64_t outer, int64_t middle, int64_t inner) {
  return operand.data[outer * operand.strides[0] + middle * operand.strides[1] + inner * operand.strides[2]];
}

// Whether the rule favours an element.
template <class T>
__device__ bool favours(const TDLossForward<T>& p, int64_t outer, int64_t middle, int64_t inner, T q, T target) {
  switch (p.rule) {
    case Rule::kNone:
      return false;
    case Rule::kGreedy:
      return read(p.all_greedy, outer, middle, inner);
    case Rule::kGreedyOrAbove:
      return read(p.all_greedy, outer, middle, inner) || target > read(p.values, outer, middle, inner);
    case Rule::kBelow:
      return q < target;
    case Rule::kNotBelow:
      return !(q < target);
    case Rule::kRecognised:
      return read(p.values, outer, middle, inner) >= read(p.thresholds, outer, middle, inner) - p.tolerance;
  }
  return false;
}

template <class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const TDLossForward<T> p, double* parts) {
  const int64_t total = p.sizes[0] * p.sizes[1] * p.sizes[2], step = static_cast<int64_t>(gridDim.x) * kPerBlock;
  double squares = 0, masks = 0;
  for (int64_t first = blockIdx.x * static_cast<int64_t>(kPerBlock) + threadIdx.x; first < total; first += step) {
    T q[kInFlight], residual[kInFlight], target[kInFlight], mask[kInFlight], weight[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t index = first + i * kThreads;
      q[i] = residual[i] = target[i] = mask[i] = 0;
      weight[i] = 1;
      if (index < total) {
        int64_t rest, outer, middle, inner;
        split(index, p.sizes[2], rest, inner);
        split(rest, p.sizes[1], outer, middle);
        q[i] = read(p.qs, outer, middle, inner);
        target[i] = read(p.targets, outer, middle, inner);
        mask[i] = read(p.mask, outer, middle, inner);
        if (p.weights.data != nullptr) weight[i] = read(p.weights, outer, middle, inner);
        if (p.residual.data != nullptr) residual[i] = read(p.residual, outer, middle, inner);
        if (p.rule != Rule::kNone) {
          const bool favoured = favours(p, outer, middle, inner, q[i], target[i]);
          if (p.residual.data != nullptr) {
            // Selected, not multiplied: a residual that is left out may be infinite.
            if (favoured) residual[i] = 0;
            p.factors[index] = favoured ? T(0) : T(1);
          } else {
            const T factor = favoured ? p.high : p.low;
            weight[i] *= factor;
            p.factors[index] = factor;
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t index = first + i * kThreads;
      // Selected, not multiplied: padded steps may hold NaN or inf.
      const T td = mask[i] != 0 ? mask[i] * (q[i] + residual[i] - target[i]) : T(0);
      const T weighted = mask[i] != 0 ? weight[i] * td : T(0);
      squares += static_cast<double>(weighted) * static_cast<double>(td);
      masks += static_cast<double>(mask[i]);
      if (index < total) {
        p.td_error[index] = td;
        if (p.grad != nullptr) p.grad[index] = mask[i] * weighted;
      }
    }
  }
  squares = block_sum<kThreads>(squares);
  masks = block_sum<kThreads>(masks);
  if (threadIdx.x == 0) {
    parts[2 * blockIdx.x] = squares;
    parts[2 * blockIdx.x + 1] = masks;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const TDLossForward<T> p, const double* parts, int n_parts, T* slope) {
  const double factor = finish_loss<kThreads>(parts, n_parts, p.scale, p.normaliser, p.loss);
  if (threadIdx.x == 0) *slope = static_cast<T>(2 * factor);
}

template <class T>
__global__ void __launch_bounds__(kThreads) backward_kernel(const TDLossBackward<T> p) {
  const T factor = *p.slope * *p.grad_loss;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPerBlock;
  for (int64_t first = blockIdx.x * static_cast<int64_t>(kPerBlock) + threadIdx.x; first < p.size; first += step) {
    T grad[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * kThreads < p.size) grad[i] = p.grad[first + i * kThreads];
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * kThreads < p.size) p.grad_qs[first + i * kThreads] = factor * grad[i];
    }
  }
}

template <class T>
const char* forward(const TDLossForward<T>& p, T* slope, double* parts, int64_t n_parts, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const int64_t total = p.sizes[0] * p.sizes[1] * p.sizes[2];
  const unsigned used = blocks(total, kPerBlock, n_parts / 2);
  if (used > 0) {
    forward_kernel<<<used, kThreads, 0, stream>>>(p, parts);
    if (const char* error = launched()) return error;
  }
  finish_kernel<<<1, kThreads, 0, stream>>>(p, parts, static_cast<int>(used), slope);
  return launched();
}

template <class T>
const char* backward(const TDLossBackward<T>& p, void* stream) {
  if (p.size == 0) return nullptr;
  backward_kernel<<<blocks(p.size, kPerBlock), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return launched();
}

}  // namespace

const char* td_loss_forward_cuda(const TDLossForward<float>& p, float* slope, double* parts, int64_t n_parts,
                                 void* stream) {
  return forward(p, slope, parts, n_parts, stream);
}
const char* td_loss_forward_cuda(const TDLossForward<double>& p, double* slope, double* parts, int64_t n_parts,
                                 void* stream) {
  return forward(p, slope, parts, n_parts, stream);
}
const char* td_loss_backward_cuda(const TDLossBackward<float>& p, void* stream) { return backward(p, stream); }
const char* td_loss_backward_cuda(const TDLossBackward<double>& p, void* stream) { return backward(p, stream); }

}  // namespace fastmix
