// Backward kernels of `recurrent`: one block per few rows walks back over the steps and leaves the gradients of the
// gates' sums; from those come the weights' gradients, as products over all rows and steps, and a sum over blocks.
#pragma once

#include "cuda/recurrent_forward.h"

namespace fastmix::FASTMIX_ISA {

// ---- What lies in memory ----

// Gradients of the sums in the gates, four of each feature: `new` as x sees it, reset, update, `new` as the state sees
// it (which is the first times the reset gate). The first three belong to x, the last three to the state.
constexpr int kGradients = 4;

// Where the pieces of a block's sums over its rows lie, for all weights but the input layer's.
struct StatesPart {
  int64_t input, state, input_bias, state_bias, output, output_bias, size;

  __host__ __device__ StatesPart(int64_t width, int64_t outputs) {
    input = 0;
    state = input + 3 * width * width;
    input_bias = state + 3 * width * width;
    state_bias = input_bias + 3 * width;
    output = state_bias + 3 * width;
    output_bias = output + outputs * width;
    size = output_bias + outputs;
  }
};

// Columns of the input layer's weights whose gradient one block adds up.
__host__ __device__ constexpr int share_of(int width) { return 4 * width; }

// Of one network, between the kernels.
struct Work {
  uint16_t* gradients;  // [T, R, planes, kGradients, D], in units of
  float* unit;          // [T, R]
  float* largest;       // [block of the walk][2]: of these units, and of x's
  float* states_part;   // [block][StatesPart]
  float* inputs_part;   // [share][block][D][columns of a share]
};

// Sizes of the launches, the same for all networks.
struct BackwardPlan {
  int tiles, walks;           // of a block that walks, and how many such blocks
  int stages;                 // of its copies, 2 or 4
  int states_blocks;          // of the gradients' kernel, for the weights that see states
  int inputs_blocks, shares;  // and for each share of the input layer's
  int64_t network_bytes;      // of the workspace

  __host__ __device__ Work work(unsigned char* memory, const RecurrentCuda& s, int planes, int64_t outputs,
                                int64_t* bytes = nullptr) const {
    const int64_t rows = s.episodes * s.agents * s.steps, width = s.hidden_size;
    Arrays arrays(memory);
    Work work;
    work.gradients = arrays.take<uint16_t>(rows * planes * kGradients * width);
    work.unit = arrays.take<float>(rows);
    work.largest = arrays.take<float>(2 * walks);
    work.states_part = arrays.take<float>(states_blocks * StatesPart(width, outputs).size);
    work.inputs_part = arrays.take<float>(static_cast<int64_t>(shares) * inputs_blocks * width * share_of(width));
    if (bytes != nullptr) *bytes = arrays.bytes();
    return work;
  }
  __device__ __forceinline__ Work work_of(const RecurrentCudaBackward& p, int network, int planes) const {
    auto* memory = static_cast<unsigned char*>(p.workspace) + network * network_bytes;
    return work(memory, p, planes, outputs_of(p.network[network]));
  }
  // None without a gradient of theirs.
  __host__ __device__ static int outputs_of(const RecurrentCudaBackward::Network& network) {
    return network.grad_q == nullptr ? 0 : static_cast<int>(network.outputs);
  }
};

// Floats from row to row: those of four rows that a product reads at once lie in different banks.
__host__ __device__ inline int row_stride(int columns) { return columns + (40 - columns % 32) % 32; }
__host__ __device__ inline int output_stride(int outputs) { return row_stride((outputs + 15) / 16 * 16); }

// ---- Walk back over the steps ----

constexpr int kSlopes = 5;  // of a cell: see slopes_of

// What the gradient of a state is multiplied with: z and r, then what makes the gradient of the new gate's sum of it,
// the reset gate's sum of that, and the update gate's sum of it again.
__device__ __forceinline__ void slopes_of(float (&slopes)[kSlopes][4], const Cell& cell, const float (&before)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float z = cell.z[i], r = cell.r[i], n = cell.n[i];
    slopes[0][i] = z;
    slopes[1][i] = r;
    slopes[2][i] = (1 - z) * (1 - n * n);
    slopes[3][i] = cell.hn[i] * (r * (1 - r));
    slopes[4][i] = (before[i] - n) * (z * (1 - z));
  }
}

template <int kWidth, int kPlanes>
struct BackwardMemory {
  static constexpr int kSlices = kWidth / 16;
  float4* slopes;                                  // [2][tiles][slice][kSlopes][lane]
  float4* gates;                                   // [2][tiles][slice][gate][lane]: sums over x
  float4* incoming;                                // [2][tiles][slice][lane]: the states' gradients from outside
  float4* carried;                                 // [tiles][slice][lane]: from the step behind, past its gates
  Tile<kPlanes, kGradients * kSlices>* gradients;  // [2][tiles]: of the gates' sums
  float* unit;                                     // [2][tiles], of these
  float* largest;                                  // [2][tiles][slice], of what the next unit has to be for
  RowRing<kWidth, kPlanes> x, states;
  float* x_unit;                 // [stage][rows]
  float* grad_q;                 // [stage][rows][output_stride]
  float* grad_states;            // [stage][rows][D]
  float4* fc2;                   // [8 outputs][slice][plane][lane]
  int64_t *result, *grad_q_row;  // [rows]
  int64_t bytes;

  __host__ __device__ BackwardMemory(unsigned char* memory, int tiles, int stages, int outputs, bool with_states) {
    Arrays arrays(memory);
    const int rows = tiles * kRowsPerTile;
    slopes = arrays.take<float4>(2 * tiles * kSlices * kSlopes * kLanes);
    gates = arrays.take<float4>(2 * tiles * kSlices * 3 * kLanes);
    incoming = arrays.take<float4>(2 * tiles * kSlices * kLanes);
    carried = arrays.take<float4>(tiles * kSlices * kLanes);
    gradients = arrays.take<Tile<kPlanes, kGradients * kSlices>>(2 * tiles);
    unit = arrays.take<float>(2 * tiles);
    largest = arrays.take<float>(2 * tiles * kSlices);
    x = {arrays.take<unsigned char>(x.size(tiles, stages)), tiles, stages};
    states = {arrays.take<unsigned char>(states.size(tiles, stages)), tiles, stages};
    x_unit = arrays.take<float>(stages * rows);
    grad_q = arrays.take<float>(outputs == 0 ? 0 : stages * rows * output_stride(outputs));
    grad_states = arrays.take<float>(with_states ? stages * rows * kWidth : 0);
    fc2 = arrays.take<float4>((outputs + 7) / 8 * kSlices * kPlanes * kLanes);
    result = arrays.take<int64_t>(rows);
    grad_q_row = arrays.take<int64_t>(rows);
    bytes = arrays.bytes();
  }
};

