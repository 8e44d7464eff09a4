// The second line of checks: Python has looked at tensors, this looks at what became of them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastmix::bindings {

namespace py = pybind11;

using Address = std::uintptr_t;  // of a tensor's first element; 0 for an absent or empty tensor

// A typed pointer from an address; `elements` is how many the op will touch.
template <class T>
T* pointer(Address address, int64_t elements, const char* name) {
  if (address == 0 && elements > 0) throw std::invalid_argument(std::string(name) + " is null");
  if (address % alignof(T) != 0) throw std::invalid_argument(std::string(name) + " is not aligned to its dtype");
  return reinterpret_cast<T*>(address);
}

inline void check(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// What Python calls for a pass on the CPU: the arguments of `make`, which checks them and gives the pass's parameters,
// and the number of threads.
template <class Params, class... Args, class Run>
auto on_cpu(Params (*make)(Args...), Run run) {
  return [make, run](Args... args, int threads) {
    Params p = make(args...);
    p.threads = threads;
    return run(p);
  };
}

// And on CUDA: those arguments, what else the kernels need, and the stream (a cudaStream_t as an integer).
template <class... Extra, class Params, class... Args, class Run>
auto on_cuda(const char* op, Params (*make)(Args...), Run run) {
  return [op, make, run](Args... args, Extra... extra, Address stream) {
    const char* error = run(make(args...), extra..., reinterpret_cast<void*>(stream));
    if (error != nullptr) throw std::runtime_error(std::string(op) + ": launch on CUDA failed: " + error);
  };
}

}  // namespace fastmix::bindings
