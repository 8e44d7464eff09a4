// `monotonic` on CUDA: the gradients of the weights, once monotonic.cu has left G, the gradient of the first layers'
// outputs. Three launches:
//
// second_layer_kernel  dW_a = x_a^T h1 with x_a[row, e] = q_a[row] * G_b1[row, e] * slope_a[row, e]; for w2 it is
//     x = grad * elu(mix) * slope, with h2. What bounds it is memory, so a block reads its rows once for all agents (up
//     to 10: eleven matrices of 64 x 32 are a third of a multiprocessor's registers). A warp owns eight of the 32
//     columns e of every agent, and every other step of eight rows: h1's fragments are loaded once for all agents,
//     every x is computed once, and all warps have equal work, whatever the number of agents.
// first_layer_kernel   G^T [states | 1]: the constant column gives the gradients of the biases. A block makes up to
//     192 x 176 outputs, so that G, by then mostly in the L2 cache, is read but once or twice.
// add_parts_kernel     Both leave one sum for each part of the rows; this adds them, the warps of a block side by side,
//     and writes what is no padding.
//
// Parts follow from the sizes and the number of multiprocessors alone and are added in a fixed order, so every run
// gives the same bits. Operands come to shared memory by asynchronous copies some tiles ahead. Rows of a tile are 8
// (modulo 32) floats apart there: what the lanes of a fragment (ptx.h) read, four rows of eight columns, falls into
// 32 banks.
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
using FASTMIX_ISA::kTooOld;
using FASTMIX_ISA::kWarp;
using FASTMIX_ISA::launch;
using FASTMIX_ISA::launched;
using FASTMIX_ISA::multiply_tf32;
using FASTMIX_ISA::to_tf32;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kStep = 8;             // rows of one product
constexpr int64_t kFewestRows = 64;  // of a part
constexpr int kHidden = kMonotonicHidden, kEmbed = kMonotonicEmbed, kColumns = kMonotonicColumns;
constexpr int kMatrix = kHidden * kEmbed;
constexpr int kHidden2 = kHidden, kMix = 2 * kHidden, kV = kMix + kEmbed;  // columns of the first layers' outputs

using Problem = MonotonicBackwardWeightsCuda;

// How the work is cut up.
struct Cut {
  int slots, groups, agents;      // second layer: `groups` of up to `agents` agents, in a kernel made for `slots`
  int second_rows, second_parts;  // rows in shared memory at once; parts of the rows
  int tiles, blocks;              // first layer: `blocks` along the states, of 16 * `tiles` columns each
  int first_rows, first_parts;
  int64_t second_size, first_size;  // floats of a part
  int64_t first_parts_at;           // the second layer's parts, then the first layer's

  __host__ __device__ int columns() const { return 16 * tiles * blocks; }
  int64_t size() const { return first_parts_at + first_parts * first_size; }
};

// Where a part begins: parts are whole steps, and as even as that allows.
__device__ __forceinline__ int64_t first_row(int64_t rows, int part, int parts) {
  const int64_t row = (rows + kStep - 1) / kStep * part / parts * kStep;
  return row < rows ? row : rows;
}

// An operand of the matrix units, and with full precision what it lacks of float32 (but for 2^-22 of it).
template <bool kFull>
struct Operand {
  float high, low;

  // `rounded`: x is tf32 already, unless precision is full.
  __device__ __forceinline__ static Operand of(float x, bool rounded = false) {
    if constexpr (kFull) {
      const float high = __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u);
      return {high, x - high};  // the latter is NaN where x is, whatever became of the former
    } else {
      return {rounded ? x : to_tf32(x), 0};
    }
  }
};

template <bool kFull>
struct FragmentA {
  float high[4], low[4];

  __device__ __forceinline__ void set(int i, const Operand<kFull>& x) {
    high[i] = x.high;
    low[i] = x.low;
  }
};

template <bool kFull>
__device__ __forceinline__ void multiply(float (&c)[4], const FragmentA<kFull>& a, const Operand<kFull>& b0,
                                         const Operand<kFull>& b1) {
  if constexpr (kFull) {  // the small ones first; added by rounding, as the matrix unit cuts its sums off
    float part[4] = {};
    multiply_tf32(part, a.low, b0.high, b1.high);
    multiply_tf32(part, a.high, b0.low, b1.low);
    multiply_tf32(part, a.high, b0.high, b1.high);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += part[i];
  } else {
    multiply_tf32(c, a.high, b0.high, b1.high);
  }
}

