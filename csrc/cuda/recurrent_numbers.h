// How the kernels of `recurrent` hold numbers, multiply them, and hand them from warp to warp.
//
// Products with weights are made of half precision factors, which the matrix unit multiplies twice as fast as tf32. A
// half precision number has the 11 significant bits of a tf32 number but not its range, so what may be of any size is
// held in units, powers of two: one for a warp's weights of a gate, for a row of x, for a tile's gradients. States are
// of size one. kPlanes is how many half precision numbers stand for one float: 1 keeps as much as a factor of a tf32
// product does; 2 adds what the first one leaves, times 2^11, 22 bits together, and three products (without the
// smallest of the four) keep what float32 keeps.
//
// Blocks of eight rows (episode, agent) are the columns of a product, weights its rows: a tile of results is 16
// features of 8 rows, of which lane 4g + t has features 2g and 2g + 1 of rows 2t and 2t + 1, in the order (2g, 2t),
// (2g, 2t + 1), (2g + 1, 2t), (2g + 1, 2t + 1). So the gates of a feature meet in one thread, whichever warp made them.
#pragma once

#include "cuda/ptx.h"
#include "fastmix/recurrent.h"

namespace fastmix::FASTMIX_ISA {

constexpr int kRowsPerTile = 8, kLanes = 32;
constexpr float kLow = 2048, kLowUnit = 1.0f / 2048;

// ---- Powers of two ----

// The largest power of two that is not above `size`, within 2^-100 and 2^100. What is not finite has none: 1, so that
// it does not spoil its neighbours.
__device__ __forceinline__ float unit_of(float size) {
  const uint32_t bits = __float_as_uint(size) & 0x7f800000u;
  return bits == 0x7f800000u ? 1.0f : __uint_as_float(min(max(bits, 27u << 23), 227u << 23));
}
// Of a power of two.
__device__ __forceinline__ float inverse(float unit) { return __uint_as_float(0x7f000000u - __float_as_uint(unit)); }

// ---- Division of indices by a size that is known before the launch: three instructions in place of twenty ----

struct Divisor {
  uint32_t size, factor, shift;

  __host__ explicit Divisor(int64_t divisor) : size(static_cast<uint32_t>(divisor)), shift(0) {
    while (int64_t{1} << shift < divisor) ++shift;
    factor = static_cast<uint32_t>((((uint64_t{1} << shift) - size) << 32) / size + 1);
  }
  // Of an index below 2^31.
  __device__ __forceinline__ void split(uint32_t index, uint32_t& quotient, uint32_t& rest) const {
    quotient = (__umulhi(index, factor) + index) >> shift;
    rest = index - quotient * size;
  }
};

// Rows and steps as they come in time: the step, then the episode, then the agent.
struct RowIndex {
  Divisor rows, agents;

  __host__ explicit RowIndex(const RecurrentShape& s) : rows(s.episodes * s.agents), agents(s.agents) {}
  struct Place {
    uint32_t step, episode, agent;
    __device__ __forceinline__ int64_t offset(const int64_t* stride) const {
      return episode * stride[0] + step * stride[1] + agent * stride[2];
    }
  };
  __device__ __forceinline__ Place operator()(int64_t index) const {
    Place place;
    uint32_t row;
    rows.split(static_cast<uint32_t>(index), place.step, row);
    agents.split(row, place.episode, place.agent);
    return place;
  }
};

// ---- Floats as half precision numbers ----

// What planes[0] leaves of two floats.
template <int kPlanes>
__device__ __forceinline__ void add_rest(uint32_t (&planes)[kPlanes], float a, float b) {
  if constexpr (kPlanes == 2) {
    const float2 kept = unpack_half(planes[0]);
    planes[1] = pack_half((a - kept.x) * kLow, (b - kept.y) * kLow);
  }
}
template <int kPlanes>
__device__ __forceinline__ void to_planes(uint32_t (&planes)[kPlanes], float a, float b) {
  planes[0] = pack_half(a, b);
  add_rest(planes, a, b);
}
template <int kPlanes>
__device__ __forceinline__ float2 from_planes(const uint32_t (&planes)[kPlanes]) {
  float2 value = unpack_half(planes[0]);
  if constexpr (kPlanes == 2) {
    const float2 rest = unpack_half(planes[1]);
    value.x += rest.x * kLowUnit;
    value.y += rest.y * kLowUnit;
  }
  return value;
}

// ---- Products ----

// 16 rows of weights (features 2g and 2g + 1 in this lane) of 16 kSteps columns, as factors of multiply_half.
template <int kPlanes, int kSteps>
struct Weights {
  uint32_t part[kSteps][kPlanes][4];
};

// `read(values, s)` gives the four columns of step s that this lane has, of both rows: values[row][column]. Returns the
// unit, one for all weights of the warp.
template <int kPlanes, int kSteps, class Read>
__device__ __forceinline__ float load_weights(Weights<kPlanes, kSteps>& w, const Read& read) {
  float values[kSteps][2][4], largest = 0;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    read(values[s], s);
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(values[s][i / 4][i % 4]));
  }
