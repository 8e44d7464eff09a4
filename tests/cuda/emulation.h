// CUDA C++ on the host, for tests without a GPU: a kernel file becomes a translation unit of ordinary C++. The kernel
// files of an op share what follows.
//
// Blocks run one after another. All threads of a block are alive at once, as fibers that give way only where CUDA
// threads meet: __syncthreads, __syncwarp, shuffles and votes. A warp goes on as far as it can before the next one
// does. A run is therefore deterministic, and `emulation_descending` takes warps and lanes in the opposite order: a
// result that depends on the order lacks a barrier. Shared memory is filled with 0xff (NaN, -1) when a block starts.
// Threads that wait for each other for ever, impossible launches and __trap() are reported as the launch's error.
//
// emulate.py has turned `kernel<<<...>>>(...)` into calls of `emulation::launch` and `__shared__` declarations into
// references to emulated memory.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

// --- Words of the language -------------------------------------------------------------------------------------------

#define FASTMIX_EMULATED 1  // kernels with inline assembly take a function of this header in its place
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define FASTMIX_VECTORS(scalar, name, bytes)                                      \
  struct alignas(2 * (bytes)) name##2 { scalar x, y; };                           \
  struct alignas((bytes) == 8 ? 16 : 4 * (bytes)) name##4 { scalar x, y, z, w; }; \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }            \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
FASTMIX_VECTORS(float, float, 4)
FASTMIX_VECTORS(double, double, 8)
FASTMIX_VECTORS(int, int, 4)
FASTMIX_VECTORS(unsigned, uint, 4)
FASTMIX_VECTORS(long long, longlong, 8)
FASTMIX_VECTORS(unsigned char, uchar, 1)
#undef FASTMIX_VECTORS

#pragma GCC visibility push(hidden)  // each library has its own threads, although these variables are inline

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// --- The runtime -----------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };

namespace emulation {

inline std::string error;  // of the last launch; empty when it went well

}  // namespace emulation

