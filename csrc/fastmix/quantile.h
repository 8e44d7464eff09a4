// Distributions held as quantiles: the pairwise quantile Huber loss with its gradient, the split of agents'
// distributions into means and a shape, and the fractions that quantiles are at.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fastmix {

// An operand of logical shape [B, T, G] or [B, T, G, N], any strides (in elements), 0 where it is broadcast.
template <class T, int kDims>
struct QuantileOperand {
  const T* data = nullptr;  // null: absent
  int64_t strides[kDims] = {};
};

template <class T>
struct QuantileLoss {
  int64_t sizes[3];  // B, T, G: the rows
  int64_t n, n_targets;
  QuantileOperand<T, 4> theta, targets, fractions;
  QuantileOperand<T, 3> mask, weights;  // weights may be absent
  double kappa, scale;
  const T* normaliser;  // one number; null: the sum of the mask, and a batch without a live step has loss 0
  T* loss;              // one number
  T* row_losses;        // dense
  T* grad;              // dense, d loss / d theta but for the factor at `slope`; null when not wanted
  T* slope;             // one number: what depends on the sum of the mask, known when every row has been through
  int threads;
};

// [outer, inner, A, N] with strides; `means` [rows, A] and `shape` [rows, N] dense.
template <class T>
struct MeanShape {
  int64_t outer, inner, n_agents, n;
  const T* quantiles;
  int64_t strides[4];
  T *means, *shape;
  int threads;
};

template <class T>
struct MeanShapeBackward {
  int64_t rows, n_agents, n;
  const T *grad_means, *grad_shape;  // dense
  T* grad;                           // [rows, A, N] dense
  int threads;
};

template <class T>
struct Fractions {
  int64_t size;
  const int64_t* key;  // seed and number of the draw
  uint32_t stream;
  T* fractions;
  int threads;
};

FASTMIX_DECLARE(void quantile_loss(const QuantileLoss<float>& p))
FASTMIX_DECLARE(void quantile_loss(const QuantileLoss<double>& p))
FASTMIX_DECLARE(void mean_shape(const MeanShape<float>& p))
FASTMIX_DECLARE(void mean_shape(const MeanShape<double>& p))
FASTMIX_DECLARE(void mean_shape_backward(const MeanShapeBackward<float>& p))
FASTMIX_DECLARE(void mean_shape_backward(const MeanShapeBackward<double>& p))
FASTMIX_DECLARE(void fractions(const Fractions<float>& p))
FASTMIX_DECLARE(void fractions(const Fractions<double>& p))

// The same on the current CUDA device, queued on `stream` (a cudaStream_t); null, or what the launch failed with.
// `threads` has no meaning there. `parts` is workspace for at least two numbers; a block takes two of them.
const char* quantile_loss_cuda(const QuantileLoss<float>& p, double* parts, int64_t n_parts, void* stream);
const char* quantile_loss_cuda(const QuantileLoss<double>& p, double* parts, int64_t n_parts, void* stream);
const char* mean_shape_cuda(const MeanShape<float>& p, void* stream);
const char* mean_shape_cuda(const MeanShape<double>& p, void* stream);
const char* mean_shape_backward_cuda(const MeanShapeBackward<float>& p, void* stream);
const char* mean_shape_backward_cuda(const MeanShapeBackward<double>& p, void* stream);
const char* fractions_cuda(const Fractions<float>& p, void* stream);
const char* fractions_cuda(const Fractions<double>& p, void* stream);

}  // namespace fastmix
