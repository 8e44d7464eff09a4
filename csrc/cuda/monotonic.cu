// `monotonic` on the matrix units of CUDA: forward, and the part of backward that is done row by row.
//
// A warp owns rows, and what belongs to a row stays in its registers: an accumulator of one product is the operand of
// the next (mma.cuh), positivity and mix are element by element, and the sum over e is two shuffles. Generated weights
// exist only as accumulators. The parameters come packed in fragment order, rounded to tf32 once, so that a lane reads
// operands as 16 bytes from consecutive addresses: no conflict between banks. They stream through shared memory in
// chunks (`Stream`) that all warps of a block share, asynchronously and two chunks ahead; where all of them fit they
// come once per block, which then takes several tiles of rows.
//
// Forward: a tile of 32 rows belongs to a pair of warps, since one fragment of the weights then feeds two products: at
// one, reading shared memory takes longer than the matrix units do. Each warp of the pair has half of the columns of
// everything. In the first layer that is one of the two hidden layers, half of b1 and half of V's hidden layer: 96
// columns, 96 accumulators a lane. Then they show each other their hidden layers, through shared memory; from there on
// a warp has 16 of the 32 e of every agent, with as many accumulators. At the end one float a row passes between them.
//
// Backward: a warp has 16 rows, all columns. It generates the weights again from the hidden layers that forward kept,
// and holds of each hidden layer both the values and the sum of the gradients.
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "fastmix/monotonic.h"