template <int kSlices>
__device__ __forceinline__ float largest_of(const float* slices) {
  float largest = slices[0];
#pragma unroll
  for (int i = 1; i < kSlices; ++i) largest = fmaxf(largest, slices[i]);
  return largest;
}

// A third of the warps carry the gradient of the state from step to step, 16 features each. The second third works on x
// and on what comes from outside: it makes the gates' sums over x and the incoming gradients two steps ahead, and
// copies the results away. The last third makes the gates once more, one step ahead, and their slopes, so that four
// multiplications are left to do between two products. All meet once per step.
//
// Gradients may be of any size, and half precision numbers not. Their unit comes from the largest gradient of the
// tile's states one step later, and of what comes in: it may be off by the growth of one step, for which there are 15
// powers of two.
template <int kWidth, int kPlanes>
__global__ void __launch_bounds__(6 * kWidth, 1)
    backward_kernel(const __grid_constant__ RecurrentCudaBackward p, const __grid_constant__ BackwardPlan plan) {
  if (kTooOld) return;
  constexpr int kSlices = kWidth / 16, kThreads = 6 * kWidth, kThird = 2 * kWidth;
  extern __shared__ __align__(16) unsigned char memory[];
  const int lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  const int role = threadIdx.x / kThird, thread = threadIdx.x % kThird, slice = thread / kLanes;
  const TileOffsets at(g, t);
  const auto& network = p.network[blockIdx.y];
  const int tiles = plan.tiles, tile_rows = tiles * kRowsPerTile;
  const int outputs = plan.outputs_of(network);
  const BackwardMemory<kWidth, kPlanes> shared(memory, tiles, plan.stages, outputs,
                                               network.grad_hidden_states != nullptr);
  const int64_t rows = p.episodes * p.agents, first = static_cast<int64_t>(blockIdx.x) * tile_rows;
  const int valid = static_cast<int>(min(rows - first, static_cast<int64_t>(tile_rows)));
  const int steps = static_cast<int>(p.steps), stages = plan.stages, stride = output_stride(outputs);
  const Saved saved(const_cast<void*>(network.saved), true, steps, rows, kWidth, kPlanes);
  const Work work = plan.work_of(p, blockIdx.y, kPlanes);

  for (int i = threadIdx.x; i < tile_rows; i += kThreads) {
    const int64_t row = i < valid ? first + i : 0, episode = row / p.agents;
    shared.result[i] = result_row(p, row);
    shared.grad_q_row[i] = episode * network.grad_q_stride[0] + (row - episode * p.agents) * network.grad_q_stride[2];
  }
  // Rows and outputs that do not exist are never copied.
  for (int i = threadIdx.x; i < (outputs == 0 ? 0 : stages * tile_rows * stride); i += kThreads) shared.grad_q[i] = 0;
  for (int i = threadIdx.x; network.grad_hidden_states != nullptr && i < stages * tile_rows * kWidth; i += kThreads) {
    shared.grad_states[i] = 0;
  }
  meet(kThreads);

  if (role == 0) {
    using Gradients = Tile<kPlanes, kGradients * kSlices>;
    GateWeights<kWidth, kPlanes> w;
    w.template load<Columns<kWidth, Neighbours>>(network.weights.weight_hh, slice, g, t);
    const auto multiply_gradients = [&](Sums<kPlanes>(&sums)[3], const Gradients& gradients) {
#pragma unroll
      for (int gate = 0; gate < 3; ++gate) sums[gate] = Sums<kPlanes>();
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
#pragma unroll
        for (int gate = 0; gate < 3; ++gate) {
          uint2 other[kPlanes];
          gradients.read(other, (1 + gate) * kSlices + s, at);
          sums[gate].add(w.gate[gate].part[s], s, other);
        }
      }
    };
    int own = (slice * kLanes + lane) * 16, own_slopes = (slice * kSlopes * kLanes + lane) * 16;  // bytes within a tile
    keep(own);
    keep(own_slopes);
    // What comes to the state behind step `step` of the walk from the step before, and adds up there.
    const auto arrive = [&](float (&dh)[4], const Sums<kPlanes>(&sums)[3], int tile, int step) {
      to_array(dh, at_byte(shared.carried + tile * kSlices * kLanes, own));
      if (step == 0) return;
      const float unit = shared.unit[(step + 1) % 2 * tiles + tile];
#pragma unroll
      for (int gate = 0; gate < 3; ++gate) {
        const float both = w.unit[gate] * unit;
#pragma unroll
        for (int i = 0; i < 4; ++i) dh[i] += sums[gate].value(i) * both;
      }
    };
    // Leaves what goes on past the gates, with what comes in from outside at step `step`, and the largest of that and
    // of `dh`.
    const auto carry = [&](float (&carried)[4], const float (&dh)[4], int tile, int step) {
      float largest = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(dh[i]));
      if (step < steps) {
        float incoming[4];
        to_array(incoming, at_byte(shared.incoming + (step % 2 * tiles + tile) * kSlices * kLanes, own));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          largest = fmaxf(largest, fabsf(incoming[i]));
          carried[i] += incoming[i];
        }
      }
      at_byte(shared.carried + tile * kSlices * kLanes, own) = to_vector(carried);
