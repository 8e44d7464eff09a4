#include "cpu/parallel.h"
#include "fastmix/returns_scan.h"

namespace fastmix::FASTMIX_ISA {
namespace {

constexpr int64_t kNumbersPerTask = 4096;  // below this another thread costs more than it saves

// The pointers of one episode, and the arithmetic that every scan over it needs.
template <class T>
struct Episode {
  const T *rewards, *ended, *mask, *qs, *behaviour;
  T* targets;
  int64_t reward_stride;  // 0 where all columns share a reward

  Episode(const ReturnsForward<T>& p, int64_t episode)
      : rewards(p.rewards + episode * p.steps * p.reward_columns),
        ended(p.terminated + episode * p.steps),
        mask(p.mask + episode * p.steps),
        qs(p.target_qs + episode * (p.steps + 1) * p.columns),
        behaviour(p.kind == ReturnKind::q_lambda ? p.behaviour_qs + episode * (p.steps + 1) * p.columns : nullptr),
        targets(p.targets + episode * p.steps * p.columns),
        reward_stride(p.reward_columns == 1 ? 0 : 1) {}
};

// The inner loops run over the columns (agents, quantiles) of one step, and vectorise.

template <class T>
void scan_lambda(const ReturnsForward<T>& p, const Episode<T>& e) {
  const int64_t steps = p.steps, columns = p.columns;
  const T decay = static_cast<T>(p.td_lambda * p.gamma), bootstrap = static_cast<T>((1 - p.td_lambda) * p.gamma);
  for (int64_t t = steps - 1; t >= 0; --t) {
    T* targets = e.targets + t * columns;
    const T mask = e.mask[t];
    if (mask == 0) {
      for (int64_t k = 0; k < columns; ++k) targets[k] = 0;
      continue;
    }
    const T alive = 1 - e.ended[t];
    const bool ends = cut(e.ended, e.mask, t, steps);
    const T *rewards = e.rewards + t * p.reward_columns, *qs = e.qs + t * columns;
    for (int64_t k = 0; k < columns; ++k) {
      const T next = times(alive, qs[columns + k]);
      T reward = rewards[k * e.reward_stride];
      if (e.behaviour != nullptr) reward += qs[k] - e.behaviour[t * columns + k];
      targets[k] = mask * (reward + bootstrap * next) + decay * (ends ? next : targets[columns + k]);
    }
  }
}

// The same for one column, where the scan is a chain of dependent operations: several episodes side by side fill the
// pipeline.
template <int kEpisodes, class T>
void scan_lambda_narrow(const ReturnsForward<T>& p, int64_t episode) {
  const int64_t steps = p.steps;
  const T decay = static_cast<T>(p.td_lambda * p.gamma), bootstrap = static_cast<T>((1 - p.td_lambda) * p.gamma);
  const T *rewards = p.rewards + episode * steps, *ended = p.terminated + episode * steps;
  const T *mask = p.mask + episode * steps, *qs = p.target_qs + episode * (steps + 1);
  const T* behaviour = p.kind == ReturnKind::q_lambda ? p.behaviour_qs + episode * (steps + 1) : nullptr;
  T* targets = p.targets + episode * steps;
  T carry[kEpisodes] = {};
  for (int64_t t = steps - 1; t >= 0; --t) {
    for (int j = 0; j < kEpisodes; ++j) {
      const int64_t i = j * steps + t, q = j * (steps + 1) + t;
      const T next = times(1 - ended[i], qs[q + 1]);
      const T reward = behaviour == nullptr ? rewards[i] : rewards[i] + (qs[q] - behaviour[q]);
      const bool ends = cut(ended + j * steps, mask + j * steps, t, steps);
      const T value = mask[i] * (reward + bootstrap * next) + decay * (ends ? next : carry[j]);
      carry[j] = mask[i] != 0 ? value : T(0);
      targets[i] = carry[j];
    }
  }
}

template <class T>
void scan_one_step(const ReturnsForward<T>& p, const Episode<T>& e) {
  const int64_t columns = p.columns;
  const T gamma = static_cast<T>(p.gamma);
  for (int64_t t = 0; t < p.steps; ++t) {
    const T alive = 1 - e.ended[t];
    for (int64_t k = 0; k < columns; ++k) {
      e.targets[t * columns + k] =
          e.rewards[t * p.reward_columns + k * e.reward_stride] + gamma * times(alive, e.qs[(t + 1) * columns + k]);
    }
  }
}

template <class T>
void scan_n_step(const ReturnsForward<T>& p, const Episode<T>& e) {
  T live = 0;
  for (int64_t t = p.steps - 1; t >= 0; --t) {
    live += e.mask[t];
    const int64_t length = window(live, p.n_step);
    for (int64_t k = 0; k < p.columns; ++k) {
      e.targets[t * p.columns + k] = window_return(e.rewards + k * e.reward_stride, p.reward_columns, e.ended, e.mask,
                                                   e.qs + k, p.columns, static_cast<T>(p.gamma), t, length);
    }
  }
}

template <class T>
void forward(const ReturnsForward<T>& p) {
  const int64_t grain = kNumbersPerTask / (p.steps * p.columns + 1) + 1;
  parallel_parts(p.episodes, p.threads, grain, [&](int64_t begin, int64_t end, int) {
    int64_t episode = begin;
    if (p.columns == 1 && (p.kind == ReturnKind::td_lambda || p.kind == ReturnKind::q_lambda)) {
      for (; episode + 8 <= end; episode += 8) scan_lambda_narrow<8>(p, episode);
      for (; episode < end; ++episode) scan_lambda_narrow<1>(p, episode);
    }
    for (; episode < end; ++episode) {
      const Episode<T> e(p, episode);
      if (p.kind == ReturnKind::one_step) {
        scan_one_step(p, e);
      } else if (p.kind == ReturnKind::n_step) {
        scan_n_step(p, e);
      } else {
        scan_lambda(p, e);
      }
    }
  });
}

template <class T>
void backward(const ReturnsBackward<T>& p) {
  const int64_t grain = kNumbersPerTask / (p.steps * p.columns + 1) + 1;
  parallel_parts(p.episodes, p.threads, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t episode = begin; episode < end; ++episode) transpose(p, episode, 0, p.columns);
  });
}

}  // namespace

void returns_forward(const ReturnsForward<float>& p) { forward(p); }
void returns_forward(const ReturnsForward<double>& p) { forward(p); }
void returns_backward(const ReturnsBackward<float>& p) { backward(p); }
void returns_backward(const ReturnsBackward<double>& p) { backward(p); }

}  // namespace fastmix::FASTMIX_ISA
