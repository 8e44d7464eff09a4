// `select` on CUDA: one pass over the utilities, and one that writes the dense gradient.
//
// Rows of actions are short (5 to 36) and of odd length, so neither a thread nor a warp for each would read memory
// well. A block takes the agents of several rows, as many as it has threads, and brings all their actions to shared
// memory in the order in which they lie, by copies that are all in flight at once. Then every thread has one agent: it
// walks along that agent's actions there, and writes beside its neighbours. The gradient goes the other way: a tile of
// zeros in shared memory, into it what each agent has, and out as it lies.
#undef NDEBUG  // actions out of range are an assertion, as in torch's own kernels
#include <cassert>
#include <initializer_list>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "fastmix/select.h"

namespace fastmix {
namespace {

using FASTMIX_ISA::blocks;
using FASTMIX_ISA::copies_arrived;
using FASTMIX_ISA::copy_async;
using FASTMIX_ISA::end_copies;
using FASTMIX_ISA::launched;
using FASTMIX_ISA::split;

constexpr int kThreads = 128;
constexpr int kGroup = 4;  // numbers that go together where they are dense
template <class T, class M>
constexpr int kChunk = 320 / (sizeof(T) + sizeof(M));  // actions of an agent that are in shared memory at once
template <class T>
constexpr int kTile = 32768 / sizeof(T);  // numbers of the gradient that are there at once

template <class T>
using Key = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <class T>
constexpr Key<T> kLowestKey = sizeof(T) == 4 ? INT32_MIN : INT64_MIN;
template <class T>
constexpr Key<T> kHighestKey = sizeof(T) == 4 ? INT32_MAX : INT64_MAX;

__device__ int32_t bits_of(float x) { return __float_as_int(x); }
__device__ int64_t bits_of(double x) { return __double_as_longlong(x); }

// Integers in the order of the numbers, -0 equal to 0 and NaN above everything, as torch.argmax has it. No number maps
// to kLowestKey, which is left to actions that are not available.
template <class T>
__device__ Key<T> key_of(T q) {
  const Key<T> bits = bits_of(q + T(0));  // -0 + 0 is 0
  const Key<T> key = bits ^ ((bits >> (8 * sizeof(T) - 1)) & kHighestKey<T>);
  return q != q ? kHighestKey<T> : key;
}

struct Always {};  // the type of availability where every action is available

__device__ int64_t offset(const RowStrides& strides, int64_t outer, int64_t inner, int64_t agent) {
  return outer * strides.outer + inner * strides.inner + agent * strides.agent;
}

template <class T>
struct alignas(sizeof(T) < 4 ? kGroup * sizeof(T) : 16) Group {
  T at[kGroup];
};

// Where number `index` lies in shared memory: 16 bytes are left out after every 128, so that threads which read with a
// stride meet in a bank four at a time at most, and groups stay whole. Bytes meet rarely.
template <class T>
__device__ constexpr int slot(int index) {
  if (sizeof(T) == 1) return index;
  return index + static_cast<int>(static_cast<unsigned>(index) / (128 / sizeof(T)) * (16 / sizeof(T)));
}
template <class T>
__host__ __device__ constexpr size_t shared_bytes(int64_t numbers) {
  return static_cast<size_t>(numbers) * sizeof(T) / 128 * 144 + 144;
}
static_assert(shared_bytes<double>(kThreads* kChunk<double, double>) * 2 <= 46 * 1024, "beside what is static");

// Brings the dense numbers [0, count) to shared memory.
template <class T>
__device__ void stage_dense(const T* from, int count, T* to) {
  constexpr int kBytes = alignof(Group<T>), kNumbers = kBytes / sizeof(T);
  const int thread = static_cast<int>(threadIdx.x), whole = count / kNumbers * kNumbers;
  for (int i = thread * kNumbers; i < whole; i += kThreads * kNumbers) copy_async<kBytes>(to + slot<T>(i), from + i);
  if (whole + thread < count) to[slot<T>(whole + thread)] = from[whole + thread];
}

// The same for pieces of `width` numbers each, that begin at the given offsets.
template <class T>
__device__ void stage_pieces(const T* from, const int64_t* offsets, int width, int count, T* to) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const int piece = i / width;
    const T* number = from + offsets[piece] + (i - piece * width);
    if constexpr (sizeof(T) >= 4) {
      copy_async<sizeof(T)>(to + slot<T>(i), number);
    } else {
      to[slot<T>(i)] = *number;
    }
  }
}

