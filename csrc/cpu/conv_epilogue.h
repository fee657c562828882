// What follows the products of a forward pass, on a block of outputs that is still in the cache: bias and folded norm,
// residual, activation, pool, and the stores. Included by for_each_isa.h inside the namespace of each instruction set.

// out = pool(activation(y * alpha[c] + beta[c] + residual)); alpha = scale, beta = bias * scale + shift.
// The sink of a forward pass. `pre` and `index` are what backward needs and may be absent: the value before the activation
// (after a max-pool only that of the chosen element), and the position of the chosen element in its window.
template <class T, class S>
struct Epilogue {
  static constexpr int W = kLanes<T>;
  const T *alpha, *beta;  // [output channels + W]
  Activation activation;
  T slope;  // of the leaky ReLU
  Image<const S> residual;
  Image<S> out, pre;
  Image<uint8_t> index;
  const Bands* bands;
  int64_t channels;  // of the convolution, per group; the last may have fewer

  bool gated() const { return activation == Activation::tanh_sigmoid; }
  // Channels of group g, and those that are left of them after the activation.
  int64_t present(int64_t g) const { return gated() ? channels : std::min(channels, out.channels - g * channels); }
  int64_t kept(int64_t g) const { return gated() ? channels / 2 : present(g); }

  DirectOutput<T> direct(int64_t n, int64_t g, const Band& band) const {
    const bool relu = activation == Activation::relu;
    if (residual.data || pre.data || bands->window.kind != Pooling::none || !(relu || activation == Activation::none)) return {};
    DirectOutput<T> found = direct_output<T>(out, n, g * channels, band);
    found.alpha = alpha + g * channels, found.beta = beta + g * channels;
    found.floor = relu ? T(0) : -std::numeric_limits<T>::infinity();
    return found;
  }

  void operator()(int64_t n, int64_t g, int64_t i, T* y, int64_t y_columns, int64_t y_stride) const {
    const Window& window = bands->window;
    const bool max = window.kind == Pooling::max;
    if (!residual.data && !pre.data && is_monotone(activation) && window.kind != Pooling::avg) {
      if (max) {
        pool_max({activation, slope}, n, g, i, y, y_columns, y_stride, alpha + g * channels, beta + g * channels);
      } else {
        with_activation(activation, [&](auto a) { write_activated<a.value>(n, g, i, y, y_columns, y_stride); });
      }
      return;
    }
    step_by_step(n, g, i, y, y_columns, y_stride);
  }

 private:
  template <class F>
  static INLINE void each_vector(const Band& band, T* y, int64_t y_columns, int64_t y_stride, F f) {
    for (int64_t r = 0; r < band.rows(); ++r)
      for (int64_t p = 0; p < band.columns(); ++p)
        for (int64_t c = 0; c < y_stride; c += W) f(y + (r * y_columns + p) * y_stride + c, c);
  }

  // Without residual and pool, straight from y where channels are adjacent in the output.
  template <Activation kActivation>
  INLINE void write_activated(int64_t n, int64_t g, int64_t i, T* y, int64_t y_columns, int64_t y_stride) const {
    const Band band = bands->full(i);
    const T *scale = alpha + g * channels, *offset = beta + g * channels;
    const auto value = [&](const T* p, int64_t c) { return activate<kActivation>(load(p) * load(scale + c) + load(offset + c), slope); };
    if (out.c != 1) {
      each_vector(band, y, y_columns, y_stride, [&](T* p, int64_t c) { store(p, value(p, c)); });
      write(out, n, g * channels, present(g), i, y, y_columns, y_stride);
      return;
    }
    S* corner = out.data + n * out.n + g * channels + band.top * out.h + band.left * out.w;
    const int64_t count = present(g);
    for (int64_t r = 0; r < band.rows(); ++r)
      for (int64_t p = 0; p < band.columns(); ++p)
        for (int64_t c = 0; c < count; c += W)
          write_lanes<T>(corner + r * out.h + p * out.w + c, value(y + (r * y_columns + p) * y_stride + c, c), count - c);
  }

