// The steps of one layer of an LSTM with layer norm (Ba, Kiros & Hinton 2016), the input's part a of the gates given:
//
//   z = W h_(t-1)     [i f g o] = a_t + gain N(z)              i, f, o through sigmoid, g through tanh
//   c_t = f c_(t-1) + i g     u = gain_c N(c_t) + bias_c     h_t = o tanh(u)     N(x) = (x - mean x) rstd x
//
// and backwards through the steps, with N'(v) = rstd (v - mean v - N mean(v N)):
//
//   du = dh o (1 - tanh(u)^2)     dc += N'(gain_c du)     do = dh tanh(u)     di = dc g     dg = dc i     df = dc c_(t-1)
//   dc *= f     da_t = (di i(1-i), df f(1-f), dg (1-g^2), do o(1-o))     dz = N'(gain da_t)     dh = dz W
//
// and over all tokens dW = dz^T h_(t-1). A thread owns sequences from the first step to the last, and sums of the gradients of
// gains and bias are kept by sequence: results do not depend on the number of threads. Both states stay in the type of computation.
//
// Floor: 8 T B H^2 operations forward, 16 T B H^2 backward, at the multiply-add peak.
#include "strips.h"

template <class T>
INLINE vec<T> get(const T* p, int64_t n) {
  return n == kLanes<T> ? load(p) : load_partial(p, n);
}
template <class S>
INLINE vec<compute_t<S>> get_stored(const S* p, int64_t n) {
  return n == kLanes<S> ? load(p) : load_partial(p, n);
}
template <class S>
INLINE void put(S* p, vec<compute_t<S>> v, int64_t n) {
  if (n == kLanes<S>)
    store(p, v);
  else
    store_partial(p, v, n);
}

// f(j, n) for every vector of n of the `count` elements at j.
template <class T, class F>
INLINE void for_lanes(int64_t count, F f) {
  constexpr int64_t W = kLanes<T>;
  for (int64_t j = 0; j < count; j += W) f(j, std::min(W, count - j));
}

template <class T>
struct Moments {
  T mean, rstd;
};

template <class T>
INLINE Moments<T> moments(const T* x, int64_t count, double eps) {
  static constexpr auto kOnes = [] {
    std::array<T, kLanes<T>> ones{};
    for (T& one : ones) one = 1;
    return ones;
  }();
  vec<T> sum{};
  for_lanes<T>(count, [&](int64_t j, int64_t n) { sum += get(x + j, n); });
  const T mean = reduce_add(sum) / static_cast<T>(count);
  vec<T> squares{};
  for_lanes<T>(count, [&](int64_t j, int64_t n) {
    const vec<T> d = (get(x + j, n) - mean) * get(kOnes.data(), n);
    squares += d * d;
  });
  return {mean, T(1) / std::sqrt(reduce_add(squares) / static_cast<T>(count) + static_cast<T>(eps))};
}

// x <- N'(x), of the N of `normed`. sum, products: of the elements of x, and of their products with N.
template <class T>
INLINE void norm_gradient(T* x, const T* normed, int64_t count, Moments<T> m, vec<T> sum, vec<T> products) {
  const T mean = reduce_add(sum) / static_cast<T>(count), along = reduce_add(products) / static_cast<T>(count);
  for_lanes<T>(count, [&](int64_t j, int64_t n) {
    put(x + j, m.rstd * (get(x + j, n) - mean - (get(normed + j, n) - m.mean) * m.rstd * along), n);
  });
}

template <class T, class S>
void to_compute_row(T* out, const S* in, int64_t count) {
  for_lanes<T>(count, [&](int64_t j, int64_t n) { put(out + j, in ? get_stored(in + j, n) : vec<T>{}, n); });
}
template <class S, class T>
void from_compute_row(S* out, const T* in, int64_t count) {
  for_lanes<T>(count, [&](int64_t j, int64_t n) { put(out + j, get(in + j, n), n); });
}

// The gains and the bias in the type of computation.
template <class T>
struct NormParameters {
  Scratch<T> gain, gain_c, bias_c;

  template <class S>
  NormParameters(const NormLstmShape& shape, const NormLstmInputs<S>& in)
      : gain(shape.gates()), gain_c(shape.hidden), bias_c(shape.hidden) {
    to_compute_row(gain.get(), in.gain, shape.gates());
    to_compute_row(gain_c.get(), in.gain_c, shape.hidden);
    to_compute_row(bias_c.get(), in.bias_c, shape.hidden);
  }
};