namespace fastmix {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kStep = MonotonicPacked::kFirstStep, kUnit = MonotonicPacked::kUnit, kMatrix = MonotonicPacked::kMatrix;
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
template <bool kFull, int M, int N>
__device__ __forceinline__ void multiply(float (&c)[M][N][4], int first, const Operand<4> (&a)[M], const float* pair) {
  const float4 v = *reinterpret_cast<const float4*>(pair);
  const float even[2] = {v.x, v.y}, odd[2] = {v.z, v.w};
  const Operand<2> b[2] = {operand<kFull>(even), operand<kFull>(odd)};
#pragma unroll
  for (int product = kFull ? 0 : 2; product < 3; ++product) {  // the small ones first
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float (&b_part)[2] = product == 1 ? b[i].low : b[i].high;
        mma_tf32(c[m][first + i], product == 0 ? a[m].low : a[m].high, b_part[0], b_part[1]);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------ small
// functions

__device__ __forceinline__ float relu(float x) { return x < 0 ? 0 : x; }  // of NaN it is NaN
__device__ __forceinline__ float elu(float x) { return x > 0 ? x : expm1f(x); }

template <bool kAbs>
__device__ __forceinline__ float positive(float z) {
  return kAbs ? fabsf(z) : z;
}

__device__ __forceinline__ float add(float x, float y) { return x + y; }
__device__ __forceinline__ uint32_t add(uint32_t x, uint32_t y) { return x | y; }

// The sum over the four lanes of a quad of x[i]: lane t gets x[t].
template <class T>
__device__ __forceinline__ T sum_to_lane(const T (&x)[4], int t) {
  const bool odd = t % 2 != 0, upper = t / 2 != 0;
  const T low = add(odd ? x[1] : x[0], __shfl_xor_sync(kAllLanes, odd ? x[0] : x[1], 1));
  const T high = add(odd ? x[3] : x[2], __shfl_xor_sync(kAllLanes, odd ? x[2] : x[3], 1));
  return add(upper ? high : low, __shfl_xor_sync(kAllLanes, upper ? low : high, 2));
}

// Lane t gets x[t % 2].
__device__ __forceinline__ float sum_to_lane(const float (&x)[2], int t) {
  const bool odd = t % 2 != 0;
  const float sum = (odd ? x[1] : x[0]) + __shfl_xor_sync(kAllLanes, odd ? x[0] : x[1], 1);
  return sum + __shfl_xor_sync(kAllLanes, sum, 2);
}

__device__ __forceinline__ int64_t offset(const StridedRows<float>& rows, int64_t row) {
  return row / rows.inner * rows.outer_stride + row % rows.inner * rows.inner_stride;
}

__device__ __forceinline__ float2 load2(const float* p) { return __ldg(reinterpret_cast<const float2*>(p)); }
__device__ __forceinline__ void store2(float* p, float x, float y) {
  *reinterpret_cast<float2*>(p) = make_float2(x, y);
}

// ---------------------------------------------------------------------------------------------- weights in shared
// memory

__device__ __forceinline__ void copy_all(float* to, const float* from, int count) {
  for (int i = 4 * static_cast<int>(threadIdx.x); i < count; i += 4 * static_cast<int>(blockDim.x)) {
    copy_async(to + i, from + i);
  }
}

// Forward reads the first layer four steps at a time, then three units.
struct ForwardChunks {
  static constexpr int kSteps = 4, kUnits = 3;
  static constexpr int kFloats = kSteps * kStep > kUnits* kUnit ? kSteps * kStep : kUnits * kUnit;

  const float* packed;
  int64_t units, transposed;  // ends of the two
  int first;                  // chunks of the first layer
  int count;

  __host__ __device__ static int first_chunks(int64_t steps) { return static_cast<int>((steps + kSteps - 1) / kSteps); }
  __host__ __device__ static int unit_chunks(int64_t agents) { return static_cast<int>(agents / kUnits + 1); }

  __device__ void fetch(int chunk, float* to) const {
    const bool is_unit = chunk >= first;
    const int64_t size = is_unit ? kUnits * kUnit : kSteps * kStep;
    const int64_t begin = is_unit ? units + (chunk - first) * size : chunk * size;
    const int64_t rest = (is_unit ? transposed : units) - begin;
    copy_all(to, packed + begin, static_cast<int>(rest < size ? rest : size));
  }
};

// Backward reads a unit in both forms.
struct BackwardChunks {
  static constexpr int kFloats = kUnit + kMatrix;

  const float* packed;
  int64_t units, transposed;
  int count;

  __device__ void fetch(int unit, float* to) const {
    copy_all(to, packed + units + unit * int64_t{kUnit}, kUnit);
    copy_all(to + kUnit, packed + transposed + unit * int64_t{kMatrix}, kMatrix);
  }
};

// Chunks 0 .. count - 1, again and again, in `slots` slots of shared memory. With a slot for each they are fetched once
// and the block meets at them in the first pass only; otherwise it meets at each.
template <class Chunks>
class Stream {
 public:
  __device__ Stream(const Chunks& chunks, float* memory, int slots, int64_t passes)
      : chunks_(chunks),
        memory_(memory),
        slots_(slots),
        to_fetch_(slots >= chunks.count ? chunks.count : chunks.count * passes),
        to_meet_(to_fetch_) {
    fetch();
    if (slots_ > 2) fetch();
  }

  // The next chunk, for all threads of the block. The chunk before it may be overwritten from now on.
  __device__ const float* next() {
    if (to_meet_ > 0) {
      --to_meet_;
      if (slots_ > 2) {
        copies_arrived<1>();
      } else {
        copies_arrived<0>();
      }
      __syncthreads();
      fetch();
    }
    const float* chunk = memory_ + slot_ * Chunks::kFloats;
    slot_ = slot_ + 1 == slots_ ? 0 : slot_ + 1;
    return chunk;
  }

 private:
  __device__ void fetch() {
    if (to_fetch_ > 0) {
      --to_fetch_;
      chunks_.fetch(chunk_, memory_ + fetch_slot_ * Chunks::kFloats);
      chunk_ = chunk_ + 1 == chunks_.count ? 0 : chunk_ + 1;
      fetch_slot_ = fetch_slot_ + 1 == slots_ ? 0 : fetch_slot_ + 1;
    }
    end_copies();
  }

  Chunks chunks_;
  float* memory_;
  int slots_, slot_ = 0, fetch_slot_ = 0, chunk_ = 0;
  int64_t to_fetch_, to_meet_;
};

// z = b + h W^T for the `N / 2` pairs of column tiles from `pair` on, M tiles of rows at a time.
template <bool kFull, int M, int N>
__device__ __forceinline__ void generate(float (&z)[M][N][4], const float (&h)[M][kHiddenTiles][4], const float* unit,
                                         int pair, int lane) {
  const float* bias = unit + kMatrix + 16 * pair + 2 * (lane % 4);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float2 b = *reinterpret_cast<const float2*>(bias + 8 * n);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      z[m][n][0] = z[m][n][2] = b.x;
      z[m][n][1] = z[m][n][3] = b.y;
    }
  }
#pragma unroll
  for (int k = 0; k < kHiddenTiles; ++k) {
    Operand<4> a[M];
#pragma unroll
    for (int m = 0; m < M; ++m) a[m] = operand<kFull>(h[m][k]);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      multiply<kFull>(z, n, a, unit + ((k * kEmbedTiles / 2 + pair + n / 2) * kWarp + lane) * 4);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- packing

constexpr int kPackThreads = 256;

// Which of the 192 columns tile `tile` of the packed first layer starts at: the columns of a pair's first warp, then
// those of its second.
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

__device__ float unit_bias(const MonotonicPackCuda& p, int64_t unit, int e) {
  if (e >= p.embed) return 0;
  return unit == 0 ? p.weights.w2_bias[e] : p.weights.w1_bias[(unit - 1) * p.embed + e];
}

// Float `i` of a pair of column tiles' fragments is element (k, n) of them, n < 16.
struct InPair {
  int k, n;
  __device__ explicit InPair(int i) : k(i / 4 % 4 * 2 + i % 2), n(i % 4 / 2 * 8 + i / 16) {}
};
constexpr int kPair = 4 * kWarp;

__global__ void __launch_bounds__(kPackThreads) pack_kernel(const MonotonicPackCuda p, const MonotonicPacked at) {
  const int64_t i = int64_t{blockIdx.x} * kPackThreads + threadIdx.x;
  if (i >= at.total) return;
  float value = 0;
  bool is_operand = true;
  if (i < at.units) {
    const int in_step = static_cast<int>(i % kStep);
    const InPair in(in_step % kPair);
    const int tile = in_step / kPair * 2 + in.n / 8;
    value = first_weight(p, first_column(tile) + in.n % 8, i / kStep * 8 + in.k);
  } else if (i < at.transposed) {
    const int64_t unit = (i - at.units) / kUnit;
    const int in_unit = static_cast<int>((i - at.units) % kUnit);
    if (in_unit < kMatrix) {
      const InPair in(in_unit % kPair);
      const int pair = in_unit / kPair;
      value = unit_weight(p, unit, pair % 2 * 16 + in.n, pair / 2 * 8 + in.k);
    } else {
      is_operand = false;
      value = unit_bias(p, unit, in_unit - kMatrix);
    }
  } else if (i < at.first_bias) {
    const int64_t unit = (i - at.transposed) / kMatrix;
    const int in_unit = static_cast<int>((i - at.transposed) % kMatrix);
    const InPair in(in_unit % kPair);
    const int pair = in_unit / kPair;
    value = unit_weight(p, unit, pair / 4 * 8 + in.k, pair % 4 * 16 + in.n);
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
constexpr int kAhead = ForwardChunks::kSteps;  // steps that states are loaded in advance

// Eight features of the lane's four rows as operand A of two tiles. `left`: features from `rows` on.
__device__ __forceinline__ void load_states(float (&a)[2][4], const float* const (&rows)[4], int64_t column,
                                            int64_t left, bool in_pairs) {
  float2 v[4] = {};
  if (in_pairs) {
    if (column < left) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = load2(rows[i] + column);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column < left) v[i].x = __ldg(rows[i] + column);
      if (column + 1 < left) v[i].y = __ldg(rows[i] + column + 1);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[i / 2][i % 2] = v[i].x;
    a[i / 2][2 + i % 2] = v[i].y;
  }
}

// Where the lane's rows g, g + 8, g + 16, g + 24 of the 32 from `first` on begin. Each lane finds one row for all; rows
// behind the last one are the last one.
__device__ __forceinline__ void find_rows(const float* (&rows)[4], const StridedRows<float>& from, int64_t first,
                                          int64_t count, int lane) {
  const int64_t row = first + lane < count ? first + lane : count - 1;
  const int64_t mine = offset(from, row);
#pragma unroll
  for (int i = 0; i < 4; ++i) rows[i] = from.data + __shfl_sync(kAllLanes, mine, lane / 4 + 8 * i);
}

template <bool kFull, bool kAbs>
__global__ void __launch_bounds__(2 * kMostPairs * kWarp, 1)
    forward_kernel(const MonotonicForwardCuda p, const MonotonicPacked at, int slots, bool in_pairs) {
  extern __shared__ __align__(16) float memory[];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int pair = static_cast<int>(threadIdx.x) / (2 * kWarp), pairs = static_cast<int>(blockDim.x) / (2 * kWarp);
  const int half = static_cast<int>(threadIdx.x) / kWarp % 2;
  const int64_t steps = (p.state_dim + 7) / 8, left = p.state_dim - 2 * t;
  const int64_t tile_rows = int64_t{pairs} * kPairRows, tiles = (p.rows + tile_rows - 1) / tile_rows;

  float* const exchange = memory + slots * ForwardChunks::kFloats + pair * kExchange;
  float* const partial = memory + slots * ForwardChunks::kFloats + pairs * kExchange + pair * kPartial;
  const int first_chunks = ForwardChunks::first_chunks(steps);
  Stream<ForwardChunks> stream(
      {p.packed, at.units, at.transposed, first_chunks, first_chunks + ForwardChunks::unit_chunks(p.agents)}, memory,
      slots, (tiles - blockIdx.x + gridDim.x - 1) / gridDim.x);

  const float* states[4];
  float ahead[kAhead][2][4];
  const auto look_ahead = [&](int64_t tile) {
    find_rows(states, p.states, tile * tile_rows + pair * kPairRows, p.rows, lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) states[i] += 2 * t;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load_states(ahead[i], states, 8 * i, left, in_pairs);
  };
  look_ahead(blockIdx.x);

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first_row = tile * tile_rows + pair * kPairRows;

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
    for (int64_t step = 0; step < steps; step += kAhead) {
      const float* chunk = stream.next() + (half * 6 * kWarp + lane) * 4;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (step + i < steps) {
          Operand<4> a[2];
#pragma unroll
          for (int m = 0; m < 2; ++m) {
#pragma unroll
            for (int x = 0; x < 4; ++x) ahead[i][m][x] = rounded<kFull>(ahead[i][m][x]);
            a[m] = operand<kFull>(ahead[i][m]);
          }
          load_states(ahead[i], states, 8 * (step + i + kAhead), left, in_pairs);
#pragma unroll
          for (int j = 0; j < 12; j += 2) multiply<kFull>(c, j, a, chunk + i * kStep + j / 2 * kPair);
        }
      }
    }
    const float* q_rows[4];
    find_rows(q_rows, p.agent_qs, first_row, p.rows, lane);
    if (tile + gridDim.x < tiles) look_ahead(tile + gridDim.x);

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
        for (int x = 0; x < 4; ++x) h[x] = relu(h[x]);
        *reinterpret_cast<float4*>(exchange + (((half * 2 + m) * kHiddenTiles + j) * kWarp + lane) * 4) =
            make_float4(rounded<kFull>(h[0]), rounded<kFull>(h[2]), rounded<kFull>(h[1]), rounded<kFull>(h[3]));
      }
    }
    if (p.activations != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = first_row + 8 * i + g;
        if (row < p.rows) {
          float* const to = p.activations + row * kMonotonicColumns + 2 * t;
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
    float h[2][kHiddenTiles][4], w2[2][2][4], q[4];
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
#pragma unroll
    for (int i = 0; i < 4; ++i) q[i] = __ldg(q_rows[i]);
    load_hidden(1);
    const float* chunk = stream.next();
    generate<kFull>(w2, h, chunk, half, lane);
    load_hidden(0);
    for (int64_t agent = 0, in_chunk = 1; agent < p.agents; ++agent, ++in_chunk) {
      if (in_chunk == ForwardChunks::kUnits) {
        chunk = stream.next();
        in_chunk = 0;
      }
      float next_q[4] = {};
      if (agent + 1 < p.agents) {
#pragma unroll
        for (int i = 0; i < 4; ++i) next_q[i] = __ldg(q_rows[i] + (agent + 1) * p.agent_qs.column_stride);
      }
      float z[2][2][4];
      generate<kFull>(z, h, chunk + in_chunk * kUnit, half, lane);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int x = 0; x < 4; ++x) mix[m][j][x] += q[2 * m + x / 2] * positive<kAbs>(z[m][j][x]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) q[i] = next_q[i];
    }

#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          if (16 * half + 8 * j + 2 * t + x % 2 >= p.embed) mix[m][j][x] = 0;  // there an infinite q made it NaN
          v[2 * m + x / 2] += elu(mix[m][j][x]) * positive<kAbs>(w2[m][j][x]);
        }
      }
    }
    if (p.activations != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = first_row + 8 * i + g;
        if (row < p.rows) {
          float* const to = p.activations + row * kMonotonicColumns + kMix + 16 * half + 2 * t;
          store2(to, mix[i / 2][0][i % 2 * 2], mix[i / 2][0][i % 2 * 2 + 1]);
          store2(to + 8, mix[i / 2][1][i % 2 * 2], mix[i / 2][1][i % 2 * 2 + 1]);
        }
      }
    }
    const float sum = sum_to_lane(v, t);
    if (half == 1) partial[8 * t + g] = sum;
    __syncthreads();
    const int64_t row = first_row + 8 * t + g;
    if (half == 0 && row < p.rows) p.q_tot[row] = sum + partial[8 * t + g] + __ldg(p.packed + at.v_bias);
  }
}

