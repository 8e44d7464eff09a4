// Forward kernels of `recurrent`: the input layer of all rows and steps at once, then one block per few rows that walks
// over the steps.
#pragma once

#include "cuda/recurrent_numbers.h"

namespace fastmix::FASTMIX_ISA {

// ---- What lies in memory ----

// Kept for the backward pass, rows and steps as they come in time: the states before each step and behind the last, the
// outputs of the input layer, both as planes of half precision numbers next to each other, and the unit of each of the
// latter's rows.
struct Saved {
  uint16_t* states;  // [T + 1, R, planes, D]; null where nothing is kept
  uint16_t* x;       // [T, R, planes, D]
  float* x_unit;     // [T, R]

  __host__ __device__ Saved(void* memory, bool with_states, int64_t steps, int64_t rows, int64_t width, int planes) {
    auto* halves = static_cast<uint16_t*>(memory);
    const int64_t step = rows * planes * width;
    states = with_states ? halves : nullptr;
    x = halves + (with_states ? (steps + 1) * step : 0);
    x_unit = reinterpret_cast<float*>(x + steps * step);
  }
};

// Lays arrays out one behind the other, on the host only to learn their size.
class Arrays {
 public:
  __host__ __device__ explicit Arrays(unsigned char* memory) : memory_(memory) {}
  template <class T>
  __host__ __device__ T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(memory_ + bytes_);
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return array;
  }
  __host__ __device__ int64_t bytes() const { return bytes_; }

 private:
  unsigned char* memory_;
  int64_t bytes_ = 0;
};

// Rows are (episode, agent) pairs. Where the results of a row's first step lie, in rows of [B, T, A].
__device__ __forceinline__ int64_t result_row(const RecurrentShape& s, int64_t row) {
  const int64_t episode = row / s.agents;
  return episode * s.steps * s.agents + (row - episode * s.agents);
}

// ---- Input layer ----

// Columns of the input layer's product: observation, one-hot action, one-hot agent and a one, for the bias.
struct InputColumns {
  int actions, agents;  // where these begin
  int all;              // without the one

  __device__ __forceinline__ InputColumns(const RecurrentShape& s, int64_t n_actions)
      : actions(static_cast<int>(s.obs_size)),
        agents(actions + static_cast<int>(n_actions)),
        all(agents + static_cast<int>(s.ids)) {}
  // The column of a row's action, -1 for none.
  __device__ __forceinline__ int action(int64_t action) const {
    return action >= 0 && action < agents - actions ? actions + static_cast<int>(action) : -1;
  }
  __device__ __forceinline__ int agent(uint32_t agent) const {
    return agents < all ? agents + static_cast<int>(agent) : -1;
  }
};

constexpr int kInputRows = 128, kInputColumns = 32, kInputThreads = 256;
constexpr int kInputStride = kInputColumns + 8;  // two neighbours of four rows in different banks

template <int kWidth, int kPlanes>
struct InputMemory {
  float inputs[2][kInputRows][kInputStride];
  float weights[2][kPlanes][kWidth][kInputStride];  // factors of multiply_tf32
  int64_t offset[kInputRows];                       // of an observation
  int action[kInputRows], agent[kInputRows];
};