// Row by row, where each begins; only the first one takes a division.
class Walk {
 public:
  __device__ __forceinline__ Walk(const StridedRows<float>& rows, int64_t row) : rows_(rows) {
    const int64_t group = row < rows.inner ? 0 : row / rows.inner;
    group_ = rows.data + group * rows.outer_stride;
    row_ = row - group * rows.inner;
  }
  __device__ __forceinline__ const float* operator*() const { return group_ + row_ * rows_.inner_stride; }
  __device__ __forceinline__ void advance(int rows) {
    for (row_ += rows; row_ >= rows_.inner; row_ -= rows_.inner) group_ += rows_.outer_stride;
  }

 private:
  const StridedRows<float>& rows_;
  const float* group_;
  int64_t row_;
};

// -------------------------------------------------------------------------------------------------- the second layer

constexpr int kSecondStages = 3;

// A tile of rows in shared memory. With w2 behind them, a unit is an agent's generated weights.
template <int kSlots>
struct SecondTile {
  static constexpr int kUnits = kSlots + 1;
  static constexpr int kHiddenStride = kHidden + 8, kEmbedStride = kEmbed + 8;
  static constexpr int kRow = 2 * kHiddenStride + 2 * kEmbedStride + kEmbed + 3 * kUnits;  // floats of a row

  float *h1, *h2;         // [rows, 64]
  float *grad_mix, *mix;  // [rows, 32]
  float* v;               // [rows, 32]
  float2* scales;         // [rows, kUnits]: the agent's value, for w2 the gradient of the row; word of slopes -1
  float* positive;        // [rows, kUnits]: word of slopes 1

  __device__ __forceinline__ SecondTile(float* memory, int rows)
      : h1(memory),
        h2(h1 + rows * kHiddenStride),
        grad_mix(h2 + rows * kHiddenStride),
        mix(grad_mix + rows * kEmbedStride),
        v(mix + rows * kEmbedStride),
        scales(reinterpret_cast<float2*>(v + rows * kEmbed)),
        positive(reinterpret_cast<float*>(scales + rows * kUnits)) {}
};

// What a block of the second layer does.
struct SecondWork {
  int64_t begin, end;  // rows of the part
  int first, agents;   // agents of the group
  bool has_w2;         // the last group has w2 and V's output layer as well

  __device__ SecondWork(const Problem& p, const Cut& cut)
      : begin(first_row(p.rows, static_cast<int>(blockIdx.x), cut.second_parts)),
        end(first_row(p.rows, static_cast<int>(blockIdx.x) + 1, cut.second_parts)),
        first(static_cast<int>(blockIdx.y) * cut.agents),
        agents(min(cut.agents, static_cast<int>(p.agents) - first)),
        has_w2(blockIdx.y + 1 == gridDim.y) {}
};

// Queues copies of one tile after the other, zeros where there is no row or no such unit. A thread copies the same
// columns of every so manieth row, so that it goes on from address to address.
template <int kSlots>
class SecondFetch {
  using Tile = SecondTile<kSlots>;
  static constexpr int kUnits = Tile::kUnits;
  // Threads of a row, and rows that all threads together take at a time.
  static constexpr int kHiddenThreads = kHidden / 4, kHiddenRows = kThreads / kHiddenThreads;
  static constexpr int kEmbedThreads = kEmbed / 4, kEmbedRows = kThreads / kEmbedThreads;
  static constexpr int kUnitThreads = kUnits <= 4 ? 4 : 8, kUnitRows = kThreads / kUnitThreads;
  static_assert(kUnits <= 8);

 public:
  __device__ SecondFetch(const Problem& p, const SecondWork& work, int rows)
      : p_(p),
        rows_(rows),
        left_(work.end - work.begin),
        has_w2_(work.has_w2),
        thread_(static_cast<int>(threadIdx.x)),
        hidden_(p.activations + (work.begin + thread_ / kHiddenThreads) * kColumns + thread_ % kHiddenThreads * 4),
        embed_((work.begin + thread_ / kEmbedThreads) * kColumns + kMix + thread_ % kEmbedThreads * 4),
        qs_(p.agent_qs, work.begin + thread_ / kUnitThreads),
        row_(work.begin + thread_ / kUnitThreads) {
    const int u = thread_ % kUnitThreads;
    has_unit_ = u < work.agents || (u == kSlots && has_w2_);
    is_w2_ = u == kSlots;
    unit_ = is_w2_ ? p.agents : work.first + u;
  }