// ------------------------------------------------------------------------------------------------------------ backward

constexpr int kRows = 16;  // of a warp
constexpr int kMostWarps = 16, kMostWarpsFull = 8;

// Eight columns of the lane's two rows, as an operand A.
__device__ __forceinline__ void load_tile(float (&a)[4], const float* const (&rows)[2], int column) {
  const float2 upper = load2(rows[0] + column), lower = load2(rows[1] + column);
  a[0] = upper.x, a[1] = lower.x, a[2] = upper.y, a[3] = lower.y;
}

// gradient * (hidden > 0) of the lane's two rows; `c` is an accumulator, `h` an operand A.
__device__ __forceinline__ void store_masked(float* const (&rows)[2], const bool (&inside)[2], int column,
                                             const float (&c)[4], const float (&h)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (inside[i]) store2(rows[i] + column, h[i] > 0 ? c[2 * i] : 0, h[2 + i] > 0 ? c[2 * i + 1] : 0);
  }
}

// Signs of generated weights z as bits, and the gradient of z from that of its positive form, as operand A.
template <bool kFull, bool kAbs>
__device__ __forceinline__ void through_positivity(float (&gradient)[4], uint32_t (&signs)[4], const float (&z)[4],
                                                   const float (&positive_gradient)[4], int tile) {
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    float value = positive_gradient[x];
    if constexpr (kAbs) {
      const uint32_t bit = 1u << (8 * tile + x % 2);  // lane t shifts it to where it belongs when all are collected
      if (z[x] > 0) signs[x / 2 * 2] |= bit;
      if (z[x] < 0) signs[x / 2 * 2 + 1] |= bit;
      value = z[x] > 0 ? value : z[x] < 0 ? -value : 0;
    }
    gradient[x % 2 * 2 + x / 2] = rounded<kFull>(value);
  }
}