// x = relu(inputs W1^T + b1) of 128 rows, and each row's unit. A lane has, of a row, kWidth / 4 neighbouring features:
// that is how the weights' rows are ordered in shared memory.
template <int kWidth, int kPlanes>
__global__ void __launch_bounds__(kInputThreads)
    input_kernel(const __grid_constant__ RecurrentCudaForward p, const __grid_constant__ RowIndex index) {
  if (kTooOld) return;
  constexpr int kTiles = kWidth / 8, kWarps = kInputThreads / kLanes, kHeld = kWidth / kWarps;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<InputMemory<kWidth, kPlanes>*>(memory);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  const auto& network = p.network[blockIdx.y];
  const int64_t rows = p.episodes * p.agents, total = rows * p.steps;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kInputRows;
  const InputColumns columns(p, network.actions);

  for (int i = threadIdx.x; i < kInputRows; i += kInputThreads) {
    const RowIndex::Place place = index(first + i < total ? first + i : 0);
    shared.offset[i] = place.offset(p.obs_stride);
    shared.action[i] = -1;
    if (p.last_actions != nullptr) {
      shared.action[i] = columns.action(p.last_actions[place.offset(p.action_stride)]);
    }
    shared.agent[i] = columns.agent(place.agent);
  }
  __syncthreads();

  const auto load_inputs = [&](int buffer, int start) {
    const int k = start + lane;
#pragma unroll 4
    for (int i = warp; i < kInputRows; i += kWarps) {
      float* to = &shared.inputs[buffer][i][lane];
      if (k < columns.actions) {
        copy_async<4>(to, p.obs + shared.offset[i] + k, true);
      } else {
        *to = k == shared.action[i] || k == shared.agent[i] || k == columns.all ? 1.0f : 0.0f;
      }
    }
    end_copies();
  };
  float held[kHeld];  // weights on their way: rounded once, before eight warps read them
  const auto fetch_weights = [&](int start) {
    const int k = start + lane;
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      const int i = warp + n * kWarps, feature = i % 8 / 2 * (kWidth / 4) + i / 8 * 2 + i % 2;
      held[n] = k < columns.all    ? network.weights.fc1_weight[feature * columns.all + k]
                : k == columns.all ? network.weights.fc1_bias[feature]
                                   : 0.0f;
    }
  };
  const auto keep_weights = [&](int buffer) {
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      const Tf32<kPlanes, 1> factors({held[n]});
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        shared.weights[buffer][plane][warp + n * kWarps][lane] = factors.part[plane][0];
      }
    }
  };

  float sums[kTiles][4] = {};
  load_inputs(0, 0);
  fetch_weights(0);
  keep_weights(0);
  int buffer = 0;
  for (int start = 0; start <= columns.all; start += kInputColumns, buffer ^= 1) {
    const bool more = start + kInputColumns <= columns.all;
    if (more) {
      load_inputs(buffer ^ 1, start + kInputColumns);
      fetch_weights(start + kInputColumns);
      copies_arrived<1>();
    } else {
      copies_arrived<0>();
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kInputColumns; k += 8) {
      const float2 upper = *reinterpret_cast<const float2*>(&shared.inputs[buffer][16 * warp + g][k + 2 * t]);
      const float2 lower = *reinterpret_cast<const float2*>(&shared.inputs[buffer][16 * warp + g + 8][k + 2 * t]);
      const Tf32<kPlanes, 4> inputs({upper.x, lower.x, upper.y, lower.y});
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        Tf32<kPlanes, 2> weights;
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          const float* pair = &shared.weights[buffer][plane][8 * tile + g][k + 2 * t];
          const float2 v = *reinterpret_cast<const float2*>(pair);
          weights.part[plane][0] = v.x, weights.part[plane][1] = v.y;
        }
        add_product<kPlanes>(sums[tile], [&](float (&sum)[4]) { multiply(sum, inputs, weights); });
      }
    }
    if (more) keep_weights(buffer ^ 1);
    __syncthreads();
  }

  const Saved saved(network.saved, network.save, p.steps, rows, kWidth, kPlanes);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first + 16 * warp + g + 8 * half;
    float largest = 0;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = sums[tile][2 * half + e];
        x = x <= 0 ? 0.0f : x;  // NaN stays
        largest = fmaxf(largest, x);
      }
    }
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    const float unit = unit_of(largest), scale = inverse(unit);
    uint32_t words[kPlanes][kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float a = sums[tile][2 * half] * scale, b = sums[tile][2 * half + 1] * scale;
      uint32_t planes[kPlanes] = {pack_half(a, b)};
      // The backward pass asks whether they are above zero.
      if (a > 0 && (planes[0] & 0xffffu) == 0) planes[0] |= 1;
      if (b > 0 && (planes[0] >> 16) == 0) planes[0] |= 1u << 16;
      add_rest(planes, a, b);
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) words[plane][tile] = planes[plane];
    }
    if (row >= total) continue;
    if (t == 0) saved.x_unit[row] = unit;
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      auto* to = reinterpret_cast<uint4*>(saved.x + (row * kPlanes + plane) * kWidth + kWidth / 4 * t);
#pragma unroll
      for (int i = 0; i < kTiles; i += 4) {
        to[i / 4] = make_uint4(words[plane][i], words[plane][i + 1], words[plane][i + 2], words[plane][i + 3]);
      }
    }
  }
}

// ---- Walk over the steps ----

