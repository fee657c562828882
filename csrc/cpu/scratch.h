// Working memory of a kernel call: 64-byte aligned, uninitialised, freed at the end of its scope.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace bmk {

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(allocate(count)) {}
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() { return data_; }
  const T* get() const { return data_; }
  operator T*() { return data_; }

 private:
  static T* allocate(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
    void* memory = std::aligned_alloc(64, bytes);
    if (!memory) throw std::bad_alloc();
    return static_cast<T*>(memory);
  }
  T* data_;
};

}  // namespace bmk
