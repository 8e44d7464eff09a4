// Masked, weighted squared temporal-difference loss: value, per-step error and gradient in one pass.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fastmix {

// An operand of logical shape [B, T, K], any strides (in elements), 0 where it is broadcast.
template <class T>
struct Strided {
  const T* data = nullptr;  // null: absent
  int64_t strides[3] = {0, 0, 0};
};

// Which elements are favoured: a residual is left out of these, and without one they weigh `high` and others `low`.
enum class Rule : int {
  kNone,
  kGreedy,         // all_greedy
  kGreedyOrAbove,  // all_greedy, or targets > values
  kBelow,          // qs < targets
  kNotBelow,       // not qs < targets
  kRecognised,     // values >= thresholds - tolerance
};

template <class T>
struct TDLossForward {
  int64_t sizes[3];
  Strided<T> qs, targets, mask, weights, residual;  // weights and residual may be absent
  Rule rule;
  Strided<bool> all_greedy;       // where the rule reads it
  Strided<T> values, thresholds;  // where the rule reads them
  T tolerance, high, low;
  double scale;
  const T* normaliser;  // one number; null: the sum of the mask, and a batch without a live step has loss 0
  T* loss;              // one number
  T* td_error;          // dense
  T* factors;           // dense, what the rule came to: high or low, or the residual's 0 or 1; null without a rule
  T* grad;              // dense, d loss / d qs, on CUDA but for a factor; null when not wanted
  int threads;
};

template <class T>
struct TDLossBackward {
  int64_t size;
  const T *grad, *slope, *grad_loss;  // as the forward pass left them, and one number
  T* grad_qs;
};

FASTMIX_DECLARE(void td_loss_forward(const TDLossForward<float>& p))
FASTMIX_DECLARE(void td_loss_forward(const TDLossForward<double>& p))

// The same on the current CUDA device, queued on `stream` (a cudaStream_t); null, or what the launch failed with.
// `threads` has no meaning there. The factor that `grad` lacks becomes the number at `slope`. `parts` is workspace for
// at least two numbers; a block takes two of them.
const char* td_loss_forward_cuda(const TDLossForward<float>& p, float* slope, double* parts, int64_t n_parts,
                                 void* stream);
const char* td_loss_forward_cuda(const TDLossForward<double>& p, double* slope, double* parts, int64_t n_parts,
                                 void* stream);
// grad_qs = grad * slope * grad_loss.
const char* td_loss_backward_cuda(const TDLossBackward<float>& p, void* stream);
const char* td_loss_backward_cuda(const TDLossBackward<double>& p, void* stream);

}  // namespace fastmix