// dh += dz W of one tile of e, whose operand A is `dz`.
template <bool kFull>
__device__ __forceinline__ void go_back(float (&dh)[1][kHiddenTiles][4], const float (&dz)[4], const float* transposed,
                                        int tile, int lane) {
  const Operand<4> a[1] = {operand<kFull>(dz)};
#pragma unroll
  for (int n = 0; n < kHiddenTiles; n += 2) {
    multiply<kFull>(dh, n, a, transposed + ((tile * kHiddenTiles / 2 + n / 2) * kWarp + lane) * 4);
  }
}

template <bool kFull, bool kAbs>
__global__ void __launch_bounds__((kFull ? kMostWarpsFull : kMostWarps) * kWarp, 1)
    backward_rows_kernel(const MonotonicBackwardRowsCuda p, const MonotonicPacked at, int slots) {
  extern __shared__ __align__(16) float memory[];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int64_t tile_rows = int64_t{blockDim.x} / kWarp * kRows, tiles = (p.rows + tile_rows - 1) / tile_rows;
  Stream<BackwardChunks> stream({p.packed, at.units, at.transposed, static_cast<int>(p.agents) + 1}, memory, slots,
                                (tiles - blockIdx.x + gridDim.x - 1) / gridDim.x);

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first_row = tile * tile_rows + threadIdx.x / kWarp * kRows + g;
    const bool inside[2] = {first_row < p.rows, first_row + 8 < p.rows};
    const float *kept[2], *q_rows[2];
    float* to[2];
    float grad[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = inside[i] ? first_row + 8 * i : p.rows - 1;
      kept[i] = p.activations + row * kMonotonicColumns + 2 * t;
      to[i] = p.grad_activations + row * kMonotonicColumns + 2 * t;
      q_rows[i] = p.agent_qs.data + offset(p.agent_qs, row);
      grad[i] = __ldg(p.grad_q_tot + row);
    }
    uint32_t* const sign_row = p.signs + ((first_row + 8 * (t / 2)) * (p.agents + 1)) * 2 + t % 2;
    const bool sign_inside = t < 2 ? inside[0] : inside[1];
    const auto store_signs = [&](const uint32_t (&signs)[4], int64_t unit) {
      uint32_t word;
      if constexpr (kAbs) {
        const uint32_t words[4] = {signs[0] << 2 * t, signs[1] << 2 * t, signs[2] << 2 * t, signs[3] << 2 * t};
        word = sum_to_lane(words, t);
      } else {
        word = t % 2 == 0 ? 0xffffffffu >> (kMonotonicEmbed - p.embed) : 0;
      }
      if (sign_inside) sign_row[2 * unit] = word;
    };

    // V, then w2, which the gradient of the mix needs.
    float h[1][kHiddenTiles][4], dh[1][kHiddenTiles][4], z[1][kEmbedTiles][4], mix[kEmbedTiles][4];
#pragma unroll
    for (int j = 0; j < kHiddenTiles; ++j) {
      load_tile(h[0][j], kept, kHidden2 + 8 * j);
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        h[0][j][x] = rounded<kFull>(h[0][j][x]);
        dh[0][j][x] = 0;
      }
    }