// What a cell makes of its sums, in the order of a tile of results.
struct Cell {
  float r[4], z[4], n[4], hn[4];  // gates, and what the reset gate is multiplied with
};

// `inputs` holds the gates' sums over x with all biases but that of `hn`.
template <int kPlanes, int kApart>
__device__ __forceinline__ Cell cell_of(const float (&inputs)[3][4], const Sums<kPlanes, kApart> (&sums)[3],
                                        const float (&unit)[3], const float (&bias)[2]) {
  Cell cell;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    cell.r[i] = sigmoid(inputs[0][i] + sums[0].value(i) * unit[0]);
    cell.hn[i] = sums[2].value(i) * unit[2] + bias[i / 2];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    cell.z[i] = sigmoid(inputs[1][i] + sums[1].value(i) * unit[1]);
    cell.n[i] = tangent<kPlanes>(inputs[2][i] + cell.r[i] * cell.hn[i]);
  }
  return cell;
}

__device__ __forceinline__ void to_array(float (&values)[4], float4 v) {
  values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
}
__device__ __forceinline__ float4& at_byte(float4* array, int bytes) {
  return *reinterpret_cast<float4*>(reinterpret_cast<unsigned char*>(array) + bytes);
}
__device__ __forceinline__ void to_array(uint32_t (&values)[4], uint4 v) {
  values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
}
__device__ __forceinline__ uint4 to_vector(const uint32_t (&values)[4]) {
  return make_uint4(values[0], values[1], values[2], values[3]);
}
__device__ __forceinline__ float4 to_vector(const float (&values)[4]) {
  return make_float4(values[0], values[1], values[2], values[3]);
}

// Tiles of rows of x or of states in shared memory, for as many steps as are on their way or in use, a power of two.
template <int kWidth, int kPlanes>
struct RowRing {
  static constexpr int kTileBytes = kRowsPerTile * kRowBytes<kWidth>;
  unsigned char* bytes;  // [stage][tile][plane][row]
  int tiles, stages;

  __host__ __device__ static int64_t size(int tiles, int stages) {
    return static_cast<int64_t>(stages) * tiles * kPlanes * kTileBytes;
  }
  __device__ __forceinline__ unsigned char* at(int step, int tile) const {
    return bytes + ((step & (stages - 1)) * tiles + tile) * kPlanes * kTileBytes;
  }
  // Copies rows [planes, width] from `from`; those from `valid` on become zeros. 2 * kWidth threads do it, in which
  // every tile takes one piece of 16 bytes each.
  __device__ __forceinline__ void load(int step, const uint16_t* from, int valid, int thread) const {
    constexpr int kPieces = kWidth / 8, kRow = kPlanes * kPieces;
    static_assert(kRowsPerTile * kRow <= 2 * kWidth);
    if (thread >= kRowsPerTile * kRow) return;
    const int piece = thread % kPieces, plane = thread / kPieces % kPlanes, row = thread / kRow;
    unsigned char* to = at(step, 0) + plane * kTileBytes + row * kRowBytes<kWidth> + 16 * piece;
    const uint16_t* source = from + 8 * thread;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const bool exists = kRowsPerTile * tile + row < valid;
      copy_async<16>(to, exists ? source : from, exists);
      to += kPlanes * kTileBytes;
      source += kRowsPerTile * kPlanes * kWidth;
    }
  }
  // Columns 16 * part + 4t ... of row g of a tile.
  static __device__ __forceinline__ void read(uint2 (&other)[kPlanes], const unsigned char* tile, int part, int g,
                                              int t) {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      const unsigned char* row = tile + plane * kTileBytes + g * kRowBytes<kWidth>;
      other[plane] = *reinterpret_cast<const uint2*>(row + 32 * part + 8 * t);
    }
  }
};

// The units of x, in step with a ring of it.
__device__ __forceinline__ void load_units(float* ring, int step, int stages, const float* from, int rows, int valid,
                                           int thread) {
  if (thread >= rows) return;
  copy_async<4>(ring + (step & (stages - 1)) * rows + thread, thread < valid ? from + thread : from, thread < valid);
}

// Shared by both walks: what warp `slice` makes of x for the gates of its 16 features, sent to the lanes that need it.
template <int kWidth, int kPlanes>
struct InputGates {
  GateWeights<kWidth, kPlanes> w;
  float bias[3][2];

