// The gated causal layer of WaveNet, block by block of time.
//
//   z = weight * x + bias (causal, dilated)        a = tanh(z_filter) sigmoid(z_gate)
//   out = x + W_out a + b_out                      skip = skip_sum + W_skip a + b_skip
//
// A task is kBlock time steps of one sequence. Steps are the rows of the products: those of x are read where they lie if
// their channels are adjacent, else transposed in registers into a block. z, in panels of one or two vectors of filters with
// their gates, and a never leave the second-level cache.
// Saved for backward: in bfloat16 tanh and sigmoid, 4 D bytes a step (gated_conv_gate.h). In float32 nothing: z is computed again (a
// third of the forward's products); 8 D bytes a step to write and to read again would take as long, and stay in memory for as long as
// the whole network's forward runs.
// Refused: more than one group, a stride.
// Floor: 2 T (2 D C K + D (C + S)) operations at the multiply-add peak (bfloat16: of the dot products), x and skip_sum read, out
// and skip written.
#include "gated_conv_product.h"

// How the channels of each side of a product are laid out.
template <class T, class M>
struct GatedLayout {
  static constexpr int W = kLanes<T>;
  static constexpr int kGateVectors = PanelTile<T>::kVectors / 2;

  const GatedConvShape& shape;
  int64_t channel_row;           // of x in rows of M
  int64_t gate_row;              // D in whole vectors
  int64_t out_row, skip_row;     // C or 0, and S, in rows of M
  int64_t out_columns, columns;  // of out, and of out and skip, in whole vectors

  explicit GatedLayout(const GatedConvShape& s)
      : shape(s),
        channel_row(row_size<T, M>(s.channels)),
        gate_row(padded<T>(s.gates)),
        out_row(row_size<T, M>(s.out)),
        skip_row(row_size<T, M>(s.skips)),
        out_columns(padded<T>(s.out)),
        columns(padded<T>(s.out) + padded<T>(s.skips)) {}

  // A row of the outputs' gradients: out, then skip.
  int64_t output_row() const { return out_row + skip_row; }
  int64_t gate_panels() const { return (gate_row / W + kGateVectors - 1) / kGateVectors; }
  // Vectors of filters (as many of gates) in the panel.
  int64_t gate_vectors(int64_t panel) const { return std::min<int64_t>(kGateVectors, gate_row / W - panel * kGateVectors); }
  // Steps of the depth for so many numbers of a row of M.
  static int64_t depth(int64_t n) { return (n + kPack<T, M> - 1) / kPack<T, M> * kPack<T, M>; }
  int64_t blocks() const { return (shape.length + kBlock - 1) / kBlock; }
};

// The weights of z: panels of [K C][filters, then gates], and their biases.
template <class T, class M>
struct GateWeights {
  Scratch<M> packed;
  Scratch<T> bias;  // [2][gate_row]
  int64_t depth;

  template <class S>
  GateWeights(const GatedLayout<T, M>& layout, const GatedConvWeights<const S>& w)
      : packed(2 * layout.gate_row * layout.shape.kernel * layout.depth(layout.shape.channels)), bias(2 * layout.gate_row) {
    constexpr int W = kLanes<T>;
    const GatedConvShape& s = layout.shape;
    const int64_t D = s.gates, C = s.channels, K = s.kernel, tap_depth = layout.depth(C);
    depth = K * tap_depth;
    const int64_t vectors = layout.gate_row / W;
    torch::stable::parallel_for(0, 2 * vectors, std::max<int64_t>(1, 16384 / (depth * W)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t half = i / vectors, vector = i % vectors, panel = vector / layout.kGateVectors;
        const int64_t in_panel = layout.gate_vectors(panel), first = vector * W, n = std::min<int64_t>(W, D - first);
        M* out = packed + panel * layout.kGateVectors * 2 * W * depth +
                 (half * in_panel + vector - panel * layout.kGateVectors) * W * kPack<T, M>;
        for (int64_t tap = 0; tap < K; ++tap)
          pack_vector<T>(out + tap * tap_depth * 2 * in_panel * W, 2 * in_panel, w.weight + (half * D + first) * C * K + tap, K, C * K, C,
                         tap_depth, n);
        for (int64_t j = 0; j < W; ++j)
          bias[half * layout.gate_row + first + j] = w.bias && j < n ? to_compute(w.bias[half * D + first + j]) : T(0);
      }
    });
  }

  const M* panel(const GatedLayout<T, M>& layout, int64_t p) const {
    return packed.get() + p * layout.kGateVectors * 2 * kLanes<T> * depth;
  }
};

// Rows of x for one block of one sequence: the parts of the products with the weights of z, tap by tap. Taps that see only what is
// before the first step are left out.
template <class T, class M>
struct InputRows {
  Scratch<M> staged;  // [K][kBlock][channel_row]
  Chunks<M> chunks;
  struct Tap {
    const M* first;
    int64_t row;
  };
  std::vector<Tap> taps;  // null where left out

  explicit InputRows(const GatedLayout<T, M>& layout)
      : staged(layout.shape.kernel * kBlock * layout.channel_row), taps(layout.shape.kernel) {}

