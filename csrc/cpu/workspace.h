// Memory that survives from call to call. What a training step needs between forward and backward is tens to hundreds
// of megabytes; got from the system and given back each time, its page faults would cost as much as a third of the
// work.
#pragma once

#include <cstddef>

namespace fastmix {

// A block of at least `bytes`, 64-byte aligned, contents undefined. Throws std::bad_alloc.
void* workspace_acquire(std::size_t bytes);

// Hands a block back. The blocks handed back last are kept for later calls, together at most kWorkspaceKept bytes.
void workspace_release(void* block) noexcept;

inline constexpr std::size_t kWorkspaceKept = std::size_t{1} << 30;

std::size_t workspace_kept() noexcept;  // bytes kept at the moment
void workspace_clear() noexcept;        // frees them

// A block for the duration of one call. Nothing inline here: this header is compiled for several instruction sets.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes);  // no bytes, no block: null
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* get() const;

 private:
  void* block_;
};

}  // namespace fastmix
