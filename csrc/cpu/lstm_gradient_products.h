// The products of the backward pass of an LSTM layer. dgates lie in panels of one vector of hidden units,
// [panel][token][gate][lanes], as the pointwise part makes them, units past the last one 0: a panel is then read as A of
// dgates W (tokens are rows, gates are steps) and as A of dgates^T [x h] (gates are rows, tokens are steps), both times line
// after line, and is never packed again. M is what is multiplied: T, or bfloat16 for dot products, where W and [x h] are
// packed with two steps to a lane. Included by lstm_backward_kernel.h.

template <class T>
using GradientTile = PanelTile<T>;

// Torch adds up the tokens of one step, then the steps: sums over all tokens need short chains to round as well.
inline constexpr int64_t kTokenChain = 48;

inline constexpr int64_t kFetches = 4;  // calls of FetchAhead::some in a panel of gates

// Fetches what the next pointwise part reads and writes, one sequence's vector of units after the other: a little at a time while
// products are computed, since many misses at once would hold up those as well.
template <class T, class M>
struct FetchAhead {
  const PointwiseGradient<T, M>*row = nullptr, *end = nullptr;
  int64_t hidden = 0, first = 0, last = 0;  // units
  int64_t at_a_time = 0;
  int64_t unit = first;

  // Before all: how often `some` will be called.
  void expect(int64_t calls) {
    const int64_t vectors = (end - row) * ((last - first + kLanes<T> - 1) / kLanes<T>);
    at_a_time = (vectors + calls - 1) / std::max<int64_t>(calls, 1);
  }

  // Steps of a product from one call of `some` to the next, of `steps` in a panel.
  INLINE int64_t run(int64_t steps) const { return row < end ? steps / kFetches : steps; }

  INLINE void some() {
    for (int64_t i = 0; i < at_a_time && row < end; ++i) {
      fetch_operands<2>(*row, hidden, unit);
      fetch_results(*row, unit);
      unit += kLanes<T>;
      if (unit >= last) unit = first, ++row;
    }
  }
};
#if ISA_VECTOR_BYTES == 64
#include "lstm_gradient_dots.h"
#endif

// ---- dgates W ----------------------------------------------------------------------------------------------------

// Packs w [4 H, columns] into panels of [panel of units][gate][lane][columns of the panel].
template <class T, class M, class S>
void pack_gate_rows(M* packed, const S* w, int64_t hidden, int64_t columns) {
  constexpr int W = kLanes<T>, pack = std::is_same_v<M, T> ? 1 : 2;
  using Tile = GradientTile<T>;
  const int64_t unit_panels = padded<T>(hidden) / W, depth = unit_panels * 4 * W;
  const int64_t grain = std::max<int64_t>(1, 32768 / (4 * W * Tile::kColumns));
  torch::stable::parallel_for(0, Tile::panels(columns) * unit_panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task / unit_panels * Tile::kColumns, panel = task % unit_panels;
      const int64_t vectors = Tile::vectors(columns, column);
      M* out = packed + column * depth + panel * 4 * W * vectors * W;
      for (int64_t gate = 0; gate < 4; ++gate)
        for (int64_t unit = panel * W; unit < (panel + 1) * W; unit += pack) {
          const S* source = w + (gate * hidden + unit) * columns + column;
          for (int64_t v = 0; v < vectors; ++v, out += pack * W) {
            const int64_t n = std::min<int64_t>(W, columns - column - v * W);
            if constexpr (pack == 2)
              store_pair(out, unit < hidden ? source + v * W : nullptr, unit + 1 < hidden ? source + columns + v * W : nullptr, n);
            else if (unit >= hidden)
              store(out, vec<T>{});
            else
              store(out, n == W ? load(source + v * W) : load_partial(source + v * W, n));
          }
        }
    }
  });
}

// Some tokens of dgates as A: row r is at `first` + r * row, gates of the next panel of units are `panel` elements on.
template <class M>
struct GateRows {
  const M* first;
  int64_t row, panel, panels;
  int64_t depth() const { return panels * 4 * kLanes<M>; }
};

