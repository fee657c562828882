// delta = sum_d do o - dlse, the derivative of the normalisation, and of lse itself: for one head, or for all of some problems. What
// rounding took from o is added where it was kept: attention_rest_kernel.h.

// delta of the queries of one head, [Sq]: a vector of queries at a time, so that their rows are on the way from memory together.
template <class S, class T>
void head_deltas(const AttentionBackward& problem, int64_t b, int64_t h, T* deltas) {
  constexpr int64_t W = kLanes<T>;
  const auto& [a, g] = problem;
  const int64_t grad_stride = g.grad_out.stride[3], out_stride = g.out.stride[3];
  const int16_t* rest = rest_of(a, g.rest, b, h, 0);
  for (int64_t i0 = 0; i0 < a.q_len; i0 += W) {
    const int64_t rows = std::min(W, a.q_len - i0);
    vec<T> sums[W];
#pragma GCC unroll 16
    for (int64_t i = 0; i < W; ++i) sums[i] = vec<T>{};
    for (int64_t d = 0; d < a.value_dim; d += W) {
      const int64_t n = std::min(W, a.value_dim - d);
      for (int64_t i = 0; i < rows; ++i) {
        const int16_t* row_rest = rest ? rest + (i0 + i) * a.value_dim + d : nullptr;
        const vec<T> out = load_with_rest(g.out.at<S>(b, h, i0 + i) + d * out_stride, out_stride, row_rest, n);
        sums[i] += load_any(g.grad_out.at<S>(b, h, i0 + i) + d * grad_stride, grad_stride, n) * out;
      }
    }
    T row_sums[W];
    store(row_sums, sum_each<T>(sums));
    for (int64_t i = 0; i < rows; ++i) deltas[i0 + i] = row_sums[i] - (g.grad_lse.data ? *g.grad_lse.at<T>(b, h, i0 + i) : T(0));
  }
}

// Where all keys are one block, delta is found with the probabilities: see GradBlock::in_block.
inline bool needs_deltas(const AttentionArgs& a) { return a.k_len > kBlockKeys; }

// Adds the heads of a problem to what all_deltas runs.
inline void add_deltas(CostedTasks& costed, const AttentionArgs& a) {
  costed.add(needs_deltas(a) ? a.batch * a.heads : 0, a.q_len * a.value_dim);
}

// delta of every query of the problems in `costed`, [B, Hq, Sq] each.
template <class S, class T>
void all_deltas(const CostedTasks& costed, const AttentionBackward* problems, T* const* deltas) {
  constexpr int64_t kTaskValues = 65536;
  costed.run(kTaskValues / CostedTasks::kUnit, [&](const auto& each_task) {
    each_task([&](int64_t i, int64_t head) {
      const AttentionArgs& a = problems[i].a;
      head_deltas<S>(problems[i], head / a.heads, head % a.heads, deltas[i] + head * a.q_len);
    });
  });
}
