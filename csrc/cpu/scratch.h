// Working memory of one call, taken piece by piece.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "cpu/workspace.h"

namespace fastmix::FASTMIX_ISA {

// Pieces come out of blocks of the pool of workspace.h, which keeps them between calls: fresh pages from the system
// would cost more than the work done in them.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    while (newest_ != nullptr) {
      Header* older = newest_->older;
      workspace_release(newest_);
      newest_ = older;
    }
  }

  // Uninitialised, aligned to a cache line.
  template <class T>
  T* take(int64_t count) {
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + kLine - 1) / kLine * kLine;
    if (bytes > left_) {
      const std::size_t block = bytes > kBlock ? bytes : kBlock;
      newest_ = new (workspace_acquire(sizeof(Header) + block)) Header{newest_};
      next_ = reinterpret_cast<char*>(newest_ + 1);
      left_ = block;
    }
    T* piece = reinterpret_cast<T*>(next_);
    next_ += bytes;
    left_ -= bytes;
    return piece;
  }

 private:
  static constexpr std::size_t kLine = 64;
  static constexpr std::size_t kBlock = std::size_t{1} << 20;

  struct alignas(kLine) Header {
    Header* older;
  };

  Header* newest_ = nullptr;
  char* next_ = nullptr;
  std::size_t left_ = 0;
};

}  // namespace fastmix::FASTMIX_ISA
