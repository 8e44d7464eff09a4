// `monotonic` on the matrix units of CUDA: forward, and the part of backward that is done row by row.
//
// A warp owns rows, and what belongs to a row stays in its registers: an accumulator of one product is the operand of
// the next (mma.cuh), positivity and mix are element by element, and the sum over e is two shuffles. Generated weights
// exist only as accumulators. The parameters come packed in fragment order, rounded to tf32 once, so that a lane reads
// operands as 16 bytes from consecutive addresses: no conflict between banks. They stream through shared memory in
// chunks (`Stream`) that all warps of a block share, asynchronously and two chunks ahead; where all of them fit they
// come once per block, which then takes several tiles of rows.
//
// Forward: a tile of 32 rows belongs to a pair of warps, since one fragment of the weights (256 bytes, two clocks of
// shared memory) then feeds two products (about 1.6 clocks of the matrix units each). Each warp of the pair has half of
// the columns of everything. In the first layer that is one of the two hidden layers, half of b1 and half of V's hidden
// layer: 96 columns, 96 accumulators a lane. Then they show each other their hidden layers, through shared memory; from
// there on a warp has 16 of the 32 e of every agent. At the end one float a row passes between them.
//
// Backward: a warp has 16 rows, all columns. It generates the weights again from the hidden layers that forward kept,
// and holds of each hidden layer both the values and the sum of the gradients; two tiles of rows would not fit beside
// each other, and reading the activations and writing their gradients takes as long as shared memory does.
#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "fastmix/monotonic.h"

namespace fastmix {
namespace {

using FASTMIX_ISA::ceil_div;
using FASTMIX_ISA::copies_arrived;
using FASTMIX_ISA::copy_async;
using FASTMIX_ISA::current_device;
using FASTMIX_ISA::Device;
using FASTMIX_ISA::end_copies;
using FASTMIX_ISA::kAllLanes;
using FASTMIX_ISA::keep;
using FASTMIX_ISA::kTooOld;
using FASTMIX_ISA::kWarp;
using FASTMIX_ISA::launch;
using FASTMIX_ISA::launched;
using FASTMIX_ISA::load2_if;
using FASTMIX_ISA::load_if;
using FASTMIX_ISA::multiply_tf32;
using FASTMIX_ISA::prefetch;
using FASTMIX_ISA::to_tf32;

constexpr int kStep = MonotonicPacked::kFirstStep, kMatrix = MonotonicPacked::kMatrix;
constexpr int kForward = MonotonicPacked::kForward, kUnit = MonotonicPacked::kUnit;
constexpr int kHidden1 = 0, kHidden2 = kMonotonicHidden, kMix = 2 * kMonotonicHidden, kV = kMix + kMonotonicEmbed;
constexpr int kHiddenTiles = kMonotonicHidden / 8, kEmbedTiles = kMonotonicEmbed / 8;

// ------------------------------------------------------------------------------------------------------------ operands

// Operands of the matrix units: `high` is tf32, and with full precision `low` is what it lacks.
template <int N>
struct Operand {
  float high[N], low[N];
};

// Three products of these are a float32 product but for 2^-22 of it. Of `low` the units ignore what no tf32 has.
template <int N>
__device__ __forceinline__ Operand<N> split(const float (&x)[N]) {
  Operand<N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    result.high[i] = __uint_as_float((__float_as_uint(x[i]) + 0x1000u) & 0xffffe000u);
    result.low[i] = x[i] - result.high[i];  // of NaN it is NaN, whatever became of `high`
  }
  return result;
}

// Operands that were already rounded when they were packed, or when they became operands.
template <bool kFull, int N>
__device__ __forceinline__ Operand<N> operand(const float (&x)[N]) {
  if constexpr (kFull) {
    return split(x);
  } else {
    Operand<N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) result.high[i] = x[i];
    return result;
  }
}

template <bool kFull>
__device__ __forceinline__ float rounded(float x) {
  return kFull ? x : to_tf32(x);
}

// c[m][first], c[m][first + 1] += a[m] b for M tiles of rows, of a pair of column tiles whose fragments lie together.
// The matrix unit cuts its sums off, always towards zero, which adds up in long sums: with kRounds the three products
// of full precision start from zero and are added by rounding. (The first layer has no registers left for that.)
template <bool kFull, bool kRounds, int M, int N>
__device__ __forceinline__ void multiply(float (&c)[M][N][4], int first, const Operand<4> (&a)[M], const float* pair) {
  const float4 v = *reinterpret_cast<const float4*>(pair);
  const float even[2] = {v.x, v.y}, odd[2] = {v.z, v.w};
  const Operand<2> b[2] = {operand<kFull>(even), operand<kFull>(odd)};
  float part[M][2][4] = {};
#pragma unroll
  for (int product = kFull ? 0 : 2; product < 3; ++product) {  // the small ones first
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float (&b_part)[2] = product == 1 ? b[i].low : b[i].high;
        float (&sum)[4] = kFull && kRounds ? part[m][i] : c[m][first + i];
        multiply_tf32(sum, product == 0 ? a[m].low : a[m].high, b_part[0], b_part[1]);
      }
    }
  }
  if constexpr (kFull && kRounds) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 8; ++i) c[m][first + i / 4][i % 4] += part[m][i / 4][i % 4];
    }
  }
}

// ---------------------------------------------------------------------------------------------------- small functions

