// The agents' distributions of one row, quantiles [A, N], as their means and a shape (fastmix/quantile.h).
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace fastmix::FASTMIX_ISA {

template <class T>
FASTMIX_INLINE T sum_of(const T* x, int64_t stride, int64_t n) {
  if (stride != 1) {
    T total = 0;
    for (int64_t i = 0; i < n; ++i) total += x[i * stride];
    return total;
  }
  Vec<T> total{};
  int64_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>) total += load(x + i);
  if (i < n) total += load_part(x + i, static_cast<int>(n - i));
  return sum<T>(total);
}

// Where the quantiles of a row lie: agents agent_stride apart, their quantiles stride apart.
struct QuantileLayout {
  int64_t n_agents, n, agent_stride, stride;
};

// Means [A], mean_stride apart, and `shape` [N], null where it is not wanted.
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
  const auto over_agents = [&](const auto& pick) __attribute__((always_inline)) {
    auto total = pick(quantiles);
    for (int64_t agent = 1; agent < at.n_agents; ++agent) total += pick(quantiles + agent * at.agent_stride);
    return total - all;
  };
  if (at.stride != 1) {
    for (int64_t i = 0; i < at.n; ++i) shape[i] = over_agents([&](const T* from) { return from[i * at.stride]; });
    return;
  }
  int64_t i = 0;
  for (; i + lanes<T> <= at.n; i += lanes<T>) {
    store(shape + i, over_agents([&](const T* from) { return load(from + i); }));
  }
  if (i < at.n) {
    const int rest = static_cast<int>(at.n - i);
    store_part(shape + i, over_agents([&](const T* from) { return load_part(from + i, rest); }), rest);
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
