#include "fastmix/quantile.h"

#include <cstring>

#include "cpu/mean_shape.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"
#include "fastmix/philox.h"

namespace fastmix::FASTMIX_ISA {
namespace {

// --- The loss --------------------------------------------------------------------------------------------------------
//
// A lane is a row: a tile of as many rows as a vector has lanes lies transposed in the cache, quantile by quantile, so
// that every pair of a quantile and a target is one vector of full use, whatever N and N' are, and no sum goes across
// lanes.

constexpr int kMostThreads = 256;
constexpr int64_t kPairsPerTask = 65536;                  // below this another thread costs more than it saves
constexpr int kTogether = kVectorRegisters > 16 ? 4 : 2;  // quantiles worked on at once

// Walks over rows [B, T, G] without dividing at each.
struct RowCounter {
  const int64_t* sizes;
  int64_t b, t, g;

  RowCounter(const int64_t* sizes, int64_t row)
      : sizes(sizes), b(row / sizes[2] / sizes[1]), t(row / sizes[2] % sizes[1]), g(row % sizes[2]) {}

  template <class T, int kDims>
  const T* at(const QuantileOperand<T, kDims>& operand) const {
    return operand.data + b * operand.strides[0] + t * operand.strides[1] + g * operand.strides[2];
  }

  void next() {
    if (++g < sizes[2]) return;
    g = 0;
    if (++t < sizes[1]) return;
    t = 0;
    ++b;
  }
};

// Rows side by side: [N][lanes] of theta, fractions and the gradient, [N'][lanes] of targets.
template <class T>
struct Tile {
  T *theta, *fractions, *grad, *targets;

  static int64_t numbers(const QuantileLoss<T>& p) { return (3 * p.n + p.n_targets) * lanes<T>; }