  __device__ __forceinline__ InputGates(const RecurrentWeights<const float>& weights, int slice, int g, int t) {
    w.template load<Rows<kWidth>>(weights.weight_ih, slice, g, t);
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int feature = gate * kWidth + 16 * slice + 2 * g + e;
        bias[gate][e] = weights.bias_ih[feature] + (gate < 2 ? weights.bias_hh[feature] : 0.0f);
      }
    }
  }
  // From a tile of a ring; `units` are those of its rows 2t and 2t + 1.
  __device__ __forceinline__ void send(float4* to, const unsigned char* x, float2 units, int lane) const {
    Sums<kPlanes> sums[3];
#pragma unroll
    for (int s = 0; s < kWidth / 16; ++s) {
      uint2 other[kPlanes];
      RowRing<kWidth, kPlanes>::read(other, x, s, lane / 4, lane % 4);
#pragma unroll
      for (int gate = 0; gate < 3; ++gate) sums[gate].add(w.gate[gate].part[s], s, other);
    }
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) {
      const float unit[2] = {w.unit[gate] * units.x, w.unit[gate] * units.y};
      float values[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = sums[gate].value(i) * unit[i % 2] + bias[gate][i / 2];
      to[gate * kLanes + lane] = to_vector(values);
    }
  }
};

constexpr int kForwardStages = 4;

template <int kWidth, int kPlanes>
struct ForwardMemory {
  static constexpr int kSlices = kWidth / 16;
  Tile<kPlanes, kSlices>* states;  // [2][tiles]: before and behind a step
  float4* gates;                   // [2][tiles][slice][gate][lane]
  float4* state;                   // [tiles][slice][lane], in full precision, each lane its own
  RowRing<kWidth, kPlanes> x;
  float* x_unit;               // [stage][rows]
  int64_t* result;             // [rows]
  uint4* fc2;                  // [16 outputs][slice][plane][lane]
  float *fc2_unit, *fc2_bias;  // [16 outputs], [outputs]
  int64_t bytes;

  __host__ __device__ ForwardMemory(unsigned char* memory, int tiles, int output_tiles) {
    Arrays arrays(memory);
    const int rows = tiles * kRowsPerTile;
    states = arrays.take<Tile<kPlanes, kSlices>>(2 * tiles);
    gates = arrays.take<float4>(2 * tiles * kSlices * 3 * kLanes);
    state = arrays.take<float4>(tiles * kSlices * kLanes);
    x = {arrays.take<unsigned char>(x.size(tiles, kForwardStages)), tiles, kForwardStages};
    x_unit = arrays.take<float>(kForwardStages * rows);
    result = arrays.take<int64_t>(rows);
    fc2 = arrays.take<uint4>(output_tiles * kPlanes * kSlices * kLanes);
    fc2_unit = arrays.take<float>(output_tiles);
    fc2_bias = arrays.take<float>(16 * output_tiles);
    bytes = arrays.bytes();
  }
};