__device__ __forceinline__ float relu(float x) { return x < 0 ? 0 : x; }  // of NaN it is NaN
__device__ __forceinline__ float elu(float x) { return x > 0 ? x : expm1f(x); }

// x times the sign of z, or x itself where `sign_bit` is zero: positivity of z is z times its own sign, and its slope
// is that sign.
__device__ __forceinline__ float with_sign(float x, float z, uint32_t sign_bit) {
  return __uint_as_float(__float_as_uint(x) ^ (__float_as_uint(z) & sign_bit));
}
__device__ __forceinline__ uint32_t sign_bit(Positivity positivity) {
  return positivity == Positivity::abs ? 0x80000000u : 0u;
}

// The sum of x[i] over the four lanes of a quad: lane t gets x[t], or x[t % 2].
__device__ __forceinline__ float sum_to_lane(const float (&x)[2], int t) {
  const bool odd = t % 2 != 0;
  const float sum = (odd ? x[1] : x[0]) + __shfl_xor_sync(kAllLanes, odd ? x[0] : x[1], 1);
  return sum + __shfl_xor_sync(kAllLanes, sum, 2);
}
__device__ __forceinline__ float sum_to_lane(const float (&x)[4], int t) {
  const bool odd = t % 2 != 0, upper = t / 2 != 0;
  const float low = (odd ? x[1] : x[0]) + __shfl_xor_sync(kAllLanes, odd ? x[0] : x[1], 1);
  const float high = (odd ? x[3] : x[2]) + __shfl_xor_sync(kAllLanes, odd ? x[2] : x[3], 1);
  return (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, 2);
}

// How a kernel's work is cut: a block takes the tile with its own number and every gridDim.x further, `passes` of them,
// the first `longer` blocks one more. Weights have `slots` in shared memory and are fetched `ahead` chunks (1 or 2)
// ahead.
struct Cut {
  int tiles, passes, longer, slots, ahead;

  __device__ __forceinline__ int mine() const { return passes + (static_cast<int>(blockIdx.x) < longer ? 1 : 0); }
};

__device__ __forceinline__ int64_t offset(const StridedRows<float>& rows, int row) {
  const auto index = static_cast<unsigned>(row), inner = static_cast<unsigned>(rows.inner);
  return index / inner * rows.outer_stride + index % inner * rows.inner_stride;
}

// Where the lane's rows g, g + 8, ... of the 8 * N from `first` on begin. Each lane finds one row for all; rows behind
// the last one are the last one.
template <int N>
__device__ __forceinline__ void find_rows(const float* (&rows)[N], const StridedRows<float>& from, int first, int count,
                                          int lane) {
  const int row = first + lane % (8 * N);
  const int64_t mine = offset(from, row < count ? row : count - 1);
#pragma unroll
  for (int i = 0; i < N; ++i) rows[i] = from.data + __shfl_sync(kAllLanes, mine, lane / 4 + 8 * i);
}

__device__ __forceinline__ float2 load2(const float* p) { return __ldg(reinterpret_cast<const float2*>(p)); }
__device__ __forceinline__ void store2(float* p, float x, float y) {
  *reinterpret_cast<float2*>(p) = make_float2(x, y);
}

// ------------------------------------------------------------------------------------------- weights in shared memory

__device__ __forceinline__ void copy_all(float* to, const float* from, int count) {
  for (int i = 4 * static_cast<int>(threadIdx.x); i < count; i += 4 * static_cast<int>(blockDim.x)) {
    copy_async(to + i, from + i);
  }
}

// Forward reads the first layer four steps at a time, then three units.
struct ForwardChunks {
  static constexpr int kSteps = 4, kUnits = 3, kFloats = kUnits * kForward;
  static_assert(kSteps * kStep <= kFloats);

  const float *steps, *units;
  int n_steps, n_units, first, count;  // first: chunks of the first layer

  __host__ __device__ ForwardChunks(const float* packed, const MonotonicPacked& at, int64_t state_dim, int64_t agents)
      : steps(packed),
        units(packed + at.units),
        n_steps(static_cast<int>((state_dim + 7) / 8)),
        n_units(static_cast<int>(agents) + 1),
        first((n_steps + kSteps - 1) / kSteps),
        count(first + (n_units + kUnits - 1) / kUnits) {}

  __device__ void fetch(int chunk, float* to) const {
    if (chunk < first) {
      copy_all(to, steps + int64_t{chunk} * (kSteps * kStep), min(kSteps, n_steps - chunk * kSteps) * kStep);
    } else {
      const int begin = (chunk - first) * kUnits;
      for (int i = 0; i < min(kUnits, n_units - begin); ++i) {
        copy_all(to + i * kForward, units + int64_t{begin + i} * kUnit, kForward);
      }
    }
  }
};

// Backward reads a unit.
struct BackwardChunks {
  static constexpr int kFloats = kUnit;

  const float* units;
  int count;

  __host__ __device__ BackwardChunks(const float* packed, const MonotonicPacked& at, int64_t agents)
      : units(packed + at.units), count(static_cast<int>(agents) + 1) {}

  __device__ void fetch(int unit, float* to) const { copy_all(to, units + int64_t{unit} * kUnit, kUnit); }
};

// Chunks 0 .. count - 1, again and again, in slots of shared memory. With a slot for each they are fetched once and the
// block meets at them in the first pass only; otherwise it meets at each. There are two chunks at least.
template <class Chunks>
class Stream {
 public:
  __device__ Stream(const Chunks& chunks, float* memory, const Cut& cut)
      : chunks_(chunks),
        memory_(memory),
        cut_(cut),
        meetings_(cut.slots >= chunks.count ? chunks.count : chunks.count * cut.mine()) {
    for (; chunk_ < cut.ahead; ++chunk_) fetch(chunk_);
  }