// kDense: the agents of consecutive rows lie one behind the other, in agent_qs and in avail_actions, in whole groups
// for each block; all their actions fit into a chunk; and there is one outer row.
template <class T, class M, bool kDense>
__global__ void __launch_bounds__(kThreads, 8)
    forward_kernel(const SelectForward<T> p, int rows_per_block, long long* faults) {
  constexpr bool kMasked = !std::is_same_v<M, Always>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int64_t q_offsets[kThreads];
  __shared__ int64_t avail_offsets[kThreads];
  __shared__ bool greedy_rows[kThreads];
  const int64_t widest = p.n_actions < kChunk<T, M> ? p.n_actions : kChunk<T, M>;
  T* qs = reinterpret_cast<T*>(memory);
  M* avail = reinterpret_cast<M*>(memory + shared_bytes<T>(kThreads * widest));
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t rows = p.outer * p.inner, step = static_cast<int64_t>(gridDim.x) * rows_per_block;
  for (int64_t first_row = blockIdx.x * static_cast<int64_t>(rows_per_block); first_row < rows; first_row += step) {
    const int own_rows = rows - first_row < rows_per_block ? static_cast<int>(rows - first_row) : rows_per_block;
    if (thread < own_rows) greedy_rows[thread] = true;
    for (int64_t first_agent = 0; first_agent < p.n_agents; first_agent += kThreads) {  // more than once from 129 on
      const int64_t left = p.n_agents - first_agent;
      const int agents = left < kThreads ? static_cast<int>(left) : kThreads;
      const int items = own_rows * agents;
      const bool busy = thread < items;
      const int own_row = thread / agents;
      const int64_t row = first_row + own_row, agent = first_agent + thread % agents, out = row * p.n_agents + agent;
      int64_t outer = 0, inner = row, action = -1;
      if (busy) {
        if constexpr (!kDense) {
          split(row, p.inner, outer, inner);
          q_offsets[thread] = offset(p.agent_qs_strides, outer, inner, agent);
          if constexpr (kMasked) avail_offsets[thread] = offset(p.avail_strides, outer, inner, agent);
        }
        if (p.actions != nullptr) action = p.actions[offset(p.actions_strides, outer, inner, agent)];
      }
      Key<T> best = kLowestKey<T>;
      int64_t greedy = 0;
      T greedy_q = p.unavailable, chosen_q = 0;
      for (int64_t start = 0; start < p.n_actions; start += kChunk<T, M>) {
        const int width =
            p.n_actions - start < widest ? static_cast<int>(p.n_actions - start) : static_cast<int>(widest);
        __syncthreads();  // the offsets are there, and nobody reads the last chunk any more
        if constexpr (kDense) {
          const int64_t first = first_row * p.n_agents * p.n_actions;
          stage_dense(p.agent_qs + first, items * width, qs);
          if constexpr (kMasked) stage_dense(static_cast<const M*>(p.avail_actions) + first, items * width, avail);
        } else {
          stage_pieces(p.agent_qs + start, q_offsets, width, items * width, qs);
          if constexpr (kMasked) {
            stage_pieces(static_cast<const M*>(p.avail_actions) + start, avail_offsets, width, items * width, avail);
          }
        }
        end_copies();
        copies_arrived<0>();
        __syncthreads();
        if (!busy) continue;
        int best_at = -1;
        for (int u = 0; u < width; ++u) {
          Key<T> key = key_of(qs[slot<T>(thread * width + u)]);
          if constexpr (kMasked) key = avail[slot<M>(thread * width + u)] != M(0) ? key : kLowestKey<T>;
          if (key > best) {
            best = key;
            best_at = u;
          }
        }
        if (best_at >= 0) {
          greedy = start + best_at;
          greedy_q = qs[slot<T>(thread * width + best_at)];
        }
        if (action >= start && action < start + width) chosen_q = qs[slot<T>(thread * width + (action - start))];
      }
      if (!busy) continue;
      const bool found = best != kLowestKey<T>;
      p.greedy_actions[out] = greedy;
      p.greedy_qs[out] = greedy_q;
      if (p.target_qs != nullptr) {
        p.chosen_target_qs[out] =
            found ? p.target_qs[offset(p.target_strides, outer, inner, agent) + greedy] : p.unavailable;
      }
      if (p.actions != nullptr) {
        const bool inside = action >= 0 && action < p.n_actions;
        if (faults == nullptr) {
          assert(inside && "fastmix select: actions must lie in [0, number of actions)");
        } else if (!inside) {
          atomicMin(faults + 1, static_cast<long long>(row));
        }
        p.chosen_qs[out] = chosen_q;
        if (action != greedy) greedy_rows[own_row] = false;
      }
      if (!found && faults != nullptr && p.mask[outer * p.mask_strides.outer + inner * p.mask_strides.inner]) {
        atomicMin(faults, static_cast<long long>(row));
      }
    }
    if (p.actions != nullptr) {
      __syncthreads();
      if (thread < own_rows) p.all_greedy[first_row + thread] = greedy_rows[thread];
    }
  }
}

