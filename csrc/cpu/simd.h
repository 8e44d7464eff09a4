// Vectors of the instruction set being compiled for, on the vector extension of GCC and Clang: one source for AVX-512,
// AVX2, SSE2 and NEON, float and double.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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
using Vec =
    typename VecOf<T>::type;  // lanes<T> numbers; arithmetic, comparison (-> Vec<Int<T>>, all ones or zero) and ?: work

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
#if defined(__AVX512F__)
  const unsigned mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<Vec<T>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p));
  } else {
    return reinterpret_cast<Vec<T>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p));
  }
#else
  Vec<T> v{};
  std::memcpy(&v, p, static_cast<size_t>(n) * sizeof(T));
  return v;
#endif
}

template <class T>
FASTMIX_INLINE void store_part(T* p, Vec<T> v, int n) {
  std::memcpy(p, &v, static_cast<size_t>(n) * sizeof(T));
}

namespace detail {

// Lane l of the result is lane indices[l] of a and b one after the other; the indices must be constants.
#if defined(__clang__)
#define FASTMIX_SHUFFLE(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTMIX_SHUFFLE(T, a, b, ...) __builtin_shuffle(a, b, Vec<Int<T>>{__VA_ARGS__})
#endif

// The lanes of a and b without bit D in their index, b's moved up by D; and those with it, a's moved down by D.
template <class T, int D, int... L>
FASTMIX_INLINE Vec<T> zip_low(Vec<T> a, Vec<T> b, std::integer_sequence<int, L...>) {
  return FASTMIX_SHUFFLE(T, a, b, ((L & D) ? lanes<T> + (L ^ D) : L)...);
}
template <class T, int D, int... L>
FASTMIX_INLINE Vec<T> zip_high(Vec<T> a, Vec<T> b, std::integer_sequence<int, L...>) {
  return FASTMIX_SHUFFLE(T, a, b, ((L & D) ? lanes<T> + L : (L ^ D))...);
}

template <class T, int D>
FASTMIX_INLINE Vec<T> fold(Vec<T> v) {
  if constexpr (D > 0) {
    v = fold<T, D / 2>(v + zip_high<T, D>(v, v, std::make_integer_sequence<int, lanes<T>>{}));
  }
  return v;
}

template <class T, int D>
FASTMIX_INLINE void transpose_from(Vec<T> (&v)[lanes<T>]) {
  if constexpr (D > 0) {
    constexpr std::make_integer_sequence<int, lanes<T>> all{};
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i) {
      if ((i & D) == 0) {
        const Vec<T> low = zip_low<T, D>(v[i], v[i + D], all), high = zip_high<T, D>(v[i], v[i + D], all);
        v[i] = low;
        v[i + D] = high;
      }
    }
    transpose_from<T, D / 2>(v);
  }
}

template <class T, int D>
FASTMIX_INLINE void sums_from(Vec<T>* v) {
  if constexpr (D > 0) {
    constexpr std::make_integer_sequence<int, lanes<T>> all{};
#pragma GCC unroll 16
    for (int i = 0; i < D; ++i) v[i] = zip_low<T, D>(v[i], v[i + D], all) + zip_high<T, D>(v[i], v[i + D], all);
    sums_from<T, D / 2>(v);
  }
}

}  // namespace detail

template <class T>
FASTMIX_INLINE T sum(Vec<T> v) {  // in a tree, always the same one
  return detail::fold<T, lanes<T> / 2>(v)[0];
}

// Lane i of the result is sum(v[i]), for much less than lanes<T> single sums; v is overwritten.
template <class T>
FASTMIX_INLINE Vec<T> sums(Vec<T> (&v)[lanes<T>]) {
  detail::sums_from<T, lanes<T> / 2>(v);
  return v[0];
}

// Lane j of v[i] becomes lane i of v[j].
template <class T>
FASTMIX_INLINE void transpose(Vec<T> (&v)[lanes<T>]) {
  detail::transpose_from<T, lanes<T> / 2>(v);
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
  return reinterpret_cast<Vec<T>>(reinterpret_cast<Vec<Int<T>>>(x) & ~reinterpret_cast<Vec<Int<T>>>(splat<T>(T(-0.0))));
}

// One bit a lane.
template <class T>
using LaneBits = std::conditional_t<(lanes<T> > 8), uint16_t, uint8_t>;

template <class T>
FASTMIX_INLINE LaneBits<T> bits_less(Vec<T> a, Vec<T> b) {  // bit l: a[l] < b[l]
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_LT_OQ);
  } else {
    return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), _CMP_LT_OQ);
  }
#elif defined(__AVX__)
  if constexpr (sizeof(T) == 4) {
    return static_cast<LaneBits<T>>(_mm256_movemask_ps(reinterpret_cast<__m256>(a < b)));
  } else {
    return static_cast<LaneBits<T>>(_mm256_movemask_pd(reinterpret_cast<__m256d>(a < b)));
  }
#else
  const Vec<Int<T>> less = a < b;
  unsigned bits = 0;
  for (int l = 0; l < lanes<T>; ++l) bits |= static_cast<unsigned>(less[l] & (1 << l));
  return static_cast<LaneBits<T>>(bits);
#endif
}

template <class T>
FASTMIX_INLINE Vec<T> where_bits(LaneBits<T> bits, Vec<T> x) {  // lane l: x[l] where bit l is set, else 0
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<Vec<T>>(_mm512_maskz_mov_ps(bits, reinterpret_cast<__m512>(x)));
  } else {
    return reinterpret_cast<Vec<T>>(_mm512_maskz_mov_pd(bits, reinterpret_cast<__m512d>(x)));
  }
#else
  return [&]<int... L>(std::integer_sequence<int, L...>) {
    constexpr Vec<Int<T>> bit_of_lane{(1 << L)...};
    const Vec<Int<T>> set = ((static_cast<Int<T>>(bits) - Vec<Int<T>>{}) & bit_of_lane) != 0;
    return reinterpret_cast<Vec<T>>(set & reinterpret_cast<Vec<Int<T>>>(x));
  }(std::make_integer_sequence<int, lanes<T>>{});
#endif
}

}  // namespace fastmix::FASTMIX_ISA
