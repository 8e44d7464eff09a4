// A library of its own for tests/core/test_math.py: csrc/cpu/math.h applied to arrays.
#include "cpu/math.h"

namespace fastmix::FASTMIX_ISA {
namespace {

template <class T>
Vec<T> apply(int function, Vec<T> x) {
  switch (function) {
    case 0:
      return exp<T>(x);
    case 1:
      return expm1<T>(x);
    case 2:
      return sigmoid<T>(x);
    case 3:
      return tanh<T>(x);
    case 4:
      return softplus<T>(x);
    default:
      return log_normal<T>(x);
  }
}

template <class T>
void map(int function, const T* x, T* y, int64_t size) {  // size: a multiple of the lanes
  for (int64_t i = 0; i < size; i += lanes<T>) store<T>(y + i, apply<T>(function, load<T>(x + i)));
}

}  // namespace
}  // namespace fastmix::FASTMIX_ISA

extern "C" void map_float(int function, const float* x, float* y, int64_t size) {
  fastmix::FASTMIX_ISA::map(function, x, y, size);
}
extern "C" void map_double(int function, const double* x, double* y, int64_t size) {
  fastmix::FASTMIX_ISA::map(function, x, y, size);
}
