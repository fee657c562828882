// The backward pass of one LSTM layer. From what the forward saved (activated gates, every c_t) and the upstream
// gradients, backwards through the steps:
//
//   dh = d_output_t + dgates_(t+1) W_hh          (projected: du = dh W_hr, else du = dh)
//   do = du tanh(c_t)     dc += du o (1 - tanh(c_t)^2)     di = dc g     dg = dc i     df = dc c_(t-1)     dc *= f
//   dgates_t = (di i(1-i), df f(1-f), dg (1-g^2), do o(1-o))
//
// and when all dgates are there, one product each over all tokens, cut into tasks that threads take as they come:
//   dW_ih = dgates^T x     dW_hh = dgates^T h_prev     dx = dgates W_ih     (projected: dW_hr = dh^T (o tanh(c)))
//
// Who owns what: as in the forward. Sums over tokens run in token order within blocks fixed by the shape.
// Included by lstm_kernel.h.

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

// Fetches what the pointwise part for one vector of units is going to read of the layer's own tensors, into the first-level cache (3)
// or the second (2).
template <int kCache, class T, class M>
INLINE void fetch_operands(const PointwiseGradient<T, M>& p, int64_t H, int64_t unit) {
  for (int64_t gate = 0; gate < 4; ++gate) __builtin_prefetch(p.gates + gate * H + unit, 0, kCache);
  __builtin_prefetch(p.c_prev + unit, 0, kCache);
  if (p.d_out) __builtin_prefetch(p.d_out + unit, 0, kCache);
}

// Fetches the lines that its results go to.
template <class T, class M>
INLINE void fetch_results(const PointwiseGradient<T, M>& p, int64_t unit) {
  constexpr int64_t W = kLanes<T>, line = 64 / sizeof(M);
  for (int64_t gate = 0; gate < 4 * W; gate += line) fetch_for_writing(p.dgates + unit / W * p.panel + gate);
}

#include "lstm_gradient_products.h"

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
  const M* of_token(int64_t token) const { return dgates.get() + token * 4 * kLanes<T>; }
  M* of_token(int64_t token) { return dgates.get() + token * 4 * kLanes<T>; }
  // Every `stride`-th token from `token` on.
  GateRows<M> rows(int64_t token, int64_t stride) const { return {of_token(token), stride * 4 * kLanes<T>, panel(), unit_panels}; }
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
  const auto product = [&](const TileTask& task, int64_t t, int64_t first, int64_t last, const FetchAhead<T, M>& ahead) {
    const int64_t active = rows.count(shape.batch_sizes[t]);
    const GateRows<M> dgates = buffers.rows(shape.offsets[t] + rows.first, rows.stride);
    if constexpr (std::is_same_v<S, T>)
      if (direct) return gate_product_direct(active, dgates, layer.weights[d].w_hh, H, dh.get(), dh_row, P, first, last);
    gate_product(task, active, dgates, buffers.w_hh.get(), dh.get(), dh_row, dh_row, first, last, false, ahead);
  };
  const auto pointwise_of = [&](int64_t t, int64_t r) {
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
  // With a projection: du = (dh + d_output) W_hr, and the whole dh is kept for dW_hr.
  const auto unproject = [&](int64_t t) {
    const int64_t active = rows.count(shape.batch_sizes[t]), token = shape.offsets[t] + rows.first;
    for (int64_t r = 0; r < active; ++r) {
      T* whole = buffers.dh + (token + r * rows.stride) * P;
      const T* d_out = layer.d_output + (token + r * rows.stride) * shape.width() + d * P;
      for (int64_t j = 0; j < P; ++j) whole[j] = dh[r * dh_row + j] + d_out[j];
    }
    gemm_packed_serial<T>(active, H, P, buffers.dh + token * P, rows.stride * P, buffers.w_hr.get(), du.get(), H, false);
  };
  // Every round: dh through W_hh from the step before, then this step's gates for the same units, so that threads sharing
  // the panels meet once a step. The rows of the step before have all ended or go on: dh keeps what others start from.
  for_team(share_panels, panels, [&](int64_t first, int64_t last, auto meet) {
    const TileTask task(cell_in_tiles<M>(shape));
    std::vector<PointwiseGradient<T, M>> pointwise;  // of the sequences of a step
    pointwise.reserve(count);
    const int64_t first_unit = shape.projected ? 0 : first * N, last_unit = shape.projected ? H : std::min(last * N, H);
    for (int64_t s = 0; s <= shape.steps; ++s) {
      const auto step_at = [&](int64_t i) { return d == 0 ? shape.steps - 1 - i : i; };
      pointwise.clear();
      for (int64_t r = 0; s < shape.steps && r < rows.count(shape.batch_sizes[step_at(s)]); ++r)
        pointwise.push_back(pointwise_of(step_at(s), r));
      const FetchAhead<T, M> ahead{pointwise.data(), pointwise.data() + (share_panels ? 0 : pointwise.size()), H, first_unit, last_unit};
      if (s > 0) product(task, step_at(s - 1), first, last, ahead);
      if (s < shape.steps && shape.projected) unproject(step_at(s));
      for (size_t r = 0; r < pointwise.size(); ++r) {
        const PointwiseGradient<T, M>& p = pointwise[r];
        if (share_panels && r + 1 < pointwise.size())
          for (int64_t unit = first_unit; unit < last_unit; unit += W) fetch_operands<3>(pointwise[r + 1], H, unit);
        for (int64_t unit = first_unit; unit < last_unit; unit += W) pointwise_gradient(p, H, unit, std::min<int64_t>(W, last_unit - unit));
      }
      meet();
    }
  });
  for (int64_t r = 0; r < count; ++r) {
    const int64_t at = d * shape.batch + rows[r];
    store_row(layer.d_h0 + at * P, dh + r * dh_row, P);
    store_row(layer.d_c0 + at * H, dc + r * H, H);
  }
}

