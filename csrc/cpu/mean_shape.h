// The agents' distributions of one row, quantiles [A, N], as their means and a shape (fastmix/quantile.h).
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace fastmix::FASTMIX_ISA {

template <class T>
FASTMIX_INLINE T sum_of(const T* x, int64_t stride, int64_t n) {
  T total = 0;
  int64_t i = 0;
  if (stride == 1 && n >= lanes<T>) {
    Vec<T> part{};
    for (; i + lanes<T> <= n; i += lanes<T>) part += load(x + i);
    total = sum<T>(part);
  }
  for (; i < n; ++i) total += x[i * stride];
  return total;
}

// Where the quantiles of a row lie: agents agent_stride apart, their quantiles stride apart.
struct QuantileLayout {
  int64_t n_agents, n, agent_stride, stride;
};

// `shape` [N] is null where it is not wanted; means are mean_stride apart.
template <class T>
FASTMIX_INLINE void split_row(const T* quantiles, const QuantileLayout& at, T* means, int64_t mean_stride, T* shape) {
  const T share = T(1) / static_cast<T>(at.n);
  T all = 0;
  for (int64_t agent = 0; agent < at.n_agents; ++agent) {
    const T mean = sum_of(quantiles + agent * at.agent_stride, at.stride, at.n) * share;
    means[agent * mean_stride] = mean;
    all += mean;
  }
  if (shape == nullptr) return;
  int64_t i = 0;
  for (; at.stride == 1 && i + lanes<T> <= at.n; i += lanes<T>) {
    Vec<T> total{};
    for (int64_t agent = 0; agent < at.n_agents; ++agent) total += load(quantiles + agent * at.agent_stride + i);
    store(shape + i, total - all);
  }
  for (; i < at.n; ++i) {
    T total = 0;
    for (int64_t agent = 0; agent < at.n_agents; ++agent) total += quantiles[agent * at.agent_stride + i * at.stride];
    shape[i] = total - all;
  }
}

// The gradient [A, N] of quantiles, dense, from those of means and shape and the latter's sum.
template <class T>
FASTMIX_INLINE void split_row_backward(const T* grad_means, int64_t mean_stride, const T* grad_shape, T sum,
                                       int64_t n_agents, int64_t n, T* grad) {
  const T share = T(1) / static_cast<T>(n);
  for (int64_t agent = 0; agent < n_agents; ++agent, grad += n) {
    const T same = (grad_means[agent * mean_stride] - sum) * share;
    for (int64_t i = 0; i < n; ++i) grad[i] = grad_shape[i] + same;
  }
}

}  // namespace fastmix::FASTMIX_ISA