inline cudaError_t cudaPeekAtLastError() { return emulation::error.empty() ? cudaSuccess : 1; }
inline const char* cudaGetErrorString(cudaError_t) {
  static std::string last;
  last = std::move(emulation::error);
  emulation::error.clear();
  return last.c_str();
}
inline cudaError_t cudaGetLastError() { return cudaPeekAtLastError(); }  // the message is taken by the call after it
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
namespace emulation {
inline int device = 0;
}  // namespace emulation
inline cudaError_t cudaGetDevice(int* device) { return *device = emulation::device, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  // One like an H100, one like an RTX 4090, but with so few multiprocessors that blocks get to do more than one tile;
  // and an H100 as it is.
  constexpr int kValues[3][4] = {{2, 227 * 1024, 9, 0}, {3, 99 * 1024, 8, 9}, {132, 227 * 1024, 9, 0}};
  return *value = kValues[device][attribute], cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

// --- Threads ---------------------------------------------------------------------------------------------------------

namespace emulation {

constexpr int kLanes = 32;
constexpr size_t kStack = 256 * 1024, kPage = 4096, kValue = 128;  // bytes; kValue: what a lane may exchange at once
constexpr size_t kStaticShared = 48 * 1024, kMostShared = 227 * 1024;
constexpr unsigned kMostThreads = 1024;

// Where the threads of a set meet. Values lie in two sets of slots by turns: whoever deposits in one has read the
// other.
struct Meeting {
  unsigned lanes = 0;  // of a warp; 0: the whole block
  unsigned arrived = 0;
  unsigned count = 0;
  uint64_t turn = 0;
  alignas(16) unsigned char values[2][kLanes][kValue];
  int votes[2] = {0, 0};
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
  size_t bytes;
};

struct Thread {
  jmp_buf at;
  ucontext_t entry;
  char* stack = nullptr;
  bool started = false, finished = true;
  Meeting* waits = nullptr;
  uint64_t turn = 0;
  std::deque<std::vector<Copy>> copies = {{}};  // asynchronous ones by group, the last group open
};

struct Warp {
  unsigned finished = 0;
  std::vector<std::pair<unsigned, Meeting*>> meetings;  // by mask
};

struct Config {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
inline Config config(dim3 grid, dim3 block, size_t shared = 0, cudaStream_t stream = nullptr) {
  return {grid, block, shared, stream};
}

inline bool descending = false;
inline std::vector<Thread> threads(kMostThreads);
inline std::vector<Warp> warps;
inline Meeting whole_block;
inline unsigned n_threads = 0, n_finished = 0, current = 0;
inline jmp_buf scheduler;
inline void (*body)(const void*) = nullptr;
inline const void* body_argument = nullptr;
alignas(16) inline unsigned char shared_memory[kMostShared];
inline size_t dynamic_size = 0, static_size = 0;
inline std::vector<std::pair<const void*, size_t>> statics;  // declaration -> offset in shared memory

inline unsigned lane() { return current % kLanes; }

// Gives the processor back to the scheduler until the condition the thread waits for holds.
__attribute__((noinline)) inline void pause() {
  if (_setjmp(threads[current].at) == 0) _longjmp(scheduler, 1);
}

inline void close(Meeting& meeting) {
  meeting.arrived = meeting.count = 0;
  ++meeting.turn;
}

inline bool complete(const Meeting& meeting, const Warp& warp) {
  if (meeting.lanes == 0) return meeting.count > 0 && meeting.count + n_finished == n_threads;
  return meeting.arrived != 0 && (meeting.lanes & ~(meeting.arrived | warp.finished)) == 0;
}

[[noreturn]] inline void stop_thread() {
  Warp& warp = warps[current / kLanes];
  threads[current].finished = true;
  warp.finished |= 1u << lane();
  ++n_finished;
  // Threads that have ended are not waited for.
  for (auto& [mask, meeting] : warp.meetings) {
    if (complete(*meeting, warp)) close(*meeting);
  }
  if (complete(whole_block, warp)) close(whole_block);
  _longjmp(scheduler, 1);
}

[[noreturn]] inline void fail(const std::string& message) {
  if (error.empty()) {
    error = message + " (thread " + std::to_string(current) + " of block " + std::to_string(blockIdx.x) + ")";
  }
  stop_thread();
}

inline void thread_main() {
  for (;;) {
    body(body_argument);
    Thread& self = threads[current];
    if (_setjmp(self.at) == 0) stop_thread();
  }
}

// Waits until all threads of the meeting are there; returns which set of slots holds what they brought.
inline int meet(Meeting& meeting) {
  Thread& self = threads[current];
  const uint64_t turn = meeting.turn;
  meeting.arrived |= 1u << lane();
  ++meeting.count;
  if (complete(meeting, warps[current / kLanes])) {
    close(meeting);
  } else {
    self.waits = &meeting;
    self.turn = turn;
    pause();
    threads[current].waits = nullptr;
  }
  return static_cast<int>(turn % 2);
}

inline Meeting& meeting_of(unsigned mask) {
  if ((mask >> lane() & 1) == 0) fail("a lane is not in the mask it passes");
  auto& meetings = warps[current / kLanes].meetings;
  for (auto& [lanes, meeting] : meetings) {
    if (lanes == mask) return *meeting;
  }
  auto* fresh = new Meeting;
  fresh->lanes = mask;
  meetings.emplace_back(mask, fresh);
  return *fresh;
}

// What every lane of `mask` brought, by lane: the one primitive that all warp-wide functions are made of, those of the
// matrix units too (each lane brings its fragments, and computes its part of the result from everybody's).
template <class T>
class Brought {
 public:
  Brought(unsigned mask, const T& mine) : mask_(mask) {
    static_assert(sizeof(T) <= kValue && std::is_trivially_copyable_v<T>);
    Meeting& meeting = meeting_of(mask);
    std::memcpy(meeting.values[meeting.turn % 2][lane()], &mine, sizeof(T));
    values_ = meeting.values[meet(meeting)];
  }

  T operator[](unsigned lane) const {
    if ((mask_ >> lane & 1) == 0) fail("a value is read from a lane that is not in the mask");
    T value;
    std::memcpy(&value, values_[lane], sizeof(T));
    return value;
  }

 private:
  unsigned mask_;
  unsigned char (*values_)[kValue];
};

inline unsigned char* dynamic_shared() { return shared_memory; }

// Memory of one `__shared__` declaration, the same for all threads of the block.
template <class T>
T& static_shared(const void* declaration) {
  for (const auto& [known, offset] : statics) {
    if (known == declaration) return *reinterpret_cast<T*>(shared_memory + offset);
  }
  const size_t align = alignof(T) > 16 ? alignof(T) : 16;
  const size_t offset = (dynamic_size + static_size + align - 1) / align * align;
  static_size = offset + sizeof(T) - dynamic_size;
  if (static_size > kStaticShared || dynamic_size + static_size > kMostShared) fail("too much shared memory");
  statics.emplace_back(declaration, offset);
  return *reinterpret_cast<T*>(shared_memory + offset);
}

inline void start(Thread& thread) {
  if (thread.stack == nullptr) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    thread.stack = static_cast<char*>(memory);
    mprotect(memory, kPage, PROT_NONE);  // what grows beyond it faults, instead of writing into another's stack
  }
  getcontext(&thread.entry);
  thread.entry.uc_stack.ss_sp = thread.stack;
  thread.entry.uc_stack.ss_size = kStack;
  thread.entry.uc_link = nullptr;
  makecontext(&thread.entry, thread_main, 0);
  thread.started = true;
  setcontext(&thread.entry);
}

// Returns when the thread pauses or ends.
__attribute__((noinline)) inline void resume(unsigned index) {
  const unsigned in_row = index % (blockDim.x * blockDim.y);
  threadIdx = {in_row % blockDim.x, in_row / blockDim.x, index / (blockDim.x * blockDim.y)};
  current = index;
  if (_setjmp(scheduler) != 0) return;
  Thread& thread = threads[index];
  if (thread.started) _longjmp(thread.at, 1);
  start(thread);
}

// Every thread of the warp that can go on does so until it waits or ends; false when none can.
inline bool resume_warp(unsigned warp) {
  bool moved = false;
  for (unsigned i = 0; i < kLanes && error.empty(); ++i) {
    const unsigned index = warp * kLanes + (descending ? kLanes - 1 - i : i);
    if (index >= n_threads) continue;
    const Thread& thread = threads[index];
    if (thread.finished || (thread.waits != nullptr && thread.waits->turn == thread.turn)) continue;
    resume(index);
    moved = true;
  }
  return moved;
}

inline void run_block() {
  std::memset(shared_memory, 0xff, sizeof(shared_memory));
  statics.clear();
  static_size = 0;
  for (Warp& warp : warps) {
    for (auto& [mask, meeting] : warp.meetings) delete meeting;
  }
  warps.assign((n_threads + kLanes - 1) / kLanes, Warp());
  whole_block = Meeting();
  n_finished = 0;
  for (unsigned i = 0; i < n_threads; ++i) {
    threads[i].finished = false;
    threads[i].copies.assign(1, {});
  }
  while (n_finished < n_threads && error.empty()) {
    bool moved = false;
    for (unsigned i = 0; i < warps.size(); ++i) {
      while (resume_warp(descending ? static_cast<unsigned>(warps.size()) - 1 - i : i)) moved = true;
    }
    if (!moved) {
      const auto waiting = std::find_if(threads.begin(), threads.begin() + n_threads,
                                        [](const Thread& thread) { return !thread.finished; });
      char mask[16];
      std::snprintf(mask, sizeof(mask), "%08x", waiting->waits->lanes);
      error = "thread " + std::to_string(waiting - threads.begin()) + " of block " + std::to_string(blockIdx.x) +
              " waits for ever at a barrier of " +
              (waiting->waits->lanes == 0 ? "the block" : std::string("lanes ") + mask);
    }
  }
  if (!error.empty()) {  // what stopped half way never goes on: all start again on their stacks
    for (Thread& thread : threads) {
      thread.started = false;
      thread.waits = nullptr;
    }
  }
}

template <class Kernel>
void launch(const Config& c, const Kernel& kernel) {
  error.clear();
  n_threads = c.block.x * c.block.y * c.block.z;
  const bool fits = n_threads >= 1 && n_threads <= kMostThreads && c.block.z <= 64 && c.grid.x >= 1 &&
                    c.grid.x <= 0x7fffffffu && c.grid.y >= 1 && c.grid.y <= 65535 && c.grid.z >= 1 && c.grid.z <= 65535;
  if (!fits || c.shared > kMostShared) {
    error = "invalid configuration argument";
    return;
  }
  blockDim = c.block;
  gridDim = c.grid;
  dynamic_size = c.shared;
  body = [](const void* argument) { (*static_cast<const Kernel*>(argument))(); };
  body_argument = &kernel;
  for (unsigned z = 0; z < c.grid.z; ++z) {
    for (unsigned y = 0; y < c.grid.y; ++y) {
      for (unsigned x = 0; x < c.grid.x && error.empty(); ++x) {
        blockIdx = {x, y, z};
        run_block();
      }
    }
  }
}

}  // namespace emulation

extern "C" __attribute__((weak, visibility("default"))) void emulation_descending(bool on) {
  emulation::descending = on;
}

extern "C" __attribute__((weak, visibility("default"))) void emulation_device(int index) { emulation::device = index; }

// --- Barriers, votes, shuffles ---------------------------------------------------------------------------------------

inline void __syncthreads() { emulation::meet(emulation::whole_block); }
inline int __syncthreads_count(int predicate) {
  auto& meeting = emulation::whole_block;
  int& votes = meeting.votes[meeting.turn % 2];
  if (meeting.count == 0) votes = 0;
  votes += predicate != 0;
  return meeting.votes[emulation::meet(meeting)];
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }
inline int __syncthreads_and(int predicate) { return __syncthreads_count(predicate == 0) == 0; }

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::meet(emulation::meeting_of(mask)); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const emulation::Brought<int> brought(mask, predicate);
  unsigned result = 0;
  for (unsigned lane = 0; lane < emulation::kLanes; ++lane) {
    if (mask >> lane & 1 && brought[lane] != 0) result |= 1u << lane;
  }
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate == 0) == 0; }

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = warpSize) {
  const int lane = static_cast<int>(emulation::lane());
  return emulation::Brought<T>(mask, value)[(lane & ~(width - 1)) + (from & (width - 1))];
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset, int width = warpSize) {
  const int lane = static_cast<int>(emulation::lane()), from = lane + static_cast<int>(offset);
  const emulation::Brought<T> brought(mask, value);
  return from < (lane & ~(width - 1)) + width ? brought[from] : value;
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned offset, int width = warpSize) {
  const int lane = static_cast<int>(emulation::lane()), from = lane - static_cast<int>(offset);
  const emulation::Brought<T> brought(mask, value);
  return from >= (lane & ~(width - 1)) ? brought[from] : value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize) {
  const int lane = static_cast<int>(emulation::lane()), from = lane ^ bits;
  const emulation::Brought<T> brought(mask, value);
  return from < (lane & ~(width - 1)) + width ? brought[from] : value;
}