template <int R, int NV, class T>
void gate_product_tile(const T* a, int64_t a_row, int64_t a_panel, const T* packed, int64_t panels, T* out, int64_t out_row,
                       int64_t columns, bool add, FetchAhead<T, T>& ahead) {
  constexpr int W = kLanes<T>;
  const int64_t run = ahead.run(4 * W);
  vec<T> acc[R][NV] = {};
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t k = 0; k < 4 * W; k += run) {
      multiply_chain<R, NV, T>(acc, a + p * a_panel + k, a_row, 1, packed + (p * 4 * W + k) * NV * W, NV * W, run);
      ahead.some();
    }
  store_tile<R, NV, T>(acc, out, out_row, columns, add);
}

template <int R, int NV, class T, class M>
INLINE void gate_product_rows(int64_t rows, const M* a, int64_t a_row, int64_t a_panel, const M* packed, int64_t panels, T* out,
                              int64_t out_row, int64_t columns, bool add, FetchAhead<T, M>& ahead) {
  if constexpr (R > 0) {
    if (rows == R)
      gate_product_tile<R, NV>(a, a_row, a_panel, packed, panels, out, out_row, columns, add, ahead);
    else
      gate_product_rows<R - 1, NV>(rows, a, a_row, a_panel, packed, panels, out, out_row, columns, add, ahead);
  }
}

// Fetches rows of one panel: the products that follow find them in the first-level cache.
template <class M>
INLINE void fetch_panel(const GateRows<M>& a, int64_t panel, int64_t row, int64_t rows) {
  constexpr int64_t G = 4 * kLanes<M>, line = 64 / sizeof(M);
  if (panel >= a.panels) return;
  for (int64_t r = row; r < row + rows; ++r)
    for (int64_t b = 0; b < G; b += line) __builtin_prefetch(a.first + r * a.row + panel * a.panel + b);
}

// out[rows, columns of the panels first..last] (+)= dgates W, in chains of kSumDepth terms, W packed by pack_gate_rows. A run
// of W as long as a chain stays in the first-level cache over all rows.
template <class T, class M>
void gate_product(const TileTask& task, int64_t rows, const GateRows<M>& a, const M* packed, T* out, int64_t out_row, int64_t columns,
                  int64_t first, int64_t last, bool accumulate, FetchAhead<T, M> ahead = {}) {
  constexpr int W = kLanes<T>;
  constexpr int64_t N = GradientTile<T>::kColumns, chain = kSumDepth / (4 * W);
  if constexpr (std::is_same_v<M, bfloat16>)
    if (task.tiled() && columns % kTileSide == 0) {
      for (int64_t column = first * N; column < std::min(last * N, columns); column += N) {
        const int64_t n = std::min(N, columns - column);
        task.multiply({.rows = rows, .columns = n, .steps = a.depth(), .a = a.first, .a_row = a.row, .run = 4 * W, .a_run = a.panel,
                       .b = packed + column * a.depth(), .b_pair = 2 * n, .b_block = 4 * kTileSide, .c = out + column, .c_row = out_row,
                       .add = accumulate});
      }
      return;
    }
  for (int64_t column = first * N; column < std::min(last * N, columns); column += N)
    with_constant<GradientTile<T>::kVectors>(GradientTile<T>::vectors(columns, column), [&](auto vectors) {
      constexpr int NV = decltype(vectors)::value, R = GradientTile<T>::rows(NV);
      const int64_t tiles = (rows + R - 1) / R;
      if (column == first * N && ahead.row < ahead.end) ahead.expect((last - first) * tiles * a.panels * kFetches);
      for (int64_t p = 0; p < a.panels; p += chain)
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t row = tile * rows / tiles, count = (tile + 1) * rows / tiles - row;
          if (column == first * N)
            for (int64_t next = p + chain; next < p + 2 * chain; ++next) fetch_panel(a, next, row, count);
          gate_product_rows<R, NV>(count, a.first + row * a.row + p * a.panel, a.row, a.panel,
                                   packed + column * a.depth() + p * 4 * W * NV * W, std::min(chain, a.panels - p),
                                   out + row * out_row + column, out_row, columns - column, accumulate || p > 0, ahead);
        }
    });
}

