// The products of lstm_gradient_products.h of bfloat16 numbers, in pairs of steps. Included by it.

template <int R, int NV>
__attribute__((target("avx512bf16"))) void gate_product_tile(const bfloat16* a, int64_t a_row, int64_t a_panel, const bfloat16* packed,
                                                             int64_t panels, float* out, int64_t out_row, int64_t columns, bool add) {
  constexpr int W = kLanes<float>;
  vec<float> acc[R][NV] = {};
  for (int64_t p = 0; p < panels; ++p) multiply_pairs<R, NV>(acc, a + p * a_panel, a_row, 2, packed + p * 4 * W * NV * W, 2 * W);
  store_tile<R, NV, float>(acc, out, out_row, columns, add);
}

// Tokens are the steps: of dgates, a chain of them is interleaved at a time.
template <int NV>
__attribute__((target("avx512bf16"))) void weight_gradient_panel(const bfloat16* dgates, const bfloat16* inputs, int64_t tokens,
                                                                 const bfloat16* next, float* sums) {
  constexpr int W = kLanes<float>, G = 4 * W, N = NV * W, R = 4;
  alignas(64) bfloat16 pairs[kTokenChain * G];
  for (int64_t t = 0; t < tokens; t += kTokenChain) {
    const int64_t steps = std::min(kTokenChain, tokens - t);
    const bfloat16* ahead = t + kTokenChain < tokens ? dgates + (t + kTokenChain) * G : next;
    for (int64_t i = 0; i < kTokenChain * G; i += 32) __builtin_prefetch(ahead + i);
    for (int64_t i = 0; i < steps; i += 2)
      for (int64_t gate = 0; gate < G; gate += W) {
        const bfloat16* first = dgates + (t + i) * G + gate;
        store_pair(pairs + i * G + gate * 2, first, i + 1 < steps ? first + G : nullptr, W);
      }
    for (int gate = 0; gate < G; gate += R) {
      vec<float> acc[R][NV] = {};
      multiply_pairs<R, NV>(acc, pairs + gate * 2, 2, 2 * G, inputs + t * N, (steps + 1) / 2);
      store_tile<R, NV, float>(acc, sums + gate * N, N, N, true);
    }
  }
}