  __device__ __forceinline__ void next(const Tile& to) {
    const int left = static_cast<int>(left_ < rows_ ? left_ : rows_);
    const float* hidden = hidden_;
    for (int r = thread_ / kHiddenThreads; r < rows_; r += kHiddenRows, hidden += kHiddenRows * kColumns) {
      const int at = r * Tile::kHiddenStride + thread_ % kHiddenThreads * 4;
      copy_async(to.h1 + at, hidden, r < left);
      if (has_w2_) copy_async(to.h2 + at, hidden + kHidden2, r < left);
    }
    const float *kept = p_.activations + embed_, *grads = p_.grad_activations + embed_;
    for (int r = thread_ / kEmbedThreads; r < rows_; r += kEmbedRows) {
      const int c = thread_ % kEmbedThreads * 4, at = r * Tile::kEmbedStride + c;
      copy_async(to.grad_mix + at, grads, r < left);
      if (has_w2_) {
        copy_async(to.mix + at, kept, r < left);
        copy_async(to.v + r * kEmbed + c, kept + (kV - kMix), r < left);
      }
      kept += kEmbedRows * kColumns;
      grads += kEmbedRows * kColumns;
    }
    const bool has_signs = p_.positivity == Positivity::abs;
    Walk qs = qs_;
    for (int r = thread_ / kUnitThreads; r < rows_; r += kUnitRows, qs.advance(kUnitRows)) {
      const int i = r * kUnits + thread_ % kUnitThreads;
      const bool inside = r < left && has_unit_;
      const int64_t row = row_ + (r - thread_ / kUnitThreads);
      const float* const scale = is_w2_ ? p_.grad_q_tot + row : *qs + unit_ * p_.agent_qs.column_stride;
      const float* const signs = reinterpret_cast<const float*>(p_.signs + (row * (p_.agents + 1) + unit_) * 2);
      if (thread_ % kUnitThreads < kUnits) {
        float* const pair = reinterpret_cast<float*>(to.scales + i);
        copy_async<4>(pair, scale, inside);
        copy_async<4>(pair + 1, signs + 1, inside && has_signs);
        copy_async<4>(to.positive + i, signs, inside && has_signs);
      }
    }
    left_ -= rows_;
    hidden_ += rows_ * kColumns;
    embed_ += rows_ * kColumns;
    row_ += rows_;
    qs_.advance(rows_);
  }

  // Whether one of the slopes that this thread copied to a tile, of `left` rows, is 0: then neither word has its bit.
  __device__ __forceinline__ bool brought_zero(const Tile& tile, int64_t left) const {
    bool found = false;
    if (p_.positivity == Positivity::abs && has_unit_) {
      const uint32_t none = ~(0xffffffffu >> (kEmbed - p_.embed));
      const int u = thread_ % kUnitThreads;
      for (int r = thread_ / kUnitThreads; r < rows_ && r < left; r += kUnitRows) {
        const int i = r * kUnits + u;
        found |= (__float_as_uint(tile.scales[i].y) | __float_as_uint(tile.positive[i]) | none) != 0xffffffffu;
      }
    }
    return found;
  }

 private:
  const Problem& p_;
  int rows_;
  int64_t left_;
  bool has_w2_;
  int thread_;
  const float* hidden_;
  int64_t embed_;
  Walk qs_;
  int64_t row_, unit_;
  bool has_unit_, is_w2_;
};

// What a lane holds. Tile i of 16 hidden units has as its rows g units 2 g, as its rows g + 8 units 2 g + 1: so two
// operands of a lane are neighbours in memory, and so are two results.
template <int kUnits>
struct SecondSums {
  float weight[kUnits][4][4] = {}, bias[kUnits] = {};
  float v_weight = 0, v_bias = 0;
};

// Rows t and t + 4 of a step, columns 2 g and 2 g + 1 of 16, as operand A; `from` is column 2 g of row t. Operands that
// a lane loads together must be such that the instruction wants in neighbouring registers, or each is moved once more.
template <bool kFull>
__device__ __forceinline__ void load_a(FragmentA<kFull>& a, const float* from, int stride, bool rounded) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const float2 pair = *reinterpret_cast<const float2*>(from + 4 * k * stride);
    a.set(2 * k, Operand<kFull>::of(pair.x, rounded));
    a.set(2 * k + 1, Operand<kFull>::of(pair.y, rounded));
  }
}

template <bool kFull>
__device__ __forceinline__ void load_hidden(FragmentA<kFull> (&a)[4], const float* from, int stride) {
#pragma unroll
  for (int i = 0; i < 4; ++i) load_a(a[i], from + 16 * i, stride, true);
}

