// The backward pass of one LSTM layer. From what the forward saved (activated gates, every c_t) and the upstream
// gradients, backwards through the steps:
//
//   dh = d_output_t + dgates_(t+1) W_hh          (projected: du = dh W_hr, else du = dh)
//   do = du tanh(c_t)     dc += du o (1 - tanh(c_t)^2)     di = dc g     dg = dc i     df = dc c_(t-1)     dc *= f
//   dgates_t = (di i(1-i), df f(1-f), dg (1-g^2), do o(1-o))
//
// and when all dgates are there, one product each over all tokens:
//   [dW_ih dW_hh db] = dgates^T [x h_prev 1]     dx = dgates W_ih     (projected: dW_hr = dh^T (o tanh(c)))
//
// Who owns what: as in the forward. Sums over tokens run in token order within blocks fixed by the shape.
// Included by lstm_kernel.h.

template <class T>
struct StateTile {
#if ISA_VECTOR_BYTES == 64
  static constexpr int kRows = 12, kVectors = 2;  // few vectors of weights per step: they stream from the second-level cache
#else
  static constexpr int kRows = 4, kVectors = 2;
#endif
  static constexpr int kColumns = kVectors * kLanes<T>;
};

// dh[R rows, one panel of columns] = dgates W_hh, in chains of kStateDepth terms (see kSumDepth).
inline constexpr int64_t kStateDepth = 256;

template <int R, class T>
void state_product(const T* dgates, int64_t dgates_row, const T* panel, int64_t depth, T* dh, int64_t dh_row) {
  constexpr int NV = StateTile<T>::kVectors, W = kLanes<T>;
  for (int64_t k0 = 0; k0 < depth; k0 += kStateDepth) {
    vec<T> acc[R][NV] = {};
    multiply_tile<R, NV, T>(acc, dgates + k0, dgates_row, 1, panel + k0 * NV * W, NV * W, std::min(kStateDepth, depth - k0));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        T* out = dh + r * dh_row + v * W;
        store(out, k0 > 0 ? load(out) + acc[r][v] : acc[r][v]);
      }
  }
}

template <int R, class T>
INLINE void state_product_rows(int64_t rows, const T* dgates, int64_t dgates_row, const T* panel, int64_t depth, T* dh, int64_t dh_row) {
  if constexpr (R > 0) {
    if (rows == R)
      state_product<R>(dgates, dgates_row, panel, depth, dh, dh_row);
    else
      state_product_rows<R - 1>(rows, dgates, dgates_row, panel, depth, dh, dh_row);
  }
}

// dh[rows, columns of the panels first..last] = dgates[rows, 4 H] W_hh; the rows of dh hold whole panels.
template <class T>
void lstm_state_gradient(int64_t rows, const T* dgates, int64_t dgates_row, int64_t depth, const T* packed, T* dh, int64_t dh_row,
                         int64_t first, int64_t last) {
  constexpr int R = StateTile<T>::kRows;
  constexpr int64_t N = StateTile<T>::kColumns;
  const int64_t tiles = (rows + R - 1) / R;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t row = tile * rows / tiles, count = (tile + 1) * rows / tiles - row;
    for (int64_t panel = first; panel < last; ++panel)
      state_product_rows<R>(count, dgates + row * dgates_row, dgates_row, packed + panel * depth * N, depth, dh + row * dh_row + panel * N,
                            dh_row);
  }
}

// The pointwise part for units [first, last) of one sequence at one step.
template <class T>
struct PointwiseGradient {
  const T* gates;   // [4 H]
  const T* c;       // [H]
  const T* c_prev;  // [H]
  const T* du;      // [H], with what came through h
  const T* d_out;   // [H] or null: added to du
  T* dc;            // [H], updated in place
  T* dgates;        // [4 H]
};

