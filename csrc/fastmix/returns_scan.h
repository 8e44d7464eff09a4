// The scans of `returns` over one episode and a range of columns, for every device: the CPU gives a thread whole
// episodes, whose columns vectorise; CUDA gives a thread one column.
#pragma once

#include <cstdint>

#include "fastmix/device.h"
#include "fastmix/returns.h"

namespace fastmix::FASTMIX_ISA {

// factor * value where 0 wins over NaN and inf: padded steps may hold anything.
template <class T>
FASTMIX_ON_DEVICE inline T times(T factor, T value) {
  return factor != 0 ? factor * value : T(0);
}

// Number of steps in the window that starts at a step with `live` live steps from there on: full, or up to the
// episode's end; one on padded steps, which every loss masks.
template <class T>
FASTMIX_ON_DEVICE inline int64_t window(T live, int64_t n_step) {
  const int64_t left = static_cast<int64_t>(live);
  return left < 1 ? 1 : left < n_step ? left : n_step;
}

// Whether the trace of the lambda forms stops after a step: the episode ends there, terminated or not, or the data do.
// Then the target bootstraps from the next state in full.
template <class T>
FASTMIX_ON_DEVICE inline bool cut(const T* ended, const T* mask, int64_t t, int64_t steps) {
  return t == steps - 1 || mask[t + 1] == 0 || ended[t] != 0;
}

// A whole window by Horner's rule from its end: full precision without powers of gamma.
template <class T>
FASTMIX_ON_DEVICE inline T window_return(const T* rewards, int64_t reward_stride, const T* ended, const T* mask,
                                         const T* qs, int64_t columns, T gamma, int64_t t, int64_t length) {
  const int64_t last = t + length - 1;
  T value = times(1 - ended[last], qs[(last + 1) * columns]);
  for (int64_t u = last; u >= t; --u) value = times(mask[u], rewards[u * reward_stride]) + gamma * value;
  return value;
}

// Gradients of columns [first, last) of an episode; grad_rewards is a sum over columns where rewards have only one, and
// then the range must be all columns.
template <class T>
FASTMIX_ON_DEVICE inline void transpose(const ReturnsBackward<T>& p, int64_t episode, int64_t first, int64_t last) {
  const int64_t steps = p.steps, columns = p.columns;
  const bool own_rewards = p.reward_columns != 1;
  const int64_t reward_first = own_rewards ? first : 0, reward_last = own_rewards ? last : 1;
  const T* grad = p.grad_targets + episode * steps * columns;
  const T* ended = p.terminated + episode * steps;
  const T* mask = p.mask + episode * steps;
  T* grad_rewards = p.grad_rewards + episode * steps * p.reward_columns;
  T* grad_qs = p.grad_target_qs + episode * (steps + 1) * columns;
  T* grad_behaviour = p.kind == ReturnKind::q_lambda ? p.grad_behaviour_qs + episode * (steps + 1) * columns : nullptr;
  for (int64_t t = 0; t <= steps; ++t) {
    for (int64_t k = first; k < last; ++k) {
      grad_qs[t * columns + k] = 0;
      if (grad_behaviour != nullptr) grad_behaviour[t * columns + k] = 0;
    }
    if (t == steps) break;
    for (int64_t k = reward_first; k < reward_last; ++k) grad_rewards[t * p.reward_columns + k] = 0;
  }
  const T gamma = static_cast<T>(p.gamma);
  if (p.kind == ReturnKind::td_lambda || p.kind == ReturnKind::q_lambda) {
    const T decay = static_cast<T>(p.td_lambda * p.gamma), bootstrap = static_cast<T>((1 - p.td_lambda) * p.gamma);
    for (int64_t k = first; k < last; ++k) {
      T carry = 0;  // gradient of target t through its own entry and all earlier targets of its trace
      for (int64_t t = 0; t < steps; ++t) {
        const bool ends = cut(ended, mask, t, steps), live = mask[t] != 0;
        carry = live ? carry + grad[t * columns + k] : T(0);
        const T masked = times(mask[t], carry);
        grad_rewards[t * p.reward_columns + (own_rewards ? k : 0)] += masked;
        grad_qs[(t + 1) * columns + k] += times(1 - ended[t], bootstrap * masked + (ends ? decay * carry : T(0)));
        if (grad_behaviour != nullptr) {
          grad_qs[t * columns + k] += masked;
          grad_behaviour[t * columns + k] -= masked;
        }
        carry = ends ? T(0) : decay * carry;
      }
    }
    return;
  }
  const bool masked = p.kind == ReturnKind::n_step;
  T live = 0;
  for (int64_t t = steps - 1; t >= 0; --t) {
    live += mask[t];
    const int64_t length = masked ? window(live, p.n_step) : 1;
    for (int64_t k = first; k < last; ++k) {
      T carry = grad[t * columns + k];
      for (int64_t u = t; u < t + length; ++u) {
        grad_rewards[u * p.reward_columns + (own_rewards ? k : 0)] += masked ? times(mask[u], carry) : carry;
        carry *= gamma;
      }
      grad_qs[(t + length) * columns + k] += times(1 - ended[t + length - 1], carry);
    }
  }
}

}  // namespace fastmix::FASTMIX_ISA