// `x` times scale and slope.
template <bool kZeros>
__device__ __forceinline__ float scaled(float x, const float2& scale, const float* positive, int column) {
  const uint32_t negative = __float_as_uint(scale.y);
  float value = x * scale.x;
  if (kZeros && (((negative | __float_as_uint(*positive)) >> column) & 1) == 0) value *= 0;
  return __uint_as_float(__float_as_uint(value) ^ (negative << (31 - column) & 0x80000000u));
}

// Without a branch, so that it may overlap with what else there is to do.
__device__ __forceinline__ float elu(float x) {
  const float below = expm1f(x > 0 ? 0 : x);
  return x > 0 ? x : below;
}

// The steps of a tile that fall to the warp. `kZeros`: a slope may be 0.
template <int kSlots, bool kFull, bool kHasW2, bool kZeros>
__device__ __forceinline__ void add_tile(SecondSums<kSlots + 1>& sums, const SecondTile<kSlots>& tile, int steps,
                                         int slice, int column, int g, int t) {
  constexpr int kHiddenStride = SecondTile<kSlots>::kHiddenStride, kEmbedStride = SecondTile<kSlots>::kEmbedStride;
  constexpr int kUnits = kSlots + 1;
  for (int step = slice; step < steps; step += 2) {
    const int row = step * kStep + t;
    const float2* const scales = tile.scales + row * kUnits;
    const float* const positive = tile.positive + row * kUnits;
    const auto add = [&](int u, const FragmentA<kFull>(&a)[4], float x0, float x1) {
      x0 = scaled<kZeros>(x0, scales[u], positive + u, column);
      x1 = scaled<kZeros>(x1, scales[4 * kUnits + u], positive + 4 * kUnits + u, column);
      sums.bias[u] += x0 + x1;
      const auto b0 = Operand<kFull>::of(x0), b1 = Operand<kFull>::of(x1);
#pragma unroll
      for (int i = 0; i < 4; ++i) multiply(sums.weight[u][i], a[i], b0, b1);
    };
    FragmentA<kFull> h[4];
    load_hidden(h, tile.h1 + row * kHiddenStride + 2 * g, kHiddenStride);
    const float* const grad_mix = tile.grad_mix + row * kEmbedStride + column;
    const float grad0 = grad_mix[0], grad1 = grad_mix[4 * kEmbedStride];
#pragma unroll
    for (int u = 0; u < kSlots; ++u) add(u, h, grad0, grad1);
    if constexpr (kHasW2) {
      load_hidden(h, tile.h2 + row * kHiddenStride + 2 * g, kHiddenStride);
      const float* const mix = tile.mix + row * kEmbedStride + column;
      add(kSlots, h, elu(mix[0]), elu(mix[4 * kEmbedStride]));
    }
  }
}

// Adds the two slices of the rows, and leaves the block's part in memory.
template <int kSlots>
__device__ __forceinline__ void store_part(SecondSums<kSlots + 1>& sums, const SecondWork& work, int64_t units,
                                           float* memory, float* part, int slice, int column, int g, int t) {
  constexpr int kUnits = kSlots + 1, kHalf = kThreads / 2;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  float2* const weights = reinterpret_cast<float2*>(memory) + thread % kHalf;  // [kUnits, 4, 2, kHalf]
  float* const biases = memory + kUnits * kMatrix;                             // [kUnits, 32]
  float* const v = biases + kUnits * kEmbed;                                   // [kWarps, 33]
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    sums.bias[u] += __shfl_xor_sync(kAllLanes, sums.bias[u], 1);
    sums.bias[u] += __shfl_xor_sync(kAllLanes, sums.bias[u], 2);
  }
  __syncthreads();  // the tiles have been read
  if (slice == 1) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&sum)[4] = sums.weight[u][i];
