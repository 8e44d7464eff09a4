#include "fastmix/td_loss.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace fastmix::FASTMIX_ISA {
namespace {

constexpr int kBlock = 256;  // numbers worked on at once: every operand of a block stays in the first-level cache
constexpr int64_t kNumbersPerTask = 16384;
constexpr int kThreads = 256;

struct Sizes {
  int64_t outer, middle, inner;

  int64_t total() const { return outer * middle * inner; }
};

// A block of an operand as dense numbers: in place where it lies so, otherwise copied into `buffer`.
template <class T>
const T* block(const Strided<T>& operand, const Sizes& sizes, int64_t begin, int size, T* buffer) {
  const auto [outer_stride, middle_stride, inner_stride] = operand.strides;
  if (inner_stride == 1 && (middle_stride == sizes.inner || sizes.middle == 1) &&
      (outer_stride == sizes.middle * sizes.inner || sizes.outer == 1)) {
    return operand.data + begin;
  }
  int64_t inner = begin % sizes.inner, middle = begin / sizes.inner % sizes.middle;
  int64_t outer = begin / sizes.inner / sizes.middle;
  for (int done = 0; done < size;) {
    const T* from = operand.data + outer * outer_stride + middle * middle_stride + inner * inner_stride;
    const int64_t left = sizes.inner - inner;
    const int run = left < size - done ? static_cast<int>(left) : size - done;
    if (inner_stride == 0) {
      const T value = *from;
      for (int i = 0; i < run; ++i) buffer[done + i] = value;
    } else if (inner_stride == 1) {
      for (int i = 0; i < run; ++i) buffer[done + i] = from[i];
    } else {
      for (int i = 0; i < run; ++i) buffer[done + i] = from[i * inner_stride];
    }
    done += run;
    inner = 0;
    if (++middle == sizes.middle) {
      middle = 0;
      ++outer;
    }
  }
  return buffer;
}

// Sum of kBlock numbers, the unused ones 0, in eight chains.
FASTMIX_INLINE double sum_block(const double* values) {
  double chains[8] = {};
  for (int i = 0; i < kBlock; i += 8) {
    for (int j = 0; j < 8; ++j) chains[j] += values[i + j];
  }
  return ((chains[0] + chains[1]) + (chains[2] + chains[3])) + ((chains[4] + chains[5]) + (chains[6] + chains[7]));
}

// Adds body(begin, size, values) over all blocks, in an order that depends on the number of threads only.
template <class Body>
double sum_blocks(int64_t total, int threads, const Body& body) {
  double parts[kThreads] = {};
  const int64_t blocks = (total + kBlock - 1) / kBlock;
  const int limit = threads < kThreads ? threads : kThreads;
  parallel_parts(blocks, limit, kNumbersPerTask / kBlock, [&](int64_t begin, int64_t end, int part) {
    double sum = 0;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t start = b * kBlock;
      const int size = total - start < kBlock ? static_cast<int>(total - start) : kBlock;
      alignas(64) double values[kBlock];
      for (int i = size; i < kBlock; ++i) values[i] = 0;
      body(start, size, values);
      sum += sum_block(values);
    }
    parts[part] = sum;
  });
  double sum = 0;
  for (const double part : parts) sum += part;
  return sum;
}

template <class T>
double sum_mask(const TDLossForward<T>& p, const Sizes& sizes) {
  // A mask without the last dimension is summed once and counted for all of its columns.
  const bool repeated = p.mask.strides[2] == 0 && sizes.inner > 1;
  const Sizes own{repeated ? 1 : sizes.outer, repeated ? sizes.outer : sizes.middle,
                  repeated ? sizes.middle : sizes.inner};
  Strided<T> mask = p.mask;
  if (repeated) {
    mask.strides[2] = mask.strides[1];
    mask.strides[1] = mask.strides[0];
  }
  const double sum = sum_blocks(own.total(), p.threads, [&](int64_t begin, int size, double* values) {
    alignas(64) T buffer[kBlock];
    const T* m = block(mask, own, begin, size, buffer);
    for (int i = 0; i < size; ++i) values[i] = m[i];
  });
  return repeated ? sum * static_cast<double>(sizes.inner) : sum;
}