#pragma unroll
      for (int bit = 1; bit < kLanes; bit *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, bit));
      }
      if (lane == 0) shared.largest[((step + 1) % 2 * tiles + tile) * kSlices + slice] = largest;
    };

    float largest_unit = 0;
    meet(kThreads);
    meet(kThreads);
    for (int tile = 0; tile < tiles; ++tile) {
      float dh[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = kRowsPerTile * tile + 2 * t + i % 2;
        if (network.grad_last_hidden == nullptr || row >= valid) continue;
        dh[i] = network.grad_last_hidden[(first + row) * kWidth + 16 * slice + 2 * g + i / 2];
      }
      float carried[4] = {dh[0], dh[1], dh[2], dh[3]};
      carry(carried, dh, tile, 0);
    }
    meet(kThreads);
    Gradients *later = shared.gradients + tiles, *earlier = shared.gradients;
    for (int step = 0; step < steps; ++step) {
      const int now = step % 2;
      for (int tile = 0; tile < tiles; ++tile) {
        Sums<kPlanes> sums[3];
        if (step > 0) multiply_gradients(sums, later[tile]);
        const float unit = unit_of(largest_of<kSlices>(shared.largest + ((1 - now) * tiles + tile) * kSlices));
        largest_unit = fmaxf(largest_unit, unit);
        if (threadIdx.x == 0) shared.unit[now * tiles + tile] = unit;
        const float scale = inverse(unit);
        const float4* from = &at_byte(shared.slopes + (now * tiles + tile) * kSlices * kSlopes * kLanes, own_slopes);
        float slopes[kSlopes][4], dh[4], gradients[kGradients][4], carried[4];
#pragma unroll
        for (int i = 0; i < kSlopes; ++i) to_array(slopes[i], from[i * kLanes]);
        arrive(dh, sums, tile, step);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          carried[i] = dh[i] * slopes[0][i];
          const float scaled = dh[i] * scale;
          gradients[0][i] = scaled * slopes[2][i];
          gradients[1][i] = gradients[0][i] * slopes[3][i];
          gradients[2][i] = scaled * slopes[4][i];
          gradients[3][i] = gradients[0][i] * slopes[1][i];
        }
#pragma unroll
        for (int gate = 0; gate < kGradients; ++gate) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            uint32_t planes[kPlanes];
            to_planes(planes, gradients[gate][c], gradients[gate][2 + c]);
            earlier[tile].write(gate * kSlices + slice, c, at, planes);
          }
        }
        carry(carried, dh, tile, step + 1);
      }
      Gradients* free = later;
      later = earlier;
      earlier = free;
      meet(kThreads);
    }
    for (int tile = 0; network.grad_hidden != nullptr && tile < tiles; ++tile) {
      Sums<kPlanes> sums[3];
      multiply_gradients(sums, later[tile]);
      float dh[4];
      arrive(dh, sums, tile, steps);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = kRowsPerTile * tile + 2 * t + i % 2;
        if (row < valid) network.grad_hidden[(first + row) * kWidth + 16 * slice + 2 * g + i / 2] = dh[i];
      }
    }
    if (threadIdx.x == 0) work.largest[2 * blockIdx.x] = largest_unit;
    return;
  }

  // Copies come in groups, of which `load(i)` begins the i-th and wait(true) waits for the first of all stages; after
  // that, wait(false) in every step waits for one more.
  const auto wait = [&](bool first_of_all) {
    if (stages == 4) {
      first_of_all ? copies_arrived<3>() : copies_arrived<2>();
    } else {
      first_of_all ? copies_arrived<1>() : copies_arrived<0>();
    }
  };

  if (role == 1) {
    const InputGates<kWidth, kPlanes> input_gates(network.weights, slice, g, t);
    const int output_steps = (outputs + 7) / 8;
    for (int k = 0; k < output_steps; ++k) {
      float values[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int output = 8 * k + 2 * t + i / 2;
        values[i] = output < outputs ? network.weights.fc2_weight[output * kWidth + 16 * slice + 2 * g + i % 2] : 0.0f;
      }
      const Tf32<kPlanes, 4> weights(values);
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        const auto& part = weights.part[plane];
        shared.fc2[((k * kSlices + slice) * kPlanes + plane) * kLanes + lane] =
            make_float4(part[0], part[1], part[2], part[3]);
      }
    }

    // What moves back with the steps, and what does not.
    constexpr int kPerRow = 16;  // threads that copy the gradients of a row's outputs
    const int64_t last = (steps - 1) * rows + first;
    int64_t row_from = last, row_to = last;
    const float* grad_q_from = network.grad_q + (steps - 1) * network.grad_q_stride[1];
    const auto load_step = [&](int step) {
      if (step >= steps) return;
      const int stage = step & (stages - 1);
      shared.x.load(step, saved.x + row_from * kPlanes * kWidth, valid, thread);
      load_units(shared.x_unit, step, stages, saved.x_unit + row_from, tile_rows, valid, thread);
#pragma unroll 1
      for (int i = thread / kPerRow; outputs > 0 && i < valid; i += kThird / kPerRow) {
        float* to = shared.grad_q + (stage * tile_rows + i) * stride;
        const float* from = grad_q_from + shared.grad_q_row[i] + thread % kPerRow * network.grad_q_stride[3];
#pragma unroll 1
        for (int output = thread % kPerRow; output < outputs; output += kPerRow) {
          copy_async<4>(to + output, from, true);
          from += kPerRow * network.grad_q_stride[3];
        }
      }
#pragma unroll 1
      for (int i = thread; network.grad_hidden_states != nullptr && i < valid * kWidth; i += kThird) {
        const int64_t from = (shared.result[i / kWidth] + (steps - 1 - step) * p.agents) * kWidth + i % kWidth;
        copy_async<4>(shared.grad_states + stage * tile_rows * kWidth + i, network.grad_hidden_states + from, true);
      }
      row_from -= rows;
      grad_q_from -= network.grad_q_stride[1];
    };
    // What this third works on lies one step further ahead than its group.
    const auto load = [&](int step) {
      load_step(step + 1);
      end_copies();
    };
    float largest_unit = 0;
    const auto send_gates = [&](int step) {
      if (step >= steps) return;
      float4* gates = shared.gates + (step % 2 * tiles * kSlices + slice) * 3 * kLanes;
      const float* unit = shared.x_unit + (step & (stages - 1)) * tile_rows + 2 * t;
      const unsigned char* x = shared.x.at(step, 0);
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        const float2 units = *reinterpret_cast<const float2*>(unit);
        largest_unit = fmaxf(largest_unit, fmaxf(units.x, units.y));
        input_gates.send(gates, x, units, lane);
        gates += kSlices * 3 * kLanes;
        unit += kRowsPerTile;
        x += kPlanes * shared.x.kTileBytes;
      }
    };
    const auto send_incoming = [&](int step) {
      if (step >= steps) return;
      const int stage = step & (stages - 1);
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        float values[4] = {};
        const float* grad_q = shared.grad_q + (stage * tile_rows + kRowsPerTile * tile + g) * stride + 2 * t;
#pragma unroll 2
        for (int k = 0; k < output_steps; ++k) {
          const float2 pair = *reinterpret_cast<const float2*>(grad_q + 8 * k);
          Tf32<kPlanes, 4> weights;
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane) {
            const float4 v = shared.fc2[((k * kSlices + slice) * kPlanes + plane) * kLanes + lane];
            auto& part = weights.part[plane];
            part[0] = v.x, part[1] = v.y, part[2] = v.z, part[3] = v.w;
          }
          multiply(values, weights, Tf32<kPlanes, 2>({pair.x, pair.y}));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (network.grad_hidden_states == nullptr) break;
          const int row = kRowsPerTile * tile + 2 * t + i % 2;
          values[i] += shared.grad_states[(stage * tile_rows + row) * kWidth + 16 * slice + 2 * g + i / 2];
        }
        shared.incoming[((step % 2 * tiles + tile) * kSlices + slice) * kLanes + lane] = to_vector(values);
      }
    };
    const auto leave = [&](int step) {
      const auto* gradients = shared.gradients + step % 2 * tiles;
      uint16_t* to = work.gradients + (row_to + g) * kPlanes * kGradients * kWidth + 16 * slice + 4 * t;
#pragma unroll 1
      for (int tile = 0; tile < tiles && kRowsPerTile * tile + g < valid; ++tile, ++gradients) {
#pragma unroll
        for (int gate = 0; gate < kGradients; ++gate) {
          uint2 planes[kPlanes];
          gradients->read(planes, gate * kSlices + slice, at);
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane) {
            *reinterpret_cast<uint2*>(to + (plane * kGradients + gate) * kWidth) = planes[plane];
          }
        }
        to += kRowsPerTile * kPlanes * kGradients * kWidth;
      }
      if (thread < valid) work.unit[row_to + thread] = shared.unit[step % 2 * tiles + thread / kRowsPerTile];
      row_to -= rows;
    };

    load_step(0);
    for (int step = 0; step + 1 < stages; ++step) load(step);
    wait(false);
    meet(kThreads);
    send_gates(0);
    send_incoming(0);
    meet(kThreads);
    load(stages - 1);  // where the first step was, which is used up
    send_gates(1);
    send_incoming(1);
    wait(false);
    meet(kThreads);
    for (int step = 0; step < steps; ++step) {
      load(step + stages);
      if (step > 0) leave(step - 1);  // first, while the others have the matrix units
      send_gates(step + 2);
      send_incoming(step + 2);
      wait(false);
      meet(kThreads);
    }
    leave(steps - 1);
    copies_arrived<0>();
    largest_unit = fmaxf(largest_unit, __shfl_xor_sync(0xffffffffu, largest_unit, 1));
    largest_unit = fmaxf(largest_unit, __shfl_xor_sync(0xffffffffu, largest_unit, 2));
    if (thread == 0) work.largest[2 * blockIdx.x + 1] = largest_unit;
    return;
  }

  GateWeights<kWidth, kPlanes> w;
  w.template load<Rows<kWidth>>(network.weights.weight_hh, slice, g, t);
  float bias[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) bias[e] = network.weights.bias_hh[2 * kWidth + 16 * slice + 2 * g + e];
  const uint16_t* states_from = saved.states + ((steps - 1) * rows + first) * kPlanes * kWidth;
  const auto load = [&](int step) {
    if (step < steps) shared.states.load(step, states_from, valid, thread);
    states_from -= rows * kPlanes * kWidth;
    end_copies();
  };
  const auto send_slopes = [&](int step) {
    if (step >= steps) return;
    const unsigned char* states = shared.states.at(step, 0);
    const float4* gates = shared.gates + (step % 2 * tiles * kSlices + slice) * 3 * kLanes + lane;
    float4* to = shared.slopes + (step % 2 * tiles * kSlices + slice) * kSlopes * kLanes + lane;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      Sums<kPlanes> sums[3];
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        uint2 other[kPlanes];
        shared.states.read(other, states, s, g, t);
#pragma unroll
        for (int gate = 0; gate < 3; ++gate) sums[gate].add(w.gate[gate].part[s], s, other);
      }
      float before[4], inputs[3][4], slopes[kSlopes][4];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        uint32_t planes[kPlanes];
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          const unsigned char* row = states + plane * shared.states.kTileBytes + (2 * t + c) * kRowBytes<kWidth>;
          planes[plane] = *reinterpret_cast<const uint32_t*>(row + 2 * (16 * slice + 2 * g));
        }
        const float2 pair = from_planes(planes);
        before[c] = pair.x;
        before[2 + c] = pair.y;
      }
