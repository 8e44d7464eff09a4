#include "cpu/workspace.h"

#include <cstdlib>
#include <list>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastmix {
namespace {

constexpr std::size_t kHeader = 64;          // in front of each block: its size
constexpr std::size_t kHugePage = 2u << 20;  // large blocks are aligned to it, so that the system may map them by it
constexpr std::size_t kSmallest = 64u << 10;

struct Block {
  char* base;
  std::size_t bytes;  // with the header
};

struct Pool {
  std::mutex mutex;
  std::list<Block> blocks;  // free ones, the one handed back last in front
  std::size_t kept = 0;
};

Pool& pool() {
  static Pool* const instance = new Pool;  // never destroyed: threads may hand blocks back while the process ends
  return *instance;
}

// Sizes in steps of an eighth, so that calls of nearly the same size share blocks.
std::size_t size_class(std::size_t bytes) {
  std::size_t size = kSmallest;
  while (size * 2 <= bytes) size *= 2;
  const std::size_t step = size / 8;
  return (bytes + step - 1) / step * step;
}

}  // namespace

void* workspace_acquire(std::size_t bytes) {
  const std::size_t wanted = size_class(bytes + kHeader);
  Pool& p = pool();
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    auto best = p.blocks.end();
    for (auto it = p.blocks.begin(); it != p.blocks.end(); ++it) {
      if (it->bytes >= wanted && (best == p.blocks.end() || it->bytes < best->bytes)) best = it;
    }
    if (best != p.blocks.end()) {
      char* base = best->base;
      p.kept -= best->bytes;
      p.blocks.erase(best);
      return base + kHeader;
    }
  }
  const std::size_t alignment = wanted >= kHugePage ? kHugePage : 64;
  void* memory = std::aligned_alloc(alignment, (wanted + alignment - 1) / alignment * alignment);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (alignment == kHugePage) madvise(memory, wanted, MADV_HUGEPAGE);  // a hint: failure changes nothing
#endif
  *static_cast<std::size_t*>(memory) = wanted;
  return static_cast<char*>(memory) + kHeader;
}

void workspace_release(void* block) noexcept {
  char* base = static_cast<char*>(block) - kHeader;
  const std::size_t bytes = *reinterpret_cast<std::size_t*>(base);
  if (bytes > kWorkspaceKept) {
    std::free(base);
    return;
  }
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  try {
    p.blocks.push_front({base, bytes});
  } catch (const std::bad_alloc&) {
    std::free(base);
    return;
  }
  p.kept += bytes;
  while (p.kept > kWorkspaceKept) {
    p.kept -= p.blocks.back().bytes;
    std::free(p.blocks.back().base);
    p.blocks.pop_back();
  }
}

std::size_t workspace_kept() noexcept {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return p.kept;
}

void workspace_clear() noexcept {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  for (const Block& block : p.blocks) std::free(block.base);
  p.blocks.clear();
  p.kept = 0;
}

Workspace::Workspace(std::size_t bytes) : block_(bytes > 0 ? workspace_acquire(bytes) : nullptr) {}
Workspace::~Workspace() {
  if (block_ != nullptr) workspace_release(block_);
}
void* Workspace::get() const { return block_; }

}  // namespace fastmix