#pragma unroll
    for (int j = 0; j < kEmbedTiles; ++j) load_tile(mix[j], kept, kMix + 8 * j);
#pragma unroll
    for (int j = 0; j < kEmbedTiles; ++j) {
      const float2 w = load2(p.packed + at.v_weight + 8 * j + 2 * t);
      float v[4];
      load_tile(v, kept, kV + 8 * j);
      const float gradient[4] = {grad[0] * w.x, grad[0] * w.y, grad[1] * w.x, grad[1] * w.y};
      store_masked(to, inside, kV + 8 * j, gradient, v);
    }
    const float* unit = stream.next();
    generate<kFull>(z, h, unit, 0, lane);
    uint32_t signs[4] = {};
#pragma unroll
    for (int j = 0; j < kEmbedTiles; ++j) {
      float from_mix[4], dz[4];
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const float before = mix[j][x % 2 * 2 + x / 2], grad_row = grad[x / 2];
        const float after = elu(before);
        from_mix[x] = grad_row * after;
        const bool real = 8 * j + 2 * t + x % 2 < p.embed;  // elsewhere an infinite gradient would make it NaN
        mix[j][x % 2 * 2 + x / 2] =
            real ? grad_row * positive<kAbs>(z[0][j][x]) * (before > 0 ? 1.0f : after + 1.0f) : 0.0f;
      }
      through_positivity<kFull, kAbs>(dz, signs, z[0][j], from_mix, j);
      go_back<kFull>(dh, dz, unit + kUnit, j, lane);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (inside[i]) store2(to[i] + kMix + 8 * j, mix[j][i], mix[j][2 + i]);
      }
    }
    store_signs(signs, p.agents);