#pragma unroll
  for (int lane = 1; lane < kLanes; lane *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, lane));
  }
  const float unit = unit_of(largest), scale = inverse(unit);
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i % 2, first = i / 2 * 2;
      uint32_t planes[kPlanes];
      to_planes(planes, values[s][row][first] * scale, values[s][row][first + 1] * scale);
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) w.part[s][plane][i] = planes[plane];
    }
  }
  return unit;
}

// Which four of a step's 16 columns a lane has. Neighbours, where the other factor is read from memory as it is: then
// four of its numbers are one load. Or as the instruction has them, where it is read by load_matrices.
struct Neighbours {
  __device__ __forceinline__ int operator()(int t, int i) const { return 4 * t + i; }
};
struct AsInstruction {
  __device__ __forceinline__ int operator()(int t, int i) const { return 2 * t + i % 2 + i / 2 * 8; }
};

// Reads rows 16 * slice + 2g + e of a matrix with kWidth columns.
template <int kWidth>
struct Rows {
  const float* first;
  bool aligned;

  __device__ __forceinline__ Rows(const float* matrix, int slice, int g, int t)
      : first(matrix + (16 * slice + 2 * g) * kWidth + Neighbours()(t, 0)),
        aligned(reinterpret_cast<uintptr_t>(matrix) % 16 == 0) {}
  __device__ __forceinline__ void operator()(float (&values)[2][4], int s) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float* four = first + e * kWidth + 16 * s;
      if (aligned) {
        const float4 v = *reinterpret_cast<const float4*>(four);
        values[e][0] = v.x, values[e][1] = v.y, values[e][2] = v.z, values[e][3] = v.w;
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) values[e][i] = four[i];
      }
    }
  }
};

// Reads columns 16 * slice + 2g + e of a matrix with kWidth of them; steps are groups of 16 of its rows.
template <int kWidth, class Column>
struct Columns {
  const float* first;
  bool aligned;
  int t;

  __device__ __forceinline__ Columns(const float* matrix, int slice, int g, int t)
      : first(matrix + 16 * slice + 2 * g), aligned(reinterpret_cast<uintptr_t>(matrix) % 8 == 0), t(t) {}
  __device__ __forceinline__ void operator()(float (&values)[2][4], int s) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = first + (16 * s + Column()(t, i)) * kWidth;
      if (aligned) {
        const float2 v = *reinterpret_cast<const float2*>(pair);
        values[0][i] = v.x, values[1][i] = v.y;
      } else {
        values[0][i] = pair[0], values[1][i] = pair[1];
      }
    }
  }
};

// The parts that belong to the three gates of [3 D, D] weights, each with a unit of its own.
template <int kWidth, int kPlanes>
struct GateWeights {
  Weights<kPlanes, kWidth / 16> gate[3];
  float unit[3];

  template <class Read>
  __device__ __forceinline__ void load(const float* matrix, int slice, int g, int t) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      unit[i] = load_weights(gate[i], Read(matrix + i * kWidth * kWidth, slice, g, t));
    }
  }
};

// One tile of results. Two products that are under way at once must not add to the same sum: kApart sums of the first
// planes take turns where a warp has nothing else to do.
template <int kPlanes, int kApart = 1>
struct Sums {
  float first[kApart][4] = {}, rest[kApart][4] = {};  // of the products of first planes, and of the others

  // Adds a step of weights times rows, whose factors are `other`.
  __device__ __forceinline__ void add(const uint32_t (&w)[kPlanes][4], int step, const uint2 (&other)[kPlanes]) {
    multiply_half(first[step % kApart], w[0], other[0].x, other[0].y);
    if constexpr (kPlanes == 2) {
      multiply_half(rest[0], w[1], other[0].x, other[0].y);
      multiply_half(rest[kApart - 1], w[0], other[1].x, other[1].y);
    }
  }
  __device__ __forceinline__ float value(int i) const {
    float sum = first[0][i];
#pragma unroll
    for (int j = 1; j < kApart; ++j) sum += first[j][i];
    if constexpr (kPlanes == 2) {
      float small = rest[0][i];
#pragma unroll
      for (int j = 1; j < kApart; ++j) small += rest[j][i];
      sum += small * kLowUnit;
    }
    return sum;
  }
};

