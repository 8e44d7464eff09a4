// `quantile` on CUDA: the pairwise loss with its gradient, the split into means and shape, and fractions.
//
// A row belongs to a group of lanes of one warp, a lane to every so many quantiles of it: a quantile's pairs are summed
// in a register, and a row's sums go across lanes. The loss's normaliser may be the mask's sum, which is known only
// when every block has been through, so the gradient is written without it and multiplied in the backward pass. Sums
// over rows are made in double precision, in an order that depends on the shape only.
#include "cuda/launch.h"
#include "cuda/loss.h"
#include "fastmix/philox.h"
#include "fastmix/quantile.h"

namespace fastmix {
namespace {

using FASTMIX_ISA::block_sum;
using FASTMIX_ISA::blocks;
using FASTMIX_ISA::finish_loss;
using FASTMIX_ISA::kAllLanes;
using FASTMIX_ISA::kWarp;
using FASTMIX_ISA::launched;
using FASTMIX_ISA::Philox;
using FASTMIX_ISA::split;

constexpr int kThreads = 256;

// Lanes of a row of n quantiles: a power of two.
int group_of(int64_t n) {
  int group = 1;
  while (group < n && group < kWarp) group *= 2;
  return group;
}

// Sum over the lanes of a group; all of them get it, and all of the warp must come here.
template <class T>
__device__ T group_sum(T value, int group) {
  for (int offset = group / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

template <class T>
__device__ T size_of(T value) {
  return value < 0 ? -value : value;
}

// --- The loss --------------------------------------------------------------------------------------------------------

struct Row {
  int64_t b, t, g;
};

template <class T, int kDims>
__device__ const T* at(const QuantileOperand<T, kDims>& operand, const Row& row) {
  return operand.data + row.b * operand.strides[0] + row.t * operand.strides[1] + row.g * operand.strides[2];
}

// What one quantile has in its row's loss, but for the mean; `slope` becomes minus its derivative.
template <class T>
__device__ T pairs(const QuantileLoss<T>& p, T theta, T fraction, const T* targets, T& slope) {
  const T above = size_of(fraction), below = size_of(fraction - 1), kappa = static_cast<T>(p.kappa);
  T sum = 0;
  slope = 0;
  for (int64_t j = 0; j < p.n_targets; ++j) {
    const T error = targets[j * p.targets.strides[3]] - theta;
    const T weight = error <= 0 ? below : above;
    if (kappa > 0) {
      // With c the error cut to [-kappa, kappa], the Huber function is c (error - c / 2) and its slope c. Compared so
      // that NaN stays.
      const T capped = error > kappa ? kappa : error, cut = capped < -kappa ? -kappa : capped;
      sum += weight * cut * (error - cut / 2);
      slope += weight * cut;
    } else {
      sum += weight * size_of(error);
      slope += error > 0 ? weight : (error < 0 ? -weight : T(0));
    }
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) loss_kernel(const QuantileLoss<T> p, int group, double* parts) {
  const int64_t rows = p.sizes[0] * p.sizes[1] * p.sizes[2];
  const int64_t per_block = kThreads / group, step = static_cast<int64_t>(gridDim.x) * per_block;
  const int lane = static_cast<int>(threadIdx.x) % group;
  const T unit = static_cast<T>(1 / (static_cast<double>(p.n_targets) * (p.kappa > 0 ? p.kappa : 1)));
  double losses = 0, masks = 0;
  // All threads of a block make the same number of turns, as the sums over groups need every lane of a warp.
  for (int64_t first = blockIdx.x * per_block; first < rows; first += step) {
    const int64_t index = first + static_cast<int>(threadIdx.x) / group;
    const bool exists = index < rows;
    T mask = 0, factor = 0, loss = 0;
    if (exists) {
      Row row;
      int64_t rest;
      split(index, p.sizes[2], rest, row.g);
      split(rest, p.sizes[1], row.b, row.t);
      mask = *at(p.mask, row);
      // Left out, not multiplied by 0: padded steps may hold NaN or inf.
      if (mask != 0) factor = p.weights.data == nullptr ? mask : mask * *at(p.weights, row);
      for (int64_t i = lane; i < p.n; i += group) {
        T slope = 0;
        if (mask != 0) {
          const T theta = at(p.theta, row)[i * p.theta.strides[3]];
          const T fraction = at(p.fractions, row)[i * p.fractions.strides[3]];
          loss += pairs(p, theta, fraction, at(p.targets, row), slope);
        }
        if (p.grad != nullptr) p.grad[index * p.n + i] = mask != 0 ? -unit * factor * slope : T(0);
      }
    }
    loss = unit * group_sum(loss, group);
    if (exists && lane == 0) {
      p.row_losses[index] = loss;
      masks += static_cast<double>(mask);
      if (mask != 0) losses += static_cast<double>(factor) * static_cast<double>(loss);
    }
  }
  losses = block_sum<kThreads>(losses);
  masks = block_sum<kThreads>(masks);
  if (threadIdx.x == 0) {
    parts[2 * blockIdx.x] = losses;
    parts[2 * blockIdx.x + 1] = masks;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const QuantileLoss<T> p, const double* parts, int n_parts) {
  const double factor = finish_loss<kThreads>(parts, n_parts, p.scale, p.normaliser, p.loss);
  if (threadIdx.x == 0) *p.slope = static_cast<T>(factor);
}

template <class T>
const char* loss(const QuantileLoss<T>& p, double* parts, int64_t n_parts, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const int group = group_of(p.n);
  const unsigned used = blocks(p.sizes[0] * p.sizes[1] * p.sizes[2], kThreads / group, n_parts / 2);
  if (used > 0) {
    loss_kernel<<<used, kThreads, 0, stream>>>(p, group, parts);
    if (const char* error = launched()) return error;
  }
  finish_kernel<<<1, kThreads, 0, stream>>>(p, parts, static_cast<int>(used));
  return launched();
}

// --- Means and shape -------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads) split_kernel(const MeanShape<T> p, int group) {
  const int64_t rows = p.outer * p.inner, per_block = kThreads / group;
  const int lane = static_cast<int>(threadIdx.x) % group;
  const T share = T(1) / static_cast<T>(p.n);
  for (int64_t first = blockIdx.x * per_block; first < rows; first += static_cast<int64_t>(gridDim.x) * per_block) {
    const int64_t row = first + static_cast<int>(threadIdx.x) / group;
    const bool exists = row < rows;
    int64_t outer = 0, inner = 0;
    if (exists) split(row, p.inner, outer, inner);
    const T* from = p.quantiles + outer * p.strides[0] + inner * p.strides[1];
    T all = 0;
    for (int64_t agent = 0; agent < p.n_agents; ++agent) {
      T sum = 0;
      if (exists) {
        for (int64_t i = lane; i < p.n; i += group) sum += from[agent * p.strides[2] + i * p.strides[3]];
      }
      const T mean = group_sum(sum, group) * share;
      all += mean;
      if (exists && lane == 0) p.means[row * p.n_agents + agent] = mean;
    }
    for (int64_t i = lane; exists && i < p.n; i += group) {
      T sum = 0;
      for (int64_t agent = 0; agent < p.n_agents; ++agent) sum += from[agent * p.strides[2] + i * p.strides[3]];
      p.shape[row * p.n + i] = sum - all;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) split_backward_kernel(const MeanShapeBackward<T> p, int group) {
  const int64_t per_block = kThreads / group;
  const int lane = static_cast<int>(threadIdx.x) % group;
  const T share = T(1) / static_cast<T>(p.n);
  for (int64_t first = blockIdx.x * per_block; first < p.rows; first += static_cast<int64_t>(gridDim.x) * per_block) {
    const int64_t row = first + static_cast<int>(threadIdx.x) / group;
    const bool exists = row < p.rows;
    const T* shape = p.grad_shape + row * p.n;
    T sum = 0;
    for (int64_t i = lane; exists && i < p.n; i += group) sum += shape[i];
    sum = group_sum(sum, group);
    for (int64_t agent = 0; exists && agent < p.n_agents; ++agent) {
      const T same = (p.grad_means[row * p.n_agents + agent] - sum) * share;
      for (int64_t i = lane; i < p.n; i += group) p.grad[(row * p.n_agents + agent) * p.n + i] = shape[i] + same;
    }
  }
}

template <class T>
const char* divide(const MeanShape<T>& p, void* stream) {
  const int64_t rows = p.outer * p.inner;
  if (rows == 0) return nullptr;
  const int group = group_of(p.n);
  split_kernel<<<blocks(rows, kThreads / group), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, group);
  return launched();
}

template <class T>
const char* divide_backward(const MeanShapeBackward<T>& p, void* stream) {
  if (p.rows == 0) return nullptr;
  const int group = group_of(p.n);
  split_backward_kernel<<<blocks(p.rows, kThreads / group), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, group);
  return launched();
}

// --- Fractions -------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads) fractions_kernel(const Fractions<T> p) {
  const auto draw = static_cast<uint64_t>(p.key[1]);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t block = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; 4 * block < p.size; block += step) {
    Philox philox(p.key[0]);
    uint32_t words[4] = {static_cast<uint32_t>(block), p.stream, static_cast<uint32_t>(draw),
                         static_cast<uint32_t>(draw >> 32)};
#pragma unroll
    for (int r = 0; r < Philox::kRounds; ++r) {
      philox.round(words[0], words[1], words[2], words[3]);
      philox.advance();
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (4 * block + w < p.size) p.fractions[4 * block + w] = static_cast<T>(words[w] >> 8) * Philox::kScale;
    }
  }
}

template <class T>
const char* draw(const Fractions<T>& p, void* stream) {
  if (p.size == 0) return nullptr;
  fractions_kernel<<<blocks(p.size, 4 * kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return launched();
}

}  // namespace

const char* quantile_loss_cuda(const QuantileLoss<float>& p, double* parts, int64_t n_parts, void* stream) {
  return loss(p, parts, n_parts, stream);
}
const char* quantile_loss_cuda(const QuantileLoss<double>& p, double* parts, int64_t n_parts, void* stream) {
  return loss(p, parts, n_parts, stream);
}
const char* mean_shape_cuda(const MeanShape<float>& p, void* stream) { return divide(p, stream); }
const char* mean_shape_cuda(const MeanShape<double>& p, void* stream) { return divide(p, stream); }
const char* mean_shape_backward_cuda(const MeanShapeBackward<float>& p, void* stream) {
  return divide_backward(p, stream);
}
const char* mean_shape_backward_cuda(const MeanShapeBackward<double>& p, void* stream) {
  return divide_backward(p, stream);
}
const char* fractions_cuda(const Fractions<float>& p, void* stream) { return draw(p, stream); }
const char* fractions_cuda(const Fractions<double>& p, void* stream) { return draw(p, stream); }

}  // namespace fastmix