// A block's tile: as many agents with all their actions as fit, at most one a thread; or a part of one agent's.
template <class T>
__global__ void __launch_bounds__(kThreads) backward_kernel(const SelectBackward<T> p, int items_per_block) {
  extern __shared__ __align__(16) unsigned char memory[];
  T* tile = reinterpret_cast<T*>(memory);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t total = p.outer * p.inner * p.n_agents, step = static_cast<int64_t>(gridDim.x) * items_per_block;
  for (int64_t first = blockIdx.x * static_cast<int64_t>(items_per_block); first < total; first += step) {
    const int items = total - first < items_per_block ? static_cast<int>(total - first) : items_per_block;
    int64_t greedy = -1, taken = -1;  // where no gradient comes from
    T of_greedy = 0, of_taken = 0;
    if (thread < items) {
      const int64_t item = first + thread;
      int64_t row, agent, outer, inner;
      split(item, p.n_agents, row, agent);
      split(row, p.inner, outer, inner);
      if (p.grad_greedy_qs != nullptr && p.greedy_qs[item] != p.unavailable) {
        greedy = p.greedy_actions[item];
        of_greedy = p.grad_greedy_qs[offset(p.grad_greedy_strides, outer, inner, agent)];
      }
      if (p.grad_chosen_qs != nullptr) {
        taken = p.actions[offset(p.actions_strides, outer, inner, agent)];
        of_taken = p.grad_chosen_qs[offset(p.grad_chosen_strides, outer, inner, agent)];
      }
    }
    for (int64_t start = 0; start < p.n_actions; start += kTile<T>) {
      const int width = p.n_actions - start < kTile<T> ? static_cast<int>(p.n_actions - start) : kTile<T>;
      const int count = items * width;
      for (int i = thread; i <= count / kGroup; i += kThreads) reinterpret_cast<Group<T>*>(tile)[i] = Group<T>{};
      __syncthreads();
      // In this order, for they may be one. What is out of range was changed after the forward pass, and left out.
      if (greedy >= start && greedy < start + width) tile[thread * width + (greedy - start)] = of_greedy;
      if (taken >= start && taken < start + width) tile[thread * width + (taken - start)] += of_taken;
      __syncthreads();
      T* to = p.grad_agent_qs + first * p.n_actions + start;
      const int groups = reinterpret_cast<uintptr_t>(to) % alignof(Group<T>) == 0 ? count / kGroup : 0;
      for (int i = thread; i < groups; i += kThreads) {
        reinterpret_cast<Group<T>*>(to)[i] = reinterpret_cast<const Group<T>*>(tile)[i];
      }
      for (int i = groups * kGroup + thread; i < count; i += kThreads) to[i] = tile[i];
      __syncthreads();
    }
  }
}

// Makes one outer row of several where all strides allow it.
void merge_rows(SelectShape& shape, const std::initializer_list<RowStrides*>& strides) {
  if (shape.inner == 1) {
    for (RowStrides* s : strides) s->inner = s->outer;
  } else if (shape.outer != 1) {
    for (const RowStrides* s : strides) {
      if (s->outer != shape.inner * s->inner) return;
    }
  }
  shape.inner *= shape.outer;
  shape.outer = 1;
}