// A product with the recurrent weights, B[k, n] = w[k * row_stride + n * column_stride], packed in runs of kChain terms: one chain
// of all of them rounds worse than the product of a single row in PyTorch, which adds in many lanes.
template <class T>
class ChainedProduct {
 public:
  template <class S>
  ChainedProduct(const S* w, int64_t row_stride, int64_t column_stride, int64_t depth, int64_t columns)
      : depth_(depth), columns_(columns), run_(packed_size<T>(kChain, columns)), packed_((depth + kChain - 1) / kChain * run_) {
    for (int64_t k = 0; k < depth; k += kChain)
      pack_b<T>(packed_ + k / kChain * run_, w + k * row_stride, row_stride, column_stride, std::min(kChain, depth - k), columns);
  }

  // c[rows, columns] = a B
  void operator()(int64_t rows, const T* a, T* c) {
    for (int64_t k = 0; k < depth_; k += kChain)
      gemm_packed_serial<T>(rows, columns_, std::min(kChain, depth_ - k), a + k, depth_, packed_ + k / kChain * run_, c, columns_, k > 0);
  }

 private:
  static constexpr int64_t kChain = 32;
  const int64_t depth_, columns_, run_;
  Scratch<T> packed_;
};

// f(first, last) for shares of the sequences, one a thread.
template <class F>
void for_sequences(const NormLstmShape& shape, F f) {
  const bool small = shape.tokens() * shape.gates() * shape.hidden < 65536;
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, shape.batch, small ? std::max<int64_t>(shape.batch, 1) : (shape.batch + threads - 1) / threads, f);
}

template <class S>
void norm_lstm_forward(const NormLstmShape& shape, const NormLstmForward<S, compute_t<S>>& call) {
  using T = compute_t<S>;
  const int64_t H = shape.hidden, G = shape.gates();
  ChainedProduct<T> product(call.in.w, 1, H, H, G);
  NormParameters<T> p(shape, call.in);
  for_sequences(shape, [&](int64_t first, int64_t last) {
    const int64_t rows = last - first;
    Scratch<T> h(rows * H), c_memory(rows * H), z_memory(rows * G), o_memory(H);
    to_compute_row(h.get(), call.in.h0 + first * H, rows * H);
    to_compute_row(c_memory.get(), call.in.c0 + first * H, rows * H);
    for (int64_t t = 0; t < shape.steps; ++t) {
      const int64_t token = t * shape.batch + first;
      T* z = call.z ? call.z + token * G : z_memory.get();
      product(rows, h.get(), z);
      for (int64_t r = 0; r < rows; ++r) {
        const T* z_row = z + r * G;
        const S* a = call.in.a + (token + r) * G;
        T *c = c_memory + r * H, *o = o_memory, *gates = call.gates ? call.gates + (token + r) * G : nullptr;
        const Moments<T> m = moments(z_row, G, shape.eps);
        for_lanes<T>(H, [&](int64_t j, int64_t n) {
          const auto before = [&](int64_t gate) {
            const int64_t at = gate * H + j;
            return get_stored(a + at, n) + (get(z_row + at, n) - m.mean) * m.rstd * get(p.gain.get() + at, n);
          };
          const vec<T> i_gate = sigmoid(before(0)), f_gate = sigmoid(before(1)), g_gate = tanh(before(2)), o_gate = sigmoid(before(3));
          put(c + j, f_gate * get(c + j, n) + i_gate * g_gate, n);
          put(o + j, o_gate, n);
          if (gates) put(gates + j, i_gate, n), put(gates + H + j, f_gate, n), put(gates + 2 * H + j, g_gate, n), put(gates + 3 * H + j, o_gate, n);
        });
        const Moments<T> m_c = moments(c, H, shape.eps_c);
        for_lanes<T>(H, [&](int64_t j, int64_t n) {
          const vec<T> c_t = get(c + j, n), u = (c_t - m_c.mean) * m_c.rstd * get(p.gain_c.get() + j, n) + get(p.bias_c.get() + j, n);
          const vec<T> h_t = get(o + j, n) * tanh(u);
          put(call.output + (token + r) * H + j, h_t, n);
          put(h + r * H + j, h_t, n);
          if (call.cells) put(call.cells + (token + r) * H + j, c_t, n);
        });
      }
    }
    from_compute_row(call.h_n + first * H, h.get(), rows * H);
    from_compute_row(call.c_n + first * H, c_memory.get(), rows * H);
  });
}