// Writes what the rule makes of a block: `favoured` for favoured elements, `other` for the rest.
template <class T>
void decide(const TDLossForward<T>& p, const Sizes& sizes, int64_t begin, int size, const T* qs, const T* targets,
            T favoured, T other, T* factors) {
  alignas(64) T first[kBlock], second[kBlock];
  alignas(64) bool flags[kBlock];
  switch (p.rule) {
    case Rule::kNone:
      break;
    case Rule::kGreedy: {
      const bool* greedy = block(p.all_greedy, sizes, begin, size, flags);
      for (int i = 0; i < size; ++i) factors[i] = greedy[i] ? favoured : other;
      break;
    }
    case Rule::kGreedyOrAbove: {
      const bool* greedy = block(p.all_greedy, sizes, begin, size, flags);
      const T* values = block(p.values, sizes, begin, size, first);
      for (int i = 0; i < size; ++i) factors[i] = greedy[i] || targets[i] > values[i] ? favoured : other;
      break;
    }
    case Rule::kBelow:
      for (int i = 0; i < size; ++i) factors[i] = qs[i] < targets[i] ? favoured : other;
      break;
    case Rule::kNotBelow:
      for (int i = 0; i < size; ++i) factors[i] = qs[i] < targets[i] ? other : favoured;
      break;
    case Rule::kRecognised: {
      const T* values = block(p.values, sizes, begin, size, first);
      const T* thresholds = block(p.thresholds, sizes, begin, size, second);
      for (int i = 0; i < size; ++i) factors[i] = values[i] >= thresholds[i] - p.tolerance ? favoured : other;
      break;
    }
  }
}

template <class T, bool kWeights, bool kResidual, bool kRule>
double pass(const TDLossForward<T>& p, const Sizes& sizes, T factor) {
  return sum_blocks(sizes.total(), p.threads, [&](int64_t begin, int size, double* squares) {
    alignas(64) T buffers[5][kBlock];
    const T* qs = block(p.qs, sizes, begin, size, buffers[0]);
    const T* targets = block(p.targets, sizes, begin, size, buffers[1]);
    const T* mask = block(p.mask, sizes, begin, size, buffers[2]);
    const T* weights = kWeights ? block(p.weights, sizes, begin, size, buffers[3]) : nullptr;
    const T* residual = kResidual ? block(p.residual, sizes, begin, size, buffers[4]) : nullptr;
    T* td_error = p.td_error + begin;
    const T* factors = nullptr;
    if constexpr (kRule) {
      factors = p.factors + begin;
      decide(p, sizes, begin, size, qs, targets, kResidual ? T(0) : p.high, kResidual ? T(1) : p.low,
             p.factors + begin);
    }
    T gradients[kBlock];
    T* grad = p.grad == nullptr ? gradients : p.grad + begin;
    for (int i = 0; i < size; ++i) {
      const T m = mask[i];
      // Selected, not multiplied: a residual that is left out may be infinite.
      const T q = kResidual && (!kRule || factors[i] != 0) ? qs[i] + residual[i] : qs[i];
      // Selected, not multiplied: padded steps may hold NaN or inf.
      const T td = m != 0 ? m * (q - targets[i]) : T(0);
      const T own = kRule && !kResidual ? factors[i] * td : td;
      const T weighted = kWeights ? (m != 0 ? weights[i] * own : T(0)) : own;
      td_error[i] = td;
      grad[i] = factor * m * weighted;
      squares[i] = static_cast<double>(weighted) * static_cast<double>(td);
    }
  });
}

template <class T, bool kWeights, bool kResidual>
double pass(const TDLossForward<T>& p, const Sizes& sizes, T factor) {
  return p.rule == Rule::kNone ? pass<T, kWeights, kResidual, false>(p, sizes, factor)
                               : pass<T, kWeights, kResidual, true>(p, sizes, factor);
}

template <class T>
void forward(TDLossForward<T> p) {
  if (p.sizes[2] == 1) {  // one column: rows along time are the inner loop
    int64_t* strides[] = {p.qs.strides,       p.targets.strides,    p.mask.strides,   p.weights.strides,
                          p.residual.strides, p.all_greedy.strides, p.values.strides, p.thresholds.strides};
    for (int64_t* of : strides) {
      of[2] = of[1];
      of[1] = of[0];
    }
    p.sizes[2] = p.sizes[1];
    p.sizes[1] = p.sizes[0];
    p.sizes[0] = 1;
  }
  const Sizes sizes{p.sizes[0], p.sizes[1], p.sizes[2]};
  const bool own = p.normaliser == nullptr;
  const double total = own ? sum_mask(p, sizes) : static_cast<double>(*p.normaliser);
  const bool nothing = own && total == 0;
  const double factor = nothing ? 0 : p.scale / total;
  const T slope = static_cast<T>(2 * factor);
  const double squares =
      p.weights.data != nullptr
          ? (p.residual.data != nullptr ? pass<T, true, true>(p, sizes, slope) : pass<T, true, false>(p, sizes, slope))
          : (p.residual.data != nullptr ? pass<T, false, true>(p, sizes, slope)
                                        : pass<T, false, false>(p, sizes, slope));
  *p.loss = nothing ? T(0) : static_cast<T>(factor * squares);
}

}  // namespace

void td_loss_forward(const TDLossForward<float>& p) { forward(p); }
void td_loss_forward(const TDLossForward<double>& p) { forward(p); }

}  // namespace fastmix::FASTMIX_ISA
