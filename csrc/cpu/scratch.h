// Working memory of a kernel call: 64-byte aligned, uninitialised, given back at the end of its scope.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bmk {

// Keeps the blocks that a thread gave back, for its next call: memory fresh from the system costs a page fault every 4 KiB,
// which took as long as the arithmetic of a training step of an LSTM.
class ScratchPool {
 public:
  struct Block {
    void* memory;
    size_t bytes;
  };

  static ScratchPool& of_this_thread() {
    thread_local ScratchPool pool;
    return pool;
  }

  ScratchPool() = default;
  ScratchPool(const ScratchPool&) = delete;
  ScratchPool& operator=(const ScratchPool&) = delete;
  ~ScratchPool() {
    for (const Block& block : kept_) std::free(block.memory);
  }

  // Of the pool of this thread. Not inlined: there are hundreds of these calls, and a copy at each was a tenth of all code.
  __attribute__((noinline)) static Block take_block(size_t bytes) { return of_this_thread().take(bytes); }
  __attribute__((noinline)) static void give_block(Block block) { of_this_thread().give(block); }

  // The smallest kept block that holds `bytes` without wasting as much again, or a new one.
  Block take(size_t bytes) {
    size_t best = kept_.size();
    for (size_t i = 0; i < kept_.size(); ++i)
      if (kept_[i].bytes >= bytes && kept_[i].bytes <= 2 * bytes && (best == kept_.size() || kept_[i].bytes < kept_[best].bytes)) best = i;
    if (best == kept_.size()) return allocate(bytes);
    const Block block = kept_[best];
    kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(best));
    kept_bytes_ -= block.bytes;
    return block;
  }

  // The blocks kept longest make room.
  void give(Block block) {
    if (block.bytes > kLimit) {
      std::free(block.memory);
      return;
    }
    kept_.push_back(block);
    kept_bytes_ += block.bytes;
    size_t drop = 0;
    for (; kept_bytes_ > kLimit || kept_.size() - drop > kBlocks; ++drop) {
      kept_bytes_ -= kept_[drop].bytes;
      std::free(kept_[drop].memory);
    }
    kept_.erase(kept_.begin(), kept_.begin() + static_cast<std::ptrdiff_t>(drop));
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kLimit = 0;  // every block is to be seen by the sanitizer
#else
  static constexpr size_t kLimit = size_t{64} << 20;
#endif
  // More than the forward and the backward of an op take in turn: with 32, attention's backward got some of its blocks anew from the
  // system at every call, which took up to half as long again.
  static constexpr size_t kBlocks = 64;
  static constexpr size_t kHugePage = size_t{2} << 20;

  static Block allocate(size_t bytes) {
    const bool huge = bytes >= kHugePage;
    const size_t step = huge ? kHugePage : 64;
    bytes = (bytes + step - 1) / step * step;
    void* memory = std::aligned_alloc(step, bytes);
    if (!memory) throw std::bad_alloc();
#if defined(__linux__)
    if (huge) madvise(memory, bytes, MADV_HUGEPAGE);  // a hint: nothing is lost where it is refused
#endif
    return {memory, bytes};
  }

  std::vector<Block> kept_;  // oldest first
  size_t kept_bytes_ = 0;
};

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    if (count > 0) block_ = ScratchPool::take_block(static_cast<size_t>(count) * sizeof(T));
  }
  ~Scratch() {
    if (block_.bytes > 0) ScratchPool::give_block(block_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() { return static_cast<T*>(block_.memory); }
  const T* get() const { return static_cast<const T*>(block_.memory); }
  operator T*() { return get(); }

 private:
  // Nothing is a place all the same: functions of the C library want one even to do nothing there.
  alignas(64) static inline char nothing_[64];
  ScratchPool::Block block_{nothing_, 0};
};

}  // namespace bmk