template <class T>
INLINE void pointwise_gradient(const PointwiseGradient<T>& p, int64_t H, int64_t unit, int64_t units) {
  const auto get = [&](const T* at) { return units == kLanes<T> ? load(at + unit) : load_partial(at + unit, units); };
  const auto put = [&](T* at, vec<T> v) {
    if (units == kLanes<T>)
      store(at + unit, v);
    else
      store_partial(at + unit, v, units);
  };
  const vec<T> i = get(p.gates), f = get(p.gates + H), g = get(p.gates + 2 * H), o = get(p.gates + 3 * H);
  const vec<T> tanh_c = tanh(get(p.c));
  vec<T> du = get(p.du);
  if (p.d_out) du += get(p.d_out);
  const vec<T> dc = get(p.dc) + du * o * (1 - tanh_c * tanh_c);
  put(p.dgates, dc * g * i * (1 - i));
  put(p.dgates + H, dc * get(p.c_prev) * f * (1 - f));
  put(p.dgates + 2 * H, dc * i * (1 - g * g));
  put(p.dgates + 3 * H, du * tanh_c * o * (1 - o));
  put(p.dc, dc * f);
}

// What one direction's backward works with besides the layer's own tensors.
template <class T>
struct GradientBuffers {
  Scratch<T> w_hh;    // [P / columns][4 H][columns]
  Scratch<T> w_hr;    // packed for du = dh W_hr
  Scratch<T> dgates;  // [tokens, 4 H]
  Scratch<T> c0;      // [B, H]
  Scratch<T> dh;      // [tokens, P]: whole gradients of h, for dW_hr

  template <class S>
  GradientBuffers(const LstmShape& shape, const LstmWeights<const S>& weights, const S* c0_stored)
      : w_hh(panels(shape) * StateTile<T>::kColumns * shape.gates()),
        w_hr(shape.projected ? packed_size<T>(shape.state, shape.hidden) : 0),
        dgates(shape.tokens * shape.gates()),
        c0(shape.batch * shape.hidden),
        dh(shape.projected ? shape.tokens * shape.state : 0) {
    constexpr int64_t N = StateTile<T>::kColumns;
    torch::stable::parallel_for(0, panels(shape), std::max<int64_t>(1, 32768 / (N * shape.gates())), [&](int64_t begin, int64_t end) {
      pack_panels<T>(w_hh.get(), weights.w_hh, shape.state, 1, shape.gates(), shape.state, N, begin, end);
    });
    if (shape.projected) pack_b<T>(w_hr.get(), weights.w_hr, shape.hidden, 1, shape.state, shape.hidden);
    load_row<T>(c0.get(), c0_stored, shape.batch * shape.hidden, 0);
  }
  static int64_t panels(const LstmShape& shape) { return (shape.state + StateTile<T>::kColumns - 1) / StateTile<T>::kColumns; }
};

// Where sequence `row` was before step t in the order direction d walks: the token, or -1 at its first step.
INLINE int64_t previous_token(const LstmShape& shape, int64_t d, int64_t t, int64_t row) {
  if (d == 0) return t > 0 ? shape.offsets[t - 1] + row : -1;
  return t + 1 < shape.lengths[row] ? shape.offsets[t + 1] + row : -1;
}

