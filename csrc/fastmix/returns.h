// Learning targets of whole episodes as one scan over time, and the transpose of that scan.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fastmix {

enum class ReturnKind { td_lambda = 0, q_lambda = 1, one_step = 2, n_step = 3 };

// All arrays dense: flags [B, T], rewards [B, T, reward_columns], bootstraps [B, T + 1, columns], targets [B, T,
// columns]. reward_columns is 1 (the same reward for every column) or columns.
struct ReturnsShape {
  int64_t episodes, steps, columns, reward_columns;
  ReturnKind kind;
  double gamma, td_lambda;
  int64_t n_step;
  int threads;
};

template <class T>
struct ReturnsForward : ReturnsShape {
  const T *rewards, *terminated, *mask, *target_qs, *behaviour_qs;  // behaviour_qs: q_lambda only
  T* targets;
};

template <class T>
struct ReturnsBackward : ReturnsShape {
  const T *grad_targets, *terminated, *mask;
  T *grad_rewards, *grad_target_qs, *grad_behaviour_qs;  // grad_behaviour_qs: q_lambda only
};

FASTMIX_DECLARE(void returns_forward(const ReturnsForward<float>& p))
FASTMIX_DECLARE(void returns_forward(const ReturnsForward<double>& p))
FASTMIX_DECLARE(void returns_backward(const ReturnsBackward<float>& p))
FASTMIX_DECLARE(void returns_backward(const ReturnsBackward<double>& p))

// The same on the current CUDA device, queued on `stream` (a cudaStream_t); null, or what the launch failed with.
// `threads` has no meaning there.
const char* returns_forward_cuda(const ReturnsForward<float>& p, void* stream);
const char* returns_forward_cuda(const ReturnsForward<double>& p, void* stream);
const char* returns_backward_cuda(const ReturnsBackward<float>& p, void* stream);
const char* returns_backward_cuda(const ReturnsBackward<double>& p, void* stream);

}  // namespace fastmix