#pragma unroll
        for (int c = 0; c < 2; ++c) weights[((u * 4 + i) * 2 + c) * kHalf] = make_float2(sum[c], sum[2 + c]);
      }
      if (t == 0) biases[u * kEmbed + column] = sums.bias[u];
    }
  }
  v[warp * (kEmbed + 1) + lane] = sums.v_weight;
  if (lane == 0) v[warp * (kEmbed + 1) + kEmbed] = sums.v_bias;
  __syncthreads();
  if (slice == 0) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (u == kSlots ? work.has_w2 : u < work.agents) {
        const int64_t unit = u == kSlots ? units - 1 : work.first + u;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&sum)[4] = sums.weight[u][i];
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float2 other = weights[((u * 4 + i) * 2 + c) * kHalf];
            const int e = column - g + 2 * t + c;
            *reinterpret_cast<float2*>(part + unit * kMatrix + e * kHidden + 16 * i + 2 * g) =
                make_float2(sum[c] + other.x, sum[2 + c] + other.y);
          }
        }
        if (t == 0) {
          part[units * kMatrix + unit * kEmbed + column] = sums.bias[u] + biases[u * kEmbed + column];
        }
      }
    }
  } else if (warp == kWarps - 1 && work.has_w2) {
    float* const to = part + units * (kMatrix + kEmbed);
    for (int e = lane; e < kEmbed + 4; e += kWarp) {  // v_weight, and v_bias padded to 4
      float sum = 0;
      for (int i = 0; i < kWarps && e <= kEmbed; ++i) sum += v[i * (kEmbed + 1) + e];
      to[e] = sum;
    }
  }
}

template <int kSlots, bool kFull>
__global__ void __launch_bounds__(kThreads, 1) second_layer_kernel(const Problem p, const Cut cut) {
  if (kTooOld) return;
  extern __shared__ __align__(16) float memory[];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int g = lane / 4, t = lane % 4, column = warp % 4 * 8 + g, slice = warp / 4;
  const SecondWork work(p, cut);
  const int rows = cut.second_rows;
  const auto stage = [&](int n) {
    return SecondTile<kSlots>(memory + n % kSecondStages * (rows * SecondTile<kSlots>::kRow), rows);
  };
  const auto tiles = static_cast<int>((work.end - work.begin + rows - 1) / rows);
  SecondFetch<kSlots> fetch(p, work, rows);
  for (int n = 0; n < kSecondStages - 1; ++n) {
    if (n < tiles) fetch.next(stage(n));
    end_copies();
  }
  SecondSums<kSlots + 1> sums;
  for (int n = 0; n < tiles; ++n) {
    const SecondTile<kSlots> tile = stage(n);
    const int64_t left = work.end - work.begin - int64_t{n} * rows;
    copies_arrived<kSecondStages - 2>();
    const bool has_zero = __syncthreads_or(fetch.brought_zero(tile, left));
    if (n + kSecondStages - 1 < tiles) fetch.next(stage(n + kSecondStages - 1));
    end_copies();
    const int steps = static_cast<int>((left < rows ? left : rows) + kStep - 1) / kStep;
    if (has_zero) {
      if (work.has_w2) {
        add_tile<kSlots, kFull, true, true>(sums, tile, steps, slice, column, g, t);
      } else {
        add_tile<kSlots, kFull, false, true>(sums, tile, steps, slice, column, g, t);
      }
    } else {
      if (work.has_w2) {
        add_tile<kSlots, kFull, true, false>(sums, tile, steps, slice, column, g, t);
      } else {
        add_tile<kSlots, kFull, false, false>(sums, tile, steps, slice, column, g, t);
      }
    }
    if (work.has_w2) {
      for (int r = warp; r < rows; r += kWarps) {
        const float grad = tile.scales[r * (kSlots + 1) + kSlots].x;
        sums.v_weight += grad * tile.v[r * kEmbed + lane];
        sums.v_bias += grad;
      }
    }
  }
  store_part<kSlots>(sums, work, p.agents + 1, memory, p.parts + blockIdx.x * cut.second_size, slice, column, g, t);
}

// --------------------------------------------------------------------------------------------------- the first layer

constexpr int kFirstStages = 4;
constexpr int kGradStride = kColumns + 8;

// Four warps along the 192 columns of G, two along those of the states.
constexpr int kGradWarps = 4, kGradTiles = kColumns / 16 / kGradWarps;

// A row of the states [0, columns), `kFloats` at a time.
template <int kStates, int kFloats>
__device__ __forceinline__ void copy_states(float* to, const float* from, int columns, bool inside, int lane) {
#pragma unroll
  for (int i = 0; i < kStates; i += kWarp * kFloats) {
    const int c = i + lane * kFloats;
    if (c < columns) copy_async<kFloats * sizeof(float)>(to + c, from + c, inside);
  }
}