// Gradients of the weights of one direction, in tasks: a panel of [h x] times some panels of units each, whole sums.
template <class S, class M>
class WeightGradients {
 public:
  using T = compute_t<S>;

  WeightGradients(const LstmShape& shape, const LstmBackward<S, T>& layer, const GradientBuffers<T, M>& buffers, int64_t d)
      : shape_(shape), layer_(layer), buffers_(buffers), out_(layer.d_weights[d]), before_(shape.tokens) {
    for (int64_t t = 0; t < shape.steps; ++t)
      for (int64_t row = 0; row < shape.batch_sizes[t]; ++row) {
        const int64_t previous = previous_token(shape, d, t, row);
        before_[shape.offsets[t] + row] = previous < 0 ? layer.h0 + (d * shape.batch + row) * shape.state
                                                       : layer.output + previous * shape.width() + d * shape.state;
      }
    const int64_t inputs = h_panels_ + GradientTile<T>::panels(shape.input), units = buffers.unit_panels;
    share_ = std::clamp<int64_t>(units * inputs / (2 * torch::stable::get_num_threads()), 1, kUnitPanels);
    parts_ = (units + share_ - 1) / share_;
    share_ = (units + parts_ - 1) / parts_;
    tasks_ = inputs * parts_;
  }

  int64_t tasks() const { return tasks_; }

  void run(const TileTask& tiles, int64_t task) {
    const int64_t input = task / parts_, first = task % parts_ * share_, last = std::min(first + share_, buffers_.unit_panels);
    const bool biases = input == 0 && out_.b_ih;
    const auto gradient = [&](int64_t columns, int64_t panel, auto row, S* d_w) {
      weight_gradient<T>(tiles, buffers_.dgates.get(), buffers_.panel(), shape_.tokens, first, last, shape_.hidden, columns,
                         panel * GradientTile<T>::kColumns, row, d_w, biases ? out_.b_ih : nullptr, biases ? out_.b_hh : nullptr);
    };
    if (input < h_panels_)
      gradient(shape_.state, input, [&](int64_t token) { return before_.get()[token]; }, out_.w_hh);
    else
      gradient(shape_.input, input - h_panels_, [&](int64_t token) { return layer_.x + token * shape_.input; }, out_.w_ih);
  }

 private:
  const LstmShape& shape_;
  const LstmBackward<S, T>& layer_;
  const GradientBuffers<T, M>& buffers_;
  const LstmWeights<S>& out_;
  Scratch<const S*> before_;  // where h_(t-1) of a token is
  const int64_t h_panels_ = GradientTile<T>::panels(shape_.state);
  int64_t share_, parts_, tasks_;
};

