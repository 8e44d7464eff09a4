#include "fastmix/optimise.h"

#include <cmath>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace fastmix::FASTMIX_ISA {
namespace {

constexpr int64_t kPerThread = 32768;  // numbers below which another thread costs more than it saves

template <class T>
double sum_of_squares(const T* x, int64_t size) {
  constexpr int64_t block = 4096;  // sums of a block in T, of blocks in double: fast, and exact enough for any size
  double total = 0;
  for (int64_t first = 0; first < size; first += block) {
    const int64_t end = first + block < size ? first + block : size;
    Vec<T> part{};
    int64_t i = first;
    for (; i + lanes<T> <= end; i += lanes<T>) {
      const Vec<T> v = load(x + i);
      part += v * v;
    }
    double rest = 0;
    for (; i < end; ++i) rest += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    total += static_cast<double>(sum<T>(part)) + rest;
  }
  return total;
}

template <class T>
void update(const Optimise<T>& p, int64_t index, int64_t begin, int64_t end, T scale, double step) {
  T* __restrict parameter = p.parameters[index];
  const T* __restrict grad = p.grads[index];
  T* __restrict square = p.squares[index];
  T* __restrict mean = p.adam ? p.means[index] : nullptr;
  const T decay = static_cast<T>(p.beta2), fresh = static_cast<T>(1 - p.beta2), eps = static_cast<T>(p.eps);
  const T penalty = static_cast<T>(p.weight_decay);
  if (p.adam) {
    const T keep = static_cast<T>(1 - p.beta1);
    const T size = static_cast<T>(p.lr / (1 - std::pow(p.beta1, step)));
    const T unbias = static_cast<T>(1 / std::sqrt(1 - std::pow(p.beta2, step)));
    for (int64_t i = begin; i < end; ++i) {
      const T g = grad[i] * scale + penalty * parameter[i];
      mean[i] += keep * (g - mean[i]);
      square[i] = decay * square[i] + fresh * g * g;
      parameter[i] -= size * mean[i] / (std::sqrt(square[i]) * unbias + eps);
    }
  } else {
    const T size = static_cast<T>(p.lr);
    for (int64_t i = begin; i < end; ++i) {
      const T g = grad[i] * scale + penalty * parameter[i];
      square[i] = decay * square[i] + fresh * g * g;
      parameter[i] -= size * g / (std::sqrt(square[i]) + eps);
    }
  }
}

template <class T>
void run(const Optimise<T>& p) {
  const auto step = static_cast<double>(++*p.steps);
  double total = 0;
  int64_t numbers = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    total += sum_of_squares(p.grads[i], p.sizes[i]);
    numbers += p.sizes[i];
  }
  const double norm = std::sqrt(total);
  *p.norm = static_cast<T>(norm);
  const double ratio = p.clip / (norm + 1e-6);
  const T scale = static_cast<T>(ratio < 1 ? ratio : norm == norm ? 1 : norm);  // NaN goes on, as torch lets it
  // Threads share the numbers of all parameters evenly, wherever the borders fall.
  parallel_parts(numbers, p.threads, kPerThread, [&](int64_t begin, int64_t end, int) {
    int64_t offset = 0;
    for (int64_t i = 0; i < p.count && offset < end; offset += p.sizes[i], ++i) {
      const int64_t first = begin > offset ? begin - offset : 0;
      const int64_t last = end - offset < p.sizes[i] ? end - offset : p.sizes[i];
      if (first < last) update(p, i, first, last, scale, step);
    }
  });
}

}  // namespace

void optimise(const Optimise<float>& p) { run(p); }
void optimise(const Optimise<double>& p) { run(p); }

}  // namespace fastmix::FASTMIX_ISA