  Tile(const QuantileLoss<T>& p, T* memory)
      : theta(memory),
        fractions(theta + p.n * lanes<T>),
        grad(fractions + p.n * lanes<T>),
        targets(grad + p.n * lanes<T>) {}
};

template <class T>
FASTMIX_INLINE void into_lane(const T* row, int64_t stride, int64_t n, T* lane) {
  for (int64_t i = 0; i < n; ++i) lane[i * lanes<T>] = row[i * stride];
}

template <class T>
FASTMIX_INLINE void zero_lane(int64_t n, T* lane) {
  for (int64_t i = 0; i < n; ++i) lane[i * lanes<T>] = 0;
}

// Quantiles [i, i + kCount) against all targets: adds their pairs to `loss` and writes their gradient for a loss of 1
// a row. kAbsolute: kappa is 0.
template <class T, int kCount, bool kAbsolute>
FASTMIX_INLINE void pairs(const Tile<T>& tile, int64_t i, int64_t n_targets, T kappa, Vec<T>& loss) {
  using V = Vec<T>;
  const V zero{}, high = splat<T>(kappa), low = splat<T>(-kappa), half = splat<T>(T(0.5));
  V theta[kCount], above[kCount], below[kCount], sum[kCount], slope[kCount];
#pragma GCC unroll 4
  for (int k = 0; k < kCount; ++k) {
    const V fraction = load(tile.fractions + (i + k) * lanes<T>);
    theta[k] = load(tile.theta + (i + k) * lanes<T>);
    above[k] = abs<T>(fraction);
    below[k] = abs<T>(fraction - 1);
    sum[k] = slope[k] = zero;
  }
  for (int64_t j = 0; j < n_targets; ++j) {
    const V target = load(tile.targets + j * lanes<T>);
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
      const V error = target - theta[k];
      const V weight = error <= zero ? below[k] : above[k];
      if constexpr (kAbsolute) {
        const V sign = error > zero ? splat<T>(1) : (error < zero ? splat<T>(-1) : zero);
        sum[k] += weight * abs<T>(error);
        slope[k] -= weight * sign;
      } else {
        // With c the error cut to [-kappa, kappa], the Huber function is c (error - c / 2) and its slope c. Compared
        // so that NaN stays.
        const V capped = error > high ? high : error;
        const V cut = capped < low ? low : capped;
        const V weighted = weight * cut;
        sum[k] += weighted * (error - half * cut);
        slope[k] -= weighted;
      }
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < kCount; ++k) {
    loss += sum[k];
    store<T>(tile.grad + (i + k) * lanes<T>, slope[k]);
  }
}

template <class T, bool kAbsolute>
Vec<T> all_pairs(const QuantileLoss<T>& p, const Tile<T>& tile) {
  Vec<T> loss{};
  const T kappa = static_cast<T>(p.kappa);
  int64_t i = 0;
  for (; i + kTogether <= p.n; i += kTogether) pairs<T, kTogether, kAbsolute>(tile, i, p.n_targets, kappa, loss);
  for (; i < p.n; ++i) pairs<T, 1, kAbsolute>(tile, i, p.n_targets, kappa, loss);
  return loss;
}

struct Sums {
  double losses = 0, mask = 0;
};

template <class T>
Sums loss_of_rows(const QuantileLoss<T>& p, int64_t begin, int64_t end, const Tile<T>& tile) {
  Sums sums;
  if (begin == end) return sums;
  const T unit = static_cast<T>(1 / (static_cast<double>(p.n_targets) * (p.kappa > 0 ? p.kappa : 1)));
  RowCounter row(p.sizes, begin);
  for (int64_t first = begin; first < end; first += lanes<T>) {
    const int used = end - first < lanes<T> ? static_cast<int>(end - first) : lanes<T>;
    T factors[lanes<T>];  // mask and weight of each row
    bool live[lanes<T>], any = false;
    for (int l = 0; l < lanes<T>; ++l) {
      live[l] = false;
      factors[l] = 0;
      if (l < used) {
        const T mask = *row.at(p.mask);
        sums.mask += static_cast<double>(mask);
        live[l] = mask != 0;
        // Left out, not multiplied by 0: padded steps may hold NaN or inf.
        if (live[l]) factors[l] = p.weights.data == nullptr ? mask : mask * *row.at(p.weights);
      }
      if (live[l]) {
        any = true;
        into_lane(row.at(p.theta), p.theta.strides[3], p.n, tile.theta + l);
        into_lane(row.at(p.fractions), p.fractions.strides[3], p.n, tile.fractions + l);
        into_lane(row.at(p.targets), p.targets.strides[3], p.n_targets, tile.targets + l);
      } else {
        zero_lane(p.n, tile.theta + l);
        zero_lane(p.n, tile.fractions + l);
        zero_lane(p.n_targets, tile.targets + l);
      }
      if (l < used) row.next();
    }
    T losses[lanes<T>] = {};
    if (any) {
      store<T>(losses, (p.kappa > 0 ? all_pairs<T, false>(p, tile) : all_pairs<T, true>(p, tile)) * unit);
    }
    for (int l = 0; l < used; ++l) {
      p.row_losses[first + l] = losses[l];
      if (live[l]) sums.losses += static_cast<double>(factors[l]) * static_cast<double>(losses[l]);
      if (p.grad != nullptr) {
        T* grad = p.grad + (first + l) * p.n;
        const T factor = unit * factors[l];
        for (int64_t i = 0; i < p.n; ++i) grad[i] = live[l] ? factor * tile.grad[i * lanes<T> + l] : T(0);
      }
    }
  }
  return sums;
}

template <class T>
void loss_forward(const QuantileLoss<T>& p) {
  const int64_t rows = p.sizes[0] * p.sizes[1] * p.sizes[2], tiles = (rows + lanes<T> - 1) / lanes<T>;
  const int threads = p.threads < kMostThreads ? p.threads : kMostThreads;
  const int64_t numbers = Tile<T>::numbers(p);
  const int64_t grain = kPairsPerTask / (p.n * p.n_targets * lanes<T>)+1;
  Workspace workspace(static_cast<size_t>(numbers) * sizeof(T) * static_cast<size_t>(threads > 1 ? threads : 1));
  Sums parts[kMostThreads];
  parallel_parts(tiles, threads, grain, [&](int64_t begin, int64_t end, int part) {
    const Tile<T> tile(p, static_cast<T*>(workspace.get()) + part * numbers);
    parts[part] = loss_of_rows(p, begin * lanes<T>, end * lanes<T> < rows ? end * lanes<T> : rows, tile);
  });
  Sums total;
  for (const Sums& part : parts) {
    total.losses += part.losses;
    total.mask += part.mask;
  }
  const bool nothing = p.normaliser == nullptr && total.mask == 0;
  const double factor =
      nothing ? 0 : p.scale / (p.normaliser == nullptr ? total.mask : static_cast<double>(*p.normaliser));
  *p.loss = nothing ? T(0) : static_cast<T>(factor * total.losses);
  *p.slope = static_cast<T>(factor);
}

// --- Means and shape -------------------------------------------------------------------------------------------------

constexpr int64_t kNumbersPerTask = 16384;

template <class T>
void split(const MeanShape<T>& p) {
  const QuantileLayout at{p.n_agents, p.n, p.strides[2], p.strides[3]};
  const int64_t numbers = p.n_agents * p.n, rows = p.outer * p.inner;
  parallel_parts(rows, p.threads, kNumbersPerTask / numbers + 1, [&](int64_t begin, int64_t end, int) {
    if (begin == end) return;
    int64_t outer = begin / p.inner, inner = begin % p.inner;
    for (int64_t row = begin; row < end; ++row) {
      const T* from = p.quantiles + outer * p.strides[0] + inner * p.strides[1];
      split_row(from, at, p.means + row * p.n_agents, 1, p.shape + row * p.n);
      if (++inner == p.inner) {
        inner = 0;
        ++outer;
      }
    }
  });
}

template <class T>
void split_backward(const MeanShapeBackward<T>& p) {
  const int64_t numbers = p.n_agents * p.n;
  parallel_parts(p.rows, p.threads, kNumbersPerTask / numbers + 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const T* shape = p.grad_shape + row * p.n;
      split_row_backward(p.grad_means + row * p.n_agents, 1, shape, sum_of(shape, 1, p.n), p.n_agents, p.n,
                         p.grad + row * numbers);
    }
  });
}

