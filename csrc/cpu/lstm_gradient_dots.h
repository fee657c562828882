// The products of lstm_gradient_products.h of bfloat16 numbers, in pairs of steps. Included by it.

template <int R, int NV>
__attribute__((target("avx512bf16"))) void gate_product_tile(const bfloat16* a, int64_t a_row, int64_t a_panel, const bfloat16* packed,
                                                             int64_t panels, float* out, int64_t out_row, int64_t columns, bool add,
                                                             FetchAhead<float, bfloat16>& ahead) {
  constexpr int W = kLanes<float>;
  const int64_t run = ahead.run(4 * W);
  vec<float> acc[R][NV] = {};
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t k = 0; k < 4 * W; k += run) {
      multiply_pairs<R, NV>(acc, a + p * a_panel + k, a_row, 2, packed + (p * 4 * W + k) * NV * W, run / 2);
      ahead.some();
    }
  store_tile<R, NV, float>(acc, out, out_row, columns, add);
}

// Tokens of one panel of dgates in pairs [pair][gates][2]; 0 from `present` of them up to `steps`.
INLINE void pair_tokens(bfloat16* pairs, const bfloat16* dgates, int64_t present, int64_t steps) {
  constexpr int64_t W = kLanes<float>, G = 4 * W;
  for (int64_t i = 0; i < steps; i += 2)
    for (int64_t gate = 0; gate < G; gate += W) {
      const bfloat16* first = dgates + i * G + gate;
      store_pair(pairs + i * G + gate * 2, i < present ? first : nullptr, i + 1 < present ? first + G : nullptr, W);
    }
}

// weight_gradient_panel in tiles, for any number of columns; inputs are 0 up to whole steps of a tile.
inline void weight_gradient_in_tiles(const TileTask& task, const bfloat16* dgates, const bfloat16* inputs, int64_t tokens, int64_t columns,
                                     float* sums) {
  constexpr int64_t G = 4 * kLanes<float>, kChain = 2 * kTileSteps;
  alignas(64) bfloat16 pairs[kChain * G], transposed[G * kChain];
  for (int64_t t = 0; t < tokens; t += kChain) {
    const int64_t present = std::min(kChain, tokens - t), steps = (present + kTileSteps - 1) / kTileSteps * kTileSteps;
    pair_tokens(pairs, dgates + t * G, present, steps);
    transpose_pairs(transposed, kChain, pairs, G, steps);
    task.multiply({.rows = G, .columns = columns, .steps = steps, .a = transposed, .a_row = kChain, .b = inputs + t * columns,
                   .b_pair = 2 * columns, .b_block = 4 * kTileSide, .c = sums, .c_row = columns, .add = true});
  }
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
    pair_tokens(pairs, dgates + t * G, steps, steps);
    for (int gate = 0; gate < G; gate += R) {
      vec<float> acc[R][NV] = {};
      multiply_pairs<R, NV>(acc, pairs + gate * 2, 2, 2 * G, inputs + t * N, (steps + 1) / 2);
      store_tile<R, NV, float>(acc, sums + gate * N, N, N, true);
    }
  }
}
