// The gradient of a convolution's own output, from that of the whole call: back through pool and activation. It is never
// stored whole: each task works out the part it reads. Included by for_each_isa.h inside the namespace of each instruction set.

// A source (see TensorSource) over the output of the convolution.
template <class T, class S>
struct GradientSource {
  using Stored = S;
  static constexpr int W = kLanes<T>;
  Image<const S> grad, out, pre;  // out, pre: what the derivative is computed from, the other is not read
  Image<const uint8_t> index;
  Activation activation;
  T slope;  // of the leaky ReLU
  Window window;
  int64_t channels;  // of the convolution
  int64_t height, width;

  bool gated() const { return activation == Activation::tanh_sigmoid; }
  // A max-pool's index already says where its ReLU is off.
  bool is_as_given() const { return activation == Activation::none || (activation == Activation::relu && window.kind == Pooling::max); }
  const Image<const S>* plain() const { return activation == Activation::none && window.kind == Pooling::none ? &grad : nullptr; }

  void load(T* block, int64_t stride, int64_t block_columns, int64_t n, int64_t c0, int64_t count, int64_t row, int64_t rows,
            int64_t column, int64_t columns) const {
    if (window.kind != Pooling::max) {
      activation_gradient(block, stride, block_columns, n, c0, count, row, rows, column, columns);
      return;
    }
    int64_t top, bottom, left, right;
    windows_over(row + window.pad_h, rows, window.h, window.stride_h, grad.height, &top, &bottom);
    windows_over(column + window.pad_w, columns, window.w, window.stride_w, grad.width, &left, &right);
    if (top >= bottom || left >= right) {
      clear(block, stride, block_columns, rows, columns);
      return;
    }
    // Windows side by side write each of their elements once; only what lies beside all of them has to be cleared.
    const bool overlapping = window.stride_h < window.h || window.stride_w < window.w;
    const bool adjacent = window.stride_h == window.h && window.stride_w == window.w && stride == count;
    const int64_t r_first = top * window.stride_h - window.pad_h - row, q_first = left * window.stride_w - window.pad_w - column;
    if (adjacent) {
      const int64_t r_begin = std::max<int64_t>(r_first, 0), r_end = std::min(r_first + (bottom - top) * window.h, rows);
      const int64_t q_begin = std::max<int64_t>(q_first, 0), q_end = std::min(q_first + (right - left) * window.w, columns);
      clear(block, stride, block_columns, r_begin, columns);
      clear(block + r_begin * block_columns * stride, stride, block_columns, r_end - r_begin, q_begin);
      clear(block + (r_begin * block_columns + q_end) * stride, stride, block_columns, r_end - r_begin, columns - q_end);
      clear(block + r_end * block_columns * stride, stride, block_columns, rows - r_end, columns);
    } else {
      clear(block, stride, block_columns, rows, columns);
    }
    const int64_t padded = round_up(count, W), pixels = (bottom - top) * (right - left);
    Scratch<T> g(pixels * padded), chosen(pixels * padded);
    load_pooled(g, chosen, padded, n, c0, count, top, bottom - top, left, right - left);
    const bool squares = adjacent && window.h == 2 && window.w == 2 && count == padded;
    for (int64_t pr = top, p = 0; pr < bottom; ++pr)
      for (int64_t pc = left; pc < right; ++pc, ++p) {
        const int64_t r0 = r_first + (pr - top) * window.stride_h, q0 = q_first + (pc - left) * window.stride_w;
        const int64_t kh0 = std::max<int64_t>(0, -r0), kh1 = std::min(window.h, rows - r0);
        const int64_t kw0 = std::max<int64_t>(0, -q0), kw1 = std::min(window.w, columns - q0);
        T* corner = block + (r0 * block_columns + q0) * stride;
        if (squares && kh1 - kh0 == 2 && kw1 - kw0 == 2) {
          for (int64_t c = 0; c < count; c += W) {
            const vec<T> gc = load_vector(g.get() + p * padded + c), kc = load_vector(chosen.get() + p * padded + c);
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k)
              write_lanes<T>(corner + (k / 2 * block_columns + k % 2) * stride + c, kc == broadcast(static_cast<T>(k)) ? gc : vec<T>{}, W);
          }
          continue;
        }
        for (int64_t c = 0; c < count; c += W) {
          const int64_t lanes = std::min<int64_t>(W, count - c);
          const vec<T> gc = load_vector(g.get() + p * padded + c), kc = load_vector(chosen.get() + p * padded + c);
          for (int64_t kh = kh0; kh < kh1; ++kh)
            for (int64_t kw = kw0; kw < kw1; ++kw) {
              T* d = corner + (kh * block_columns + kw) * stride + c;
              vec<T> v = kc == broadcast(static_cast<T>(kh * window.w + kw)) ? gc : vec<T>{};
              if (overlapping) v += read_lanes<T>(d, lanes);
              write_lanes<T>(d, v, lanes);
            }
        }
      }
  }

  // For a max-pool: the gradient at the chosen element of each window, and which one that is unless null. Blocks [rows][columns][stride].
  // Where a ReLU is off, the gradient is any number.
  void load_pooled(T* g, T* chosen, int64_t stride, int64_t n, int64_t c0, int64_t count, int64_t top, int64_t rows, int64_t left,
                   int64_t columns) const {
    activation_gradient(g, stride, columns, n, c0, count, top, rows, left, columns);
    if (!chosen) return;
    if (!gated()) {
      load_block<T>(chosen, stride, columns, index, n, c0, count, top, rows, left, columns);
      return;
    }
    const int64_t half = channels / 2, half_stride = round_up(half, W);
    Scratch<T> halves(rows * columns * half_stride);
    load_block<T>(halves.get(), half_stride, columns, index, n, 0, half, top, rows, left, columns);
    for (int64_t p = 0; p < rows * columns; ++p)
      for (int64_t c = 0; c < channels; ++c) chosen[p * stride + c] = halves[p * half_stride + (c < half ? c : c - half)];
  }

 private:
  static INLINE vec<T> load_vector(const T* p) { return read_lanes<T>(p, W); }  // the member `load` hides the function

  static void clear(T* block, int64_t stride, int64_t block_columns, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r) std::memset(block + r * block_columns * stride, 0, columns * stride * sizeof(T));
  }

  // The pool windows [*first, *last) that touch [start, start + count).
  static void windows_over(int64_t start, int64_t count, int64_t size, int64_t stride, int64_t windows, int64_t* first, int64_t* last) {
    *first = std::max<int64_t>(0, floor_div(start - size, stride) + 1);
    *last = std::min(windows, floor_div(start + count - 1, stride) + 1);
  }

  // grad times the derivative of the activation: at every pixel, or after a max-pool at the chosen ones.
  void activation_gradient(T* block, int64_t stride, int64_t block_columns, int64_t n, int64_t c0, int64_t count, int64_t row, int64_t rows,
                           int64_t column, int64_t columns) const {
    if (gated()) {
      gated_gradient(block, stride, block_columns, n, row, rows, column, columns);
      return;
    }
    const bool as_it_is = is_as_given();
    if (!as_it_is && window.kind == Pooling::none && !pre.data && grad.c == 1 && out.c == 1) {
      in_one_pass(block, stride, block_columns, n, c0, count, row, rows, column, columns);
      return;
    }
    spread(block, stride, block_columns, n, c0, count, row, rows, column, columns);
    if (as_it_is) return;
    const int64_t size = (rows - 1) * block_columns * stride + columns * stride;
    Scratch<T> known(size);
    load_block<T>(known.get(), stride, block_columns, pre.data ? pre : out, n, c0, count, row, rows, column, columns);
    // relu and leaky_relu may be given the value before them as well: it has the sign of the value after.
    const bool from_pre = pre.data && derivative_from_output(activation);
    with_activation(activation, [&](auto kind) {
      for (int64_t r = 0; r < rows; ++r) {
        T* d = block + r * block_columns * stride;
        const T* k = known.get() + r * block_columns * stride;
        for (int64_t i = 0; i < columns * stride; i += W) {
          const int64_t lanes = std::min<int64_t>(W, columns * stride - i);
          vec<T> z = read_lanes<T>(k + i, lanes);
          if (from_pre) z = activate<kind.value>(z, slope);
          write_lanes<T>(d + i, read_lanes<T>(d + i, lanes) * derivative<kind.value>(z, slope), lanes);
        }
      }
    });
  }

  // The gradient times the derivative, both known from tensors whose channels are adjacent.
  void in_one_pass(T* block, int64_t stride, int64_t block_columns, int64_t n, int64_t c0, int64_t count, int64_t row, int64_t rows,
                   int64_t column, int64_t columns) const {
    const int64_t left = std::max<int64_t>(column, 0), right = std::min(column + columns, width);
    const bool whole = left == column && right == column + columns && stride == count;
    with_activation(activation, [&](auto kind) {
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t h = row + r;
        const bool outside = h < 0 || h >= height;
        if (outside || !whole) std::memset(block + r * block_columns * stride, 0, columns * stride * sizeof(T));
        if (outside) continue;
        for (int64_t w = left; w < right; ++w) {
          const S* g = grad.data + n * grad.n + c0 + h * grad.h + w * grad.w;
          const S* value = out.data + n * out.n + c0 + h * out.h + w * out.w;
          T* d = block + (r * block_columns + w - column) * stride;
          for (int64_t c = 0; c < count; c += W) {
            const int64_t lanes = count - c;
            write_lanes<T>(d + c, read_lanes<T>(g + c, lanes) * derivative<kind.value>(read_lanes<T>(value + c, lanes), slope), lanes);
          }
        }
      }
    });
  }

  void gated_gradient(T* block, int64_t stride, int64_t block_columns, int64_t n, int64_t row, int64_t rows, int64_t column,
                      int64_t columns) const {
    const int64_t half = channels / 2, half_stride = round_up(half, W), pre_stride = round_up(channels, W) + W;
    Scratch<T> g(rows * columns * half_stride), z(rows * columns * pre_stride);
    spread(g, half_stride, columns, n, 0, half, row, rows, column, columns);
    load_block<T>(z.get(), pre_stride, columns, pre, n, 0, channels, row, rows, column, columns);
    clear(block, stride, block_columns, rows, columns);
    for (int64_t p = 0; p < rows * columns; ++p) {
      T* d = block + (p / columns * block_columns + p % columns) * stride;
      for (int64_t c = 0; c < half; c += W) {
        const int64_t lanes = std::min<int64_t>(W, half - c);
        const vec<T> gc = load_vector(g.get() + p * half_stride + c);
        const vec<T> t = tanh(load_vector(z.get() + p * pre_stride + c)), s = sigmoid(load_vector(z.get() + p * pre_stride + half + c));
        write_lanes<T>(d + c, gc * s * (1 - t * t), lanes);
        write_lanes<T>(d + half + c, gc * t * s * (1 - s), lanes);
      }
    }
  }

  // grad itself; under an average pool every element of a window gets its share.
  void spread(T* block, int64_t stride, int64_t block_columns, int64_t n, int64_t c0, int64_t count, int64_t row, int64_t rows,
              int64_t column, int64_t columns) const {
    if (window.kind != Pooling::avg) {
      load_block<T>(block, stride, block_columns, grad, n, c0, count, row, rows, column, columns);
      return;
    }
    clear(block, stride, block_columns, rows, columns);
    int64_t top, bottom, left, right;
    windows_over(row + window.pad_h, rows, window.h, window.stride_h, grad.height, &top, &bottom);
    windows_over(column + window.pad_w, columns, window.w, window.stride_w, grad.width, &left, &right);
    if (top >= bottom || left >= right) return;
    const int64_t padded = round_up(count, W), pixels = (bottom - top) * (right - left);
    Scratch<T> g(pixels * padded);
    load_block<T>(g.get(), padded, right - left, grad, n, c0, count, top, bottom - top, left, right - left);
    const T elements = static_cast<T>(window.h * window.w);
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t r0 = (top + p / (right - left)) * window.stride_h - row, q0 = (left + p % (right - left)) * window.stride_w - column;
      for (int64_t r = std::max<int64_t>(r0, 0); r < std::min(r0 + window.h, rows); ++r)
        for (int64_t q = std::max<int64_t>(q0, 0); q < std::min(q0 + window.w, columns); ++q)
          for (int64_t c = 0; c < count; c += W) {
            const int64_t lanes = std::min<int64_t>(W, count - c);
            T* d = block + (r * block_columns + q) * stride + c;
            write_lanes<T>(d, read_lanes<T>(d, lanes) + load_vector(g.get() + p * padded + c) / elements, lanes);
          }
    }
  }
};
