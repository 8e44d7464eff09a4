// Elementary functions on whole vectors, float and double: no calls of the C library, so that they inline into kernels.
//
// At most 3 units in the last place from the exact value (tests/core/test_math.py). NaN stays NaN; outside the range of
// the dtype they take their limits.
#pragma once

#include "cpu/simd.h"

namespace fastmix::FASTMIX_ISA {
namespace detail {

// One dtype's constants. `expm1`: (expm1(r) - r) / r^2 on |r| <= ln(2) / 2; `atanh`: (2 atanh(s) / s - 2) / s^2 as a
// polynomial in s^2 <= 1 / 9 (Chebyshev fits, relative error of the whole function below half a unit in the last
// place).
template <class T>
struct MathConstants;

template <>
struct MathConstants<float> {
  static constexpr float log2_e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // ln2_high: 12 bits
  static constexpr float shifter = 12582912.0f;  // 1.5 * 2^23: x + shifter has round(x) in its low bits
  static constexpr int mantissa_bits = 23;
  static constexpr float sqrt_half = 0.70710678f;
  static constexpr float exp_low = -104.0f, exp_high = 89.0f;    // exp is 0 below, infinite above
  static constexpr float normal = 87.0f;                         // exp(-x) .. exp(x) are normal numbers
  static constexpr float expm1_low = -17.5f, tanh_high = 10.0f;  // expm1 is -1 below; tanh is 1 above
  static constexpr float expm1[] = {0.5f, 0.16666576666f, 0.041666554213f, 0.0083632328837f, 0.0013926250831f};
  static constexpr float atanh[] = {0.66666640225831f, 0.40007584873116f, 0.28235887907430f, 0.26856791406586f};
};

template <>
struct MathConstants<double> {
  static constexpr double log2_e = 1.44269504088896340736, ln2_high = 6.93147180369123816490e-01,
                          ln2_low = 1.90821492927058770002e-10;
  static constexpr double shifter = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int mantissa_bits = 52;
  static constexpr double sqrt_half = 0.70710678118654752440;
  static constexpr double exp_low = -746.0, exp_high = 710.0, normal = 708.0;
  static constexpr double expm1_low = -38.0, tanh_high = 20.0;
  static constexpr double expm1[] = {0.5,
                                     0.1666666666666667103,
                                     0.041666666666666669783,
                                     0.0083333333333260831202,
                                     0.0013888888888883711167,
                                     0.00019841269875002278793,
                                     0.0000248015873256774619,
                                     2.7557255170000887438e-6,
                                     2.7557273478718580474e-7,
                                     2.5105312729622101787e-8,
                                     2.09147553258932022e-9};
  static constexpr double atanh[] = {0.66666666666666666889,  0.39999999999999517412, 0.2857142857160175545,
                                     0.22222222198029474094,  0.18181819911054523602, 0.15384543492578210538,
                                     0.13335188953901269055,  0.11734140010893390844, 0.1084630614262001925,
                                     0.074870965862528138569, 0.15640149889607409857};
};

template <class T, int Size>
FASTMIX_INLINE Vec<T> polynomial(const T (&coefficients)[Size], Vec<T> x) {
  Vec<T> value = splat<T>(coefficients[Size - 1]);
#pragma GCC unroll 16
  for (int i = Size - 2; i >= 0; --i) value = value * x + coefficients[i];
  return value;
}

template <class T>
FASTMIX_INLINE Vec<T> clamp(Vec<T> x, T low, T high) {  // keeps NaN
  x = x < splat<T>(low) ? splat<T>(low) : x;
  return x > splat<T>(high) ? splat<T>(high) : x;
}

template <class T>
FASTMIX_INLINE Vec<T> power_of_two(Vec<Int<T>> k) {  // 2^k for k within the exponents of normal numbers
  return reinterpret_cast<Vec<T>>((k << MathConstants<T>::mantissa_bits) + reinterpret_cast<Vec<Int<T>>>(splat<T>(1)));
}

// x = k ln(2) + r: exp(x) = 2^k (1 + p) with p = expm1(r).
template <class T>
struct Reduced {
  Vec<Int<T>> k;
  Vec<T> p;
};

template <class T>
FASTMIX_INLINE Reduced<T> reduce(Vec<T> x) {
  using C = MathConstants<T>;
  const Vec<T> shifted = x * C::log2_e + C::shifter;
  const Vec<T> k = shifted - C::shifter;
  const Vec<T> r = (x - k * C::ln2_high) - k * C::ln2_low;
  return {reinterpret_cast<Vec<Int<T>>>(shifted) - reinterpret_cast<Vec<Int<T>>>(splat<T>(C::shifter)),
          r + r * r * polynomial<T>(C::expm1, r)};
}

template <class T>
FASTMIX_INLINE Vec<T> exp_normal(Vec<T> x) {  // |x| <= MathConstants::normal
  const Reduced<T> e = reduce<T>(x);
  const Vec<T> scale = power_of_two<T>(e.k);
  return scale + scale * e.p;
}

template <class T>
FASTMIX_INLINE Vec<T> expm1_upto(Vec<T> x, T high) {
  const Reduced<T> e = reduce<T>(clamp<T>(x, MathConstants<T>::expm1_low, high));
  const Vec<T> half = power_of_two<T>(e.k - 1);  // of the scale, which may itself be out of range
  const Vec<T> value = half * e.p + (half - T(0.5));
  return value + value;
}

}  // namespace detail

template <class T>
FASTMIX_INLINE Vec<T> exp(Vec<T> x) {
  using C = detail::MathConstants<T>;
  const auto e = detail::reduce<T>(detail::clamp<T>(x, C::exp_low, C::exp_high));
  // In two factors: 2^k alone leaves the normal numbers where exp(x) is subnormal or just below infinity.
  const Vec<Int<T>> half = e.k >> 1;
  const Vec<T> scale = detail::power_of_two<T>(half);
  return (scale + scale * e.p) * detail::power_of_two<T>(e.k - half);
}

template <class T>
FASTMIX_INLINE Vec<T> expm1(Vec<T> x) {  // exact near 0; elu(x) = x > 0 ? x : expm1(x)
  return detail::expm1_upto<T>(x, detail::MathConstants<T>::exp_high);
}

template <class T>
FASTMIX_INLINE Vec<T> sigmoid(Vec<T> x) {
  constexpr T normal = detail::MathConstants<T>::normal;
  return T(1) / (T(1) + detail::exp_normal<T>(-detail::clamp<T>(x, -normal, normal)));
}

template <class T>
FASTMIX_INLINE Vec<T> tanh(Vec<T> x) {
  const Vec<T> e = detail::expm1_upto<T>(x + x, 2 * detail::MathConstants<T>::tanh_high);
  return e / (e + T(2));
}

template <class T>
FASTMIX_INLINE Vec<T> softplus(Vec<T> x) {  // log(1 + exp(x))
  constexpr T normal = detail::MathConstants<T>::normal;
  // log1p(u) = 2 atanh(u / (2 + u)), with u = exp(-|x|) <= 1 and so an argument of at most 1 / 3.
  const Vec<T> magnitude = abs<T>(x);
  const Vec<T> u = detail::exp_normal<T>(-(magnitude > splat<T>(normal) ? splat<T>(normal) : magnitude));
  const Vec<T> s = u / (u + T(2));
  const Vec<T> w = s * s;
  return relu<T>(x) + (s + s + s * w * detail::polynomial<T>(detail::MathConstants<T>::atanh, w));
}

template <class T>
FASTMIX_INLINE Vec<T> log_normal(Vec<T> x) {  // of positive normal numbers; of anything else it is any number
  using C = detail::MathConstants<T>;
  // x = 2^k m with m from sqrt(1/2) to sqrt(2); log(m) = 2 atanh((m - 1) / (m + 1)), with an argument of at most 0.172.
  const Vec<Int<T>> bits = reinterpret_cast<Vec<Int<T>>>(x);
  const Vec<Int<T>> k = (bits - reinterpret_cast<Vec<Int<T>>>(splat<T>(C::sqrt_half))) >> C::mantissa_bits;
  const Vec<T> m = reinterpret_cast<Vec<T>>(bits - (k << C::mantissa_bits));
  const Vec<T> s = (m - T(1)) / (m + T(1));
  const Vec<T> w = s * s;
  const Vec<T> scale = __builtin_convertvector(k, Vec<T>);
  return scale * C::ln2_high + (s + s + (s * w * detail::polynomial<T>(C::atanh, w) + scale * C::ln2_low));
}

}  // namespace fastmix::FASTMIX_ISA