#pragma unroll
    for (int j = 0; j < kHiddenTiles; ++j) store_masked(to, inside, kHidden2 + 8 * j, dh[0][j], h[0][j]);

    // The agents.
#pragma unroll
    for (int j = 0; j < kHiddenTiles; ++j) {
      load_tile(h[0][j], kept, kHidden1 + 8 * j);
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        h[0][j][x] = rounded<kFull>(h[0][j][x]);
        dh[0][j][x] = 0;
      }
    }
    float q[2] = {__ldg(q_rows[0]), __ldg(q_rows[1])};
    float* const grad_q = p.grad_agent_qs + (first_row + 8 * (t % 2)) * p.agents;
    const bool grad_q_inside = t < 2 && (t == 0 ? inside[0] : inside[1]) && p.grad_agent_qs != nullptr;
    for (int64_t agent = 0; agent < p.agents; ++agent) {
      float next_q[2] = {};
      if (agent + 1 < p.agents) {
#pragma unroll
        for (int i = 0; i < 2; ++i) next_q[i] = __ldg(q_rows[i] + (agent + 1) * p.agent_qs.column_stride);
      }
      unit = stream.next();
      generate<kFull>(z, h, unit, 0, lane);
      uint32_t agent_signs[4] = {};
      float dq[2] = {};
#pragma unroll
      for (int j = 0; j < kEmbedTiles; ++j) {
        float from_mix[4], dz[4];
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const float gradient = mix[j][x % 2 * 2 + x / 2];
          dq[x / 2] += gradient * positive<kAbs>(z[0][j][x]);
          from_mix[x] = q[x / 2] * gradient;
        }
        through_positivity<kFull, kAbs>(dz, agent_signs, z[0][j], from_mix, j);
        go_back<kFull>(dh, dz, unit + kUnit, j, lane);
      }
      store_signs(agent_signs, agent);
      const float dq_row = sum_to_lane(dq, t);
      if (grad_q_inside) grad_q[agent] = dq_row;
      q[0] = next_q[0];
      q[1] = next_q[1];
    }
