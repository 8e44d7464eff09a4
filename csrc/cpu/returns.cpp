#include "fastmix/returns.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace fastmix::FASTMIX_ISA {
namespace {

constexpr int64_t kStepsPerTask = 4096;  // below this many numbers another thread costs more than it saves

// factor * value where 0 wins over NaN and inf: padded steps may hold anything.
template <class T>
FASTMIX_INLINE T times(T factor, T value) {
  return factor != 0 ? factor * value : T(0);
}

template <class T>
T total(const T* flags, int64_t steps) {
  T sum = 0;
  for (int64_t t = 0; t < steps; ++t) sum += flags[t];
  return sum;
}

// The scans below run over the columns (agents, quantiles) of one episode in their inner loop, which vectorises.

template <class T>
void scan_lambda(const ReturnsForward<T>& p, int64_t episode) {
  const int64_t steps = p.steps, columns = p.columns, stride = p.reward_columns == 1 ? 0 : 1;
  const T* rewards = p.rewards + episode * steps * p.reward_columns;
  const T* ended = p.terminated + episode * steps;
  const T* mask = p.mask + episode * steps;
  const T* qs = p.target_qs + episode * (steps + 1) * columns;
  const T* behaviour = p.kind == ReturnKind::q_lambda ? p.behaviour_qs + episode * (steps + 1) * columns : nullptr;
  T* targets = p.targets + episode * steps * columns;
  const T decay = static_cast<T>(p.td_lambda * p.gamma), bootstrap = static_cast<T>((1 - p.td_lambda) * p.gamma);
  const T open = 1 - total(ended, steps);
  for (int64_t t = steps - 1; t >= 0; --t) {
    const T alive = 1 - ended[t];
    for (int64_t k = 0; k < columns; ++k) {
      const T next = t == steps - 1 ? times(open, qs[steps * columns + k]) : targets[(t + 1) * columns + k];
      T reward = rewards[t * p.reward_columns + k * stride];
      if (behaviour != nullptr) reward += qs[t * columns + k] - behaviour[t * columns + k];
      const T one_step = reward + bootstrap * times(alive, qs[(t + 1) * columns + k]);
      targets[t * columns + k] = decay * next + times(mask[t], one_step);
    }
  }
}

template <class T>
void scan_one_step(const ReturnsForward<T>& p, int64_t episode) {
  const int64_t steps = p.steps, columns = p.columns, stride = p.reward_columns == 1 ? 0 : 1;
  const T* rewards = p.rewards + episode * steps * p.reward_columns;
  const T* ended = p.terminated + episode * steps;
  const T* qs = p.target_qs + episode * (steps + 1) * columns;
  T* targets = p.targets + episode * steps * columns;
  const T gamma = static_cast<T>(p.gamma);
  for (int64_t t = 0; t < steps; ++t) {
    for (int64_t k = 0; k < columns; ++k) {
      targets[t * columns + k] =
          rewards[t * p.reward_columns + k * stride] + gamma * times(1 - ended[t], qs[(t + 1) * columns + k]);
    }
  }
}

// Number of steps in the window that starts at a step with `live` live steps from there on: full, or up to the episode's
// end; one on padded steps, which every loss masks.
template <class T>
int64_t window(T live, int64_t n_step) {
  const int64_t left = static_cast<int64_t>(live);
  return left < 1 ? 1 : left < n_step ? left : n_step;
}

template <class T>
void scan_n_step(const ReturnsForward<T>& p, int64_t episode) {
  const int64_t steps = p.steps, columns = p.columns, stride = p.reward_columns == 1 ? 0 : 1;
  const T* rewards = p.rewards + episode * steps * p.reward_columns;
  const T* ended = p.terminated + episode * steps;
  const T* mask = p.mask + episode * steps;
  const T* qs = p.target_qs + episode * (steps + 1) * columns;
  T* targets = p.targets + episode * steps * columns;
  T live = 0;
  for (int64_t t = steps - 1; t >= 0; --t) {
    live += mask[t];
    const int64_t length = window(live, p.n_step);
    const int64_t last = t + length - 1;
    for (int64_t k = 0; k < columns; ++k) {
      // Horner's rule from the window's end: full precision without powers of gamma.
      T value = times(1 - ended[last], qs[(last + 1) * columns + k]);
      for (int64_t u = last; u >= t; --u) {
        value = times(mask[u], rewards[u * p.reward_columns + k * stride]) + static_cast<T>(p.gamma) * value;
      }
      targets[t * columns + k] = value;
    }
  }
}

template <class T>
void forward(const ReturnsForward<T>& p) {
  parallel_parts(p.episodes, p.threads, kStepsPerTask / (p.steps * p.columns + 1) + 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t episode = begin; episode < end; ++episode) {
      if (p.kind == ReturnKind::one_step) {
        scan_one_step(p, episode);
      } else if (p.kind == ReturnKind::n_step) {
        scan_n_step(p, episode);
      } else {
        scan_lambda(p, episode);
      }
    }
  });
}

