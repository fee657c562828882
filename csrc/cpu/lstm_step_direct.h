// One step of an LSTM with the weights as they lie, for so few sequences that packing them would take longer than the step. Included by
// lstm_kernel.h.

// The dot products of R rows of x or of h with four rows of weights. Meanwhile those of the next unit, the rows behind them, come into the
// second-level cache.
template <int R, class Q, class S, class A>
INLINE void add_dot_products(vec<compute_t<Q>> (&acc)[R][4], const A* a, int64_t a_row, const S* const (&w)[4], int64_t depth,
                             int64_t next) {
  constexpr int64_t N = kTerms<Q>;
  vec<compute_t<Q>> weights[4];
  const auto add = [&](int64_t k, auto get) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) weights[g] = get(w[g] + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const auto x = get(a + r * a_row + k);
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) add_product<Q>(acc[r][g], x, weights[g]);
    }
  };
  int64_t k = 0;
  for (; k + N <= depth; k += N) {
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) __builtin_prefetch(w[g] + k + next, 0, 2);
    add(k, [](const auto* p) __attribute__((always_inline)) { return load_operand<Q>(p); });
  }
  if (k < depth) add(k, [&](const auto* p) __attribute__((always_inline)) { return load_operand<Q>(p, depth - k); });
}

// The same in runs where vectors are short: their few lanes would each add up more terms in a row than PyTorch's product does.
template <int R, class Q, class S, class A>
INLINE void add_dot_runs(vec<compute_t<Q>> (&acc)[R][4], const A* a, int64_t a_row, const S* const (&w)[4], int64_t depth) {
  constexpr int64_t kRun = 8 * kLanes<Q>;
  if (ISA_VECTOR_BYTES == 64 || depth <= kRun) return add_dot_products<R, Q>(acc, a, a_row, w, depth, depth);
  for (int64_t k = 0; k < depth; k += kRun) {
    const S* const from[4] = {w[0] + k, w[1] + k, w[2] + k, w[3] + k};
    vec<compute_t<Q>> run[R][4] = {};
    add_dot_products<R, Q>(run, a + k, a_row, from, std::min(kRun, depth - k), depth);
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < 4; ++g) acc[r][g] += run[r][g];
  }
}

// The gates of R <= 4 sequences x one panel before their activation, into gates [R][4][lanes].
template <int R, class S, class M>
void direct_product(const LstmShape& shape, const LstmWeights<const S>& weights, const CellStep<S, M>& step, const S* x, int64_t row,
                    int64_t panel, compute_t<S>* gates) {
  using T = compute_t<S>;
  constexpr int W = kLanes<T>;
  const int64_t H = shape.hidden, I = shape.input, P = shape.state;
  for (int64_t j = 0; j < W; ++j) {
    const int64_t unit = panel * W + j;
    vec<T> acc[R][4] = {};
    if (unit < H) {
      const S *w_ih[4], *w_hh[4];
      for (int g = 0; g < 4; ++g) {
        w_ih[g] = weights.w_ih + (g * H + unit) * I;
        w_hh[g] = weights.w_hh + (g * H + unit) * P;
      }
      add_dot_runs<R, M>(acc, x + row * I, I, w_ih, I);
      add_dot_runs<R, M>(acc, step.h + row * step.h_row, step.h_row, w_hh, P);
    }
    for (int g = 0; g < 4; ++g) {
      T bias = 0;
      if (weights.b_ih && unit < H) bias = to_compute(weights.b_ih[g * H + unit]) + to_compute(weights.b_hh[g * H + unit]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) gates[(r * 4 + g) * W + j] = bias + reduce_add(acc[r][g]);
    }
  }
}

template <int R, class S, class M>
INLINE void direct_product_rows(int64_t rows, const LstmShape& shape, const LstmWeights<const S>& weights, const CellStep<S, M>& step,
                                const S* x, int64_t row, int64_t panel, compute_t<S>* gates) {
  if constexpr (R > 0) {
    if (rows == R)
      direct_product<R>(shape, weights, step, x, row, panel, gates);
    else
      direct_product_rows<R - 1>(rows, shape, weights, step, x, row, panel, gates);
  }
}

// As lstm_step, for consecutive sequences with inputs x [rows, I].
template <class S, class M>
void lstm_step_direct(const LstmShape& shape, const LstmWeights<const S>& weights, const CellStep<S, M>& step, const S* x, int64_t first,
                      int64_t last) {
  using T = compute_t<S>;
  constexpr int64_t R = 4;
  alignas(64) T gates[R * 4 * kLanes<T>];
  for (int64_t panel = first; panel < last; ++panel)
    for (int64_t row = 0; row < step.rows; row += R) {
      const int64_t rows = std::min(R, step.rows - row);
      direct_product_rows<R>(rows, shape, weights, step, x, row, panel, gates);
      cell_pointwise(shape, step, row, rows, panel, gates);
    }
}
