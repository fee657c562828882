// What the kernels use of PyTorch, for programs without it: everything runs on the calling thread.
#pragma once

#include <cstdint>

namespace torch::stable {

inline int64_t get_num_threads() { return 1; }

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, F f) {
  if (begin < end) f(begin, end);
}

}  // namespace torch::stable