  // The next chunk, for all threads of the block. The chunk before it may be overwritten from now on.
  __device__ const float* next() {
    if (meetings_ > 0) {
      --meetings_;
      if (cut_.ahead == 2) {
        copies_arrived<1>();
      } else {
        copies_arrived<0>();
      }
      __syncthreads();
      if (meetings_ >= cut_.ahead) {
        const int slot = slot_ + cut_.ahead;
        fetch(slot < cut_.slots ? slot : slot - cut_.slots);
        chunk_ = chunk_ + 1 == chunks_.count ? 0 : chunk_ + 1;
      } else {
        end_copies();
      }
    }
    const float* chunk = memory_ + slot_ * Chunks::kFloats;
    slot_ = slot_ + 1 == cut_.slots ? 0 : slot_ + 1;
    return chunk;
  }

 private:
  __device__ void fetch(int slot) {
    chunks_.fetch(chunk_, memory_ + slot * Chunks::kFloats);
    end_copies();
  }

  const Chunks chunks_;
  float* const memory_;
  const Cut& cut_;
  int meetings_, slot_ = 0, chunk_ = 0;  // chunk_: the next to be fetched
};

// z = b + h W^T for the `N / 2` pairs of column tiles from `pair` on, M tiles of rows at a time.
template <bool kFull, int M, int N>
__device__ __forceinline__ void generate(float (&z)[M][N][4], float (&h)[M][kHiddenTiles][4], const float* unit,
                                         int pair, int lane) {
  const float* bias = unit + kMatrix + 2 * 16 * pair + 4 * (lane % 4);
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const float4 b = *reinterpret_cast<const float4*>(bias + 2 * 8 * n);
      z[m][n][0] = b.x, z[m][n][1] = b.y, z[m][n][2] = b.z, z[m][n][3] = b.w;
    }
  }
#pragma unroll
  for (int k = 0; k < kHiddenTiles; ++k) {
    Operand<4> a[M];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if constexpr (kFull && M > 1) {
#pragma unroll
        for (int i = 0; i < 4; ++i) keep(h[m][k][i]);  // or all are split once for all units, which spills
      }
      a[m] = operand<kFull>(h[m][k]);
    }
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      multiply<kFull, false>(z, n, a, unit + ((k * kEmbedTiles / 2 + pair + n / 2) * kWarp + lane) * 4);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- packing

constexpr int kPackThreads = 256;

// Which of the 192 columns tile `tile` of the packed first layer starts at: first the columns of a pair's first warp,
// then those of its second; of either eight tiles of a hidden layer, two of b1, two of V's hidden layer.
__host__ __device__ constexpr int first_column(int tile) {
  const int half = tile / 12, j = tile % 12;
  if (j < 8) return kMonotonicHidden * half + 8 * j;
  return (j < 10 ? kMix - 64 : kV - 80) + 16 * half + 8 * j;
}

__device__ float first_weight(const MonotonicPackCuda& p, int column, int64_t k) {
  const MonotonicWeights<const float>& w = p.weights;
  if (k >= p.state_dim) return 0;
  const bool hidden = column < kMix;
  const float* weight = column < kHidden2 ? w.w1_hidden_weight
                        : hidden          ? w.w2_hidden_weight
                        : column < kV     ? w.b1_weight
                                          : w.v_hidden_weight;
  const int row = column % (hidden ? kMonotonicHidden : kMonotonicEmbed);
  return row < (hidden ? p.hidden : p.embed) ? weight[row * p.state_dim + k] : 0;
}

__device__ float first_bias(const MonotonicPackCuda& p, int column) {
  const MonotonicWeights<const float>& w = p.weights;
  const bool hidden = column < kMix;
  const float* bias = column < kHidden2 ? w.w1_hidden_bias
                      : hidden          ? w.w2_hidden_bias
                      : column < kV     ? w.b1_bias
                                        : w.v_hidden_bias;
  const int row = column % (hidden ? kMonotonicHidden : kMonotonicEmbed);
  return row < (hidden ? p.hidden : p.embed) ? bias[row] : 0;
}

__device__ float unit_weight(const MonotonicPackCuda& p, int64_t unit, int e, int h) {
  if (e >= p.embed || h >= p.hidden) return 0;
  if (unit == 0) return p.weights.w2_weight[e * p.hidden + h];
  return p.weights.w1_weight[((unit - 1) * p.embed + e) * p.hidden + h];
}

// In the padding 1, so that there is a sign there too; nothing comes of it, as the mix is 0 there.
__device__ float unit_bias(const MonotonicPackCuda& p, int64_t unit, int e) {
  if (e >= p.embed) return 1;
  return unit == 0 ? p.weights.w2_bias[e] : p.weights.w1_bias[(unit - 1) * p.embed + e];
}

// Float `i` of a pair of column tiles' fragments is element (k, n) of them, n < 16.
struct InPair {
  int k, n;
  __device__ explicit InPair(int i) : k(i / 4 % 4 * 2 + i % 2), n(i % 4 / 2 * 8 + i / 16) {}
};
constexpr int kPair = 4 * kWarp;

