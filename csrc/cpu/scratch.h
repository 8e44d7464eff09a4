// Working memory that a thread keeps between calls: fresh pages from the system cost more than the work done in them.
#pragma once

#include <cstdint>
#include <new>

namespace fastmix::FASTMIX_ISA {

namespace detail {

struct KeptMemory {
  char* data = nullptr;
  int64_t size = 0;
  ~KeptMemory() { ::operator delete(data, std::align_val_t{64}); }
};

}  // namespace detail

// The working memory of one call, taken piece by piece by the calling thread. Up to kKept bytes stay with that thread for its next
// call, and are freed when it ends. One Scratch at a time in a thread.
class Scratch {
 public:
  static constexpr int64_t kKept = int64_t{64} << 20;

  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    while (extra_ != nullptr) {
      Extra* next = extra_->next;
      release(extra_);
      extra_ = next;
    }
    if (used_ > kept_.size && used_ <= kKept) {  // once is enough the next time
      release(kept_.data);
      kept_.size = 0;
      kept_.data = static_cast<char*>(::operator new(static_cast<std::size_t>(used_), kAlignment, std::nothrow));
      if (kept_.data != nullptr) kept_.size = used_;
    }
  }

  // Uninitialised, aligned to a cache line.
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    used_ += bytes;
    if (used_ <= kept_.size) return reinterpret_cast<T*>(kept_.data + used_ - bytes);
    char* piece = static_cast<char*>(::operator new(static_cast<std::size_t>(bytes) + sizeof(Extra), kAlignment));
    extra_ = new (piece) Extra{extra_};
    return reinterpret_cast<T*>(piece + sizeof(Extra));
  }

 private:
  static constexpr std::align_val_t kAlignment{64};

  struct alignas(64) Extra {
    Extra* next;
  };
  static void release(void* p) { ::operator delete(p, kAlignment); }

  static inline thread_local detail::KeptMemory kept_;
  Extra* extra_ = nullptr;
  int64_t used_ = 0;
};

}  // namespace fastmix::FASTMIX_ISA