// --- Asynchronous copies ---------------------------------------------------------------------------------------------

namespace emulation {

template <class To, class From>
To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// Copies happen as late as they may, when they are waited for; until then their place holds nothing that means
// anything.
inline void copy_async(void* to, const void* from, size_t bytes, bool inside) {
  const auto* place = static_cast<unsigned char*>(to);
  if (place < shared_memory || place + bytes > shared_memory + dynamic_size + static_size) fail("copy out of bounds");
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || (inside && reinterpret_cast<uintptr_t>(from) % bytes != 0)) {
    fail("an asynchronous copy is not aligned");
  }
  auto& copies = threads[current].copies;
  for (const auto& group : copies) {
    for (const Copy& other : group) {
      if (other.to == to) fail("a copy to where another one is still under way");
    }
  }
  std::memset(to, 0xff, bytes);
  copies.back().push_back({to, inside ? from : nullptr, bytes});
}
inline void end_copies() { threads[current].copies.emplace_back(); }
inline void copies_arrived(size_t pending) {
  auto& copies = threads[current].copies;
  while (copies.size() > pending + 1) {
    for (const auto& [to, from, bytes] : copies.front()) {
      if (from == nullptr) {
        std::memset(to, 0, bytes);
      } else {
        std::memcpy(to, from, bytes);
      }
    }
    copies.pop_front();
  }
}

}  // namespace emulation

// --- Memory and arithmetic -------------------------------------------------------------------------------------------

inline void __threadfence() {}
inline void __threadfence_block() {}
#define emulated_assert(condition) ((condition) ? void() : emulation::fail("assertion " #condition))
[[noreturn]] inline void __trap() { emulation::fail("trap"); }

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  return std::exchange(*p, static_cast<T>(*p + value));
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> value) {
  return std::exchange(*p, value);
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> value) {
  return std::exchange(*p, std::max(*p, value));
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> value) {
  return std::exchange(*p, std::min(*p, value));
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return *p == expected ? std::exchange(*p, value) : *p;
}
inline unsigned atomicInc(unsigned* p, unsigned last) { return std::exchange(*p, *p >= last ? 0 : *p + 1); }

using std::max;
using std::min;
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32 | low) << (shift % 32)) >> 32);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
    result |= static_cast<unsigned>(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  }
  return result;
}
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(static_cast<uint64_t>(x) * y >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

inline int __float_as_int(float x) { return emulation::same_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulation::same_bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulation::same_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulation::same_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulation::same_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulation::same_bits<double>(x); }

#include "instructions.h"

#pragma GCC visibility pop
