// The backward pass of one LSTM layer. From what the forward saved (activated gates, every c_t) and the upstream
// gradients, backwards through the steps:
//
//   dh = d_output_t + dgates_(t+1) W_hh          (projected: du = dh W_hr, else du = dh)
//   do = du tanh(c_t)     dc += du o (1 - tanh(c_t)^2)     di = dc g     dg = dc i     df = dc c_(t-1)     dc *= f
//   dgates_t = (di i(1-i), df f(1-f), dg (1-g^2), do o(1-o))
//
// and when all dgates are there, one product each over all tokens:
//   dW_ih = dgates^T x     dW_hh = dgates^T h_prev     dx = dgates W_ih     (projected: dW_hr = dh^T (o tanh(c)))
//
// Who owns what: as in the forward. Sums over tokens run in token order within blocks fixed by the shape.
// Included by lstm_kernel.h.

#include "lstm_gradient_products.h"

// The pointwise part for units [first, last) of one sequence at one step.
template <class T, class M>
struct PointwiseGradient {
  const T* gates;   // [4 H]
  const T* c;       // [H]
  const T* c_prev;  // [H]
  const T* du;      // [H], with what came through h
  const T* d_out;   // [H] or null: added to du
  T* dc;            // [H], updated in place
  M* dgates;        // of the first panel of units
  int64_t panel;    // from one panel of dgates to the next
};

template <class T, class M>
INLINE void pointwise_gradient(const PointwiseGradient<T, M>& p, int64_t H, int64_t unit, int64_t units) {
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
  constexpr int W = kLanes<T>;
  M* dgates = p.dgates + unit / W * p.panel;
  store(dgates, dc * g * i * (1 - i));
  store(dgates + W, dc * get(p.c_prev) * f * (1 - f));
  store(dgates + 2 * W, dc * i * (1 - g * g));
  store(dgates + 3 * W, du * tanh_c * o * (1 - o));
  put(p.dc, dc * f);
}

// Fetches what the pointwise part for these units is going to read of the layer's own tensors.
template <class T, class M>
INLINE void fetch_pointwise(const PointwiseGradient<T, M>& p, int64_t H, int64_t first, int64_t last) {
  for (int64_t unit = first; unit < last; unit += 64 / sizeof(T)) {
    for (int64_t gate = 0; gate < 4; ++gate) __builtin_prefetch(p.gates + gate * H + unit);
    __builtin_prefetch(p.c_prev + unit);
    if (p.d_out) __builtin_prefetch(p.d_out + unit);
  }
}

// What one direction's backward works with besides the layer's own tensors.
template <class T, class M>
struct GradientBuffers {
  Scratch<M> w_hh;    // packed by pack_gate_rows
  Scratch<T> w_hr;    // packed for du = dh W_hr
  Scratch<M> dgates;  // [panels of H][tokens][4][lanes]
  Scratch<T> c0;      // [B, H]
  Scratch<T> dh;      // [tokens, P]: whole gradients of h, for dW_hr
  int64_t tokens, unit_panels;

  template <class S>
  GradientBuffers(const LstmShape& shape, const LstmWeights<const S>& weights, const S* c0_stored, bool direct)
      : w_hh(direct ? 0 : padded<T>(shape.state) * 4 * padded<T>(shape.hidden)),
        w_hr(shape.projected ? packed_size<T>(shape.state, shape.hidden) : 0),
        dgates(shape.tokens * 4 * padded<T>(shape.hidden)),
        c0(shape.batch * shape.hidden),
        dh(shape.projected ? shape.tokens * shape.state : 0),
        tokens(shape.tokens),
        unit_panels(padded<T>(shape.hidden) / kLanes<T>) {
    if (!direct) pack_gate_rows<T>(w_hh.get(), weights.w_hh, shape.hidden, shape.state);
    if (shape.projected) pack_b<T>(w_hr.get(), weights.w_hr, shape.hidden, 1, shape.state, shape.hidden);
    load_row<T>(c0.get(), c0_stored, shape.batch * shape.hidden, 0);
  }

  int64_t panel() const { return tokens * 4 * kLanes<T>; }
  M* of_token(int64_t token) { return dgates.get() + token * 4 * kLanes<T>; }
  // Every `stride`-th token from `token` on.
  GateRows<M> rows(int64_t token, int64_t stride) { return {of_token(token), stride * 4 * kLanes<T>, panel(), unit_panels}; }
};