__global__ void __launch_bounds__(kPackThreads) pack_kernel(const MonotonicPackCuda p, const MonotonicPacked at) {
  if (kTooOld) return;
  const int64_t i = int64_t{blockIdx.x} * kPackThreads + threadIdx.x;
  if (i >= at.total) return;
  float value = 0;
  bool is_operand = true;
  if (i < at.units) {
    const int in_step = static_cast<int>(i % kStep);
    const InPair in(in_step % kPair);
    const int tile = in_step / kPair * 2 + in.n / 8;
    value = first_weight(p, first_column(tile) + in.n % 8, i / kStep * 8 + in.k);
  } else if (i < at.first_bias) {
    const int64_t unit = (i - at.units) / kUnit;
    const int in_unit = static_cast<int>((i - at.units) % kUnit);
    if (in_unit < kMatrix) {
      const InPair in(in_unit % kPair);
      const int pair = in_unit / kPair;
      value = unit_weight(p, unit, pair % 2 * 16 + in.n, pair / 2 * 8 + in.k);
    } else if (in_unit < kForward) {
      const int in_bias = in_unit - kMatrix;
      is_operand = false;
      value = unit_bias(p, unit, in_bias / 4 * 2 + in_bias % 2);
    } else {
      const InPair in((in_unit - kForward) % kPair);
      const int pair = (in_unit - kForward) / kPair;
      value = unit_weight(p, unit, pair / 4 * 8 + in.k, pair % 4 * 16 + in.n);
    }
  } else {
    is_operand = false;
    if (i < at.v_weight) {
      value = first_bias(p, static_cast<int>(i - at.first_bias));
    } else if (i < at.v_bias) {
      const int64_t e = i - at.v_weight;
      if (e < p.embed) value = p.weights.v_weight[e];
    } else if (i == at.v_bias) {
      value = p.weights.v_bias[0];
    }
  }
  p.packed[i] = is_operand && !p.full_precision ? to_tf32(value) : value;
}

// ------------------------------------------------------------------------------------------------------------- forward

constexpr int kPairRows = 32;
constexpr int kMostPairs = 4;                                                      // of warps in a block
constexpr int kExchange = 2 * kPairRows * kMonotonicHidden, kPartial = kPairRows;  // floats of shared memory a pair

// Eight features of the lane's four rows, from `column` on, as operand A of two tiles. `left`: features that are there.
// `kEven`: their number and all addresses allow for two to be loaded at once.
template <bool kEven>
__device__ __forceinline__ void load_states(float (&a)[2][4], const float* const (&rows)[4], int column, int left) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 v;
    if constexpr (kEven) {
      v = load2_if(column < left, rows[i] + column);
    } else {
      v.x = load_if(column < left, rows[i] + column);
      v.y = load_if(column + 1 < left, rows[i] + column + 1);
    }
    a[i / 2][i % 2] = v.x;
    a[i / 2][2 + i % 2] = v.y;
  }
}