  // Stores a block of pooled outputs (those of band i).
  template <class Stored>
  void write(const Image<Stored>& image, int64_t n, int64_t c0, int64_t count, int64_t i, const T* block, int64_t columns,
             int64_t stride) const {
    const Band band = bands->pooled(i);
    store_block<T>(block, stride, columns, image, n, c0, count, band.top, band.rows(), band.left, band.columns());
  }

  // The largest of each window, as torch chooses it: the first of equals; a NaN beats every number.
  NOINLINE void pool_max(const AnyActivation<T>& finish, int64_t n, int64_t g, int64_t i, const T* y, int64_t y_columns, int64_t y_stride,
                         const T* scale, const T* offset) const {
    const Band band = bands->pooled(i);
    const int64_t pixels = band.rows() * band.columns();
    Scratch<T> largest(pixels * y_stride + W), chosen(index.data ? pixels * y_stride + W : 0);
    if (index.data)
      pick_max<true>(finish, i, y, y_columns, y_stride, scale, offset, largest, chosen);
    else if (bands->window.stride_h < bands->window.h)
      max_by_axes(finish, i, y, y_columns, y_stride, scale, offset, largest);
    else
      pick_max<false>(finish, i, y, y_columns, y_stride, scale, offset, largest, chosen);
    const int64_t count = kept(g);
    write(out, n, gated() ? 0 : g * channels, count, i, largest.get(), band.columns(), y_stride);
    if (index.data) write(index, n, gated() ? 0 : g * channels, count, i, chosen.get(), band.columns(), y_stride);
  }

  // The part of pooled window `p` that lies in the image, along one axis: elements [first, last) of the window, whose element 0
  // is row or column `start` of the block.
  struct Span {
    int64_t start, first, last;
  };
  static INLINE Span span_of(int64_t p, int64_t stride, int64_t pad, int64_t size, int64_t begin, int64_t end) {
    const int64_t start = p * stride - pad - begin;
    return {start, std::max<int64_t>(0, -start), std::min(size, end - begin - start)};
  }

  template <bool kIndex>
  NOINLINE void pick_max(const AnyActivation<T>& finish, int64_t i, const T* y, int64_t y_columns, int64_t y_stride, const T* scale,
                         const T* offset, T* largest, T* chosen) const {
    const Window& window = bands->window;
    if (window.h == 2 && window.w == 2 && window.pad_h == 0 && window.pad_w == 0)
      pick_max_of<kIndex, 2>(finish, i, y, y_columns, y_stride, scale, offset, largest, chosen);
    else
      pick_max_of<kIndex, 0>(finish, i, y, y_columns, y_stride, scale, offset, largest, chosen);
  }

  // kSide x kSide windows, or those of any size for kSide = 0.
  template <bool kIndex, int kSide>
  INLINE void pick_max_of(const AnyActivation<T>& finish, int64_t i, const T* y, int64_t y_columns, int64_t y_stride, const T* scale,
                          const T* offset, T* largest, T* chosen) const {
    const Window& window = bands->window;
    // Up to this a ReLU passes no gradient on; without one no number compares.
    const T off = finish.kind == Activation::relu ? T(0) : std::numeric_limits<T>::quiet_NaN();
    const Band band = bands->pooled(i), full = bands->full(i);
    for (int64_t c = 0; c < y_stride; c += W) {
      const vec<T> alpha = load(scale + c), beta = load(offset + c);
      for (int64_t r = 0; r < band.rows(); ++r)
        for (int64_t p = 0; p < band.columns(); ++p) {
          Span h{r * window.stride_h, 0, kSide}, w{p * window.stride_w, 0, kSide};
          if constexpr (kSide == 0) {
            h = span_of(band.top + r, window.stride_h, window.pad_h, window.h, full.top, full.bottom);
            w = span_of(band.left + p, window.stride_w, window.pad_w, window.w, full.left, full.right);
          }
          const T* corner = y + (h.start * y_columns + w.start) * y_stride + c;
          vec<T> best = load(corner + (h.first * y_columns + w.first) * y_stride) * alpha + beta;
          vec<T> position = broadcast(static_cast<T>(h.first * window.w + w.first));
#pragma GCC unroll 2
          for (int64_t kh = h.first; kh < h.last; ++kh)
#pragma GCC unroll 2
            for (int64_t kw = w.first; kw < w.last; ++kw) {
              if (kh == h.first && kw == w.first) continue;
              const vec<T> z = load(corner + (kh * y_columns + kw) * y_stride) * alpha + beta;
              const auto better = (z > best) | (z != z);
              best = better ? z : best;
              if constexpr (kIndex) position = better ? broadcast(static_cast<T>(kh * window.w + kw)) : position;
            }
          const vec<T> a = finish(best);
          const int64_t at = (r * band.columns() + p) * y_stride + c;
          store(largest + at, a);
          if constexpr (kIndex) store(chosen + at, a <= off ? broadcast(static_cast<T>(kNoGradient)) : position);
        }
    }
  }

