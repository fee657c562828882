// One time step of a causal convolution that streams: taps from the ring, activation or gate, residual and skip, and the new input
// into the ring.
//
//   z = weight window + bias, the window being x at t, t - dilation, ..        a = activation(z)
//   y = a, or x_t + W_out a + b_out        skip = skip_sum + W_skip a + b_skip
//
// Weights are read as they lie, [rows][C / groups][K], a vector of rows at a time: each row's products stay in a vector of their
// own, and the vectors are transposed and added at the end. The ring is read at K places and written at one, whatever its length.
// Floor: the weights read once, from the cache that holds them.
#include "activation_kernel.h"
#include "tiles.h"

// out[i] = (row first + i of w) . v for i < W, rows past `rows` 0.
template <class T, class S>
INLINE vec<T> dot_rows(const S* w, int64_t first, int64_t rows, int64_t depth, const T* v) {
  constexpr int W = kLanes<T>;
  vec<T> acc[W] = {};
  const S* row[W];
  for (int j = 0; j < W; ++j) row[j] = w + std::min(first + j, rows - 1) * depth;
  int64_t k = 0;
  for (; k + W <= depth; k += W) {
    const vec<T> x = load(v + k);
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) acc[j] += x * load(row[j] + k);
  }
  if (k < depth) {
    const vec<T> x = load_partial(v + k, depth - k);
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) acc[j] += x * load_partial(row[j] + k, depth - k);
  }
  transpose(acc);
#pragma GCC unroll 16
  for (int half = W / 2; half; half /= 2)
#pragma GCC unroll 16
    for (int j = 0; j < half; ++j) acc[j] += acc[j + half];
  return acc[0];
}

// out[n][i] = w[i] . v[n] + bias[i] (+ added[n][i]) for all rows i of w.
template <class T, class S, class O>
void matrix_vectors(const S* w, int64_t rows, int64_t depth, const T* v, int64_t v_row, int64_t batch, const S* bias, const S* added,
                    O* out, int64_t out_row) {
  constexpr int W = kLanes<T>;
  // A region of threads costs as much as so many multiplications.
  const int64_t grain = std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(1, depth * W * batch));
  torch::stable::parallel_for(0, (rows + W - 1) / W, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * W; i < std::min(end * W, rows); i += W) {
      const int64_t n = std::min<int64_t>(W, rows - i);
      const vec<T> shift = bias ? load_partial(bias + i, n) : vec<T>{};
      for (int64_t b = 0; b < batch; ++b) {
        vec<T> sum = dot_rows<T>(w, i, rows, depth, v + b * v_row) + shift;
        if (added) sum += load_partial(added + b * rows + i, n);
        store_partial(out + b * out_row + i, sum, n);
      }
    }
  });
}

template <class S>
void conv_step(const ConvStep<S>& c) {
  using T = compute_t<S>;
  constexpr int W = kLanes<T>;
  const int64_t window = c.channels * c.kernel, depth = window / c.groups, D = c.values(), rows = padded<T>(c.rows);
  Scratch<T> taps(c.batch * window), z(c.batch * rows), a(c.batch * rows);
  Scratch<S> x_t(c.batch * c.channels);
  for (int64_t n = 0; n < c.batch; ++n) {
    T* out = taps.get() + n * window;
    S* x = x_t.get() + n * c.channels;
    for (int64_t i = 0; i < c.channels; ++i) x[i] = c.x[n * c.x_row + i * c.x_column];
    S* ring = c.ring + n * c.delay() * c.channels;
    for (int64_t k = 0; k < c.kernel; ++k) {
      // Step t - L was where step t belongs, and t counts from 0.
      const S* from = k + 1 < c.kernel ? ring + (c.position + k * c.dilation) % c.delay() * c.channels : x;
      for (int64_t i = 0; i < c.channels; ++i) out[i * c.kernel + k] = to_compute(from[i]);
    }
    if (c.delay()) std::memcpy(ring + c.position % c.delay() * c.channels, x, c.channels * sizeof(S));
  }
  if (c.groups == 1) {
    matrix_vectors<T, S, T>(c.weight, c.rows, depth, taps.get(), window, c.batch, c.bias, nullptr, z.get(), rows);
  } else {
    const int64_t of_group = c.rows / c.groups;
    for (int64_t g = 0; g < c.groups; ++g)
      matrix_vectors<T, S, T>(c.weight + g * of_group * depth, of_group, depth, taps.get() + g * depth, window, c.batch,
                              c.bias ? c.bias + g * of_group : nullptr, nullptr, z.get() + g * of_group, rows);
  }
  for (int64_t n = 0; n < c.batch; ++n) {
    const T* from = z.get() + n * rows;
    T* to = a.get() + n * rows;
    if (c.activation == Activation::tanh_sigmoid) {
      for (int64_t i = 0; i < D; i += W) {
        const int64_t count = std::min<int64_t>(W, D - i);
        store(to + i, tanh(load_partial(from + i, count)) * sigmoid(load_partial(from + D + i, count)));
      }
    } else {
      with_activation(c.activation, [&](auto constant) {
        for (int64_t i = 0; i < D; i += W)
          store(to + i, activate<decltype(constant)::value>(load_partial(from + i, std::min<int64_t>(W, D - i)), static_cast<T>(c.slope)));
      });
    }
    if (!c.out_weight)
      for (int64_t i = 0; i < D; i += W) store_partial(c.y + n * D + i, load(to + i), std::min<int64_t>(W, D - i));
  }
  if (c.out_weight) matrix_vectors<T>(c.out_weight, c.out, D, a.get(), rows, c.batch, c.out_bias, x_t.get(), c.y, c.out);
  if (c.skip_weight) matrix_vectors<T>(c.skip_weight, c.skips, D, a.get(), rows, c.batch, c.skip_bias, c.skip_sum, c.skip, c.skips);
}