template <bool kFull, bool kEven>
__global__ void __launch_bounds__(2 * kMostPairs * kWarp, 1)
    forward_kernel(const MonotonicForwardCuda p, const MonotonicPacked at, const Cut cut) {
  if (kTooOld) return;
  extern __shared__ __align__(16) float memory[];
  const int lane = static_cast<int>(threadIdx.x % kWarp), g = lane / 4, t = lane % 4;
  const int pair = static_cast<int>(threadIdx.x / (2 * kWarp)), pairs = static_cast<int>(blockDim.x / (2 * kWarp));
  const int half = static_cast<int>(threadIdx.x / kWarp % 2), agents = static_cast<int>(p.agents);
  const uint32_t sign = sign_bit(p.positivity);
  const int n_rows = static_cast<int>(p.rows), tile_rows = pairs * kPairRows;
  const ForwardChunks chunks(p.packed, at, p.state_dim, p.agents);
  Stream<ForwardChunks> stream(chunks, memory, cut);
  float* const exchange = memory + cut.slots * ForwardChunks::kFloats + pair * kExchange;
  float* const partial = memory + cut.slots * ForwardChunks::kFloats + pairs * kExchange + pair * kPartial;

  // States are loaded some steps before they are used (three products in one take long enough for half as many), those
  // of a tile's first steps during the tile before it.
  constexpr int kSteps = ForwardChunks::kSteps, kAhead = kFull ? kSteps / 2 : kSteps;
  const float* states[4];
  int left;
  float ahead[kAhead][2][4];
  const auto look_ahead = [&](int tile) {
    find_rows(states, p.states, tile * tile_rows + pair * kPairRows, n_rows, lane);
    left = static_cast<int>(p.state_dim) - 2 * t;
#pragma unroll
    for (int i = 0; i < 4; ++i) states[i] += 2 * t;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load_states<kEven>(ahead[i], states, 8 * i, left);
  };
  look_ahead(blockIdx.x);

  for (int tile = blockIdx.x; tile < cut.tiles; tile += gridDim.x) {
    const int first_row = tile * tile_rows + pair * kPairRows;

    // First layer: the pair's half of the columns, in tiles as first_column() has them.
    float c[2][12][4];
#pragma unroll
    for (int j = 0; j < 12; ++j) {
      const float2 b =
          load2(p.packed + at.first_bias + first_column(j) + (j < 8 ? kMonotonicHidden : 16) * half + 2 * t);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        c[m][j][0] = c[m][j][2] = b.x;
        c[m][j][1] = c[m][j][3] = b.y;
      }
    }
    const auto take_step = [&](const float* weights, int i) {
      Operand<4> a[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float x[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) x[k] = rounded<kFull>(ahead[i % kAhead][m][k]);
        a[m] = operand<kFull>(x);
      }
      load_states<kEven>(ahead[i % kAhead], states, 8 * (i + kAhead), left);
#pragma unroll
      for (int j = 0; j < 12; j += 2) multiply<kFull, false>(c, j, a, weights + i * kStep + j / 2 * kPair);
    };
    int steps = chunks.n_steps;
    for (; steps >= kSteps; steps -= kSteps) {
      const float* weights = stream.next() + (half * 6 * kWarp + lane) * 4;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) take_step(weights, i);
#pragma unroll
      for (int i = 0; i < 4; ++i) states[i] += 8 * kSteps;
      left -= 8 * kSteps;
    }
    if (steps > 0) {
      const float* weights = stream.next() + (half * 6 * kWarp + lane) * 4;
#pragma unroll
      for (int i = 0; i < kSteps - 1; ++i) {
        if (i < steps) take_step(weights, i);
      }
    }
    const float* q_rows[4];
    find_rows(q_rows, p.agent_qs, first_row, n_rows, lane);
    if (tile + static_cast<int>(gridDim.x) < cut.tiles) look_ahead(tile + gridDim.x);

    // What follows the first layer; the hidden layers go to the other warp too.
    float v[4] = {};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float2 w = load2(p.packed + at.v_weight + 16 * half + 8 * j + 2 * t);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          c[m][10 + j][x] = relu(c[m][10 + j][x]);
          v[2 * m + x / 2] += c[m][10 + j][x] * (x % 2 == 0 ? w.x : w.y);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int j = 0; j < kHiddenTiles; ++j) {
        float (&h)[4] = c[m][j];
#pragma unroll
        for (int x = 0; x < 4; ++x) h[x] = rounded<kFull>(relu(h[x]));
        *reinterpret_cast<float4*>(exchange + (((half * 2 + m) * kHiddenTiles + j) * kWarp + lane) * 4) =
            make_float4(h[0], h[2], h[1], h[3]);
      }
    }
    if (p.activations != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_row + 8 * i + g;
        if (row < n_rows) {
          float* const to = p.activations + int64_t{row} * kMonotonicColumns + 2 * t;
#pragma unroll
          for (int j = 0; j < kHiddenTiles; ++j) {
            store2(to + kMonotonicHidden * half + 8 * j, c[i / 2][j][i % 2 * 2], c[i / 2][j][i % 2 * 2 + 1]);
          }
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            store2(to + kV + 16 * half + 8 * j, c[i / 2][10 + j][i % 2 * 2], c[i / 2][10 + j][i % 2 * 2 + 1]);
          }
        }
      }
    }
    float mix[2][2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int x = 0; x < 4; ++x) mix[m][j][x] = c[m][8 + j][x];
      }
    }
    __syncthreads();

    // Second layer and mix: unit 0 is w2, the others are the agents.
    float h[2][kHiddenTiles][4], w2[2][2][4];
    const auto load_hidden = [&](int which) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int k = 0; k < kHiddenTiles; ++k) {
          const float4 a =
              *reinterpret_cast<const float4*>(exchange + (((which * 2 + m) * kHiddenTiles + k) * kWarp + lane) * 4);
          h[m][k][0] = a.x, h[m][k][1] = a.y, h[m][k][2] = a.z, h[m][k][3] = a.w;
        }
      }
    };
    load_hidden(1);
    const float* chunk = stream.next();
    generate<kFull>(w2, h, chunk, half, lane);
    load_hidden(0);
    for (int agent = 0, in_chunk = 1; agent < agents; ++agent, ++in_chunk) {
      if (in_chunk == ForwardChunks::kUnits) {
        chunk = stream.next();
        in_chunk = 0;
      }
      float q[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) q[i] = __ldg(q_rows[i] + agent * p.agent_qs.column_stride);
      float z[2][2][4];
      generate<kFull>(z, h, chunk + in_chunk * kForward, half, lane);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            mix[m][j][x] += with_sign(q[2 * m + x / 2], z[m][j][x], sign) * z[m][j][x];
          }
        }
      }
    }

#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          if (16 * half + 8 * j + 2 * t + x % 2 >= p.embed) mix[m][j][x] = 0;  // there an infinite q made it NaN
          v[2 * m + x / 2] += with_sign(elu(mix[m][j][x]), w2[m][j][x], sign) * w2[m][j][x];
        }
      }
    }
    if (p.activations != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_row + 8 * i + g;
        if (row < n_rows) {
          float* const to = p.activations + int64_t{row} * kMonotonicColumns + kMix + 16 * half + 2 * t;
          store2(to, mix[i / 2][0][i % 2 * 2], mix[i / 2][0][i % 2 * 2 + 1]);
          store2(to + 8, mix[i / 2][1][i % 2 * 2], mix[i / 2][1][i % 2 * 2 + 1]);
        }
      }
    }
    const float sum = sum_to_lane(v, t);
    if (half == 1) partial[8 * t + g] = sum;
    __syncthreads();
    const int row = first_row + 8 * t + g;
    if (half == 0 && row < n_rows) p.q_tot[row] = sum + partial[8 * t + g] + __ldg(p.packed + at.v_bias);
  }
}

// ------------------------------------------------------------------------------------------------------------ backward

constexpr int kRows = 16;  // of a warp
constexpr int kMostWarps = 12, kMostWarpsFull = 8;