// Half of the warps carry the states of 16 features each from step to step. The other half work around them: they make
// the gates' sums over x one step ahead, and from the states one step behind the outputs, and copy both ways. All meet
// once per step.
template <int kWidth, int kPlanes>
__global__ void __launch_bounds__(4 * kWidth, 1)
    forward_kernel(const __grid_constant__ RecurrentCudaForward p, int tiles) {
  if (kTooOld) return;
  constexpr int kSlices = kWidth / 16, kThreads = 4 * kWidth;
  extern __shared__ __align__(16) unsigned char memory[];
  const int lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  const int warp = threadIdx.x / kLanes, slice = warp % kSlices;
  const TileOffsets at(g, t);
  const auto& network = p.network[blockIdx.y];
  const int outputs = network.q == nullptr ? 0 : static_cast<int>(network.outputs), output_tiles = (outputs + 15) / 16;
  const ForwardMemory<kWidth, kPlanes> shared(memory, tiles, output_tiles);
  const int64_t rows = p.episodes * p.agents, first = static_cast<int64_t>(blockIdx.x) * tiles * kRowsPerTile;
  const int valid = static_cast<int>(min(rows - first, static_cast<int64_t>(tiles * kRowsPerTile)));
  const int steps = static_cast<int>(p.steps);
  const Saved saved(network.saved, network.save, steps, rows, kWidth, kPlanes);

  for (int i = threadIdx.x; i < tiles * kRowsPerTile; i += kThreads) {
    shared.result[i] = i < valid ? result_row(p, first + i) : 0;
  }

  if (warp < kSlices) {
    GateWeights<kWidth, kPlanes> w;
    w.template load<Rows<kWidth>>(network.weights.weight_hh, slice, g, t);
    float bias[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) bias[e] = network.weights.bias_hh[2 * kWidth + 16 * slice + 2 * g + e];

    int own = (slice * 3 * kLanes + lane) * 16, own_state = (slice * kLanes + lane) * 16;  // bytes within a tile
    keep(own);
    keep(own_state);
    const auto send = [&](Tile<kPlanes, kSlices>* states, int tile, const float (&h)[4]) {
      at_byte(shared.state + tile * kSlices * kLanes, own_state) = to_vector(h);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        uint32_t planes[kPlanes];
        to_planes(planes, h[c], h[2 + c]);
        states[tile].write(slice, c, at, planes);
      }
    };
    // Stores this lane's part of a tile into rows of [.., D] at `row(c) * D`.
    const auto store = [&](float* to, int tile, const float (&h)[4], const auto& row) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int i = kRowsPerTile * tile + 2 * t + c;
        if (i >= valid) continue;
        float* features = to + row(i) * kWidth + 16 * slice + 2 * g;
        features[0] = h[c];
        features[1] = h[2 + c];
      }
    };
    const auto multiply_states = [&](Sums<kPlanes, 2>(&sums)[3], const Tile<kPlanes, kSlices>& state) {
#pragma unroll
      for (int gate = 0; gate < 3; ++gate) sums[gate] = Sums<kPlanes, 2>();
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        uint2 other[kPlanes];
        state.read(other, s, at);
        sums[0].add(w.gate[0].part[s], s, other);
        sums[2].add(w.gate[2].part[s], s, other);
        sums[1].add(w.gate[1].part[s], s, other);
      }
    };

    for (int tile = 0; tile < tiles; ++tile) {
      float h[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = kRowsPerTile * tile + 2 * t + i % 2;
        if (network.hidden == nullptr || row >= valid) continue;
        h[i] = network.hidden[(first + row) * kWidth + 16 * slice + 2 * g + i / 2];
      }
      send(shared.states, tile, h);
    }
    meet(kThreads);  // for the others
    meet(kThreads);
    Tile<kPlanes, kSlices>*before = shared.states, *behind = shared.states + tiles;
    float4* gates = shared.gates;
    for (int step = 0; step < steps; ++step) {
      Sums<kPlanes, 2> sums[3], ahead[3];
      multiply_states(ahead, before[0]);
      for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
        for (int gate = 0; gate < 3; ++gate) sums[gate] = ahead[gate];
        if (tile + 1 < tiles) multiply_states(ahead, before[tile + 1]);  // under way while the gates are computed
        float inputs[3][4], h[4];
        const float4* from = &at_byte(gates + tile * kSlices * 3 * kLanes, own);
#pragma unroll
        for (int gate = 0; gate < 3; ++gate) to_array(inputs[gate], from[gate * kLanes]);
        to_array(h, at_byte(shared.state + tile * kSlices * kLanes, own_state));
        const Cell cell = cell_of(inputs, sums, w.unit, bias);
#pragma unroll
        for (int i = 0; i < 4; ++i) h[i] = cell.n[i] + cell.z[i] * (h[i] - cell.n[i]);
        send(behind, tile, h);
        if (network.hidden_states != nullptr) {
          store(network.hidden_states, tile, h, [&](int i) { return shared.result[i] + step * p.agents; });
        }
      }
      auto* free = before;
      before = behind;
      behind = free;
      gates = shared.gates + (step + 1) % 2 * tiles * kSlices * 3 * kLanes;
      meet(kThreads);
    }
    for (int tile = 0; tile < tiles; ++tile) {
      float h[4];
      to_array(h, shared.state[(tile * kSlices + slice) * kLanes + lane]);
      store(network.last_hidden, tile, h, [&](int i) { return first + i; });
    }
    return;
  }

  const InputGates<kWidth, kPlanes> input_gates(network.weights, slice, g, t);
  for (int tile = slice; tile < output_tiles; tile += kSlices) {
    const int output = 16 * tile + 2 * g;
    const auto read = [&](float (&values)[2][4], int s) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = output + i / 4, column = 16 * s + Neighbours()(t, i % 4);
        values[i / 4][i % 4] = row < outputs ? network.weights.fc2_weight[row * kWidth + column] : 0.0f;
      }
    };
    Weights<kPlanes, kSlices> w;
    const float unit = load_weights(w, read);
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        shared.fc2[((tile * kSlices + s) * kPlanes + plane) * kLanes + lane] = to_vector(w.part[s][plane]);
      }
    }
    if (t == 0) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        shared.fc2_bias[output + e] = output + e < outputs ? network.weights.fc2_bias[output + e] : 0.0f;
      }
      shared.fc2_unit[tile] = unit;
    }
  }

  const int thread = threadIdx.x - kThreads / 2;
  // What moves on with the steps.
  const uint16_t* x_from = saved.x + first * kPlanes * kWidth;
  const float* unit_from = saved.x_unit + first;
  uint16_t* states_to = saved.states + (first + g) * kPlanes * kWidth + 16 * slice + 4 * t;
  float* q_to = network.q;
  const auto load = [&](int step) {
    if (step < steps) {
      shared.x.load(step, x_from, valid, thread);
      load_units(shared.x_unit, step, kForwardStages, unit_from, tiles * kRowsPerTile, valid, thread);
      x_from += rows * kPlanes * kWidth;
      unit_from += rows;
    }
    end_copies();
  };
  const auto send_gates = [&](int step) {
    if (step >= steps) return;
    float4* gates = shared.gates + (step % 2 * tiles * kSlices + slice) * 3 * kLanes;
    const float* unit = shared.x_unit + step % kForwardStages * tiles * kRowsPerTile + 2 * t;
    const unsigned char* x = shared.x.at(step, 0);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      input_gates.send(gates, x, *reinterpret_cast<const float2*>(unit), lane);
      gates += kSlices * 3 * kLanes;
      unit += kRowsPerTile;
      x += kPlanes * shared.x.kTileBytes;
    }
  };
  // The state before a step goes to memory, and the output it belongs to, that of the step before.
  const auto leave = [&](int step) {
    const Tile<kPlanes, kSlices>* states = shared.states + step % 2 * tiles;
    if (saved.states != nullptr) {
      uint16_t* to = states_to;
#pragma unroll 1
      for (int tile = 0; tile < tiles && kRowsPerTile * tile + g < valid; ++tile) {
        uint2 planes[kPlanes];
        states[tile].read(planes, slice, at);
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          *reinterpret_cast<uint2*>(to + plane * kWidth) = planes[plane];
        }
        to += kRowsPerTile * kPlanes * kWidth;
      }
      states_to += rows * kPlanes * kWidth;
    }
    if (step == 0) return;