// `width`: floats that one copy of the states may take.
template <int kTiles, bool kFull>
__global__ void __launch_bounds__(kThreads, 1) first_layer_kernel(const Problem p, const Cut cut, int width) {
  if (kTooOld) return;
  constexpr int kStates = 16 * kTiles, kStride = kStates + 8;
  extern __shared__ __align__(16) float memory[];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int g = lane / 4, t = lane % 4;
  const int rows = cut.first_rows, stage_size = rows * (kGradStride + kStride);
  const int64_t begin = first_row(p.rows, static_cast<int>(blockIdx.y), cut.first_parts);
  const int64_t end = first_row(p.rows, static_cast<int>(blockIdx.y) + 1, cut.first_parts);
  const auto tiles = static_cast<int>((end - begin + rows - 1) / rows);
  const int64_t start = int64_t{blockIdx.x} * kStates;
  const int columns = static_cast<int>(p.state_dim - start < kStates ? p.state_dim - start : kStates);

  // Behind the states a column of ones, then zeros: no copy writes there.
  for (int i = thread; i < kFirstStages * rows; i += kThreads) {
    float* const row = memory + i / rows * stage_size + rows * kGradStride + i % rows * kStride;
    for (int c = columns < 0 ? 0 : columns; c < kStates; ++c) row[c] = c == columns ? 1 : 0;
  }
  constexpr int kGradThreads = 16, kGradRows = kThreads / kGradThreads;  // of a row; rows at a time
  const float* grads = p.grad_activations + (begin + thread / kGradThreads) * kColumns + thread % kGradThreads * 4;
  Walk states(p.states, begin + warp);
  const auto fetch = [&](int n) {
    float* const grad = memory + n % kFirstStages * stage_size;
    const int64_t left = end - begin - int64_t{n} * rows;
    for (int r = thread / kGradThreads; r < rows; r += kGradRows, grads += kGradRows * kColumns) {
      float* const to = grad + r * kGradStride + thread % kGradThreads * 4;
#pragma unroll
      for (int c = 0; c < kColumns; c += kGradThreads * 4) copy_async(to + c, grads + c, r < left);
    }  // `rows` is a multiple of what one turn takes
    for (int r = warp; r < rows; r += kWarps, states.advance(kWarps)) {
      float* const to = grad + rows * kGradStride + r * kStride;
      const float* const from = *states + start;
      if (width == 4) {
        copy_states<kStates, 4>(to, from, columns, r < left, lane);
      } else if (width == 2) {
        copy_states<kStates, 2>(to, from, columns, r < left, lane);
      } else {
        copy_states<kStates, 1>(to, from, columns, r < left, lane);
      }
    }
  };
  for (int n = 0; n < kFirstStages - 1; ++n) {
    if (n < tiles) fetch(n);
    end_copies();
  }

  float c[kGradTiles][kTiles][4] = {};
  const int grad_column = warp % kGradWarps * (16 * kGradTiles), state_column = warp / kGradWarps * (8 * kTiles);
  for (int n = 0; n < tiles; ++n) {
    copies_arrived<kFirstStages - 2>();
    __syncthreads();
    if (n + kFirstStages - 1 < tiles) fetch(n + kFirstStages - 1);
    end_copies();
    const float* const grad = memory + n % kFirstStages * stage_size + t * kGradStride + grad_column + 2 * g;
    const float* const state =
        memory + n % kFirstStages * stage_size + rows * kGradStride + t * kStride + state_column + g;
    const int64_t left = end - begin - int64_t{n} * rows;
    const int steps = static_cast<int>((left < rows ? left : rows) + kStep - 1) / kStep;
    for (int step = 0; step < steps; ++step) {
      const float* const grad_step = grad + step * kStep * kGradStride;
      const float* const state_step = state + step * kStep * kStride;
      FragmentA<kFull> a[kGradTiles];
#pragma unroll
      for (int i = 0; i < kGradTiles; ++i) load_a(a[i], grad_step + 16 * i, kGradStride, false);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const auto b0 = Operand<kFull>::of(state_step[8 * j]), b1 = Operand<kFull>::of(state_step[4 * kStride + 8 * j]);
#pragma unroll
        for (int i = 0; i < kGradTiles; ++i) multiply(c[i][j], a[i], b0, b1);
      }
    }
  }

  const int stride = cut.columns(), left = columns + 1 - state_column;
  float* const part = p.parts + cut.first_parts_at + blockIdx.y * cut.first_size + start + state_column + 2 * t;
