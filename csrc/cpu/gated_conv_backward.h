// The gradient of gated_conv. Included by gated_conv_kernel.h.
//
//   d_a = W_out^T d_out + W_skip^T d_skip
//   d_filter = d_a s (1 - t^2)        d_gate = d_a t s (1 - s)        with t = tanh(z_filter), s = sigmoid(z_gate), a = t s
//   d_x[t] = d_out[t] + sum over taps of weight[tap]^T d_z[t + shift(tap)]
//   d_weight[tap] = sum over t of d_z[t] x[t - shift(tap)]^T        d_W_out = sum of d_out a^T        d_W_skip = sum of d_skip a^T
//
// Two passes over the blocks of some sequences. The first reads t and s, or computes them again, and from them d_z, adds up the
// gradients of the weights while x, a, d_z and the outputs' gradients are in the second-level cache, and leaves d_z in memory; the
// second computes d_x from it. The lines of the next block are asked for between the tiles of this one.
// The blocks are dealt to a number of sums that the shapes alone decide, so the result does not depend on the threads.

// Sums over time, of one part of the blocks: [K C][2 gate_row] for the weights of z, [output_row][gate_row] for the others.
template <class T>
struct GatedSums {
  T *weight, *mix, *bias, *mix_bias;
};

template <class S, class M>
class GatedBackward {
  using T = compute_t<S>;
  static constexpr int W = kLanes<T>;
  static constexpr bool kKept = std::is_same_v<S, bfloat16>, kPaired = kPack<T, M> == 2;
  static constexpr int64_t kSums = 64, kSumBlocks = 8;  // parts at most; blocks of a part at least
  static constexpr int64_t kSteps = 1 << 14;            // of the sequences whose d_z are in memory at a time, if they are shorter

  const GatedConvBackward<S>& b;
  const GatedConvShape& s;
  const GatedLayout<T, M> layout;
  std::optional<GateWeights<T, M>> gate;  // where z is computed again
  const int64_t z_row;  // of d_z: filters, then gates
  const int64_t parts;
  Scratch<M> mix;  // W_out and W_skip as [output_row][D], in panels as wide as those of the gates' filters
  Scratch<T> sums;

 public:
  explicit GatedBackward(const GatedConvBackward<S>& b)
      : b(b),
        s(b.shape),
        layout(s),
        z_row(2 * layout.gate_row),
        parts(std::clamp<int64_t>(s.batch * layout.blocks() / kSumBlocks, 1, kSums)),
        mix(layout.output_row() * layout.gate_row),
        sums(b.need_weights ? parts * sums_size() : 0) {
    if constexpr (!kKept) gate.emplace(layout, b.weights);
    pack_mix();
    if (b.need_weights) std::fill_n(sums.get(), parts * sums_size(), T(0));
  }

