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

}  // namespace fastmix::bindings
