// What a Transformer's layer has of its own between the kernels of others. Included by for_each_isa.h inside the namespace of each
// instruction set.
//
//   gelu_tanh(v) = v / 2 (1 + tanh(sqrt(2 / pi) (v + 0.044715 v^3))) = v sigmoid(2 sqrt(2 / pi) (v + 0.044715 v^3)),
//   the second without the difference of nearly equal numbers below 0.
// clang-format off: each builds on those before it
#include "row_kernel.h"
// clang-format on

template <class S>
void gelu_tanh_of(void* numbers, int64_t count) {
  using T = compute_t<S>;
  constexpr int W = kLanes<T>;
  constexpr int64_t kGrain = 1 << 12;
  S* data = static_cast<S*>(numbers);
  torch::stable::parallel_for(0, (count + W - 1) / W, kGrain / W, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * W; i < std::min(count, end * W); i += W) {
      const int64_t n = std::min<int64_t>(W, count - i);
      const vec<T> v = load_partial(data + i, n);
      const vec<T> u = v * (static_cast<T>(1.5957691216057308) + static_cast<T>(0.07135481627260025) * v * v);
      store_partial(data + i, v / (1 + exp(-u)), n);
    }
  });
}