#pragma unroll
      for (int gate = 0; gate < 3; ++gate) to_array(inputs[gate], gates[gate * kLanes]);
      slopes_of(slopes, cell_of(inputs, sums, w.unit, bias), before);
#pragma unroll
      for (int i = 0; i < kSlopes; ++i) to[i * kLanes] = to_vector(slopes[i]);
      states += kPlanes * shared.states.kTileBytes;
      gates += kSlices * 3 * kLanes;
      to += kSlices * kSlopes * kLanes;
    }
  };
  for (int step = 0; step < stages; ++step) load(step);
  wait(true);
  meet(kThreads);
  meet(kThreads);
  send_slopes(0);
  wait(false);
  meet(kThreads);
  for (int step = 0; step < steps; ++step) {
    load(step + stages);
    send_slopes(step + 1);
    wait(false);
    meet(kThreads);
  }
  copies_arrived<0>();
}

// ---- Weights' gradients: products over all rows and steps ----

constexpr int kBlockRows = 16, kGradientStages = 3;
constexpr float kTop = 256;  // what the largest unit is taken for; smaller ones may have 22 powers of two less

template <int kWidth>
constexpr int kMatrixBytes = 2 * kWidth + 16;  // a row that load_matrices reads: eight of them differ in their banks

// Copies 16 rows [kFromPlanes, kFrom] of half precision numbers, of each plane the first kWidth, to [plane][row]. Rows
// from `valid` on become zeros.
template <int kWidth, int kFrom, int kPlanes, int kFromPlanes, int kThreads>
__device__ __forceinline__ void load_matrix(unsigned char* to, const uint16_t* from, int valid) {
  constexpr int kPieces = kWidth / 8, kAll = kBlockRows * kPlanes * kPieces;  // of 16 bytes
#pragma unroll
  for (int pass = 0; pass < kAll; pass += kThreads) {
    const int i = pass + static_cast<int>(threadIdx.x);
    if (kAll % kThreads != 0 && i >= kAll) break;
    const int piece = i % kPieces, plane = i / kPieces % kPlanes, row = i / (kPieces * kPlanes);
    const bool exists = row < valid;
    const uint16_t* source = from + (row * kFromPlanes + plane) * kFrom + 8 * piece;
    copy_async<16>(to + (plane * kBlockRows + row) * kMatrixBytes<kWidth> + 16 * piece, exists ? source : from, exists);
  }
}

