// Layer and RMS normalisation of rows after an addition, and its gradient. Included by for_each_isa.h inside the namespace of each
// instruction set.
//
//   h = x + residual    xhat = (h - mean) rstd    y = weight xhat + bias    rstd = 1 / sqrt(mean of (h - mean)^2 + eps)
//   g = dy weight       dh' = rstd (g - mean of g - xhat mean of (g xhat)) + dh         (RMS: mean = 0, and no mean of g)
//   dweight = sum over rows of dy xhat                 dbias = sum over rows of dy
//
// A task owns whole rows, which stay in the first-level cache between the passes over them: sum and squares; for a layer norm
// squares of differences (from the mean, so that rows far from 0 keep their digits); result. Saved: h, where there is a residual, mean and rstd.
//
// Floor: memory. Forward x, residual, h and y once; backward dy, h, dh and the result once.
#include "row_kernel.h"

template <class S>
void norm_forward(const NormCall& call) {
  using T = compute_t<S>;
  const S *weight = static_cast<const S*>(call.weight), *bias = static_cast<const S*>(call.bias);
  const int64_t columns = call.columns;
  torch::stable::parallel_for(0, call.rows, row_grain(columns), [&](int64_t begin, int64_t end) {
    Scratch<T> wide(std::is_same_v<S, T> ? 0 : columns);  // of a bfloat16 row, h before it is rounded
    for (int64_t r = begin; r < end; ++r) {
      const S* x = static_cast<const S*>(call.x) + r * call.x_row;
      const S* residual = call.residual ? static_cast<const S*>(call.residual) + r * call.residual_row : nullptr;
      S* h = call.h ? static_cast<S*>(call.h) + r * columns : nullptr;
      const T* row = wide.get();
      if constexpr (std::is_same_v<S, T>) row = h ? h : x;
      vec<T> sums[kRowSums] = {}, squares[kRowSums] = {};
      for_each_vector<T>(columns, [&](int64_t j, int i, auto n) {
        vec<T> v = load_size(x + j, n);
        if (residual) {
          v += load_size(residual + j, n);
          store_size(h + j, v, n);
        }
        if constexpr (!std::is_same_v<S, T>) store_size(wide.get() + j, v, n);
        sums[i] += v;
        squares[i] += v * v;
      });
      T mean = 0;
      if (call.center) {
        mean = total(sums) / static_cast<T>(columns);
        std::fill_n(squares, kRowSums, vec<T>{});
        for_each_vector<T>(columns, [&](int64_t j, int i, auto n) {
          const vec<T> v = first_lanes(load_size(row + j, n) - mean, n);
          squares[i] += v * v;
        });
      }
      const T rstd = 1 / std::sqrt(total(squares) / static_cast<T>(columns) + static_cast<T>(call.eps));
      S* y = static_cast<S*>(call.y) + r * columns;
      for_each_vector<T>(columns, [&](int64_t j, int, auto n) {
        vec<T> v = (load_size(row + j, n) - mean) * rstd;
        if (weight) v *= load_size(weight + j, n);
        if (bias) v += load_size(bias + j, n);
        store_size(y + j, v, n);
      });
      static_cast<T*>(call.mean)[r] = mean;
      static_cast<T*>(call.rstd)[r] = rstd;
    }
  });
}

// The sums over rows of dy xhat and dy are those of runs of kRun rows, added to those of a share of the rows, at most kShares: they
// depend on the shape alone, and so does the order of all additions.
template <class S>
void norm_backward(const NormGradientCall& call) {
  using T = compute_t<S>;
  constexpr int64_t kRun = 32, kShares = 64;
  const int64_t columns = call.columns, rows = call.rows;
  const int64_t share_rows = std::max<int64_t>(kRun, (rows + kShares - 1) / kShares);
  const int64_t shares = (rows + share_rows - 1) / share_rows;
  const S* weight = static_cast<const S*>(call.weight);
  const bool parameters = call.d_weight || call.d_bias;
  Scratch<T> sums(parameters ? shares * 2 * columns : 0);
  const int64_t grain = std::max<int64_t>(1, row_grain(columns) / share_rows);
  torch::stable::parallel_for(0, shares, grain, [&](int64_t begin, int64_t end) {
    Scratch<T> run(parameters ? 2 * columns : 0);
    for (int64_t share = begin; share < end; ++share) {
      T* share_sums = sums.get() + share * 2 * columns;
      if (parameters) std::fill_n(share_sums, 2 * columns, T(0));
      const int64_t first = share * share_rows, last = std::min(rows, first + share_rows);
      for (int64_t r = first; r < last; ++r) {
        const S* dy = static_cast<const S*>(call.dy) + r * call.dy_row;
        const S* h = static_cast<const S*>(call.h) + r * call.h_row;
        const S* dh = call.dh ? static_cast<const S*>(call.dh) + r * call.dh_row : nullptr;
        S* d_h = static_cast<S*>(call.d_h) + r * columns;
        const T mean = static_cast<const T*>(call.mean)[r], rstd = static_cast<const T*>(call.rstd)[r];
        T *of_weight = run.get(), *of_bias = of_weight + columns;
        if (parameters && (r - first) % kRun == 0) std::fill_n(of_weight, 2 * columns, T(0));
        vec<T> of_g[kRowSums] = {}, of_product[kRowSums] = {};
        for_each_vector<T>(columns, [&](int64_t j, int i, auto n) {
          const vec<T> d = load_size(dy + j, n), normal = (load_size(h + j, n) - mean) * rstd;
          const vec<T> g = weight ? d * load_size(weight + j, n) : d;
          of_g[i] += g;
          of_product[i] += first_lanes(g * normal, n);
          if (parameters) {
            store_size(of_weight + j, load_size(of_weight + j, n) + d * normal, n);
            store_size(of_bias + j, load_size(of_bias + j, n) + d, n);
          }
        });
        const T g_mean = call.center ? total(of_g) / static_cast<T>(columns) : 0;
        const T product_mean = total(of_product) / static_cast<T>(columns);
        for_each_vector<T>(columns, [&](int64_t j, int, auto n) {
          const vec<T> d = load_size(dy + j, n), normal = (load_size(h + j, n) - mean) * rstd;
          const vec<T> g = weight ? d * load_size(weight + j, n) : d;
          vec<T> v = rstd * (g - g_mean - normal * product_mean);
          if (dh) v += load_size(dh + j, n);
          store_size(d_h + j, v, n);
        });
        if (parameters && ((r - first) % kRun == kRun - 1 || r == last - 1))
          for_each_vector<T>(2 * columns, [&](int64_t j, int, auto n) {
            store_size(share_sums + j, load_size(share_sums + j, n) + load_size(of_weight + j, n), n);
          });
      }
    }
  });
  S* targets[] = {static_cast<S*>(call.d_weight), static_cast<S*>(call.d_bias)};
  for (int which = 0; which < 2; ++which) {
    if (!targets[which]) continue;
    for_each_vector<T>(columns, [&](int64_t j, int, auto n) {
      vec<T> sum{};
      for (int64_t share = 0; share < shares; ++share) sum += load_size(sums.get() + (share * 2 + which) * columns + j, n);
      store_size(targets[which] + j, sum, n);
    });
  }
}
