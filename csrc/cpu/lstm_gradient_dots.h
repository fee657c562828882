// The products of lstm_gradient_products.h of bfloat16 numbers, in pairs of steps. Included by it.

// Two rows of at most one vector of columns, interleaved; a row that is null counts as 0.
INLINE void store_pair(bfloat16* out, const bfloat16* first, const bfloat16* second, int64_t columns) {
  typedef uint16_t half_bits __attribute__((vector_size(ISA_VECTOR_BYTES / 2)));
  typedef uint32_t full_bits __attribute__((vector_size(ISA_VECTOR_BYTES)));
  half_bits rows[2] = {};
  if (columns >= kLanes<float>) {
    if (first) std::memcpy(&rows[0], first, sizeof rows[0]);
    if (second) std::memcpy(&rows[1], second, sizeof rows[1]);
  } else {
    if (first) std::memcpy(&rows[0], first, columns * sizeof(bfloat16));
    if (second) std::memcpy(&rows[1], second, columns * sizeof(bfloat16));
  }
  const full_bits pairs = __builtin_convertvector(rows[0], full_bits) | (__builtin_convertvector(rows[1], full_bits) << 16);
  std::memcpy(out, &pairs, sizeof pairs);
}

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
                                                                 float* sums) {
  constexpr int W = kLanes<float>, G = 4 * W, N = NV * W, R = 4;
  alignas(64) bfloat16 pairs[kTokenChain * G];
  std::fill_n(sums, G * N, 0.0f);
  for (int64_t t = 0; t < tokens; t += kTokenChain) {
    const int64_t steps = std::min(kTokenChain, tokens - t);
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