// How many of 16 rows from `first` on exist.
__device__ __forceinline__ int rows_left(int64_t first, int64_t total) {
  return static_cast<int>(max(min(total - first, static_cast<int64_t>(kBlockRows)), static_cast<int64_t>(0)));
}

// The largest units of all blocks of the walk: of the gradients, and of x.
__device__ __forceinline__ float2 largest_units(const Work& work, int walks, int lane) {
  float2 largest = make_float2(0, 0);
  for (int i = lane; i < walks; i += kLanes) {
    largest.x = fmaxf(largest.x, work.largest[2 * i]);
    largest.y = fmaxf(largest.y, work.largest[2 * i + 1]);
  }
#pragma unroll
  for (int bit = 1; bit < kLanes; bit *= 2) {
    largest.x = fmaxf(largest.x, __shfl_xor_sync(0xffffffffu, largest.x, bit));
    largest.y = fmaxf(largest.y, __shfl_xor_sync(0xffffffffu, largest.y, bit));
  }
  return largest;
}

// A stage of the states' products.
template <int kWidth, int kPlanes>
struct StatesStage {
  unsigned char gradients[kPlanes][kBlockRows][kMatrixBytes<kGradients * kWidth>];
  unsigned char x[kPlanes][kBlockRows][kMatrixBytes<kWidth>];
  unsigned char states[kPlanes][kBlockRows][kMatrixBytes<kWidth>];
  float unit[kBlockRows], x_unit[kBlockRows];
};

// Gradients of weight_ih, weight_hh and fc2 with their biases. The rows of 16 (step, row) pairs that a state *before* a
// step belongs to also make it a state *behind* the step before: the output layer takes its gradients from there.
//
// Half of the warps multiply with x, half with states, each three tiles of gradients with all columns. Products over
// rows need one unit for all of them: the rows' own go to x and to the states as they are read.
template <int kWidth, int kPlanes>
__device__ __forceinline__ void states_gradients(const RecurrentCudaBackward& p, const BackwardPlan& plan,
                                                 const RowIndex& index, unsigned char* memory) {
  constexpr int kSlices = kWidth / 16, kThreads = 4 * kWidth;
  using Stage = StatesStage<kWidth, kPlanes>;
  const int lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4, warp = threadIdx.x / kLanes;
  const auto& network = p.network[blockIdx.y];
  const Work work = plan.work_of(p, blockIdx.y, kPlanes);
  const int outputs = plan.outputs_of(network), stride = output_stride(outputs);
  const int64_t rows = p.episodes * p.agents, total = rows * p.steps;
  const int64_t states = outputs == 0 ? total : total + rows;
  const Saved saved(const_cast<void*>(network.saved), true, p.steps, rows, kWidth, kPlanes);
  auto* stages = reinterpret_cast<Stage*>(memory);
  auto* grad_q = reinterpret_cast<float*>(stages + kGradientStages);  // [stage][row][stride]
  for (int i = threadIdx.x; i < (outputs == 0 ? 0 : kGradientStages * kBlockRows * stride); i += kThreads)
    grad_q[i] = 0;
  __syncthreads();

  const auto load = [&](int64_t block, int at) {
    const int64_t first = block * kBlockRows;
    if (first < states) {
      Stage& stage = stages[at];
      const int valid = rows_left(first, total);
      const int64_t row = valid > 0 ? first : 0;  // that exists
      load_matrix<kGradients * kWidth, kGradients * kWidth, kPlanes, kPlanes, kThreads>(
          &stage.gradients[0][0][0], work.gradients + row * kPlanes * kGradients * kWidth, valid);
      load_matrix<kWidth, kWidth, kPlanes, kPlanes, kThreads>(&stage.x[0][0][0], saved.x + row * kPlanes * kWidth,
                                                              valid);
      load_matrix<kWidth, kWidth, kPlanes, kPlanes, kThreads>(
          &stage.states[0][0][0], saved.states + first * kPlanes * kWidth, rows_left(first, states));
      if (threadIdx.x < kBlockRows) {
        const int i = static_cast<int>(threadIdx.x);
        copy_async<4>(&stage.unit[i], work.unit + row + (i < valid ? i : 0), i < valid);
        copy_async<4>(&stage.x_unit[i], saved.x_unit + row + (i < valid ? i : 0), i < valid);
      }
      constexpr int kPerRow = 16;  // threads
#pragma unroll
      for (int pass = 0; pass < kBlockRows; pass += kThreads / kPerRow) {
        if (outputs == 0) break;
        const int i = pass + static_cast<int>(threadIdx.x) / kPerRow, own = threadIdx.x % kPerRow;
        const int64_t behind = first + i - rows;
        const bool exists = behind >= 0 && behind < total;
        const float* from =
            network.grad_q + index(exists ? behind : 0).offset(network.grad_q_stride) + own * network.grad_q_stride[3];
#pragma unroll 1
        for (int output = own; output < outputs; output += kPerRow) {
          copy_async<4>(grad_q + (at * kBlockRows + i) * stride + output, from, exists);
          from += kPerRow * network.grad_q_stride[3];
        }
      }
    }
    end_copies();
  };

  const bool is_input = warp < kSlices;
  const int first_tile = (is_input ? 0 : kSlices) + 3 * (warp % kSlices);  // of the gradients
  const float2 largest = largest_units(work, plan.walks, lane);
  const float scale = inverse(largest.x), x_scale = inverse(largest.y);
  float sums[3][2 * kSlices][4] = {}, biases[3][4] = {};
  float output_sums[4][4] = {}, output_bias = 0;

  int64_t block = blockIdx.x;
  for (int at = 0; at < kGradientStages - 1; ++at) load(block + at * plan.states_blocks, at);
  for (int at = 0; block * kBlockRows < states; block += plan.states_blocks, at = (at + 1) % kGradientStages) {
    copies_arrived<kGradientStages - 2>();
    __syncthreads();
    load(block + (kGradientStages - 1) * plan.states_blocks, (at + kGradientStages - 1) % kGradientStages);

    const Stage& stage = stages[at];
    uint32_t factor[2], low_factor[2], bias_factor[2], low_bias_factor[2];  // of rows 2t + {0, 1}, and 8 further
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float own[2], with_x[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = 2 * t + i + 8 * half;
        own[i] = stage.unit[row] * scale * kTop;
        with_x[i] = is_input ? own[i] * (stage.x_unit[row] * x_scale) : own[i];
      }
      factor[half] = pack_half(with_x[0], with_x[1]);
      low_factor[half] = pack_half(with_x[0] * kLowUnit, with_x[1] * kLowUnit);
      bias_factor[half] = g == 0 ? pack_half(own[0], own[1]) : 0;
      low_bias_factor[half] = g == 0 ? pack_half(own[0] * kLowUnit, own[1] * kLowUnit) : 0;
    }
    uint32_t gradients[kPlanes][3][4];
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
      for (int m = 0; m < 3; ++m) {
        const int row = lane % 8 + lane / 16 * 8, column = 16 * (first_tile + m) + lane / 8 % 2 * 8;
        load_matrices_transposed(gradients[plane][m], &stage.gradients[plane][row][2 * column]);
      }
    }
