// The product and the vector functions by themselves, for tests and for the machine's measured ceiling; and the products that other
// files call.
// clang-format off: each builds on those before it
#include "tiles.h"
#include "strips.h"
// clang-format on

template <class T>
void gemm_kernel(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_row, int64_t b_column,
                 T* c) {
  gemm(m, n, k, a, a_row, a_step, b, b_row, b_column, c, n);
}

template <class T, class F>
INLINE void map_lanes(const T* x, T* out, int64_t count, F f) {
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < count; i += W) {
    const int64_t n = std::min<int64_t>(W, count - i);
    store_partial(out + i, f(load_partial(x + i, n)), n);
  }
}

template <class T>
void unary_kernel(int which, const T* x, T* out, int64_t count) {
  if (which == 0) map_lanes(x, out, count, [](auto v) { return exp(v); });
  if (which == 1) map_lanes(x, out, count, [](auto v) { return tanh(v); });
  if (which == 2) map_lanes(x, out, count, [](auto v) { return sigmoid(v); });
}
