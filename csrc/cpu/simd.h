// Vectors of the instruction set being compiled for, on the vector extension of GCC and Clang: one source for AVX-512,
// AVX2, SSE2 and NEON, float and double.
#pragma once

#include <cstdint>
#include <cstring>

#define FASTMIX_INLINE inline __attribute__((always_inline))

namespace fastmix::FASTMIX_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kVectorRegisters = 32;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kVectorRegisters = 16;
#elif defined(__aarch64__)
inline constexpr int kVectorBytes = 16;
inline constexpr int kVectorRegisters = 32;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kVectorRegisters = 16;
#endif

template <class T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <class T>
using Int = typename IntOf<T>::type;

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;  // lanes<T> numbers; arithmetic, comparison (-> Vec<Int<T>>, all ones or zero) and ?: work

template <class T>
inline constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
FASTMIX_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // not 0 + x, which would cost an addition to turn -0 into 0
}

template <class T>
FASTMIX_INLINE Vec<T> load(const T* p) {  // any alignment
  Vec<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
FASTMIX_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof(v));
}

// The first n lanes of memory, the others zero: never reads behind p + n.
template <class T>
FASTMIX_INLINE Vec<T> load_part(const T* p, int n) {
  Vec<T> v{};
  std::memcpy(&v, p, static_cast<size_t>(n) * sizeof(T));
  return v;
}

template <class T>
FASTMIX_INLINE void store_part(T* p, Vec<T> v, int n) {
  std::memcpy(p, &v, static_cast<size_t>(n) * sizeof(T));
}

template <class T>
FASTMIX_INLINE T sum(Vec<T> v) {
  T total = 0;
  for (int i = 0; i < lanes<T>; ++i) total += v[i];
  return total;
}

template <class T>
FASTMIX_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <class T>
FASTMIX_INLINE Vec<T> relu(Vec<T> x) {  // keeps NaN, as torch does
  return x < splat<T>(0) ? splat<T>(0) : x;
}

template <class T>
FASTMIX_INLINE Vec<T> abs(Vec<T> x) {
  return x < splat<T>(0) ? -x : x;
}

}  // namespace fastmix::FASTMIX_ISA