#pragma unroll
    for (int pair = 0; pair < kSlices; ++pair) {
      uint32_t values[kPlanes][4];
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        const int row = lane % 8 + lane / 8 % 2 * 8, column = 16 * pair + lane / 16 * 8;
        const auto& matrix = is_input ? stage.x[plane] : stage.states[plane];
        load_matrices_transposed(values[plane], &matrix[row][2 * column]);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t other[2] = {times_half(values[0][2 * n], factor[0]),
                                   times_half(values[0][2 * n + 1], factor[1])};
#pragma unroll
        for (int m = 0; m < 3; ++m) {
          add_product<kPlanes>(sums[m][2 * pair + n], [&](float (&sum)[4]) {
            if constexpr (kPlanes == 2) {
              multiply_half(sum, gradients[1][m], times_half(values[0][2 * n], low_factor[0]),
                            times_half(values[0][2 * n + 1], low_factor[1]));
              multiply_half(sum, gradients[0][m], times_half(values[1][2 * n], low_factor[0]),
                            times_half(values[1][2 * n + 1], low_factor[1]));
            }
            multiply_half(sum, gradients[0][m], other[0], other[1]);
          });
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 3; ++m) {
      add_product<kPlanes>(biases[m], [&](float (&sum)[4]) {
        if constexpr (kPlanes == 2) multiply_half(sum, gradients[1][m], low_bias_factor[0], low_bias_factor[1]);
        multiply_half(sum, gradients[0][m], bias_factor[0], bias_factor[1]);
      });
    }

    const float* from = grad_q + at * kBlockRows * stride;
#pragma unroll
    for (int k = 0; k < kBlockRows; k += 8) {
      if (outputs == 0) break;
      Tf32<kPlanes, 2> state;
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const unsigned char* half = &stage.states[plane][k + t + 4 * i][2 * (8 * warp + g)];
          const float value = unpack_half(*reinterpret_cast<const uint16_t*>(half)).x;
          state.part[plane][i] = plane == 0 ? value : value * kLowUnit;
        }
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        if (16 * m >= outputs) break;
        const float2 upper = *reinterpret_cast<const float2*>(from + (k + t) * stride + 16 * m + 2 * g);
        const float2 lower = *reinterpret_cast<const float2*>(from + (k + t + 4) * stride + 16 * m + 2 * g);
        const Tf32<kPlanes, 4> grads({upper.x, upper.y, lower.x, lower.y});
        add_product<kPlanes>(output_sums[m], [&](float (&sum)[4]) { multiply(sum, grads, state); });
      }
    }
    if (threadIdx.x < outputs) {
#pragma unroll
      for (int i = 0; i < kBlockRows; ++i) output_bias += from[i * stride + threadIdx.x];
    }
  }
  copies_arrived<0>();

  const StatesPart part(kWidth, outputs);
  float* to = work.states_part + blockIdx.x * part.size;
  float* matrix = to + (is_input ? part.input : part.state);
  float* bias = to + (is_input ? part.input_bias : part.state_bias);
  const auto in_units = [&](float sum, bool with_x) {
    const float value = sum * (1 / kTop) * largest.x;
    return with_x ? value * largest.y : value;
  };
#pragma unroll
  for (int m = 0; m < 3; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * (3 * (warp % kSlices) + m) + g + 8 * half;
#pragma unroll
      for (int n = 0; n < 2 * kSlices; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          matrix[row * kWidth + 8 * n + 2 * t + i] = in_units(sums[m][n][2 * half + i], is_input);
        }
      }
      if (t == 0) bias[row] = in_units(biases[m][2 * half], false);
    }
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int output = 16 * m + 2 * g + e;
      if (output >= outputs) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) to[part.output + output * kWidth + 8 * warp + 2 * t + i] = output_sums[m][2 * e + i];
    }
  }
  if (threadIdx.x < outputs) to[part.output_bias + threadIdx.x] = output_bias;
}

