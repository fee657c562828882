// One step of an LSTM with the weights as they lie, for so few sequences that packing them would take longer than the step. Included by
// lstm_kernel.h.

// The dot products of R rows of x and of h with four rows of weights each, vectors along the inputs.
template <int R, class T, class S, class A>
INLINE void add_dot_products(vec<T> (&acc)[R][4], const A* a, int64_t a_row, const S* const (&w)[4], int64_t depth) {
  constexpr int W = kLanes<T>;
  const auto add = [&](int64_t k, auto get) {
    vec<T> weights[4];
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) weights[g] = get(w[g] + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vec<T> x = get(a + r * a_row + k);
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) acc[r][g] += x * weights[g];
    }
  };
  int64_t k = 0;
  for (; k + W <= depth; k += W) add(k, [](const auto* p) { return load(p); });
  if (k < depth) add(k, [&](const auto* p) { return load_partial(p, depth - k); });
}

// The same in runs where vectors are short: their few lanes would each add up more terms in a row than PyTorch's product does.
template <int R, class T, class S, class A>
INLINE void add_dot_runs(vec<T> (&acc)[R][4], const A* a, int64_t a_row, const S* const (&w)[4], int64_t depth) {
  constexpr int64_t kRun = 8 * kLanes<T>;
  if (ISA_VECTOR_BYTES == 64 || depth <= kRun) return add_dot_products<R, T>(acc, a, a_row, w, depth);
  for (int64_t k = 0; k < depth; k += kRun) {
    const S* const from[4] = {w[0] + k, w[1] + k, w[2] + k, w[3] + k};
    vec<T> run[R][4] = {};
    add_dot_products<R, T>(run, a + k, a_row, from, std::min(kRun, depth - k));
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < 4; ++g) acc[r][g] += run[r][g];
  }
}

#if ISA_VECTOR_BYTES == 64
// The same of bfloat16 numbers, two to a lane.
template <int R>
__attribute__((target("avx512bf16"))) void add_pair_products(vec<float> (&acc)[R][4], const bfloat16* a, int64_t a_row,
                                                             const bfloat16* const (&w)[4], int64_t depth) {
  constexpr int64_t N = 2 * kLanes<float>;
  for (int64_t k = 0; k < depth; k += N) {
    const __mmask32 mask = depth - k >= N ? ~__mmask32{0} : (__mmask32{1} << (depth - k)) - 1;
    __m512i weights[4];
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) weights[g] = _mm512_maskz_loadu_epi16(mask, w[g] + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512i x = _mm512_maskz_loadu_epi16(mask, a + r * a_row + k);
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g)
        acc[r][g] = reinterpret_cast<vec<float>>(
            _mm512_dpbf16_ps(reinterpret_cast<__m512>(acc[r][g]), reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(weights[g])));
    }
  }
}
#endif

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
      if constexpr (std::is_same_v<M, T>) {
        add_dot_runs<R, T>(acc, x + row * I, I, w_ih, I);
        add_dot_runs<R, T>(acc, step.h + row * step.h_row, step.h_row, w_hh, P);
      } else {
        add_pair_products<R>(acc, x + row * I, I, w_ih, I);
        add_pair_products<R>(acc, step.h + row * step.h_row, step.h_row, w_hh, P);
      }
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