// The same with w [4 H, columns] as it lies, columns a multiple of the lanes: for so few rows that packing w would take longer.
template <class T>
void gate_product_direct(int64_t rows, const GateRows<T>& a, const T* w, int64_t hidden, T* out, int64_t out_row, int64_t columns,
                         int64_t first, int64_t last, bool accumulate = false) {
  constexpr int W = kLanes<T>, R = 4;
  constexpr int64_t N = GradientTile<T>::kColumns;
  for (int64_t column = first * N; column < std::min(last * N, columns); column += N)
    with_constant<GradientTile<T>::kVectors>(GradientTile<T>::vectors(columns, column), [&](auto vectors) {
      for (int64_t row = 0; row < rows; row += R)
        with_constant<R>(std::min<int64_t>(R, rows - row), [&](auto count) {
          constexpr int NV = decltype(vectors)::value, C = decltype(count)::value;
          for (int64_t p = 0; p < a.panels; ++p) {
            vec<T> acc[C][NV] = {};
            for (int64_t gate = 0; gate < 4; ++gate)
              multiply_tile<C, NV, T>(acc, a.first + row * a.row + p * a.panel + gate * W, a.row, 1,
                                      w + (gate * hidden + p * W) * columns + column, columns, std::min<int64_t>(W, hidden - p * W));
            store_tile<C, NV, T>(acc, out + row * out_row + column, out_row, NV * W, accumulate || p > 0);
          }
        });
    });
}

// ---- dgates^T [x h] ----------------------------------------------------------------------------------------------

// A tile of gates over one chain of tokens; meanwhile it fetches its share of the chain that follows, which lies at `ahead`.
template <int R, int NV, class T>
INLINE void weight_gradient_tile(const T* dgates, const T* inputs, int64_t steps, int64_t gate, const T* ahead, T* sums) {
  constexpr int W = kLanes<T>, G = 4 * W, N = NV * W, line = 64 / sizeof(T);
  for (int64_t t = gate * kTokenChain / G; t < (gate + R) * kTokenChain / G; ++t)
    for (int64_t b = 0; b < G; b += line) __builtin_prefetch(ahead + t * G + b);
  vec<T> acc[R][NV] = {};
  multiply_chain<R, NV, T>(acc, dgates + gate, 1, G, inputs, N, steps);
  store_tile<R, NV, T>(acc, sums + gate * N, N, N, true);
}

// sums[4 lanes, NV vectors] += one panel of dgates, transposed, times one panel of inputs. `next`: the dgates read after these.
template <int NV, class T>
void weight_gradient_panel(const T* dgates, const T* inputs, int64_t tokens, const T* next, T* sums) {
  constexpr int W = kLanes<T>, G = 4 * W, N = NV * W, R = GradientTile<T>::kAccumulators / NV < 6 ? 4 : 6;
  for (int64_t t = 0; t < tokens; t += kTokenChain) {
    const int64_t steps = std::min(kTokenChain, tokens - t);
    const T* ahead = t + kTokenChain < tokens ? dgates + (t + kTokenChain) * G : next;
    int64_t gate = 0;
    for (; gate + R <= G; gate += R) weight_gradient_tile<R, NV>(dgates + t * G, inputs + t * N, steps, gate, ahead, sums);
    if constexpr (G % R) weight_gradient_tile<G % R, NV>(dgates + t * G, inputs + t * N, steps, gate, ahead, sums);
  }
}

// sums[4][lanes] += the sum of one panel of dgates over the tokens.
template <class T, class M>
void bias_gradient_panel(const M* dgates, int64_t tokens, T* sums) {
  constexpr int W = kLanes<T>;
  for (int64_t t0 = 0; t0 < tokens; t0 += kTokenChain) {
    vec<T> chain[4] = {};
    for (int64_t t = t0; t < std::min(tokens, t0 + kTokenChain); ++t)
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) chain[g] += load(dgates + (t * 4 + g) * W);
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) store(sums + g * W, load(sums + g * W) + chain[g]);
  }
}