#pragma unroll
    for (int j = 0; j < kHiddenTiles; ++j) store_masked(to, inside, kHidden1 + 8 * j, dh[0][j], h[0][j]);
  }
}

// --------------------------------------------------------------------------------------------------------------
// launches

constexpr int kOldest = 80;  // capability with tf32 and asynchronous copies

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// How many of `items` (pairs of warps, or warps) a block has. Every multiprocessor gets a block and the same number of
// tiles, or one less: 29 items for each where a block takes 16 at most are two tiles of 15.
int64_t per_block(int64_t items, int most, int multiprocessors) {
  const int64_t each = ceil_div(items, multiprocessors);
  return ceil_div(each, ceil_div(each, most));
}

struct Launch {
  unsigned blocks, threads;
  int slots;
  size_t shared;
};

// `items` of `warps` warps each, which need `own` floats of shared memory besides the chunks. The chunks have a slot
// each where that fits, otherwise three, or two where shared memory is small: then blocks may be smaller as well.
template <class Chunks>
Launch plan(const Device& device, int64_t items, int most, int warps, int own, int chunks) {
  const auto bytes = [&](int64_t slots, int64_t in_block) {
    return static_cast<size_t>(slots * Chunks::kFloats + in_block * own) * sizeof(float);
  };
  const auto limit = static_cast<size_t>(device.shared_memory);
  int slots = chunks < 3 ? chunks : 3;
  while (slots > 2 && bytes(slots, most < 4 ? most : 4) > limit) --slots;
  while (most > 1 && bytes(slots, most) > limit) --most;
  const int64_t in_block = per_block(items, most, device.multiprocessors);
  if (bytes(chunks, in_block) <= limit) slots = chunks;
  const int64_t tiles = ceil_div(items, in_block);
  return {static_cast<unsigned>(tiles < device.multiprocessors ? tiles : device.multiprocessors),
          static_cast<unsigned>(in_block * warps * kWarp), slots, bytes(slots, in_block)};
}