  // Windows that overlap, no index: the largest of each column first, which two windows may share.
  NOINLINE void max_by_axes(const AnyActivation<T>& finish, int64_t i, const T* y, int64_t y_columns, int64_t y_stride, const T* scale,
                            const T* offset, T* largest) const {
    const Window& window = bands->window;
    const Band band = bands->pooled(i), full = bands->full(i);
    Scratch<T> line(full.columns() * W);
    for (int64_t r = 0; r < band.rows(); ++r) {
      const Span h = span_of(band.top + r, window.stride_h, window.pad_h, window.h, full.top, full.bottom);
      for (int64_t c = 0; c < y_stride; c += W) {
        const vec<T> alpha = load(scale + c), beta = load(offset + c);
        for (int64_t column = 0; column < full.columns(); ++column) {
          const T* at = y + ((h.start + h.first) * y_columns + column) * y_stride + c;
          vec<T> best = load(at) * alpha + beta;
          for (int64_t k = h.first + 1; k < h.last; ++k) best = larger(best, load(at += y_columns * y_stride) * alpha + beta);
          store(line + column * W, best);
        }
        for (int64_t p = 0; p < band.columns(); ++p) {
          const Span w = span_of(band.left + p, window.stride_w, window.pad_w, window.w, full.left, full.right);
          const T* at = line + (w.start + w.first) * W;
          vec<T> best = load(at);
          for (int64_t k = w.first + 1; k < w.last; ++k) best = larger(best, load(at += W));
          store(largest + (r * band.columns() + p) * y_stride + c, finish(best));
        }
      }
    }
  }

  void pool_avg(int64_t n, int64_t g, int64_t i, const T* y, int64_t y_columns, int64_t y_stride) const {
    const Band band = bands->pooled(i);
    const Window& window = bands->window;
    Scratch<T> mean(band.rows() * band.columns() * y_stride + W);
    for (int64_t r = 0; r < band.rows(); ++r)
      for (int64_t p = 0; p < band.columns(); ++p)
        for (int64_t c = 0; c < y_stride; c += W) {
          const T* corner = y + (r * window.stride_h * y_columns + p * window.stride_w) * y_stride + c;
          vec<T> sum = {};
          for (int64_t kh = 0; kh < window.h; ++kh)
            for (int64_t kw = 0; kw < window.w; ++kw) sum += load(corner + (kh * y_columns + kw) * y_stride);
          store(mean.get() + (r * band.columns() + p) * y_stride + c, sum / static_cast<T>(window.h * window.w));
        }
    const int64_t count = kept(g);
    write(out, n, gated() ? 0 : g * channels, count, i, mean.get(), band.columns(), y_stride);
  }