template <class S>
void norm_lstm_backward(const NormLstmShape& shape, const NormLstmBackward<S, compute_t<S>>& call) {
  using T = compute_t<S>;
  const int64_t H = shape.hidden, G = shape.gates(), B = shape.batch;
  const int64_t kept = std::max<int64_t>(B, 1);
  ChainedProduct<T> product(call.in.w, H, 1, G, H);
  Scratch<T> dz(shape.tokens() * G), sums(kept * (G + 2 * H));
  std::fill_n(sums.get(), kept * (G + 2 * H), T(0));
  T *d_gain = sums, *d_gain_c = d_gain + kept * G, *d_bias_c = d_gain_c + kept * H;  // by sequence
  NormParameters<T> p(shape, call.in);
  const auto add = [](T* at, vec<T> v, int64_t n) { put(at, get(at, n) + v, n); };
  for_sequences(shape, [&](int64_t first, int64_t last) {
    const int64_t rows = last - first;
    Scratch<T> dh(rows * H), dc_memory(rows * H), c0(rows * H), da_memory(G), v_memory(H);
    to_compute_row(dh.get(), call.d_h_n ? call.d_h_n + first * H : nullptr, rows * H);
    to_compute_row(dc_memory.get(), call.d_c_n ? call.d_c_n + first * H : nullptr, rows * H);
    to_compute_row(c0.get(), call.in.c0 + first * H, rows * H);
    for (int64_t t = shape.steps - 1; t >= 0; --t) {
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = first + r, token = t * B + row;
        const T *c = call.cells + token * H, *c_before = t > 0 ? c - B * H : c0 + r * H;
        const T *gates = call.gates + token * G, *z = call.z + token * G;
        T *dc = dc_memory + r * H, *da = da_memory, *v = v_memory, *dz_row = dz + token * G;
        const Moments<T> m_c = moments(c, H, shape.eps_c), m = moments(z, G, shape.eps);
        vec<T> sum{}, products{};
        for_lanes<T>(H, [&](int64_t j, int64_t n) {
          const vec<T> normed = (get(c + j, n) - m_c.mean) * m_c.rstd, gain = get(p.gain_c.get() + j, n), o = get(gates + 3 * H + j, n);
          const vec<T> tanh_u = tanh(normed * gain + get(p.bias_c.get() + j, n));
          vec<T> d = get(dh + r * H + j, n);
          if (call.d_output) d += get_stored(call.d_output + token * H + j, n);
          const vec<T> du = d * o * (1 - tanh_u * tanh_u), scaled = du * gain;  // 0 in lanes past n, where gain and o are
          add(d_gain_c + row * H + j, du * normed, n);
          add(d_bias_c + row * H + j, du, n);
          put(da + 3 * H + j, d * tanh_u * o * (1 - o), n);
          put(v + j, scaled, n);
          sum += scaled;
          products += scaled * normed;
        });
        norm_gradient(v, c, H, m_c, sum, products);
        for_lanes<T>(H, [&](int64_t j, int64_t n) {
          const vec<T> i = get(gates + j, n), f = get(gates + H + j, n), g = get(gates + 2 * H + j, n);
          const vec<T> d = get(dc + j, n) + get(v + j, n);
          put(da + j, d * g * i * (1 - i), n);
          put(da + H + j, d * get(c_before + j, n) * f * (1 - f), n);
          put(da + 2 * H + j, d * i * (1 - g * g), n);
          put(dc + j, d * f, n);
        });
        from_compute_row(call.d_a + token * G, da, G);
        sum = products = vec<T>{};
        for_lanes<T>(G, [&](int64_t j, int64_t n) {
          const vec<T> d = get(da + j, n), normed = (get(z + j, n) - m.mean) * m.rstd, scaled = d * get(p.gain.get() + j, n);
          add(d_gain + row * G + j, d * normed, n);
          put(dz_row + j, scaled, n);
          sum += scaled;
          products += scaled * normed;
        });
        norm_gradient(dz_row, z, G, m, sum, products);
      }
      product(rows, dz + (t * B + first) * G, dh.get());
    }
    from_compute_row(call.d_h0 + first * H, dh.get(), rows * H);
    from_compute_row(call.d_c0 + first * H, dc_memory.get(), rows * H);
  });
  // Sequences are added up in their order.
  const auto add_up = [&](S* out, T* of_rows, int64_t count) {
    for (int64_t row = 1; row < B; ++row)
      for_lanes<T>(count, [&](int64_t j, int64_t n) { add(of_rows + j, get(of_rows + row * count + j, n), n); });
    from_compute_row(out, of_rows, count);
  };
  add_up(call.d_gain, d_gain, G);
  add_up(call.d_gain_c, d_gain_c, H);
  add_up(call.d_bias_c, d_bias_c, H);
  Scratch<T> d_w(G * H);
  gemm(G, H, B, static_cast<const T*>(dz.get()), 1, G, call.in.h0, H, 1, d_w.get(), H);
  gemm(G, H, shape.tokens() - B, static_cast<const T*>(dz + B * G), 1, G, call.output, H, 1, d_w.get(), H, true);
  from_compute_row(call.d_w, d_w.get(), G * H);
}