// dW_hr = dh^T (o tanh(c))
template <class S, class M>
void lstm_projection_gradient(const LstmShape& shape, const LstmBackward<S, compute_t<S>>& layer,
                              const GradientBuffers<compute_t<S>, M>& buffers, int64_t d) {
  using T = compute_t<S>;
  const int64_t P = shape.state, H = shape.hidden;
  Scratch<T> u(shape.tokens * H), sums(P * H);
  const T* gates = layer.gates + d * shape.tokens * shape.gates();
  const T* cells = layer.cells + d * shape.tokens * H;
  for (int64_t token = 0; token < shape.tokens; ++token)
    for (int64_t unit = 0; unit < H; unit += kLanes<T>) {
      const int64_t units = std::min<int64_t>(kLanes<T>, H - unit);
      const vec<T> o = load_partial(gates + token * shape.gates() + 3 * H + unit, units), c = load_partial(cells + token * H + unit, units);
      store_partial(u + token * H + unit, o * tanh(c), units);
    }
  gemm(P, H, shape.tokens, static_cast<const T*>(buffers.dh.get()), 1, P, static_cast<const T*>(u.get()), H, 1, sums.get(), H, false,
       kTokenChain);
  store_row(layer.d_weights[d].w_hr, sums.get(), P * H);
}

// dx = dgates W_ih, added up over the directions; in tasks: a block of tokens each, or a panel of columns where weights are read
// as they lie.
template <class S, class M>
class InputGradient {
 public:
  using T = compute_t<S>;

  InputGradient(const LstmShape& shape, const LstmBackward<S, T>& layer, std::optional<GradientBuffers<T, M>>* buffers, bool direct)
      : shape_(shape), layer_(layer), buffers_(buffers), direct_(direct) {
    for (int64_t d = 0; d < shape.directions && !direct; ++d) {
      w_ih_[d].emplace(padded<T>(shape.input) * 4 * padded<T>(shape.hidden));
      pack_gate_rows<T>(w_ih_[d]->get(), layer.weights[d].w_ih, shape.hidden, shape.input);
    }
  }

  int64_t tasks() const { return direct_ ? panels_ : (shape_.tokens + kBlock - 1) / kBlock; }

  void run(const TileTask& tiles, int64_t task) {
    const int64_t I = shape_.input;
    for (int64_t d = 0; d < shape_.directions; ++d) {
      if constexpr (std::is_same_v<S, T>)
        if (direct_) {
          gate_product_direct(shape_.tokens, buffers_[d]->rows(0, 1), layer_.weights[d].w_ih, shape_.hidden, layer_.d_x, I, I, task, task + 1,
                              d > 0);
          continue;
        }
      const int64_t token = task * kBlock;
      gate_product(tiles, std::min(kBlock, shape_.tokens - token), buffers_[d]->rows(token, 1), w_ih_[d]->get(), layer_.d_x + token * I, I, I,
                   0, panels_, d > 0);
    }
  }

 private:
  static constexpr int64_t kBlock = 192 / sizeof(M);  // tokens: a chain of their gradients stays in the first-level cache
  const LstmShape& shape_;
  const LstmBackward<S, T>& layer_;
  std::optional<GradientBuffers<T, M>>* buffers_;
  const bool direct_;
  const int64_t panels_ = GradientTile<T>::panels(shape_.input);
  std::optional<Scratch<M>> w_ih_[2];
};

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

  std::optional<WeightGradients<S, M>> weights[2];
  std::optional<InputGradient<S, M>> input;
  int64_t weight_tasks = 0;
  for (int64_t d = 0; d < shape.directions && layer.d_weights[d].w_hh; ++d)  // w_ih may be empty, and then has no address
    weight_tasks += weights[d].emplace(shape, layer, *buffers[d], d).tasks();
  if (layer.d_x) input.emplace(shape, layer, buffers, direct);
  // The long tasks first: the short ones even out what the threads differ by.
  const bool small = shape.tokens * shape.gates() * (shape.input + shape.state) < 65536;
  const int64_t members = small ? 1 : torch::stable::get_num_threads();
  Claims weight_claims(weight_tasks, members), input_claims(input ? input->tasks() : 0, members);
  torch::stable::parallel_for(0, members, 1, [&](int64_t member, int64_t) {
    const TileTask tiles(cell_in_tiles<M>(shape));
    weight_claims.run(member, [&](int64_t task) {
      weights[task * shape.directions / weight_tasks]->run(tiles, task % (weight_tasks / shape.directions));
    });
    input_claims.run(member, [&](int64_t task) { input->run(tiles, task); });
  });
  for (int64_t d = 0; d < shape.directions; ++d)
    if (layer.d_weights[d].w_hr) lstm_projection_gradient<S, M>(shape, layer, *buffers[d], d);
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