template <class T, class M>
const char* forward_as(SelectForward<T> p, int64_t* faults, cudaStream_t stream) {
  RowStrides none = p.agent_qs_strides;
  merge_rows(p, {&p.agent_qs_strides, p.avail_actions == nullptr ? &none : &p.avail_strides,
                 p.actions == nullptr ? &none : &p.actions_strides, p.target_qs == nullptr ? &none : &p.target_strides,
                 p.mask == nullptr ? &none : &p.mask_strides});
  const int64_t row_size = p.n_agents * p.n_actions;
  // Whole rows where they fit, and if possible whole groups; a row without agents still has a flag.
  int rows = p.n_agents == 0 ? kThreads : p.n_agents < kThreads ? kThreads / static_cast<int>(p.n_agents) : 1;
  if (rows >= kGroup && row_size % kGroup != 0) rows = rows / kGroup * kGroup;
  const auto dense = [&](const void* data, size_t alignment, const RowStrides& s) {
    return data == nullptr || (reinterpret_cast<uintptr_t>(data) % alignment == 0 &&
                               (p.n_agents == 1 || s.agent == p.n_actions) && (p.inner == 1 || s.inner == row_size));
  };
  const bool is_dense = p.outer == 1 && p.n_agents <= kThreads && p.n_actions <= kChunk<T, M> &&
                        rows * row_size % kGroup == 0 && dense(p.agent_qs, alignof(Group<T>), p.agent_qs_strides) &&
                        dense(p.avail_actions, alignof(Group<M>), p.avail_strides);
  const auto kernel = is_dense ? forward_kernel<T, M, true> : forward_kernel<T, M, false>;
  const int64_t widest = kThreads * (p.n_actions < kChunk<T, M> ? p.n_actions : kChunk<T, M>);
  const size_t shared = shared_bytes<T>(widest) + (std::is_same_v<M, Always> ? 0 : shared_bytes<M>(widest));
  kernel<<<blocks(p.outer * p.inner, rows), kThreads, shared, stream>>>(p, rows, reinterpret_cast<long long*>(faults));
  return launched();
}

template <class T>
const char* forward(const SelectForward<T>& p, int64_t* faults, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  if (p.outer * p.inner == 0) return nullptr;
  switch (p.avail_type) {
    case AvailType::boolean:
      return forward_as<T, uint8_t>(p, faults, stream);
    case AvailType::int32:
      return forward_as<T, int32_t>(p, faults, stream);
    case AvailType::int64:
      return forward_as<T, int64_t>(p, faults, stream);
    case AvailType::float32:
      return forward_as<T, float>(p, faults, stream);
    case AvailType::float64:
      return forward_as<T, double>(p, faults, stream);
    default:
      return forward_as<T, Always>(p, faults, stream);
  }
}

template <class T>
const char* backward(const SelectBackward<T>& p, void* stream) {
  const int64_t total = p.outer * p.inner * p.n_agents;
  if (total == 0) return nullptr;
  const int64_t fit = p.n_actions < kTile<T> ? kTile<T> / p.n_actions : 1;
  const int items = fit < kThreads ? static_cast<int>(fit) : kThreads;
  const int64_t numbers = p.n_actions < kTile<T> ? items * p.n_actions : kTile<T>;
  backward_kernel<<<blocks(total, items), kThreads, (numbers + kGroup) * sizeof(T),
                    static_cast<cudaStream_t>(stream)>>>(p, items);
  return launched();
}

}  // namespace

const char* select_forward_cuda(const SelectForward<float>& p, int64_t* faults, void* stream) {
  return forward(p, faults, stream);
}
const char* select_forward_cuda(const SelectForward<double>& p, int64_t* faults, void* stream) {
  return forward(p, faults, stream);
}
const char* select_backward_cuda(const SelectBackward<float>& p, void* stream) { return backward(p, stream); }
const char* select_backward_cuda(const SelectBackward<double>& p, void* stream) { return backward(p, stream); }

}  // namespace fastmix