template <class S>
void lstm_rows_backward(const LstmShape& shape, const LstmBackward<S, compute_t<S>>& layer, GradientBuffers<compute_t<S>>& buffers,
                        int64_t d, Rows rows, bool share_panels) {
  using T = compute_t<S>;
  constexpr int W = kLanes<T>;
  constexpr int64_t N = StateTile<T>::kColumns;
  const int64_t count = rows.count(shape.batch), H = shape.hidden, P = shape.state, G = shape.gates();
  const int64_t panels = GradientBuffers<T>::panels(shape), dh_row = panels * N;
  Scratch<T> dh(count * dh_row), dc(count * H), du(shape.projected ? count * H : 0);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t at = d * shape.batch + rows[r];
    if (layer.d_h_n)
      load_row<T>(dh + r * dh_row, layer.d_h_n + at * P, P, dh_row);
    else
      std::fill_n(dh + r * dh_row, dh_row, T(0));
    if (layer.d_c_n)
      load_row<T>(dc + r * H, layer.d_c_n + at * H, H, H);
    else
      std::fill_n(dc + r * H, H, T(0));
  }
  const T* gates = layer.gates + d * shape.tokens * G;
  const T* cells = layer.cells + d * shape.tokens * H;
  const auto product = [&](int64_t t, int64_t first, int64_t last) {
    lstm_state_gradient<T>(rows.count(shape.batch_sizes[t]), buffers.dgates + (shape.offsets[t] + rows.first) * G, rows.stride * G, G,
                           buffers.w_hh, dh, dh_row, first, last);
  };
  const auto pointwise = [&](int64_t t, int64_t first_unit, int64_t last_unit) {
    const int64_t active = rows.count(shape.batch_sizes[t]);
    for (int64_t r = 0; r < active; ++r) {
      const int64_t row = rows[r], token = shape.offsets[t] + row, previous = previous_token(shape, d, t, row);
      PointwiseGradient<T> p;
      p.gates = gates + token * G;
      p.c = cells + token * H;
      p.c_prev = previous < 0 ? buffers.c0 + row * H : cells + previous * H;
      p.du = shape.projected ? du + r * H : dh + r * dh_row;
      p.d_out = shape.projected ? nullptr : layer.d_output + token * shape.width() + d * P;
      p.dc = dc + r * H;
      p.dgates = buffers.dgates + token * G;
      for (int64_t unit = first_unit; unit < last_unit; unit += W) pointwise_gradient(p, H, unit, std::min<int64_t>(W, last_unit - unit));
    }
  };
  // With a projection: du = (dh + d_output) W_hr, and the whole dh is kept for dW_hr.
  const auto unproject = [&](int64_t t) {
    const int64_t active = rows.count(shape.batch_sizes[t]), token = shape.offsets[t] + rows.first;
    for (int64_t r = 0; r < active; ++r) {
      T* whole = buffers.dh + (token + r * rows.stride) * P;
      const T* d_out = layer.d_output + (token + r * rows.stride) * shape.width() + d * P;
      for (int64_t j = 0; j < P; ++j) whole[j] = dh[r * dh_row + j] + d_out[j];
    }
    gemm_packed_serial<T>(active, H, P, buffers.dh + token * P, rows.stride * P, 1, buffers.w_hr.get(), du.get(), H, false);
  };
  // Every round: dh through W_hh from the step before, then this step's gates for the same units, so that threads sharing
  // the panels meet once a step. The rows of the step before have all ended or go on: dh keeps what others start from.
  for (int64_t s = 0; s <= shape.steps; ++s) {
    const auto step_at = [&](int64_t i) { return d == 0 ? shape.steps - 1 - i : i; };
    if (s < shape.steps && shape.projected) {
      if (s > 0) product(step_at(s - 1), 0, panels);
      unproject(step_at(s));
      pointwise(step_at(s), 0, H);
      continue;
    }
    for_range(share_panels, panels, [&](int64_t first, int64_t last) {
      if (s > 0) product(step_at(s - 1), first, last);
      if (s < shape.steps) pointwise(step_at(s), first * N, std::min(last * N, H));
    });
  }
  for (int64_t r = 0; r < count; ++r) {
    const int64_t at = d * shape.batch + rows[r];
    store_row(layer.d_h0 + at * P, dh + r * dh_row, P);
    store_row(layer.d_c0 + at * H, dc + r * H, H);
  }
}

// Panels for gemm_packed of the rows [x_t, h_(t-1), 1] of all tokens.
template <class S>
void pack_step_inputs(compute_t<S>* packed, const LstmShape& shape, const LstmBackward<S, compute_t<S>>& layer, int64_t d) {
  using T = compute_t<S>;
  constexpr int64_t N = Tile<T>::kColumns;
  const int64_t columns = shape.input + shape.state + 1, panels = (columns + N - 1) / N;
  torch::stable::parallel_for(0, shape.steps, std::max<int64_t>(1, 32768 / (columns * shape.batch + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t row = 0; row < shape.batch_sizes[t]; ++row) {
        const int64_t token = shape.offsets[t] + row, previous = previous_token(shape, d, t, row);
        const auto at = [&](int64_t column) { return packed + (column / N * shape.tokens + token) * N + column % N; };
        const auto copy = [&](int64_t column, const S* source, int64_t n) {
          for (int64_t done = 0; done < n;) {
            const int64_t run = std::min(n - done, N - (column + done) % N);
            load_row<T>(at(column + done), source + done, run, run);
            done += run;
          }
        };
        copy(0, layer.x + token * shape.input, shape.input);
        copy(shape.input,
             previous < 0 ? layer.h0 + (d * shape.batch + row) * shape.state : layer.output + previous * shape.width() + d * shape.state,
             shape.state);
        *at(columns - 1) = 1;
        for (int64_t column = columns; column < panels * N; ++column) *at(column) = 0;
      }
  });
}