// A stage of the inputs' products; the observations [row][stride] follow behind all stages.
template <int kWidth, int kPlanes>
struct InputsStage {
  unsigned char gradients[kPlanes][kBlockRows][kMatrixBytes<3 * kWidth>];
  unsigned char x[kBlockRows][kMatrixBytes<kWidth>];
  float unit[kBlockRows];
  int64_t action[kBlockRows];
  int agent[kBlockRows];
};

template <int kWidth, int kPlanes>
struct InputsMemory {
  InputsStage<kWidth, kPlanes> stage[kGradientStages];
  float grad_x[kPlanes][kBlockRows][kWidth + 8];  // factors of multiply_tf32
};

// Gradients of fc1 with its bias, and of the input layer's sums where wanted. First the gradient of 16 rows of x, one
// tile of 16 features and 8 rows in each warp, then its product with the inputs, one in each warp of every 2 kSlices
// tiles of columns.
template <int kWidth, int kPlanes>
__device__ __forceinline__ void inputs_gradients(const RecurrentCudaBackward& p, const BackwardPlan& plan,
                                                 const RowIndex& index, unsigned char* memory) {
  constexpr int kSlices = kWidth / 16, kThreads = 4 * kWidth, kWarps = 2 * kSlices;
  constexpr int kShare = share_of(kWidth), kTiles = kShare / 8 / kWarps;
  const int lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4, warp = threadIdx.x / kLanes;
  const auto& network = p.network[blockIdx.y];
  const Work work = plan.work_of(p, blockIdx.y, kPlanes);
  const int64_t rows = p.episodes * p.agents, total = rows * p.steps;
  const Saved saved(const_cast<void*>(network.saved), true, p.steps, rows, kWidth, kPlanes);
  const InputColumns columns(p, network.actions);
  const int own = (static_cast<int>(blockIdx.x) - plan.states_blocks) % plan.inputs_blocks;
  const int share = (static_cast<int>(blockIdx.x) - plan.states_blocks) / plan.inputs_blocks;
  const int first_column = share * kShare;
  if (first_column > columns.all) return;
  const int n_columns = min(columns.all + 1 - first_column, kShare);
  const int n_obs = max(min(columns.actions - first_column, kShare), 0);
  const int own_tiles = (n_columns + 8 * (kWarps - warp) - 1) / (8 * kWarps);  // of columns 8 * (warp + i * kWarps) ...
  const int stride = row_stride(n_obs);
  auto& shared = *reinterpret_cast<InputsMemory<kWidth, kPlanes>*>(memory);
  auto* obs = reinterpret_cast<float*>(memory + sizeof(InputsMemory<kWidth, kPlanes>));  // [stage][row][stride]

  const auto load = [&](int64_t block, int at) {
    const int64_t first = block * kBlockRows;
    if (first < total) {
      auto& stage = shared.stage[at];
      const int valid = rows_left(first, total);
      load_matrix<3 * kWidth, kGradients * kWidth, kPlanes, kPlanes, kThreads>(
          &stage.gradients[0][0][0], work.gradients + first * kPlanes * kGradients * kWidth, valid);
      load_matrix<kWidth, kWidth, 1, kPlanes, kThreads>(&stage.x[0][0], saved.x + first * kPlanes * kWidth, valid);
      constexpr int kPerRow = kThreads / kBlockRows;
      const int i = threadIdx.x / kPerRow, own = threadIdx.x % kPerRow;
      const bool exists = i < valid;
      const RowIndex::Place place = index(exists ? first + i : first);
      const float* from = p.obs + place.offset(p.obs_stride) + first_column + own;
#pragma unroll 4
      for (int column = own; column < n_obs; column += kPerRow) {
        copy_async<4>(obs + (at * kBlockRows + i) * stride + column, from, exists);
        from += kPerRow;
      }
      if (own == 0) {
        copy_async<4>(&stage.unit[i], work.unit + first + (exists ? i : 0), exists);
        stage.agent[i] = columns.agent(place.agent);
        if (p.last_actions != nullptr) {
          copy_async<8>(&stage.action[i], p.last_actions + place.offset(p.action_stride), exists);
        }
      }
    }
    end_copies();
  };

  const int slice = warp % kSlices, row_tile = warp / kSlices;
  GateWeights<kWidth, kPlanes> w;
  w.template load<Columns<kWidth, AsInstruction>>(network.weights.weight_ih, slice, g, t);
  float sums[kTiles][kSlices][4] = {};

  int64_t block = own;
  for (int at = 0; at < kGradientStages - 1; ++at) load(block + at * plan.inputs_blocks, at);
  for (int at = 0; block * kBlockRows < total; block += plan.inputs_blocks, at = (at + 1) % kGradientStages) {
    copies_arrived<kGradientStages - 2>();
    __syncthreads();
    load(block + (kGradientStages - 1) * plan.inputs_blocks, (at + kGradientStages - 1) % kGradientStages);

    const auto& stage = shared.stage[at];
    // Gradients come as new, reset, update; the weights as reset, update, new.
    Sums<kPlanes> sums_of[3];
#pragma unroll
    for (int s = 0; s < 3 * kSlices; s += 2) {
      uint32_t values[kPlanes][4];
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        const int row = kRowsPerTile * row_tile + lane % 8;
        load_matrices(values[plane], &stage.gradients[plane][row][2 * (16 * s + lane / 8 * 8)]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint2 other[kPlanes];
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          other[plane] = make_uint2(values[plane][2 * i], values[plane][2 * i + 1]);
        }
        const int gate = (s / kSlices + 2) % 3, part = s % kSlices + i;
        sums_of[gate].add(w.gate[gate].part[part], part, other);
      }
    }
    const auto grad_x = [&](int i) {
      return sums_of[0].value(i) * w.unit[0] + sums_of[1].value(i) * w.unit[1] + sums_of[2].value(i) * w.unit[2];
    };
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int row = kRowsPerTile * row_tile + 2 * t + c, feature = 16 * slice + 2 * g;
      const uint32_t x = *reinterpret_cast<const uint32_t*>(&stage.x[row][2 * feature]);
      float2 pair;
      pair.x = (x & 0xffffu) != 0 ? grad_x(c) * stage.unit[row] : 0.0f;
      pair.y = (x >> 16) != 0 ? grad_x(2 + c) * stage.unit[row] : 0.0f;
      const Tf32<kPlanes, 2> factors({pair.x, pair.y});
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        *reinterpret_cast<float2*>(&shared.grad_x[plane][row][feature]) =
            make_float2(factors.part[plane][0], factors.part[plane][1]);
      }
      if (network.grad_x == nullptr || share > 0 || block * kBlockRows + row >= total) continue;
      *reinterpret_cast<float2*>(network.grad_x + (block * kBlockRows + row) * kWidth + feature) = pair;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kBlockRows; k += 8) {
      Tf32<kPlanes, 2> inputs[kTiles];
      int ones[2][2];  // of rows k + t and k + t + 4: columns of action and agent
      const float* from[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = k + t + 4 * i;
        ones[i][0] = p.last_actions == nullptr ? -1 : columns.action(stage.action[row]);
        ones[i][1] = stage.agent[row];
        from[i] = obs + (at * kBlockRows + row) * stride;
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int first_of_tile = 8 * (warp + tile * kWarps), column = first_of_tile + g;
        float values[2] = {};
        if (first_of_tile + 8 <= n_obs) {
          values[0] = from[0][column];
          values[1] = from[1][column];
        } else if (tile < own_tiles) {
          const int input = first_column + column;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const bool is_one = input == ones[i][0] || input == ones[i][1] || input == columns.all;
            values[i] = column < n_obs ? from[i][column] : is_one ? 1.0f : 0.0f;
          }
        }
        inputs[tile] = Tf32<kPlanes, 2>(values);
      }