// --- Fractions -------------------------------------------------------------------------------------------------------

constexpr int kBlocks = 16;  // of four numbers, worked on side by side

template <class T>
void draw(const Fractions<T>& p) {
  constexpr int64_t kPerStep = 4 * kBlocks;
  const int64_t steps = (p.size + kPerStep - 1) / kPerStep;
  const auto number = static_cast<uint64_t>(p.key[1]);
  parallel_parts(steps, p.threads, kNumbersPerTask / kPerStep, [&](int64_t begin, int64_t end, int) {
    for (int64_t step = begin; step < end; ++step) {
      uint32_t words[4][kBlocks];
      for (int l = 0; l < kBlocks; ++l) {
        words[0][l] = static_cast<uint32_t>(step * kBlocks + l);
        words[1][l] = p.stream;
        words[2][l] = static_cast<uint32_t>(number);
        words[3][l] = static_cast<uint32_t>(number >> 32);
      }
      Philox philox(p.key[0]);
      for (int r = 0; r < Philox::kRounds; ++r) {
        for (int l = 0; l < kBlocks; ++l) philox.round(words[0][l], words[1][l], words[2][l], words[3][l]);
        philox.advance();
      }
      T numbers[kPerStep];
      for (int l = 0; l < kBlocks; ++l) {
        for (int w = 0; w < 4; ++w) numbers[4 * l + w] = static_cast<T>(words[w][l] >> 8) * Philox::kScale;
      }
      const int64_t left = p.size - step * kPerStep;
      std::memcpy(p.fractions + step * kPerStep, numbers,
                  static_cast<size_t>(left < kPerStep ? left : kPerStep) * sizeof(T));
    }
  });
}

}  // namespace

void quantile_loss(const QuantileLoss<float>& p) { loss_forward(p); }
void quantile_loss(const QuantileLoss<double>& p) { loss_forward(p); }
void mean_shape(const MeanShape<float>& p) { split(p); }
void mean_shape(const MeanShape<double>& p) { split(p); }
void mean_shape_backward(const MeanShapeBackward<float>& p) { split_backward(p); }
void mean_shape_backward(const MeanShapeBackward<double>& p) { split_backward(p); }
void fractions(const Fractions<float>& p) { draw(p); }
void fractions(const Fractions<double>& p) { draw(p); }

}  // namespace fastmix::FASTMIX_ISA