// Eight columns of the lane's two rows, as an operand A. Each is loaded by itself: of values that came in pairs the
// compiler makes operands anew for every product.
__device__ __forceinline__ void load_tile(float (&a)[4], const float* const (&rows)[2], int column) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = __ldg(rows[i % 2] + column + i / 2);
}

// Generated weights z of a unit become their gradients, as operand A. That of their positive form is `scale` of the row
// times `factor` (an operand A too); `sum` is what factor times positive form adds up to. Bit 2 * tile + x % 2 of the
// bytes of the result is for z[tile][x]: slope 1 in row g, slope -1 in row g, the same in row g + 8.
template <bool kFull>
__device__ __forceinline__ uint32_t through_positivity(float (&z)[kEmbedTiles][4],
                                                       const float (&factor)[kEmbedTiles][4], const float (&scale)[2],
                                                       float (&sum)[2], uint32_t sign) {
  float least = 1;
#pragma unroll
  for (int j = 0; j < kEmbedTiles; ++j) {
#pragma unroll
    for (int x = 0; x < 4; ++x) least = fminf(least, fabsf(z[j][x]));
  }
  const bool exact_zeros = sign != 0 && __any_sync(kAllLanes, least == 0);  // rare: their slope is neither
  uint32_t zero = 0, minus = 0;                                             // row g in the first byte, then row g + 8
  if (exact_zeros) {
#pragma unroll
    for (int j = 0; j < kEmbedTiles; ++j) {
#pragma unroll
      for (int x = 0; x < 4; ++x) zero |= (z[j][x] == 0 ? 1u : 0u) << (x / 2 * 8 + 2 * j + x % 2);
    }
  }
#pragma unroll
  for (int row = 1; row >= 0; --row) {
    sum[row] = 0;
#pragma unroll
    for (int j = kEmbedTiles - 1; j >= 0; --j) {
#pragma unroll
      for (int column = 1; column >= 0; --column) {
        const float weight = z[j][2 * row + column];
        const float value = with_sign(factor[j][row + 2 * column], weight, sign);
        sum[row] += value * weight;
        minus = __funnelshift_l(__float_as_uint(weight), minus, 1);
        z[j][2 * row + column] = rounded<kFull>(scale[row] * value);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kEmbedTiles; ++j) {
    const float second = z[j][1];  // accumulator to operand
    z[j][1] = z[j][2];
    z[j][2] = second;
  }
  if (sign == 0) minus = 0;
  if (exact_zeros) {
#pragma unroll
    for (int j = 0; j < kEmbedTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (zero >> (i % 2 * 8 + 2 * j + i / 2) & 1) z[j][i] = 0;
      }
    }
    minus &= ~zero;
  }
  return __byte_perm(~(minus | zero), minus, 0x5140);
}

// Byte t of all lanes of a quad, with their bits where the 32 columns of a row are: lane t has columns 2 t + x % 2 of
// every tile.
__device__ __forceinline__ uint32_t byte_to_lane(uint32_t bytes, int t) {
  constexpr uint32_t kLow = 0xffff, kEven = 0x00ff00ff;
  const bool odd = t % 2 != 0, upper = t / 2 != 0;
  const uint32_t half = upper ? bytes >> 16 : bytes & kLow;
  const uint32_t other = __shfl_xor_sync(kAllLanes, upper ? bytes & kLow : bytes >> 16, 2);
  const uint32_t pairs = upper ? other | half << 16 : half | other << 16;  // of lanes t % 2 and t % 2 + 2
  const uint32_t mine = (odd ? pairs >> 8 : pairs) & kEven;
  const uint32_t theirs = __shfl_xor_sync(kAllLanes, (odd ? pairs : pairs >> 8) & kEven, 1);
  uint32_t bits = odd ? theirs | mine << 8 : mine | theirs << 8;  // by lane, tile, column
  uint32_t moved = (bits ^ bits >> 6) & 0x00cc00ccu;              // to tile, lane, column: two steps of a transpose
  bits ^= moved ^ moved << 6;
  moved = (bits ^ bits >> 12) & 0x0000f0f0u;
  return bits ^ moved ^ moved << 12;
}

// dh += dz W of one tile of e, whose operand A is `dz`.
template <bool kFull>
__device__ __forceinline__ void go_back(float (&dh)[1][kHiddenTiles][4], const float (&dz)[4], const float* transposed,
                                        int tile, int lane) {
  __syncwarp();  // or the weights of all tiles are loaded at once, which spills
  const Operand<4> a[1] = {operand<kFull>(dz)};
#pragma unroll
  for (int n = 0; n < kHiddenTiles; n += 2) {
    multiply<kFull, true>(dh, n, a, transposed + ((tile * kHiddenTiles / 2 + n / 2) * kWarp + lane) * 4);
  }
}

template <bool kFull>
__global__ void __launch_bounds__((kFull ? kMostWarpsFull : kMostWarps) * kWarp, 1)
    backward_rows_kernel(const MonotonicBackwardRowsCuda p, const MonotonicPacked at, const Cut cut) {
  if (kTooOld) return;
  extern __shared__ __align__(16) float memory[];
  int thread = static_cast<int>(threadIdx.x);
  const int agents = static_cast<int>(p.agents);
  const uint32_t sign = sign_bit(p.positivity), real_columns = 0xffffffffu >> (kMonotonicEmbed - p.embed);
  const int n_rows = static_cast<int>(p.rows), tile_rows = static_cast<int>(blockDim.x / kWarp) * kRows;
  Stream<BackwardChunks> stream({p.packed, at, p.agents}, memory, cut);

  // A warp waits for activations twice in a tile, for less time where they are in the second-level cache.
  const auto look_ahead = [&](int tile) {
    constexpr int kLine = 32;  // floats
    const int first_row = tile * tile_rows + thread / kWarp * kRows;
    const float* line = p.activations + int64_t{first_row} * kMonotonicColumns + thread % kWarp * kLine;
    const float* const end = p.activations + int64_t{n_rows} * kMonotonicColumns;
#pragma unroll
    for (int i = 0; i < kRows * kMonotonicColumns; i += kWarp * kLine) {
      if (line + i < end) prefetch(line + i);
    }
  };
  look_ahead(blockIdx.x);

  for (int tile = blockIdx.x; tile < cut.tiles; tile += gridDim.x) {
    keep(thread);  // or what follows from it stays in registers for all tiles, which spills
    const int warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
    const int first_row = tile * tile_rows + warp * kRows + g;
    if (tile + static_cast<int>(gridDim.x) < cut.tiles) look_ahead(tile + gridDim.x);
    const float *kept[2], *q_rows[2];
    float grad[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = min(first_row + 8 * i, n_rows - 1);
      kept[i] = p.activations + row * kMonotonicColumns + 2 * t;
      grad[i] = __ldg(p.grad_q_tot + row);
    }
    find_rows(q_rows, p.agent_qs, first_row - g, n_rows, lane);
    float* const to = p.grad_activations + int64_t{first_row} * kMonotonicColumns + 2 * t;
    const auto store = [&](int column, int i, float x, float y) {
      if (first_row + 8 * i < n_rows) store2(to + 8 * i * kMonotonicColumns + column, x, y);
    };
    // gradient * (hidden > 0); `c` is an accumulator, `a` an operand A.
    const auto store_masked = [&](int column, const float (&c)[4], const float (&a)[4]) {
#pragma unroll
      for (int i = 0; i < 2; ++i) store(column, i, a[i] <= 0 ? 0 : c[2 * i], a[2 + i] <= 0 ? 0 : c[2 * i + 1]);
    };
    const int sign_row = first_row + 8 * (t / 2), q_row = first_row + 8 * t;
    uint32_t* const signs = p.signs + int64_t{sign_row} * (agents + 1) * 2 + t % 2;
    float* const grad_q = p.grad_agent_qs + int64_t{q_row} * agents;
    const auto store_signs = [&](uint32_t bytes, int unit) {
      const uint32_t word = byte_to_lane(bytes, t) & real_columns;
      if (sign_row < n_rows && p.signs != nullptr) signs[2 * unit] = word;
    };

    // w2, which the gradient of the mix needs.
    float h[1][kHiddenTiles][4], dh[1][kHiddenTiles][4], z[1][kEmbedTiles][4], mix[kEmbedTiles][4];
    const auto load_hidden = [&](int column) {
#pragma unroll
      for (int j = 0; j < kHiddenTiles; ++j) {
        load_tile(h[0][j], kept, column + 8 * j);
#pragma unroll
        for (int i = 0; i < 4; ++i) dh[0][j][i] = 0;
      }
    };
    load_hidden(kHidden2);
#pragma unroll
    for (int j = 0; j < kEmbedTiles; ++j) load_tile(mix[j], kept, kMix + 8 * j);
    const float* unit = stream.next();
    generate<kFull>(z, h, unit, 0, lane);
    float after[kEmbedTiles][4], sum[2];
#pragma unroll
    for (int j = 0; j < kEmbedTiles; ++j) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int i = x % 2 * 2 + x / 2;
        const float before = mix[j][i], w2 = with_sign(z[0][j][x], z[0][j][x], sign);
        after[j][i] = elu(before);
        // In the padding an infinite gradient would make NaN.
        const bool is_real = 8 * j + 2 * t + x % 2 < p.embed;
        mix[j][i] = is_real ? grad[x / 2] * w2 * (before > 0 ? 1 : after[j][i] + 1) : 0;
      }
      store(kMix + 8 * j, 0, mix[j][0], mix[j][2]);
      store(kMix + 8 * j, 1, mix[j][1], mix[j][3]);
    }
    store_signs(through_positivity<kFull>(z[0], after, grad, sum, sign), agents);
#pragma unroll
    for (int j = 0; j < kEmbedTiles; ++j) go_back<kFull>(dh, z[0][j], unit + kForward, j, lane);
#pragma unroll
    for (int j = 0; j < kHiddenTiles; ++j) store_masked(kHidden2 + 8 * j, dh[0][j], h[0][j]);

    // V, whose hidden layer is on its way together with the agents'.
    load_hidden(kHidden1);
#pragma unroll
    for (int j = 0; j < kEmbedTiles; ++j) {
      const float2 w = load2(p.packed + at.v_weight + 8 * j + 2 * t);
      float v[4];
      load_tile(v, kept, kV + 8 * j);
      const float gradient[4] = {grad[0] * w.x, grad[0] * w.y, grad[1] * w.x, grad[1] * w.y};
      store_masked(kV + 8 * j, gradient, v);
    }

    // The agents.
    for (int agent = 0; agent < agents; ++agent) {
      float q[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) q[i] = __ldg(q_rows[i] + agent * p.agent_qs.column_stride);
      unit = stream.next();
      generate<kFull>(z, h, unit, 0, lane);
      const uint32_t bytes = through_positivity<kFull>(z[0], mix, q, sum, sign);
#pragma unroll
      for (int j = 0; j < kEmbedTiles; ++j) go_back<kFull>(dh, z[0][j], unit + kForward, j, lane);
      store_signs(bytes, agent);
      const float dq = sum_to_lane(sum, t);
      if (t < 2 && q_row < n_rows && p.grad_agent_qs != nullptr) grad_q[agent] = dq;
    }
#pragma unroll
    for (int j = 0; j < kHiddenTiles; ++j) store_masked(kHidden1 + 8 * j, dh[0][j], h[0][j]);
  }
}

