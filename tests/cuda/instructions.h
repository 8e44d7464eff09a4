// The functions of csrc/cuda/ptx.h on the host: fragments lie in lanes and registers as the instructions have them, and
// sums are cut off to float after every product as the matrix unit does.
#pragma once

#include "emulation.h"

namespace emulation {

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float value = exponent == 31  ? (mantissa == 0 ? INFINITY : NAN)
                : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return bits >> 15 ? -value : value;
}

inline uint16_t float_to_half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7fff;  // NVIDIA's
  const float size = std::fabs(x);
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 6.103515625e-05f) return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
  int exponent;
  const float fraction = std::frexp(size, &exponent);  // in [0.5, 1)
  // A mantissa that rounds up to 2048 carries into the exponent.
  return sign | static_cast<uint16_t>((exponent + 13) * 1024 + static_cast<int>(std::nearbyint(fraction * 2048)));
}

// To float towards zero.
inline float cut(double x) {
  float value = static_cast<float>(x);
  if (std::fabs(static_cast<double>(value)) > std::fabs(x) && std::isfinite(value)) value = std::nextafter(value, 0.0f);
  return value;
}

inline const float* halves() {
  static const auto* table = [] {
    auto* values = new float[65536];
    for (unsigned i = 0; i < 65536; ++i) values[i] = half_to_float(static_cast<uint16_t>(i));
    return values;
  }();
  return table;
}

inline float tf32(float x) { return same_bits<float>(same_bits<uint32_t>(x) & 0xffffe000u); }

namespace instructions {

// Row r of `a` lies in lanes 4 (r % 8) ...; column c of `b` in lanes 4 c ...
inline void multiply_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Factors {
    uint32_t a[4], b[2];
  };
  const Brought<Factors> brought(0xffffffffu, {{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const unsigned g = lane() / 4, t = lane() % 4;
  const float* half = halves();
  double sums[4] = {d[0], d[1], d[2], d[3]};
  for (unsigned quad = 0; quad < 4; ++quad) {
    const Factors row = brought[4 * g + quad];
    for (unsigned column = 0; column < 2; ++column) {
      const Factors other = brought[4 * (2 * t + column) + quad];
      for (unsigned part = 0; part < 2; ++part) {
        for (unsigned shift = 0; shift < 32; shift += 16) {
          const double factor = half[other.b[part] >> shift & 0xffff];
          sums[column] += factor * half[row.a[2 * part] >> shift & 0xffff];
          sums[2 + column] += factor * half[row.a[2 * part + 1] >> shift & 0xffff];
        }
      }
    }
  }
  for (int i = 0; i < 4; ++i) d[i] = cut(sums[i]);
}

inline void multiply_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
  struct Factors {
    float a[4], b[2];
  } mine = {{tf32(a[0]), tf32(a[1]), tf32(a[2]), tf32(a[3])}, {tf32(b0), tf32(b1)}};
  const Brought<Factors> brought(0xffffffffu, mine);
  const unsigned g = lane() / 4, t = lane() % 4;
  double sums[4] = {d[0], d[1], d[2], d[3]};
  for (unsigned k = 0; k < 8; ++k) {
    const Factors row = brought[4 * g + k % 4];
    for (unsigned column = 0; column < 2; ++column) {
      const double factor = brought[4 * (2 * t + column) + k % 4].b[k / 4];
      sums[column] += factor * row.a[2 * (k / 4)];
      sums[2 + column] += factor * row.a[2 * (k / 4) + 1];
    }
  }
  for (int i = 0; i < 4; ++i) d[i] = cut(sums[i]);
}

inline float to_tf32(float x) {  // ties away from zero
  return std::isnan(x) ? x : tf32(same_bits<float>(same_bits<uint32_t>(x) + 0x1000u));
}

inline void load_matrices(uint32_t (&d)[4], const void* row, bool transposed) {
  const auto* place = static_cast<const unsigned char*>(row);
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix from a misaligned row");
  if (place < shared_memory || place + 16 > shared_memory + dynamic_size + static_size) fail("ldmatrix out of bounds");
  const Brought<const unsigned char*> rows(0xffffffffu, place);
  const unsigned g = lane() / 4, t = lane() % 4;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned r = transposed ? 2 * t + i : g, c = transposed ? g : 2 * t + i;
      std::memcpy(&pair[i], rows[8 * matrix + r] + 2 * c, 2);
    }
    d[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
  Brought<int>(0xffffffffu, 0);  // nobody writes there before all have read
}

inline void load_matrices(uint32_t (&d)[4], const void* row) { load_matrices(d, row, false); }
inline void load_matrices_transposed(uint32_t (&d)[4], const void* row) { load_matrices(d, row, true); }

template <int kBytes = 16>
void copy_async(void* to, const void* from, bool inside = true) {
  emulation::copy_async(to, from, kBytes, inside);
}
inline void end_copies() { emulation::end_copies(); }
template <int kPending>
void copies_arrived() {
  emulation::copies_arrived(kPending);
}
inline float load_if(bool inside, const float* from) { return inside ? *from : 0; }
inline float2 load2_if(bool inside, const float* from) {
  return inside ? *reinterpret_cast<const float2*>(from) : make_float2(0, 0);
}
inline void prefetch(const void*) {}

inline void meet(int) { __syncthreads(); }
inline void keep(int&) {}
inline void keep(float&) {}

inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1 / x; }

inline uint32_t pack_half(float low, float high) {
  return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
}
inline float2 unpack_half(uint32_t pair) { return {halves()[pair & 0xffff], halves()[pair >> 16]}; }
inline uint32_t times_half(uint32_t x, uint32_t y) {
  const float2 a = unpack_half(x), b = unpack_half(y);
  return pack_half(a.x * b.x, a.y * b.y);
}

}  // namespace instructions
}  // namespace emulation