  void run() {
    // Some zeros follow the last step of each sequence: a block whose taps look past it reads them.
    const int64_t length = s.length + kBlock,
                  group = std::clamp<int64_t>(kSteps / std::max<int64_t>(s.length, 1), 1, std::max<int64_t>(s.batch, 1));
    Scratch<M> d_z(group * length * z_row);
    const InputWeights input(*this);
    for (int64_t first = 0; first < s.batch; first += group) {
      const int64_t count = std::min(group, s.batch - first), blocks = count * layout.blocks();
      const int64_t used = std::min(parts, blocks);
      torch::stable::parallel_for(0, used, 1, [&](int64_t begin, int64_t end) {
        Pass pass(*this);
        for (int64_t part = begin; part < end; ++part)
          for (int64_t i = part * blocks / used; i < (part + 1) * blocks / used; ++i) {
            const int64_t sample = i / layout.blocks(), step = i % layout.blocks() * kBlock, rows = std::min(kBlock, s.length - step);
            M* out = d_z.get() + (sample * length + step) * z_row;
            pass.block(first + sample, step, rows, out, sums_of(part));
            if (step + rows == s.length) std::fill_n(out + rows * z_row, kBlock * z_row, M{});
          }
      });
      if (b.d_x.data)
        torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
          Scratch<T> y(kBlock * PanelTile<T>::kColumns);
          Chunks<M> chunks;
          LinesAhead ahead;
          for (int64_t i = begin; i < end; ++i) {
            const int64_t sample = i / layout.blocks(), step = i % layout.blocks() * kBlock;
            const M* of_sample = d_z.get() + sample * length * z_row;
            input.block(first + sample, step, std::min(kBlock, s.length - step), of_sample, chunks, ahead, y.get());
          }
        });
    }
    if (b.need_weights) store_sums();
  }

 private:
  int64_t sums_size() const { return s.kernel * s.channels * z_row + layout.output_row() * layout.gate_row + z_row + layout.output_row(); }
  GatedSums<T> sums_of(int64_t part) {
    if (!b.need_weights) return {};
    T* weight = sums.get() + part * sums_size();
    T* mix_sums = weight + s.kernel * s.channels * z_row;
    T* bias = mix_sums + layout.output_row() * layout.gate_row;
    return {weight, mix_sums, bias, bias + z_row};
  }

  void pack_mix() {
    const int64_t depth = layout.output_row();
    for (int64_t vector = 0; vector < layout.gate_row / W; ++vector) {
      const int64_t panel = vector / layout.kGateVectors, vectors = layout.gate_vectors(panel), first = vector * W;
      const int64_t n = std::min<int64_t>(W, s.gates - first);
      M* out = mix.get() + panel * layout.kGateVectors * W * depth + (vector - panel * layout.kGateVectors) * W * kPack<T, M>;
      if (s.out) pack_vector<T>(out, vectors, b.weights.out + first, s.gates, 1, s.out, layout.out_row, n);
      if (s.skips)
        pack_vector<T>(out + layout.out_row * vectors * W, vectors, b.weights.skip + first, s.gates, 1, s.skips, layout.skip_row, n);
    }
  }

  // The first pass, with the memory of one thread.
  struct Pass {
    const GatedBackward& of;
    InputRows<T, M> input;
    Scratch<M> d_outputs;  // [kBlock][out_row], then [kBlock][skip_row], where the gradients are not read as they lie
    Scratch<T> z, d_a;     // of one panel
    Scratch<M> a;          // [kBlock][gate_row], with the steps in pairs where M is multiplied in pairs
    // The same with the steps in pairs, where M is multiplied in pairs.
    Scratch<M> x_pairs, d_output_pairs, d_z_pairs;
    Chunks<M> output_chunks;
    LinesAhead ahead;
    // Rows of the outputs' gradients, `columns` of them, `at` among the two.
    struct OutputRows {
      const M* first;
      int64_t row, columns, at;
    };

    explicit Pass(const GatedBackward& of)
        : of(of),
          input(of.layout),
          d_outputs(kBlock * of.layout.output_row()),
          z(kBlock * PanelTile<T>::kColumns),
          d_a(kBlock * PanelTile<T>::kColumns),
          a(kBlock * of.layout.gate_row),
          x_pairs(pairs(of.layout.channel_row)),
          d_output_pairs(pairs(of.layout.output_row())),
          d_z_pairs(pairs(of.z_row)) {}
    static int64_t pairs(int64_t row) { return kPaired ? kBlock * row : 0; }

    void block(int64_t sample, int64_t step, int64_t rows, M* d_z, const GatedSums<T>& sums) {
      const GatedLayout<T, M>& layout = of.layout;
      const GatedConvShape& s = of.s;
      const bool weights = of.b.need_weights;
      if (weights || !kKept) input.set(layout, of.b.x, sample, step, rows, weights && kPaired);
      const OutputRows outputs[2] = {
          output_rows(of.b.d_out.at(sample, 0), s.out, layout.out_row, 0, step, rows),
          output_rows(of.b.d_skip.at(sample, 0), s.skips, layout.skip_row, layout.out_row, step, rows),
      };
      ahead.clear();
      if (const int64_t next = std::min(kBlock, s.length - step - rows); next > 0) {
        const int64_t after = step + rows, row = kept_row(s.gates);
        ahead.add(of.b.d_out.at(sample, after), next, s.out);
        ahead.add(of.b.d_skip.at(sample, after), next, s.skips);
        if constexpr (kKept) ahead.add(of.b.gates + (sample * s.length + after) * row, row, next, row);
        ahead.add(d_z + rows * of.z_row, of.z_row, next, of.z_row);
        if (weights) ahead.add(of.b.x.at(sample, after), next, s.channels);
      }
      output_chunks.clear();
      for (const OutputRows& o : outputs) output_chunks.add(o.first, o.row, o.columns, o.at);
      output_chunks.end();
      for (int64_t p = 0; p < layout.gate_panels(); ++p) gate_panel(p, sample, step, rows, d_z, sums);
      if (!weights) return;
      const int64_t C = s.channels, D = layout.gate_row, Z = of.z_row;
      if constexpr (!kPaired) {
        for (int64_t tap = 0; tap < s.kernel; ++tap)
          if (const auto& x = input.taps[tap]; x.first)
            outer_product<T>(C, Z, rows, x.first, x.row, d_z, Z, sums.weight + tap * C * Z, Z, ahead);
        for (const OutputRows& o : outputs) {
          outer_product<T>(o.columns, D, rows, o.first, o.row, a.get(), D, sums.mix + o.at * D, D, ahead);
          add_columns(o.first, o.row, rows, o.columns, sums.mix_bias + o.at);
        }
      } else {
        for (int64_t tap = 0; tap < s.kernel; ++tap)
          if (const auto& x = input.taps[tap]; x.first) {
            pair_rows(x_pairs, layout.channel_row, x.first, x.row, rows, layout.channel_row);
            outer_product<T>(C, Z, rows, x_pairs.get(), layout.channel_row, d_z_pairs.get(), Z, sums.weight + tap * C * Z, Z, ahead);
          }
        for (const OutputRows& o : outputs) {
          pair_rows(d_output_pairs, o.columns, o.first, o.row, rows, o.columns);
          outer_product<T>(o.columns, D, rows, d_output_pairs.get(), o.columns, a.get(), D, sums.mix + o.at * D, D, ahead);
          add_pairs(d_output_pairs, o.columns, rows, o.columns, sums.mix_bias + o.at);
        }
      }
    }

    // d_a of one panel, and from it a, d_z and the sums of the bias.
    void gate_panel(int64_t p, int64_t sample, int64_t step, int64_t rows, M* d_z, const GatedSums<T>& sums) {
      const GatedLayout<T, M>& layout = of.layout;
      const int64_t vectors = layout.gate_vectors(p), first = p * layout.kGateVectors * W, D = layout.gate_row;
      product<T>(rows, output_chunks, of.mix.get() + first * layout.output_row(), vectors, d_a.get(), vectors * W, &ahead);
      const GateGradient<T, M> gradient{rows,
                                        vectors,
                                        d_a.get(),
                                        d_z + first,
                                        d_z + D + first,
                                        a + first * kPack<T, M>,
                                        of.z_row,
                                        D,
                                        sums.bias ? sums.bias + first : nullptr,
                                        sums.bias ? sums.bias + D + first : nullptr};
      if constexpr (kKept) {
        const int64_t row = kept_row(of.s.gates);
        const uint16_t* kept = of.b.gates + (sample * of.s.length + step) * row + 2 * first;
        if constexpr (kPaired)
          gate_gradients(gradient, kept, row, d_z_pairs + 2 * first, d_z_pairs + 2 * (D + first));
        else
          gate_gradients(gradient, [&](int64_t r, int64_t v) { return kept_values(kept + r * row + 2 * v * W); });
      } else {
        product<T>(rows, input.chunks, of.gate->panel(layout, p), 2 * vectors, z.get(), 2 * vectors * W);
        const T *filter_bias = of.gate->bias.get() + first, *gate_bias = filter_bias + D;
        gate_gradients(gradient, [&](int64_t r, int64_t v) {
          const T* row = z.get() + (2 * vectors * r + v) * W;
          const vec<T> filter = load(row) + load(filter_bias + v * W), gate = load(row + vectors * W) + load(gate_bias + v * W);
          return std::pair(tanh(filter), sigmoid(gate));
        });
      }
    }

    // Read as they lie where their channels are adjacent and whole vectors.
    OutputRows output_rows(const Signal<const S>& d, int64_t channels, int64_t columns, int64_t at, int64_t step, int64_t rows) {
      if constexpr (std::is_same_v<M, S>)
        if (d.data && d.c == 1 && channels == columns) return {d.data + step * d.t, d.t, columns, at};
      M* staged = d_outputs + kBlock * at;
      stage_rows<T>(staged, columns, columns, d, channels, step, rows, of.s.length);
      return {staged, columns, columns, at};
    }

    static void add_columns(const M* from, int64_t row, int64_t rows, int64_t columns, T* out) {
      for (int64_t c = 0; c < columns; c += W) {
        vec<T> sum = {};
        for (int64_t r = 0; r < rows; ++r) sum += load(from + r * row + c);
        store(out + c, load(out + c) + sum);
      }
    }
  };

  // The second pass: weight^T in panels of channels, tap by tap [2 D] deep.
  struct InputWeights {
    GatedBackward& of;
    Scratch<M> packed;

    explicit InputWeights(GatedBackward& of) : of(of), packed(of.b.d_x.data ? padded<T>(of.s.channels) * of.s.kernel * of.z_row : 0) {
      if (!of.b.d_x.data) return;
      const GatedConvShape& s = of.s;
      constexpr int64_t N = PanelTile<T>::kColumns;
      const int64_t columns = padded<T>(s.channels), D = of.layout.gate_row, depth = s.kernel * of.z_row;
      torch::stable::parallel_for(0, columns / W, std::max<int64_t>(1, 16384 / (depth * W)), [&](int64_t begin, int64_t end) {
        for (int64_t vector = begin; vector < end; ++vector) {
          const int64_t first = vector * W, panel = first / N * N, vectors = PanelTile<T>::vectors(columns, panel);
          const int64_t n = std::min<int64_t>(W, s.channels - first);
          for (int64_t tap = 0; tap < s.kernel; ++tap)
            for (int64_t half = 0; half < 2; ++half) {
              M* out = packed.get() + panel * depth + (tap * of.z_row + half * D) * vectors * W + (first - panel) * kPack<T, M>;
              pack_vector<T>(out, vectors, of.b.weights.weight + (half * s.gates * s.channels + first) * s.kernel + tap,
                             s.channels * s.kernel, s.kernel, s.gates, D, n);
            }
        }
      });
    }

    void block(int64_t sample, int64_t step, int64_t rows, const M* d_z, Chunks<M>& chunks, LinesAhead& ahead, T* y) const {
      const GatedConvShape& s = of.s;
      constexpr int64_t N = PanelTile<T>::kColumns;
      const int64_t columns = padded<T>(s.channels), depth = s.kernel * of.z_row;
      chunks.clear();
      for (int64_t tap = 0; tap < s.kernel; ++tap)
        if (const int64_t at = step + s.shift(tap); at < s.length) chunks.add(d_z + at * of.z_row, of.z_row, of.z_row, tap * of.z_row);
      chunks.end();
      ahead.clear();
      ahead.add(of.b.d_x.at(sample, step), rows, s.channels);
      ahead.add(of.b.d_out.at(sample, step), rows, s.out);
      for (int64_t column = 0; column < columns; column += N) {
        const int64_t vectors = PanelTile<T>::vectors(columns, column);
        product<T>(rows, chunks, packed.get() + column * depth, vectors, y, vectors * W, &ahead);
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t first = column + v * W;
          const Signal<const S> added = s.out ? of.b.d_out.at(sample, step).channel(first) : Signal<const S>{};
          finish_rows<T>(y + v * W, vectors * W, rows, std::min<int64_t>(W, s.channels - first), nullptr, added,
                         of.b.d_x.at(sample, step).channel(first));
        }
      }
    }
  };

  // Adds the parts in order and lays the sums out as the weights.
  void store_sums() {
    const int64_t size = sums_size();
    torch::stable::parallel_for(0, (size + W - 1) / W, 512, [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(end * W, size);
      for (int64_t part = 1; part < parts; ++part) {
        const T* from = sums.get() + part * size;
        for (int64_t i = begin * W; i < last; ++i) sums[i] += from[i];
      }
    });
    const GatedSums<T> total = sums_of(0);
    const GatedConvWeights<S>& d = b.d_weights;
    const int64_t C = s.channels, D = s.gates, K = s.kernel;
    torch::stable::parallel_for(0, 2 * D, std::max<int64_t>(1, 16384 / (C * K)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = i < D ? i : layout.gate_row + i - D;
        for (int64_t c = 0; c < C; ++c)
          for (int64_t tap = 0; tap < K; ++tap)
            d.weight[(i * C + c) * K + tap] = from_compute<S>(total.weight[(tap * C + c) * z_row + column]);
        if (d.bias) d.bias[i] = from_compute<S>(total.bias[column]);
      }
    });
    auto store_mix = [&](int64_t rows, int64_t first, S* weight, S* bias) {
      for (int64_t i = 0; i < rows; ++i) {
        const T* from = total.mix + (first + i) * layout.gate_row;
        for (int64_t j = 0; j < D; ++j) weight[i * D + j] = from_compute<S>(from[j]);
        if (bias) bias[i] = from_compute<S>(total.mix_bias[first + i]);
      }
    };
    store_mix(s.out, 0, d.out, d.out_bias);
    store_mix(s.skips, layout.out_row, d.skip, d.skip_bias);
  }
};

template <class S, class M>
void gated_conv_backward_with(const GatedConvBackward<S>& b) {
  GatedBackward<S, M>(b).run();
}