// ------------------------------------------------------------------------------------------------------------ launches

constexpr int kOldest = 80;  // capability with tf32 and asynchronous copies

// How many of `items` (pairs of warps, or warps) a block has. Every multiprocessor gets a block and the same number of
// tiles, or one less: 30 items for each where a block takes 12 at most are three tiles of 10.
int64_t per_block(int64_t items, int most, int multiprocessors) {
  const int64_t each = ceil_div(items, multiprocessors);
  return ceil_div(each, ceil_div(each, most));
}

struct Launch {
  Cut cut;
  unsigned blocks, threads;
  size_t shared;
};

// `items` of `warps` warps each, which need `own` floats of shared memory besides the chunks. Of these a block that
// takes several tiles has all in shared memory, where they fit; otherwise there are three slots, or two where shared
// memory is small, and then blocks may be smaller as well.
template <class Chunks>
Launch plan(const Device& device, int64_t items, int most, int warps, int own, int chunks) {
  const auto bytes = [&](int64_t slots, int64_t in_block) {
    return static_cast<size_t>(slots * Chunks::kFloats + in_block * own) * sizeof(float);
  };
  const auto limit = static_cast<size_t>(device.shared_memory);
  int slots = chunks < 3 || bytes(3, most) > limit ? 2 : 3;
  while (most > 1 && bytes(slots, most) > limit) --most;
  const int64_t in_block = per_block(items, most, device.multiprocessors);
  const int tiles = static_cast<int>(ceil_div(items, in_block));
  const int blocks = tiles < device.multiprocessors ? tiles : device.multiprocessors;
  if (tiles > blocks && bytes(chunks, in_block) <= limit) slots = chunks;
  return {{tiles, tiles / blocks, tiles % blocks, slots, slots > 2 ? 2 : 1},
          static_cast<unsigned>(blocks),
          static_cast<unsigned>(in_block * warps * kWarp),
          bytes(slots, in_block)};
}