#pragma unroll
      for (int m = 0; m < kSlices; ++m) {
        Tf32<kPlanes, 4> grads;
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          const auto& rows_of = shared.grad_x[plane];
          const float2 upper = *reinterpret_cast<const float2*>(&rows_of[k + t][16 * m + 2 * g]);
          const float2 lower = *reinterpret_cast<const float2*>(&rows_of[k + t + 4][16 * m + 2 * g]);
          auto& part = grads.part[plane];
          part[0] = upper.x, part[1] = upper.y, part[2] = lower.x, part[3] = lower.y;
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          if (tile >= own_tiles) break;
          add_product<kPlanes>(sums[tile][m], [&](float (&sum)[4]) { multiply(sum, grads, inputs[tile]); });
        }
      }
    }
  }
  copies_arrived<0>();

  float* to = work.inputs_part + static_cast<int64_t>(share * plan.inputs_blocks + own) * kWidth * kShare;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int m = 0; m < kSlices; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int feature = 16 * m + 2 * g + i / 2, column = 8 * (warp + tile * kWarps) + 2 * t + i % 2;
        if (column < n_columns) to[feature * kShare + column] = sums[tile][m][i];
      }
    }
  }
}

template <int kWidth, int kPlanes>
__global__ void __launch_bounds__(4 * kWidth, 1)
    gradients_kernel(const __grid_constant__ RecurrentCudaBackward p, const __grid_constant__ BackwardPlan plan,
                     const __grid_constant__ RowIndex index) {
  if (kTooOld) return;
  extern __shared__ __align__(16) unsigned char memory[];
  if (blockIdx.x < plan.states_blocks) {
    states_gradients<kWidth, kPlanes>(p, plan, index, memory);
  } else {
    inputs_gradients<kWidth, kPlanes>(p, plan, index, memory);
  }
}

template <int kWidth, int kPlanes>
__host__ inline int64_t gradients_bytes(int outputs, int64_t obs_size) {
  const int64_t columns = min(obs_size, static_cast<int64_t>(share_of(kWidth)));
  const int64_t states = kGradientStages * (sizeof(StatesStage<kWidth, kPlanes>) +
                                            (outputs == 0 ? 0 : kBlockRows * 4 * output_stride(outputs)));
  const int64_t inputs =
      sizeof(InputsMemory<kWidth, kPlanes>) + kGradientStages * kBlockRows * 4 * row_stride(static_cast<int>(columns));
  return max(states, inputs);
}

// ---- Sum over blocks, one thread for each number, always in the same order ----

constexpr int kSumThreads = 256;

__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const __grid_constant__ RecurrentCudaBackward p, const __grid_constant__ BackwardPlan plan, int planes) {
  const auto& network = p.network[blockIdx.y];
  const Work work = plan.work_of(p, blockIdx.y, planes);
  const int64_t width = p.hidden_size;
  const StatesPart part(width, plan.outputs_of(network));
  const auto& grads = network.grad_weights;
  const auto sum = [](const float* first, int64_t stride, int blocks) {
    float total = 0;
#pragma unroll 8
    for (int i = 0; i < blocks; ++i) total += first[i * stride];
    return total;
  };
  int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i < part.size) {
    const float total = sum(work.states_part + i, part.size, plan.states_blocks);
    // The gradients of the sums over x come as new, reset, update.
    if (i < part.state) {
      grads.weight_ih[(i + 2 * width * width) % (3 * width * width)] = total;
    } else if (i < part.input_bias) {
      grads.weight_hh[i - part.state] = total;
    } else if (i < part.state_bias) {
      grads.bias_ih[(i - part.input_bias + 2 * width) % (3 * width)] = total;
    } else if (i < part.output) {
      grads.bias_hh[i - part.state_bias] = total;
    } else if (i < part.output_bias) {
      grads.fc2_weight[i - part.output] = total;
    } else {
      grads.fc2_bias[i - part.output_bias] = total;
    }
    return;
  }
  i -= part.size;
  const int64_t inputs = InputColumns(p, network.actions).all, share = share_of(static_cast<int>(width));
  if (i >= width * (inputs + 1)) return;
  const int64_t feature = i / (inputs + 1), column = i - feature * (inputs + 1);
  const float* first = work.inputs_part + column / share * plan.inputs_blocks * width * share;
  const float total = sum(first + feature * share + column % share, width * share, plan.inputs_blocks);
  if (column < inputs) {
    grads.fc1_weight[feature * inputs + column] = total;
  } else {
    grads.fc1_bias[feature] = total;
  }
}

}  // namespace fastmix::FASTMIX_ISA