// Torch adds up the tokens of one step, then the steps: sums over all tokens need short chains to round as well.
inline constexpr int64_t kTokenChain = 48;

template <class S>
void lstm_weight_gradients(const LstmShape& shape, const LstmBackward<S, compute_t<S>>& layer, GradientBuffers<compute_t<S>>& buffers,
                           int64_t d) {
  using T = compute_t<S>;
  const int64_t I = shape.input, P = shape.state, H = shape.hidden, G = shape.gates(), columns = I + P + 1;
  const LstmWeights<S>& out = layer.d_weights[d];
  {
    Scratch<T> inputs(packed_size<T>(shape.tokens, columns)), sums(G * columns);
    pack_step_inputs(inputs.get(), shape, layer, d);
    gemm_packed<T>(G, columns, shape.tokens, buffers.dgates.get(), 1, G, inputs.get(), sums.get(), columns, false, kTokenChain);
    for (int64_t gate = 0; gate < G; ++gate) {
      const T* sum = sums + gate * columns;
      store_row(out.w_ih + gate * I, sum, I);
      store_row(out.w_hh + gate * P, sum + I, P);
      if (out.b_ih) out.b_ih[gate] = out.b_hh[gate] = from_compute<S>(sum[I + P]);
    }
  }
  if (shape.projected) {
    Scratch<T> u(shape.tokens * H), sums(P * H);
    const T* gates = layer.gates + d * shape.tokens * G;
    const T* cells = layer.cells + d * shape.tokens * H;
    for (int64_t token = 0; token < shape.tokens; ++token)
      for (int64_t unit = 0; unit < H; unit += kLanes<T>) {
        const int64_t units = std::min<int64_t>(kLanes<T>, H - unit);
        const vec<T> o = load_partial(gates + token * G + 3 * H + unit, units), c = load_partial(cells + token * H + unit, units);
        store_partial(u + token * H + unit, o * tanh(c), units);
      }
    Scratch<T> packed(packed_size<T>(shape.tokens, H));
    pack_b<T>(packed.get(), u.get(), H, 1, shape.tokens, H);
    gemm_packed<T>(P, H, shape.tokens, buffers.dh.get(), 1, P, packed.get(), sums.get(), H, false, kTokenChain);
    store_row(out.w_hr, sums.get(), P * H);
  }
}

template <class S>
void lstm_layer_backward(const LstmShape& shape, const LstmBackward<S, compute_t<S>>& layer) {
  using T = compute_t<S>;
  const Plan plan = make_plan(shape);
  std::optional<GradientBuffers<T>> buffers[2];
  for (int64_t d = 0; d < shape.directions; ++d) buffers[d].emplace(shape, layer.weights[d], layer.c0 + d * shape.batch * shape.hidden);
  for_tasks(shape, plan, [&](int64_t d, Rows rows) { lstm_rows_backward<S>(shape, layer, *buffers[d], d, rows, plan.share_panels); });
  for (int64_t d = 0; d < shape.directions; ++d) {
    if (layer.d_weights[d].w_ih) lstm_weight_gradients(shape, layer, *buffers[d], d);
    if (layer.d_x)
      gemm<T, S, T>(shape.tokens, shape.input, shape.gates(), buffers[d]->dgates.get(), shape.gates(), 1, layer.weights[d].w_ih,
                    shape.input, 1, layer.d_x, shape.input, d > 0);
  }
}