// Where sequence `row` was before step t in the order direction d walks: the token, or -1 at its first step.
INLINE int64_t previous_token(const LstmShape& shape, int64_t d, int64_t t, int64_t row) {
  if (d == 0) return t > 0 ? shape.offsets[t - 1] + row : -1;
  return t + 1 < shape.lengths[row] ? shape.offsets[t + 1] + row : -1;
}

template <class S, class M>
void lstm_rows_backward(const LstmShape& shape, const LstmBackward<S, compute_t<S>>& layer, GradientBuffers<compute_t<S>, M>& buffers,
                        int64_t d, Rows rows, bool share_panels, bool direct) {
  using T = compute_t<S>;
  constexpr int W = kLanes<T>;
  constexpr int64_t N = GradientTile<T>::kColumns;
  const int64_t count = rows.count(shape.batch), H = shape.hidden, P = shape.state, G = shape.gates();
  const int64_t panels = GradientTile<T>::panels(P), dh_row = padded<T>(P);
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
  const auto product = [&](const TileTask& task, int64_t t, int64_t first, int64_t last) {
    const int64_t active = rows.count(shape.batch_sizes[t]);
    const GateRows<M> dgates = buffers.rows(shape.offsets[t] + rows.first, rows.stride);
    if constexpr (std::is_same_v<S, T>)
      if (direct) return gate_product_direct(active, dgates, layer.weights[d].w_hh, H, dh.get(), dh_row, P, first, last);
    gate_product(task, active, dgates, buffers.w_hh.get(), dh.get(), dh_row, dh_row, first, last, false);
  };
  const auto pointwise = [&](int64_t t, int64_t first_unit, int64_t last_unit) {
    const int64_t active = rows.count(shape.batch_sizes[t]);
    const auto of_row = [&](int64_t r) {
      const int64_t row = rows[r], token = shape.offsets[t] + row, previous = previous_token(shape, d, t, row);
      PointwiseGradient<T, M> p;
      p.gates = gates + token * G;
      p.c = cells + token * H;
      p.c_prev = previous < 0 ? buffers.c0 + row * H : cells + previous * H;
      p.du = shape.projected ? du + r * H : dh + r * dh_row;
      p.d_out = shape.projected ? nullptr : layer.d_output + token * shape.width() + d * P;
      p.dc = dc + r * H;
      p.dgates = buffers.of_token(token);
      p.panel = buffers.panel();
      return p;
    };
    for (int64_t r = 0; r < active; ++r) {
      const PointwiseGradient<T, M> p = of_row(r);
      if (r + 1 < active) fetch_pointwise(of_row(r + 1), H, first_unit, last_unit);
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
  for_team(share_panels, panels, [&](int64_t first, int64_t last, auto meet) {
    const TileTask task(cell_in_tiles<M>(shape));
    for (int64_t s = 0; s <= shape.steps; ++s) {
      const auto step_at = [&](int64_t i) { return d == 0 ? shape.steps - 1 - i : i; };
      if (s > 0) product(task, step_at(s - 1), first, last);
      if (s < shape.steps && shape.projected) unproject(step_at(s));
      if (s < shape.steps) pointwise(step_at(s), shape.projected ? 0 : first * N, shape.projected ? H : std::min(last * N, H));
      meet();
    }
  });
  for (int64_t r = 0; r < count; ++r) {
    const int64_t at = d * shape.batch + rows[r];
    store_row(layer.d_h0 + at * P, dh + r * dh_row, P);
    store_row(layer.d_c0 + at * H, dc + r * H, H);
  }
}

template <class S, class M>
void lstm_weight_gradients(const LstmShape& shape, const LstmBackward<S, compute_t<S>>& layer, GradientBuffers<compute_t<S>, M>& buffers,
                           int64_t d) {
  using T = compute_t<S>;
  const int64_t I = shape.input, P = shape.state, H = shape.hidden, G = shape.gates();
  const LstmWeights<S>& out = layer.d_weights[d];
  {
    Scratch<const S*> before(shape.tokens);  // where h_(t-1) of a token is
    for (int64_t t = 0; t < shape.steps; ++t)
      for (int64_t row = 0; row < shape.batch_sizes[t]; ++row) {
        const int64_t previous = previous_token(shape, d, t, row);
        before[shape.offsets[t] + row] =
            previous < 0 ? layer.h0 + (d * shape.batch + row) * P : layer.output + previous * shape.width() + d * P;
      }
    // A panel of [h x] times some panels of units is a task, whole sums each.
    constexpr int64_t N = GradientTile<T>::kColumns;
    const int64_t h_panels = GradientTile<T>::panels(P), inputs = h_panels + GradientTile<T>::panels(I), units = buffers.unit_panels;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t share = std::clamp<int64_t>(units * inputs / (4 * threads), 1, kUnitPanels), parts = (units + share - 1) / share;
    const bool small = shape.tokens * G * (I + P) < 65536;
    torch::stable::parallel_for(0, inputs * parts, small ? inputs * parts : 1, [&](int64_t begin, int64_t end) {
      const TileTask tiles(cell_in_tiles<M>(shape));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t input = task / parts, first = task % parts * share, last = std::min(first + share, units);
        const bool biases = input == 0 && out.b_ih;
        const auto gradient = [&](int64_t columns, int64_t column, auto row, S* d_w) {
          weight_gradient<T>(tiles, static_cast<const M*>(buffers.dgates.get()), buffers.panel(), shape.tokens, first, last, H, columns,
                             column, row, d_w, biases ? out.b_ih : nullptr, biases ? out.b_hh : nullptr);
        };
        if (input < h_panels)
          gradient(P, input * N, [&](int64_t token) { return before.get()[token]; }, out.w_hh);
        else
          gradient(I, (input - h_panels) * N, [&](int64_t token) { return layer.x + token * I; }, out.w_ih);
      }
    });
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

// dx (+)= dgates W_ih
template <class S, class M>
void lstm_input_gradient(const LstmShape& shape, const LstmBackward<S, compute_t<S>>& layer, GradientBuffers<compute_t<S>, M>& buffers,
                         int64_t d, bool direct) {
  using T = compute_t<S>;
  constexpr int64_t kBlock = 192 / sizeof(M);  // tokens: a chain of their gradients stays in the first-level cache
  const int64_t I = shape.input, panels = GradientTile<T>::panels(I);
  const bool small = shape.tokens * shape.gates() * I < 65536;
  if constexpr (std::is_same_v<S, T>)
    if (direct && d == 0) {
      torch::stable::parallel_for(0, panels, small ? panels : 1, [&](int64_t begin, int64_t end) {
        gate_product_direct(shape.tokens, buffers.rows(0, 1), layer.weights[d].w_ih, shape.hidden, layer.d_x, I, I, begin, end);
      });
      return;
    }
  Scratch<M> w_ih(padded<T>(I) * 4 * padded<T>(shape.hidden));
  pack_gate_rows<T>(w_ih.get(), layer.weights[d].w_ih, shape.hidden, I);
  const int64_t blocks = (shape.tokens + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, blocks, small ? blocks : 1, [&](int64_t begin, int64_t end) {
    const TileTask task(cell_in_tiles<M>(shape));
    for (int64_t token = begin * kBlock; token < std::min(end * kBlock, shape.tokens); token += kBlock)
      gate_product(task, std::min(kBlock, shape.tokens - token), buffers.rows(token, 1), w_ih.get(), layer.d_x + token * I, I, I, 0, panels,
                   d > 0);
  });
}

template <class S, class M>
void lstm_layer_backward(const LstmShape& shape, const LstmBackward<S, compute_t<S>>& layer) {
  using T = compute_t<S>;
  const Plan plan = make_plan<T>(shape);
  const bool direct = plan.direct && std::is_same_v<S, T> && shape.input % kLanes<T> == 0 && shape.state % kLanes<T> == 0;
  std::optional<GradientBuffers<T, M>> buffers[2];
  for (int64_t d = 0; d < shape.directions; ++d)
    buffers[d].emplace(shape, layer.weights[d], layer.c0 + d * shape.batch * shape.hidden, direct);
  for_tasks(shape, plan,
            [&](int64_t d, Rows rows) { lstm_rows_backward<S, M>(shape, layer, *buffers[d], d, rows, plan.share_panels, direct); });
  for (int64_t d = 0; d < shape.directions; ++d) {
    // w_ih may be empty, and then has no address.
    if (layer.d_weights[d].w_hh) lstm_weight_gradients<S, M>(shape, layer, *buffers[d], d);
    if (layer.d_x) lstm_input_gradient<S, M>(shape, layer, *buffers[d], d, direct);
  }
}

// Dot products round the gradients of the gates: where few of them are added up, twice the rounding of the result is left.
template <class S>
void lstm_layer_backward(const LstmShape& shape, const LstmBackward<S, compute_t<S>>& layer) {
#if ISA_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<S, bfloat16>)
    if (dots<S>(shape) && shape.hidden >= 32 && shape.tokens * shape.gates() * (shape.input + shape.state) >= 1 << 18)
      return lstm_layer_backward<S, bfloat16>(shape, layer);
#endif
  lstm_layer_backward<S, compute_t<S>>(shape, layer);
}