template <class T>
void transpose_lambda(const ReturnsBackward<T>& p, int64_t episode, T* grad_rewards, T* grad_qs, T* grad_behaviour) {
  const int64_t steps = p.steps, columns = p.columns, stride = p.reward_columns == 1 ? 0 : 1;
  const T* grad = p.grad_targets + episode * steps * columns;
  const T* ended = p.terminated + episode * steps;
  const T* mask = p.mask + episode * steps;
  const T decay = static_cast<T>(p.td_lambda * p.gamma), bootstrap = static_cast<T>((1 - p.td_lambda) * p.gamma);
  const T open = 1 - total(ended, steps);
  for (int64_t k = 0; k < columns; ++k) {
    T carry = 0;  // gradient of target t through all earlier targets and its own
    for (int64_t t = 0; t < steps; ++t) {
      carry = decay * carry + grad[t * columns + k];
      const T live = mask[t] * carry;
      grad_rewards[t * p.reward_columns + k * stride] += live;
      grad_qs[(t + 1) * columns + k] += bootstrap * (1 - ended[t]) * live;
      if (grad_behaviour != nullptr) {
        grad_qs[t * columns + k] += live;
        grad_behaviour[t * columns + k] -= live;
      }
    }
    grad_qs[steps * columns + k] += decay * carry * open;
  }
}

template <class T>
void transpose_windows(const ReturnsBackward<T>& p, int64_t episode, T* grad_rewards, T* grad_qs) {
  const int64_t steps = p.steps, columns = p.columns, stride = p.reward_columns == 1 ? 0 : 1;
  const T* grad = p.grad_targets + episode * steps * columns;
  const T* ended = p.terminated + episode * steps;
  const T* mask = p.mask + episode * steps;
  const bool masked = p.kind == ReturnKind::n_step;
  T live = 0;
  for (int64_t t = steps - 1; t >= 0; --t) {
    live += mask[t];
    const int64_t length = masked ? window(live, p.n_step) : 1;
    for (int64_t k = 0; k < columns; ++k) {
      T carry = grad[t * columns + k];
      for (int64_t u = t; u < t + length; ++u) {
        grad_rewards[u * p.reward_columns + k * stride] += masked ? mask[u] * carry : carry;
        carry *= static_cast<T>(p.gamma);
      }
      grad_qs[(t + length) * columns + k] += (1 - ended[t + length - 1]) * carry;
    }
  }
}

template <class T>
void backward(const ReturnsBackward<T>& p) {
  const int64_t grain = kStepsPerTask / (p.steps * p.columns + 1) + 1;
  parallel_parts(p.episodes, p.threads, grain, [&](int64_t begin, int64_t end, int) {
    const int64_t reward_size = p.steps * p.reward_columns, q_size = (p.steps + 1) * p.columns;
    for (int64_t episode = begin; episode < end; ++episode) {
      T* grad_rewards = p.grad_rewards + episode * reward_size;
      T* grad_qs = p.grad_target_qs + episode * q_size;
      T* grad_behaviour = p.kind == ReturnKind::q_lambda ? p.grad_behaviour_qs + episode * q_size : nullptr;
      for (int64_t i = 0; i < reward_size; ++i) grad_rewards[i] = 0;
      for (int64_t i = 0; i < q_size; ++i) grad_qs[i] = 0;
      if (grad_behaviour != nullptr) {
        for (int64_t i = 0; i < q_size; ++i) grad_behaviour[i] = 0;
      }
      if (p.kind == ReturnKind::td_lambda || p.kind == ReturnKind::q_lambda) {
        transpose_lambda(p, episode, grad_rewards, grad_qs, grad_behaviour);
      } else {
        transpose_windows(p, episode, grad_rewards, grad_qs);
      }
    }
  });
}

}  // namespace

void returns_forward(const ReturnsForward<float>& p) { forward(p); }
void returns_forward(const ReturnsForward<double>& p) { forward(p); }
void returns_backward(const ReturnsBackward<float>& p) { backward(p); }
void returns_backward(const ReturnsBackward<double>& p) { backward(p); }

}  // namespace fastmix::FASTMIX_ISA