  // Every step by itself, in the order of the formula.
  void step_by_step(int64_t n, int64_t g, int64_t i, T* y, int64_t y_columns, int64_t y_stride) const {
    const Pooling pool = bands->window.kind;
    const Band band = bands->full(i);
    const int64_t c0 = g * channels, size = band.rows() * y_columns * y_stride;
    each_vector(band, y, y_columns, y_stride, [&](T* p, int64_t c) { store(p, load(p) * load(alpha + c0 + c) + load(beta + c0 + c)); });
    if (residual.data) {
      Scratch<T> added(size);
      load_block<T>(added.get(), y_stride, y_columns, residual, n, c0, present(g), band.top, band.rows(), band.left, band.columns());
      each_vector(band, y, y_columns, y_stride, [&](T* p, int64_t) { store(p, load(p) + load(added.get() + (p - y))); });
    }
    if (pre.data && pool != Pooling::max)
      store_block<T>(y, y_stride, y_columns, pre, n, c0, present(g), band.top, band.rows(), band.left, band.columns());
    // A max-pool that saves `pre` looks the chosen values up afterwards, so the activated ones go elsewhere.
    Scratch<T> activated(pool == Pooling::max && pre.data ? size + W : 0);
    T* a = pool == Pooling::max && pre.data ? activated.get() : y;
    if (gated()) {
      const int64_t half = channels / 2;
      each_vector(band, y, y_columns, y_stride, [&](T* p, int64_t c) {
        if (c < half) store_partial(a + (p - y), tanh(load(p)) * sigmoid(load(p + half)), std::min<int64_t>(W, half - c));
      });
    } else if (pool != Pooling::max || !is_monotone(activation)) {
      with_activation(activation, [&](auto kind) {
        each_vector(band, y, y_columns, y_stride, [&](T* p, int64_t) { store(a + (p - y), activate<kind.value>(load(p), slope)); });
      });
    }
    if (pool == Pooling::none) {
      write(out, n, gated() ? 0 : c0, kept(g), i, y, y_columns, y_stride);
    } else if (pool == Pooling::avg) {
      pool_avg(n, g, i, y, y_columns, y_stride);
    } else {
      Scratch<T> units(y_stride), zeros(y_stride);
      for (int64_t c = 0; c < y_stride; ++c) units[c] = 1, zeros[c] = 0;
      if (is_monotone(activation))
        pool_max({activation, slope}, n, g, i, y, y_columns, y_stride, units, zeros);
      else
        pool_activated(n, g, i, y, a, y_columns, y_stride, units, zeros);
    }
  }

  // The pool of values activated before it; `pre` (saved together with `index`) takes the value of y where the activated one
  // was chosen.
  void pool_activated(int64_t n, int64_t g, int64_t i, const T* y, const T* a, int64_t y_columns, int64_t y_stride, const T* units,
                      const T* zeros) const {
    if (!pre.data) {
      pool_max({Activation::none, slope}, n, g, i, a, y_columns, y_stride, units, zeros);
      return;
    }
    const Band band = bands->pooled(i);
    const int64_t count = kept(g), size = band.rows() * band.columns() * y_stride + W;
    Scratch<T> largest(size), chosen(size);
    pick_max<true>({Activation::none, slope}, i, a, y_columns, y_stride, units, zeros, largest, chosen);
    write(out, n, gated() ? 0 : g * channels, count, i, largest.get(), band.columns(), y_stride);
    write(index, n, gated() ? 0 : g * channels, count, i, chosen.get(), band.columns(), y_stride);
    write_chosen(n, g, i, y, y_columns, y_stride, chosen.get());
  }

  void write_chosen(int64_t n, int64_t g, int64_t i, const T* y, int64_t y_columns, int64_t y_stride, const T* chosen) const {
    const Band band = bands->pooled(i), full = bands->full(i);
    const Window& window = bands->window;
    const int64_t count = kept(g);
    Scratch<T> values(band.rows() * band.columns() * y_stride + W);
    for (int64_t r = 0; r < band.rows(); ++r)
      for (int64_t p = 0; p < band.columns(); ++p) {
        const int64_t at = (r * band.columns() + p) * y_stride;
        const int64_t row = (band.top + r) * window.stride_h - window.pad_h - full.top;
        const T* corner = y + (row * y_columns + (band.left + p) * window.stride_w - window.pad_w - full.left) * y_stride;
        for (int64_t c = 0; c < present(g); ++c) {
          const int64_t k = static_cast<int64_t>(chosen[at + (c < count ? c : c - count)]);
          values[at + c] = corner[(k / window.w * y_columns + k % window.w) * y_stride + c];
        }
      }
    write(pre, n, g * channels, present(g), i, values.get(), band.columns(), y_stride);
  }
};