  // stage_all: rows are read whole, past the last channel too.
  template <class S>
  void set(const GatedLayout<T, M>& layout, const Signal<const S>& x, int64_t sample, int64_t step, int64_t rows, bool stage_all) {
    const GatedConvShape& s = layout.shape;
    const int64_t depth = layout.depth(s.channels);
    const Signal<const S> source = x.at(sample, 0);
    chunks.clear();
    for (int64_t tap = 0; tap < s.kernel; ++tap) {
      const int64_t first = step - s.shift(tap);
      taps[tap] = {nullptr, 0};
      if (first + rows <= 0) continue;
      bool direct = false;
      if constexpr (std::is_same_v<M, S>)
        if (first >= 0 && source.c == 1 && depth == s.channels && (!stage_all || s.channels == layout.channel_row)) {
          taps[tap] = {source.data + first * source.t, source.t};
          direct = true;
        }
      if (!direct) {
        M* out = staged + tap * kBlock * layout.channel_row;
        stage_rows<T>(out, layout.channel_row, layout.channel_row, source, s.channels, first, rows, s.length);
        taps[tap] = {out, layout.channel_row};
      }
      chunks.add(taps[tap].first, taps[tap].row, depth, tap * depth);
    }
    chunks.end();
  }
};

#include "gated_conv_gate.h"
#include "gated_conv_backward.h"

template <class S, class M>
void gated_conv_forward_with(const GatedConvForward<S>& f) {
  using T = compute_t<S>;
  constexpr int W = kLanes<T>;
  constexpr int64_t N = PanelTile<T>::kColumns;
  const GatedConvShape& s = f.shape;
  const GatedLayout<T, M> layout(s);
  const GateWeights<T, M> gate(layout, f.weights);
  // [D][out, then skip] in panels, and the biases.
  const int64_t depth = layout.depth(s.gates);
  Scratch<M> mix(layout.columns * depth);
  Scratch<T> mix_bias(layout.columns);
  for (int64_t column = 0; column < layout.columns; column += W) {
    const bool is_out = column < layout.out_columns;
    const int64_t first = is_out ? column : column - layout.out_columns, n = std::min<int64_t>(W, (is_out ? s.out : s.skips) - first);
    const S* bias = is_out ? f.weights.out_bias : f.weights.skip_bias;
    const int64_t panel = column / N * N;
    pack_vector<T>(mix + panel * depth + (column - panel) * kPack<T, M>, PanelTile<T>::vectors(layout.columns, panel),
                   (is_out ? f.weights.out : f.weights.skip) + first * s.gates, 1, s.gates, s.gates, depth, n);
    for (int64_t j = 0; j < W; ++j) mix_bias[column + j] = bias && j < n ? to_compute(bias[first + j]) : T(0);
  }
  torch::stable::parallel_for(0, s.batch * layout.blocks(), 1, [&](int64_t begin, int64_t end) {
    InputRows<T, M> input(layout);
    Scratch<T> y(kBlock * N);  // of z, then of the outputs
    Scratch<M> a(kBlock * layout.gate_row);
    LinesAhead ahead;
    Chunks<M> activated;
    activated.add(a.get(), layout.gate_row, depth, 0);
    activated.end();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / layout.blocks(), step = task % layout.blocks() * kBlock, rows = std::min(kBlock, s.length - step);
      uint16_t* kept = f.gates ? f.gates + (sample * s.length + step) * kept_row(s.gates) : nullptr;
      input.set(layout, f.x, sample, step, rows, false);
      ahead.clear();
      if (kept) ahead.add(kept, kept_row(s.gates), rows, kept_row(s.gates));
      ahead.add(f.out.at(sample, step), rows, s.out);
      ahead.add(f.skip.at(sample, step), rows, s.skips);
      ahead.add(f.skip_sum.at(sample, step), rows, s.skips);
      for (int64_t p = 0; p < layout.gate_panels(); ++p) {
        const int64_t vectors = layout.gate_vectors(p), y_row = 2 * vectors * W, first = p * layout.kGateVectors * W;
        product<T>(rows, input.chunks, gate.panel(layout, p), 2 * vectors, y.get(), y_row, &ahead);
        gate_values(GatePanel<T, M>{rows, vectors, y.get(), gate.bias.get() + first, gate.bias.get() + layout.gate_row + first, a + first,
                                    layout.gate_row, kept ? kept + 2 * first : nullptr, kept_row(s.gates)});
      }
      for (int64_t column = 0; column < layout.columns; column += N) {
        const int64_t vectors = PanelTile<T>::vectors(layout.columns, column);
        product<T>(rows, activated, mix.get() + column * depth, vectors, y.get(), vectors * W);
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t at = column + v * W;
          const bool is_out = at < layout.out_columns;
          const int64_t first = is_out ? at : at - layout.out_columns, n = std::min<int64_t>(W, (is_out ? s.out : s.skips) - first);
          finish_rows(y.get() + v * W, vectors * W, rows, n, mix_bias.get() + at,
                      (is_out ? f.x : f.skip_sum).at(sample, step).channel(first),
                      (is_out ? f.out : f.skip).at(sample, step).channel(first));
        }
      }
    }
  });
}

// Whether bfloat16 numbers are multiplied as they are.
template <class S>
INLINE bool dot_products() {
  return std::is_same_v<S, bfloat16> && selected_isa() == Isa::avx512_bf16;
}

template <class S>
void gated_conv_forward(const GatedConvForward<S>& f) {
#if ISA_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<S, bfloat16>)
    if (dot_products<S>()) return gated_conv_forward_with<S, bfloat16>(f);
#endif
  gated_conv_forward_with<S, compute_t<S>>(f);
}

template <class S>
void gated_conv_backward(const GatedConvBackward<S>& b) {
#if ISA_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<S, bfloat16>)
    if (dot_products<S>()) return gated_conv_backward_with<S, bfloat16>(b);
#endif
  gated_conv_backward_with<S, compute_t<S>>(b);
}