#pragma unroll
  for (int i = 0; i < kGradTiles; ++i) {
    float* const to = part + (grad_column + 16 * i + 2 * g) * stride;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (8 * j + t / 2 * 4 < left) {  // add_parts_kernel reads four at once
        *reinterpret_cast<float2*>(to + 8 * j) = make_float2(c[i][j][0], c[i][j][1]);
        *reinterpret_cast<float2*>(to + stride + 8 * j) = make_float2(c[i][j][2], c[i][j][3]);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------- sums of the parts

// Entry i of a part of the second layer: [A + 1, 32, 64] weights, [A + 1, 32] biases, [32] and [1] of V's output layer.
__device__ void store_second(const Problem& p, int64_t i, float value) {
  const MonotonicWeights<float>& to = p.gradients;
  const int64_t units = p.agents + 1;
  if (i < units * kMatrix) {
    const int64_t unit = i / kMatrix, e = i % kMatrix / kHidden, h = i % kHidden;
    if (e >= p.embed || h >= p.hidden) return;
    (unit == p.agents ? to.w2_weight + e * p.hidden : to.w1_weight + (unit * p.embed + e) * p.hidden)[h] = value;
    return;
  }
  i -= units * kMatrix;
  if (i < units * kEmbed) {
    const int64_t unit = i / kEmbed, e = i % kEmbed;
    if (e < p.embed) (unit == p.agents ? to.w2_bias : to.w1_bias + unit * p.embed)[e] = value;
    return;
  }
  i -= units * kEmbed;
  if (i < p.embed) to.v_weight[i] = value;
  if (i == kEmbed) to.v_bias[0] = value;
}

// Entry (row, column) of the first layer's gradient.
__device__ void store_first(const Problem& p, int row, int64_t column, float value) {
  const MonotonicWeights<float>& to = p.gradients;
  const bool hidden = row < kMix;
  const int within = row % (hidden ? kHidden : kEmbed);
  if (within >= (hidden ? p.hidden : p.embed) || column > p.state_dim) return;
  float* const weight = row < kHidden2 ? to.w1_hidden_weight
                        : hidden       ? to.w2_hidden_weight
                        : row < kV     ? to.b1_weight
                                       : to.v_hidden_weight;
  float* const bias = row < kHidden2 ? to.w1_hidden_bias
                      : hidden       ? to.w2_hidden_bias
                      : row < kV     ? to.b1_bias
                                     : to.v_hidden_bias;
  if (column == p.state_dim) {
    bias[within] = value;
  } else {
    weight[within * p.state_dim + column] = value;
  }
}

// Each lane of a block has four entries, each warp every eighth part.
__global__ void __launch_bounds__(kThreads) add_parts_kernel(const Problem p, const Cut cut) {
  __shared__ float4 sums[kWarps][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  constexpr int kEntries = 4 * kWarp;
  const int64_t second_blocks = (cut.second_size + kEntries - 1) / kEntries;
  const bool is_second = blockIdx.x < second_blocks;
  const int64_t size = is_second ? cut.second_size : cut.first_size;
  const int64_t entry = (is_second ? blockIdx.x : blockIdx.x - second_blocks) * kEntries + 4 * lane;
  const int parts = is_second ? cut.second_parts : cut.first_parts;
  const float* const from = p.parts + (is_second ? 0 : cut.first_parts_at) + entry;
  const int64_t row = is_second ? 0 : entry / cut.columns(), column = is_second ? entry : entry % cut.columns();
  const bool wanted = entry < size && (is_second || column <= p.state_dim);
  float4 sum = {};
  if (wanted) {
#pragma unroll 4
    for (int part = warp; part < parts; part += kWarps) {
      const float4 x = *reinterpret_cast<const float4*>(from + part * size);
      sum.x += x.x;
      sum.y += x.y;
      sum.z += x.z;
      sum.w += x.w;
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || !wanted) return;
  for (int i = 1; i < kWarps; ++i) {
    sum.x += sums[i][lane].x;
    sum.y += sums[i][lane].y;
    sum.z += sums[i][lane].z;
    sum.w += sums[i][lane].w;
  }
  const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (is_second) {
      store_second(p, column + i, values[i]);
    } else {
      store_first(p, static_cast<int>(row), column + i, values[i]);
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- launches

constexpr int kMostAgents = 5;  // with more in a group registers do not suffice to load ahead
constexpr int kTileChoices[] = {2, 4, 7, 11};

int second_row_floats(int slots) { return slots == 3 ? SecondTile<3>::kRow : SecondTile<kMostAgents>::kRow; }
int first_row_floats(int tiles) { return kGradStride + 16 * tiles + 8; }

// One block for every multiprocessor, of which `blocks` share the same rows.
int parts(int64_t rows, int64_t blocks, const Device& device) {
  const int64_t wanted = ceil_div(rows, kFewestRows), most = device.multiprocessors / blocks;
  return static_cast<int>(wanted < 1 || most < 1 ? 1 : wanted < most ? wanted : most);
}

// Rows of a tile, a multiple of 16: so that both slices, and all threads that copy, have the same.
int tile_rows(int most, int stages, int row_floats, const Device& device) {
  const int fit = device.shared_memory / (stages * row_floats * static_cast<int>(sizeof(float))) / 16 * 16;
  return fit < most ? fit : most;
}

Cut cut_up(const MonotonicCudaShape& s, const Device& device) {
  Cut cut;
  cut.groups = static_cast<int>(ceil_div(s.agents, kMostAgents));
  cut.agents = static_cast<int>(ceil_div(s.agents, cut.groups));
  cut.slots = cut.agents <= 3 ? 3 : kMostAgents;
  cut.second_parts = parts(s.rows, cut.groups, device);
  cut.second_rows = tile_rows(64, kSecondStages, second_row_floats(cut.slots), device);
  cut.second_size = (s.agents + 1) * (kMatrix + kEmbed) + kEmbed + 4;

  // Columns of padding cost products; another block cost about as much as four tiles of them, as it reads G again.
  int64_t least = 0;
  for (const int tiles : kTileChoices) {
    const int64_t blocks = ceil_div(s.state_dim + 1, 16 * tiles), cost = blocks * (tiles + 4);
    if (least == 0 || cost < least) {
      least = cost;
      cut.tiles = tiles;
      cut.blocks = static_cast<int>(blocks);
    }
  }
  cut.first_parts = parts(s.rows, cut.blocks, device);
  cut.first_rows = tile_rows(32, kFirstStages, first_row_floats(cut.tiles), device);
  cut.first_size = int64_t{kColumns} * cut.columns();
  cut.first_parts_at = cut.second_parts * cut.second_size;
  return cut;
}

template <int kSlots, bool kFull>
const char* second_layer(const Device& device, const Problem& p, const Cut& cut, void* stream) {
  const int tiles = kSecondStages * cut.second_rows * SecondTile<kSlots>::kRow;
  const int sums = (kSlots + 1) * (kMatrix + kEmbed) + kWarps * (kEmbed + 1);
  return launch<second_layer_kernel<kSlots, kFull>>(device, dim3(cut.second_parts, cut.groups), kThreads,
                                                    (tiles > sums ? tiles : sums) * sizeof(float), stream, p, cut);
}

// Floats of the states that one copy can take.
int copy_width(const StridedRows<float>& states, int64_t columns) {
  const auto fits = [&](int64_t width) {
    return reinterpret_cast<uintptr_t>(states.data) % (width * sizeof(float)) == 0 && columns % width == 0 &&
           states.outer_stride % width == 0 && states.inner_stride % width == 0;
  };
  return fits(4) ? 4 : fits(2) ? 2 : 1;
}

template <int kTiles, bool kFull>
const char* first_layer(const Device& device, const Problem& p, const Cut& cut, void* stream) {
  const int shared = kFirstStages * cut.first_rows * first_row_floats(kTiles);
  return launch<first_layer_kernel<kTiles, kFull>>(device, dim3(cut.blocks, cut.first_parts), kThreads,
                                                   shared * sizeof(float), stream, p, cut,
                                                   copy_width(p.states, p.state_dim));
}

template <bool kFull>
const char* both_layers(const Device& device, const Problem& p, const Cut& cut, void* stream) {
  const auto second = cut.slots == 3 ? second_layer<3, kFull> : second_layer<kMostAgents, kFull>;
  if (const char* error = second(device, p, cut, stream)) return error;
  const auto first = cut.tiles == 2   ? first_layer<2, kFull>
                     : cut.tiles == 4 ? first_layer<4, kFull>
                     : cut.tiles == 7 ? first_layer<7, kFull>
                                      : first_layer<11, kFull>;
  return first(device, p, cut, stream);
}

}  // namespace

int64_t monotonic_parts_cuda(const MonotonicCudaShape& s) { return cut_up(s, current_device()).size(); }

const char* monotonic_backward_weights_cuda(const MonotonicBackwardWeightsCuda& p, void* stream) {
  const Device& device = current_device();
  if (device.capability < 80) return "it needs a GPU of compute capability 8.0 or above";
  const Cut cut = cut_up(p, device);
  const auto layers = p.full_precision ? both_layers<true> : both_layers<false>;
  if (const char* error = layers(device, p, cut, stream)) return error;
  constexpr int kEntries = 4 * kWarp;
  const int64_t blocks = ceil_div(cut.second_size, kEntries) + ceil_div(cut.first_size, kEntries);
  add_parts_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, cut);
  return launched();
}

}  // namespace fastmix