// Some tokens' rows of a matrix, at most one panel of their columns, as B of that product. row(token) is where a row begins.
// vectors: of the panel; n: how many of its columns there are.
template <class T, class M, class Row>
void pack_tokens(M* packed, int64_t tokens, int64_t vectors, int64_t n, Row row) {
  constexpr int64_t W = kLanes<T>, kTokens = std::is_same_v<M, T> ? 1 : 2;  // that lie side by side
  for (int64_t token = 0; token < tokens; token += kTokens)
    for (int64_t v = 0; v < vectors; ++v, packed += kTokens * W) {
      const int64_t columns = std::min(W, n - v * W);
      if constexpr (kTokens == 2)
        store_pair(packed, row(token) + v * W, token + 1 < tokens ? row(token + 1) + v * W : nullptr, columns);
      else
        store(packed, columns == W ? load(row(token) + v * W) : load_partial(row(token) + v * W, columns));
    }
}

// A block of tokens is packed at a time: it stays in the second-level cache for all panels of dgates, whose sums do too.
inline constexpr int64_t kTokenBlock = 4 * kTokenChain, kUnitPanels = 16;

// Rows of the weight gradients that belong to the panels [first, last) of units, for one panel of inputs: d_w[4 H, columns]
// from `column` on, and the biases' too if d_bias is not null. dgates: of panel 0, the next one `panel_size` elements on.
template <class T, class M, class S, class Row>
void weight_gradient(const TileTask& task, const M* dgates, int64_t panel_size, int64_t tokens, int64_t first, int64_t last,
                     int64_t hidden, int64_t columns, int64_t column, Row row, S* d_w, S* d_b_ih, S* d_b_hh) {
  constexpr int W = kLanes<T>, G = 4 * W;
  const int64_t n = std::min<int64_t>(GradientTile<T>::kColumns, columns - column);
  with_constant<GradientTile<T>::kVectors>(GradientTile<T>::vectors(columns, column), [&](auto vectors) {
    constexpr int NV = decltype(vectors)::value, N = NV * W;
    Scratch<M> block((kTokenBlock + 1) * N);
    Scratch<T> sums((last - first) * G * N), bias((last - first) * G);
    std::fill_n(sums.get(), (last - first) * G * N, T(0));
    std::fill_n(bias.get(), (last - first) * G, T(0));
    for (int64_t token = 0; token < tokens; token += kTokenBlock) {
      const int64_t count = std::min(kTokenBlock, tokens - token);
      pack_tokens<T>(block.get(), count, NV, n, [&](int64_t t) { return row(token + t) + column; });
      if (task.tiled()) std::fill(block + (count + 1) / 2 * 2 * N, block + (count + kTileSteps - 1) / kTileSteps * kTileSteps * N, M{});
      for (int64_t p = first; p < last; ++p) {
        const M* these = dgates + p * panel_size + token * G;
        const M* next = p + 1 < last ? these + panel_size : dgates + first * panel_size + (token + count) * G;
        T* panel_sums = sums + (p - first) * G * N;
        if constexpr (std::is_same_v<M, bfloat16>) {
          if (task.tiled())
            weight_gradient_in_tiles(task, these, block.get(), count, N, panel_sums);
          else
            weight_gradient_panel<NV>(these, block.get(), count, next, panel_sums);
        } else {
          weight_gradient_panel<NV>(these, block.get(), count, next, panel_sums);
        }
        if (d_b_ih) bias_gradient_panel(these, count, bias + (p - first) * G);
      }
    }
    for (int64_t p = first; p < last; ++p)
      for (int64_t gate = 0; gate < 4; ++gate)
        for (int64_t j = 0; j < std::min<int64_t>(W, hidden - p * W); ++j) {
          const int64_t at = (p - first) * G + gate * W + j, unit = gate * hidden + p * W + j;
          const T* sum = sums + at * N;
          S* out = d_w + unit * columns + column;
          int64_t i = 0;
          for (; i + W <= n; i += W) store(out + i, load(sum + i));
          if (i < n) store_partial(out + i, load(sum + i), n - i);
          if (d_b_ih) d_b_ih[unit] = d_b_hh[unit] = from_compute<S>(bias[at]);
        }
  });
}
