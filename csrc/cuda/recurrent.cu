// `recurrent` on CUDA: two launches forward, three backward, whatever the length and for up to four networks at once.
//
// What costs time in a recurrent network on a GPU is the chain of steps. So one block keeps some rows (episode, agent)
// for all steps, its recurrent weights in registers: each of its warps holds 16 features of all three gates, multiplies
// them with the states of eight rows, and has the three sums of a feature in one thread, where the gates are computed.
// Eight rows, not 16, because the weights are the rows of the product: rows of the batch fill many multiprocessors, and
// half as many exponentials stand between two products. The new states go through shared memory in the very order the
// next product reads them in, without conflicts; one barrier per step. Everything that is not the chain is done by
// other warps of the block at the same time: copies from and to memory, the gates' sums over x one step ahead (so that
// neither these nor the gates ever lie in memory: 128 bytes a row and step come in, where the sums would be 768), the
// output layer one step behind. Backward likewise: gates are made again, one step ahead of the gradients, from the 256
// bytes a row and step that forward leaves; four multiplications and one product are the chain. The weights' gradients
// are products over all rows and steps, balanced over all multiprocessors, in a fixed order: the same bits every time.
#include "cuda/launch.h"
#include "cuda/recurrent_backward.h"

namespace fastmix {
namespace FASTMIX_ISA {
namespace {

// How many tiles of eight rows a block takes: a step costs about as much as a tile more than its tiles do, and blocks
// that find no multiprocessor free walk after the others. 0 where not even one tile fits.
template <class Bytes>
int choose_tiles(int64_t rows, int networks, const Device& device, const Bytes& bytes) {
  constexpr int kMost = 8;
  int best = 0;
  int64_t least = 0;
  for (int tiles = 1; tiles <= kMost && bytes(tiles) <= device.shared_memory; ++tiles) {
    const int64_t work = blocks(rows, tiles * kRowsPerTile) * static_cast<int64_t>(networks);
    const int64_t cost = (work + device.multiprocessors - 1) / device.multiprocessors * (tiles + 1);
    if (best == 0 || cost < least) best = tiles, least = cost;
  }
  return best;
}

template <int kWidth, int kPlanes>
const char* forward(const RecurrentCudaForward& p, cudaStream_t stream) {
  const Device& device = current_device();
  const int64_t rows = p.episodes * p.agents;
  int output_tiles = 0;
  for (int i = 0; i < p.networks; ++i) {
    const auto& network = p.network[i];
    if (network.q != nullptr) output_tiles = max(output_tiles, static_cast<int>((network.outputs + 15) / 16));
  }
  const auto bytes = [&](int tiles) { return ForwardMemory<kWidth, kPlanes>(nullptr, tiles, output_tiles).bytes; };
  const int tiles = choose_tiles(rows, p.networks, device, bytes);
  if (tiles == 0) return "a block has too little shared memory";

  const auto networks = static_cast<unsigned>(p.networks);
  const dim3 input_grid(blocks(rows * p.steps, kInputRows, INT32_MAX), networks);
  const char* error = launch<input_kernel<kWidth, kPlanes>>(
      device, input_grid, kInputThreads, sizeof(InputMemory<kWidth, kPlanes>), stream, p, RowIndex(p));
  if (error != nullptr) return error;
  const dim3 grid(blocks(rows, tiles * kRowsPerTile, INT32_MAX), networks);
  return launch<forward_kernel<kWidth, kPlanes>>(device, grid, 4 * kWidth, bytes(tiles), stream, p, tiles);
}

// The steps of more tiles take longer: copies may begin later, in memory that the tiles need.
int stages_of(int tiles) { return tiles <= 2 ? 4 : 2; }

// None where a kernel does not fit into a block.
template <int kWidth, int kPlanes>
BackwardPlan plan_backward(const RecurrentCudaBackward& p, const Device& device) {
  BackwardPlan plan{};
  const int64_t rows = p.episodes * p.agents;
  int outputs = 0;
  int64_t inputs = 0;
  bool with_states = false;
  for (int i = 0; i < p.networks; ++i) {
    const auto& network = p.network[i];
    outputs = max(outputs, plan.outputs_of(network));
    inputs = max(inputs, p.obs_size + network.actions + p.ids);
    with_states |= network.grad_hidden_states != nullptr;
  }
  if (gradients_bytes<kWidth, kPlanes>(outputs, p.obs_size) > device.shared_memory) return plan;
  const auto bytes = [&](int tiles) {
    return BackwardMemory<kWidth, kPlanes>(nullptr, tiles, stages_of(tiles), outputs, with_states).bytes;
  };
  plan.tiles = choose_tiles(rows, p.networks, device, bytes);
  if (plan.tiles == 0) return plan;
  plan.stages = stages_of(plan.tiles);
  plan.walks = blocks(rows, plan.tiles * kRowsPerTile, INT32_MAX);
  // The states' products are about three fifths of the work. A block should have rows enough to be worth its sums.
  const int64_t most = max(device.multiprocessors / p.networks, 2),
                worth = blocks(rows * p.steps, 8 * kBlockRows, INT32_MAX);
  plan.states_blocks = static_cast<int>(min(max(3 * most / 5, int64_t{1}), worth));
  plan.inputs_blocks = static_cast<int>(min(max(most - 3 * most / 5, int64_t{1}), worth));
  plan.shares = static_cast<int>(inputs / share_of(kWidth)) + 1;
  plan.work(nullptr, p, kPlanes, outputs, &plan.network_bytes);
  plan.network_bytes = (plan.network_bytes + 255) / 256 * 256;
  return plan;
}

template <int kWidth, int kPlanes>
const char* backward(const RecurrentCudaBackward& p, cudaStream_t stream) {
  const Device& device = current_device();
  const BackwardPlan plan = plan_backward<kWidth, kPlanes>(p, device);
  if (plan.tiles == 0) return "a block has too little shared memory";
  int outputs = 0;
  int64_t sums = 0;
  bool with_states = false;
  for (int i = 0; i < p.networks; ++i) {
    const auto& network = p.network[i];
    outputs = max(outputs, plan.outputs_of(network));
    with_states |= network.grad_hidden_states != nullptr;
    sums = max(sums,
               StatesPart(kWidth, plan.outputs_of(network)).size + kWidth * (p.obs_size + network.actions + p.ids + 1));
  }
  const auto networks = static_cast<unsigned>(p.networks);

  const int64_t walk_bytes =
      BackwardMemory<kWidth, kPlanes>(nullptr, plan.tiles, plan.stages, outputs, with_states).bytes;
  const char* error = launch<backward_kernel<kWidth, kPlanes>>(device, dim3(plan.walks, networks), 6 * kWidth,
                                                               walk_bytes, stream, p, plan);
  if (error != nullptr) return error;
  const dim3 grid(plan.states_blocks + plan.shares * plan.inputs_blocks, networks);
  error = launch<gradients_kernel<kWidth, kPlanes>>(
      device, grid, 4 * kWidth, gradients_bytes<kWidth, kPlanes>(outputs, p.obs_size), stream, p, plan, RowIndex(p));
  if (error != nullptr) return error;
  const dim3 sum_grid(blocks(sums, kSumThreads, INT32_MAX), networks);
  sum_kernel<<<sum_grid, kSumThreads, 0, stream>>>(p, plan, kPlanes);
  return launched();
}

template <int kWidth_, int kPlanes_>
struct Constants {
  static constexpr int kWidth = kWidth_, kPlanes = kPlanes_;
};

// Calls `run` with width and planes as constants.
template <class Run>
auto with_constants(const RecurrentCuda& p, const Run& run) {
  const bool wide = p.hidden_size == 64;
  if (p.precise) return wide ? run(Constants<64, 2>()) : run(Constants<32, 2>());
  return wide ? run(Constants<64, 1>()) : run(Constants<32, 1>());
}

}  // namespace
}  // namespace FASTMIX_ISA

bool recurrent_cuda_fits(int64_t hidden_size, int64_t obs_size, int64_t outputs, bool precise) {
  RecurrentCuda p{};
  p.hidden_size = hidden_size;
  p.precise = precise;
  return FASTMIX_ISA::with_constants(p, [&](auto constants) {
    using C = decltype(constants);
    const auto n = static_cast<int>(outputs);
    const int64_t forward = FASTMIX_ISA::ForwardMemory<C::kWidth, C::kPlanes>(nullptr, 1, (n + 15) / 16).bytes;
    const int64_t walk =
        FASTMIX_ISA::BackwardMemory<C::kWidth, C::kPlanes>(nullptr, 1, FASTMIX_ISA::stages_of(1), n, true).bytes;
    const int64_t input = sizeof(FASTMIX_ISA::InputMemory<C::kWidth, C::kPlanes>);
    const int64_t gradients = FASTMIX_ISA::gradients_bytes<C::kWidth, C::kPlanes>(n, obs_size);
    return max(max(forward, walk), max(input, gradients)) <= FASTMIX_ISA::current_device().shared_memory;
  });
}

int64_t recurrent_cuda_workspace(const RecurrentCudaBackward& p) {
  return FASTMIX_ISA::with_constants(p, [&](auto constants) {
    using C = decltype(constants);
    const auto plan = FASTMIX_ISA::plan_backward<C::kWidth, C::kPlanes>(p, FASTMIX_ISA::current_device());
    return plan.network_bytes * p.networks;
  });
}

const char* recurrent_cuda_forward(const RecurrentCudaForward& p, void* stream) {
  return FASTMIX_ISA::with_constants(p, [&](auto constants) {
    using C = decltype(constants);
    return FASTMIX_ISA::forward<C::kWidth, C::kPlanes>(p, static_cast<cudaStream_t>(stream));
  });
}

const char* recurrent_cuda_backward(const RecurrentCudaBackward& p, void* stream) {
  return FASTMIX_ISA::with_constants(p, [&](auto constants) {
    using C = decltype(constants);
    return FASTMIX_ISA::backward<C::kWidth, C::kPlanes>(p, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fastmix