const char* too_old(const Device& device) {
  return device.capability < kOldest ? "it needs a GPU of compute capability 8.0 or above" : nullptr;
}

// Kernel, launch and arguments; `kernel` may use more shared memory than blocks have without asking.
template <class Params, class... More>
const char* launch(void (*kernel)(Params, More...), const Launch& l, void* stream, const Params& p, More... more) {
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(l.shared)) ==
      cudaSuccess) {
    kernel<<<l.blocks, l.threads, l.shared, static_cast<cudaStream_t>(stream)>>>(p, more...);
  }
  return launched();
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
  const int chunks = ForwardChunks::first_chunks(ceil_div(p.state_dim, 8)) + ForwardChunks::unit_chunks(p.agents);
  const Launch l =
      plan<ForwardChunks>(device, ceil_div(p.rows, kPairRows), kMostPairs, 2, kExchange + kPartial, chunks);
  // Whether two neighbours of a row can be loaded at once, and neither lies behind its end.
  const bool in_pairs = p.state_dim % 2 == 0 && p.states.outer_stride % 2 == 0 && p.states.inner_stride % 2 == 0 &&
                        reinterpret_cast<uintptr_t>(p.states.data) % sizeof(float2) == 0;
  const bool is_abs = p.positivity == Positivity::abs;
  const auto kernel = p.full_precision ? (is_abs ? forward_kernel<true, true> : forward_kernel<true, false>)
                                       : (is_abs ? forward_kernel<false, true> : forward_kernel<false, false>);
  return launch(kernel, l, stream, p, monotonic_packed(p.agents, p.state_dim), l.slots, in_pairs);
}

const char* monotonic_backward_rows_cuda(const MonotonicBackwardRowsCuda& p, void* stream) {
  const Device& device = current_device();
  if (const char* error = too_old(device)) return error;
  if (p.rows == 0) return nullptr;
  const Launch l = plan<BackwardChunks>(device, ceil_div(p.rows, kRows), p.full_precision ? kMostWarpsFull : kMostWarps,
                                        1, 0, static_cast<int>(p.agents) + 1);
  const bool is_abs = p.positivity == Positivity::abs;
  const auto kernel = p.full_precision
                          ? (is_abs ? backward_rows_kernel<true, true> : backward_rows_kernel<true, false>)
                          : (is_abs ? backward_rows_kernel<false, true> : backward_rows_kernel<false, false>);
  return launch(kernel, l, stream, p, monotonic_packed(p.agents, p.state_dim), l.slots);
}

}  // namespace fastmix