#pragma unroll 1
    for (int m = slice; m < output_tiles; m += kSlices) {
      const uint4* weights = shared.fc2 + m * kSlices * kPlanes * kLanes + lane;
      const int output = 16 * m + 2 * g;
      const float unit = shared.fc2_unit[m];
      const float2 bias = *reinterpret_cast<const float2*>(shared.fc2_bias + output);
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        Sums<kPlanes> sums;
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
          uint2 other[kPlanes];
          states[tile].read(other, s, at);
          uint32_t w[kPlanes][4];
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane) to_array(w[plane], weights[(s * kPlanes + plane) * kLanes]);
          sums.add(w, s, other);
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int row = kRowsPerTile * tile + 2 * t + c;
          if (row >= valid) continue;
          float* to = q_to + shared.result[row] * outputs + output;
          if (output < outputs) to[0] = sums.value(c) * unit + bias.x;
          if (output + 1 < outputs) to[1] = sums.value(2 + c) * unit + bias.y;
        }
      }
    }
    q_to += p.agents * outputs;
  };

  for (int step = 0; step < kForwardStages - 1; ++step) load(step);
  copies_arrived<kForwardStages - 2>();
  meet(kThreads);
  send_gates(0);
  load(kForwardStages - 1);
  copies_arrived<kForwardStages - 2>();
  meet(kThreads);
  for (int step = 0; step < steps; ++step) {
    load(step + kForwardStages);
    leave(step);  // first, while the others have the matrix units
    send_gates(step + 1);
    copies_arrived<kForwardStages - 2>();
    meet(kThreads);
  }
  leave(steps);
  copies_arrived<0>();
}

}  // namespace fastmix::FASTMIX_ISA