const char* too_old(const Device& device) {
  return device.capability < kOldest ? "it needs a GPU of compute capability 8.0 or above" : nullptr;
}

template <auto kKernel, class Params>
const char* launch_plan(const Device& device, const Launch& l, void* stream, const Params& p,
                        const MonotonicPacked& at) {
  return launch<kKernel>(device, l.blocks, l.threads, l.shared, stream, p, at, l.cut);
}

}  // namespace

const char* monotonic_pack_cuda(const MonotonicPackCuda& p, void* stream) {
  if (const char* error = too_old(current_device())) return error;
  const MonotonicPacked at = monotonic_packed(p.agents, p.state_dim);
  const auto blocks = static_cast<unsigned>(ceil_div(at.total, kPackThreads));
  pack_kernel<<<blocks, kPackThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, at);
  return launched();
}

const char* monotonic_forward_cuda(const MonotonicForwardCuda& p, void* stream) {
  const Device& device = current_device();
  if (const char* error = too_old(device)) return error;
  if (p.rows == 0) return nullptr;
  const MonotonicPacked at = monotonic_packed(p.agents, p.state_dim);
  const int chunks = ForwardChunks(p.packed, at, p.state_dim, p.agents).count;
  const Launch l =
      plan<ForwardChunks>(device, ceil_div(p.rows, kPairRows), kMostPairs, 2, kExchange + kPartial, chunks);
  const bool even = p.state_dim % 2 == 0 && p.states.outer_stride % 2 == 0 && p.states.inner_stride % 2 == 0 &&
                    reinterpret_cast<uintptr_t>(p.states.data) % sizeof(float2) == 0;
  if (p.full_precision) {
    return even ? launch_plan<forward_kernel<true, true>>(device, l, stream, p, at)
                : launch_plan<forward_kernel<true, false>>(device, l, stream, p, at);
  }
  return even ? launch_plan<forward_kernel<false, true>>(device, l, stream, p, at)
              : launch_plan<forward_kernel<false, false>>(device, l, stream, p, at);
}

const char* monotonic_backward_rows_cuda(const MonotonicBackwardRowsCuda& p, void* stream) {
  const Device& device = current_device();
  if (const char* error = too_old(device)) return error;
  if (p.rows == 0) return nullptr;
  const MonotonicPacked at = monotonic_packed(p.agents, p.state_dim);
  const Launch l = plan<BackwardChunks>(device, ceil_div(p.rows, kRows), p.full_precision ? kMostWarpsFull : kMostWarps,
                                        1, 0, BackwardChunks(p.packed, at, p.agents).count);
  return p.full_precision ? launch_plan<backward_rows_kernel<true>>(device, l, stream, p, at)
                          : launch_plan<backward_rows_kernel<false>>(device, l, stream, p, at);
}

}  // namespace fastmix