// Floats as factors of multiply_tf32, for what has no common unit: inputs, and gradients of the outputs.
template <int kPlanes, int kCount>
struct Tf32 {
  float part[kPlanes][kCount];

  Tf32() = default;
  __device__ __forceinline__ explicit Tf32(const float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      part[0][i] = to_tf32(values[i]);
      if constexpr (kPlanes == 2) part[1][i] = to_tf32(values[i] - part[0][i]);
    }
  }
};

template <int kPlanes>
__device__ __forceinline__ void multiply(float (&sum)[4], const Tf32<kPlanes, 4>& a, const Tf32<kPlanes, 2>& b) {
  if constexpr (kPlanes == 2) {
    multiply_tf32(sum, a.part[1], b.part[0][0], b.part[0][1]);
    multiply_tf32(sum, a.part[0], b.part[1][0], b.part[1][1]);
  }
  multiply_tf32(sum, a.part[0], b.part[0][0], b.part[0][1]);
}

// Adds what `product` adds to zero, where many are added up. The matrix unit cuts its sums off, always towards zero,
// which adds up too: to float's precision they are added by rounding.
template <int kPlanes, class Product>
__device__ __forceinline__ void add_product(float (&sum)[4], const Product& product) {
  if constexpr (kPlanes == 1) {
    product(sum);
  } else {
    float part[4] = {};
    product(part);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += part[i];
  }
}

// ---- From warp to warp ----

// Where a row's numbers lie in a tile that one warp writes as results and others read as factors: neither the lanes 4g,
// g = 0 .. 7, with rows 2t, t = 0 .. 3, nor half a warp with four neighbouring rows may meet in a bank.
__device__ __forceinline__ int place(int row) {
  return (((row >> 1 & 1) | (row & 1) << 1) ^ (row >> 2 << 1)) | (row & 4);
}

// A lane's part of a tile: as a factor four neighbouring columns of row g, as a result two of rows 2t and 2t + 1.
struct TileOffsets {
  int read, write[2];  // bytes within a step

  __device__ __forceinline__ TileOffsets(int g, int t)
      : read((4 * place(g) + t) * 8),
        write{(4 * place(2 * t) + g / 2) * 8 + g % 2 * 4, (4 * place(2 * t + 1) + g / 2) * 8 + g % 2 * 4} {
    keep(read);
    keep(write[0]);
    keep(write[1]);
  }
};

// Factors of eight rows: [plane][step][row's place][four neighbouring columns].
template <int kPlanes, int kSteps>
struct Tile {
  uint2 part[kPlanes][kSteps][kLanes];

  // Features 2g and 2g + 1 of a step, of row 2t + c, as results have them.
  __device__ __forceinline__ void write(int step, int c, const TileOffsets& at, const uint32_t (&planes)[kPlanes]) {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      auto* bytes = reinterpret_cast<unsigned char*>(part[plane][step]);
      *reinterpret_cast<uint32_t*>(bytes + at.write[c]) = planes[plane];
    }
  }
  __device__ __forceinline__ void read(uint2 (&other)[kPlanes], int step, const TileOffsets& at) const {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      const auto* bytes = reinterpret_cast<const unsigned char*>(part[plane][step]);
      other[plane] = *reinterpret_cast<const uint2*>(bytes + at.read);
    }
  }
};

// Rows in shared memory as they lie in global memory: so far apart that four neighbours differ in their banks.
template <int kWidth>
constexpr int kRowBytes = 2 * kWidth % 64 == 0 ? 2 * kWidth + 32 : 2 * kWidth;

// ---- Gates ----

__device__ __forceinline__ float sigmoid(float x) { return fast_reciprocal(1 + fast_exp2(-1.44269504f * x)); }

template <int kPlanes>
__device__ __forceinline__ float tangent(float x) {
  const float large = 1 - 2 * fast_reciprocal(1 + fast_exp2(2.88539008f * x));
  if constexpr (kPlanes == 1) return large;
  // Its difference cancels near zero; there the Taylor polynomial, whose first missing term is below 6e-8 of the value.
  const float s = x * x;
  const float small =
      x + x * s * (-1.0f / 3 + s * (2.0f / 15 + s * (-17.0f / 315 + s * (62.0f / 2835 - s * (1382.0f / 155925)))));
  return fabsf(x) < 0.35f ? small : large;
}

}  // namespace fastmix::FASTMIX_ISA
