// Rows of time as A, packed weights as B: the products of gated_conv, and how signals of either layout become rows and rows
// become signals again. T is the arithmetic type; M is what is multiplied: T, or bfloat16 for dot products, where B lies with
// two steps of the depth to a lane. Included by gated_conv_kernel.h.
#include "tiles.h"

inline constexpr int64_t kBlock = 96;      // time steps that stay in the first- and second-level cache from input to output
inline constexpr int64_t kSumSteps = 192;  // terms that are summed up before they are added to the others; see gemm.h

// Numbers of the depth that lie side by side in B.
template <class T, class M>
inline constexpr int kPack = std::is_same_v<T, M> ? 1 : 2;

// Channels of a row of time, rounded up so that a row is whole vectors of M.
template <class T, class M>
INLINE int64_t row_size(int64_t channels) {
  constexpr int64_t step = kLanes<T> * kPack<T, M>;
  return (channels + step - 1) / step * step;
}

// ---- weights into panels -----------------------------------------------------------------------------------------

// One vector of columns of a panel of `vectors` vectors: B(k, lane) = b[k * row_stride + lane * column_stride], for k < depth and
// lane < columns, and 0 up to `whole` steps and all lanes.
template <class T, class M, class S>
void pack_vector(M* out, int64_t vectors, const S* b, int64_t row_stride, int64_t column_stride, int64_t depth, int64_t whole,
                 int64_t columns) {
  constexpr int W = kLanes<T>, pack = kPack<T, M>;
  for (int64_t k = 0; k < whole; ++k) {
    M* row = out + k / pack * pack * vectors * W + k % pack;
    const int64_t n = k < depth ? std::min<int64_t>(columns, W) : 0;
    for (int64_t j = 0; j < n; ++j) row[j * pack] = from_compute<M>(to_compute(b[k * row_stride + j * column_stride]));
    for (int64_t j = std::max<int64_t>(n, 0); j < W; ++j) row[j * pack] = M{};
  }
}

// ---- memory ahead of its use -------------------------------------------------------------------------------------

// What is read and written next, asked for a few lines at a time between the tiles of a product.
class LinesAhead {
  struct Run {
    const char* first;
    int64_t row, rows, bytes;
    bool written;
  };
  std::vector<Run> runs_;
  size_t run_ = 0;
  int64_t row_ = 0, at_ = 0;

 public:
  void clear() { runs_.clear(), run_ = 0, row_ = 0, at_ = 0; }
  // `rows` of `count` numbers each, `row` apart.
  template <class T>
  void add(T* first, int64_t row, int64_t rows, int64_t count) {
    constexpr int64_t size = sizeof(T);
    if (first && rows > 0) runs_.push_back({reinterpret_cast<const char*>(first), row * size, rows, count * size, !std::is_const_v<T>});
  }
  // Steps of a signal whose channels are adjacent.
  template <class S>
  void add(const Signal<S>& x, int64_t rows, int64_t channels) {
    if (x.c == 1) add(x.data, x.t, rows, channels);
  }
  INLINE void some() {
    constexpr int64_t kLine = 64, kLines = 12;  // to the second-level cache: all at once would fill the queue of misses
    for (int64_t i = 0; i < kLines; ++i) {
      if (run_ == runs_.size()) return;
      const Run& r = runs_[run_];
      const char* line = r.first + row_ * r.row + at_;
      if (r.written)
        __builtin_prefetch(line, 1, 2);
      else
        __builtin_prefetch(line, 0, 2);
      at_ += kLine;
      if (at_ >= r.bytes) {
        at_ = 0;
        if (++row_ == r.rows) row_ = 0, ++run_;
      }
    }
  }
};

// ---- products ----------------------------------------------------------------------------------------------------

// Steps of the depth that are multiplied in one go: A(r, k) = first[r * row + k], B's steps from `at` on.
template <class M>
struct Chunk {
  const M* first;
  int64_t row, at, steps;
  bool store;  // the sum is complete, or long enough to be added to memory
};

template <class M>
struct Chunks {
  std::vector<Chunk<M>> list;
  int64_t summed = 0;

  void clear() { list.clear(), summed = 0; }
  // The next part of the sum: `depth` steps of rows at `first`, whose weights are at `at` in the panels.
  void add(const M* first, int64_t row, int64_t depth, int64_t at) {
    for (int64_t k = 0; k < depth;) {
      const int64_t steps = std::min(depth - k, kSumSteps - summed);
      summed = (summed + steps) % kSumSteps;
      list.push_back({first + k, row, at + k, steps, summed == 0});
      k += steps;
    }
  }
  void end() {
    if (!list.empty()) list.back().store = true;
  }
};

template <int R, int NV, class V>
INLINE void clear(V (&acc)[R][NV]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = V{};
}

template <int R, int NV, class T>
void product_tile(const std::vector<Chunk<T>>& chunks, int64_t r, const T* panel, T* out, int64_t out_row) {
  constexpr int W = kLanes<T>;
  bool add = false;
  vec<T> acc[R][NV] = {};
  for (const Chunk<T>& c : chunks) {
    multiply_tile<R, NV, T>(acc, c.first + r * c.row, c.row, 1, panel + c.at * NV * W, NV * W, c.steps);
    if (c.store) {
      store_tile<R, NV, T>(acc, out, out_row, NV * W, add);
      clear(acc);
      add = true;
    }
  }
}

// sums[i][column] += the sum over steps of a[step * a_row + i] b[step * b_row + column].
template <int R, int NV, class T>
void outer_tile(const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t steps, T* sums, int64_t sums_row) {
  vec<T> acc[R][NV] = {};
  multiply_tile<R, NV, T>(acc, a, 1, a_row, b, b_row, steps);
  store_tile<R, NV, T>(acc, sums, sums_row, NV * kLanes<T>, true);
}

#if ISA_VECTOR_BYTES == 64
template <int R, int NV, class T>
__attribute__((target("avx512bf16"))) void product_tile(const std::vector<Chunk<bfloat16>>& chunks, int64_t r, const bfloat16* panel,
                                                        T* out, int64_t out_row) {
  constexpr int W = kLanes<T>;
  bool add = false;
  vec<T> acc[R][NV] = {};
  for (const Chunk<bfloat16>& c : chunks) {
    multiply_pairs<R, NV>(acc, c.first + r * c.row, c.row, 2, panel + c.at * NV * W, c.steps / 2);
    if (c.store) {
      store_tile<R, NV, T>(acc, out, out_row, NV * W, add);
      clear(acc);
      add = true;
    }
  }
}

// As above; a and b hold the steps in pairs, side by side.
template <int R, int NV, class T>
__attribute__((target("avx512bf16"))) void outer_tile(const bfloat16* a, int64_t a_row, const bfloat16* b, int64_t b_row, int64_t steps,
                                                      T* sums, int64_t sums_row) {
  vec<T> acc[R][NV] = {};
  multiply_pairs<R, NV>(acc, a, 2, 2 * a_row, b, (steps + 1) / 2, 2 * b_row);
  store_tile<R, NV, T>(acc, sums, sums_row, NV * kLanes<T>, true);
}
#endif

#if ISA_VECTOR_BYTES == 64
// sums[column] += the sum of `steps` steps of pairs.
__attribute__((target("avx512bf16"))) inline void add_pairs(const bfloat16* pairs, int64_t row, int64_t steps, int64_t columns,
                                                            float* sums) {
  const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
  for (int64_t c = 0; c < columns; c += kLanes<float>) {
    __m512 sum = _mm512_loadu_ps(sums + c);
    for (int64_t r = 0; r < steps; r += 2)
      sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_loadu_si512(pairs + r * row + 2 * c)), ones);
    _mm512_storeu_ps(sums + c, sum);
  }
}
#endif

// out[r][columns of one panel] = the sum of the chunks, r < rows. The last tile reaches back over rows that are done already.
template <class T, class M>
void product(int64_t rows, const Chunks<M>& chunks, const M* panel, int64_t vectors, T* out, int64_t out_row,
             LinesAhead* ahead = nullptr) {
  with_constant<PanelTile<T>::kVectors>(vectors, [&](auto constant) {
    constexpr int NV = decltype(constant)::value, R = PanelTile<T>::rows(NV);
    if (rows < R) {
      for (int64_t r = 0; r < rows; ++r) product_tile<1, NV, T>(chunks.list, r, panel, out + r * out_row, out_row);
    } else {
      for (int64_t r = 0; r < rows; r += R) {
        const int64_t first = std::min<int64_t>(r, rows - R);
        product_tile<R, NV, T>(chunks.list, first, panel, out + first * out_row, out_row);
        if (ahead) ahead->some();
      }
    }
  });
}

// sums[i < rows][columns, whole vectors] += A^T B over `steps` steps; see outer_tile.
template <class T, class M>
void outer_product(int64_t rows, int64_t columns, int64_t steps, const M* a, int64_t a_row, const M* b, int64_t b_row, T* sums,
                   int64_t sums_row, LinesAhead& ahead) {
  constexpr int64_t N = PanelTile<T>::kColumns;
  constexpr int R = 4, pack = kPack<T, M>;
  for (int64_t column = 0; column < columns; column += N)
    with_constant<PanelTile<T>::kVectors>(PanelTile<T>::vectors(columns, column), [&](auto constant) {
      constexpr int NV = decltype(constant)::value;
      int64_t i = 0;
      for (; i + R <= rows; i += R) {
        outer_tile<R, NV, T>(a + i * pack, a_row, b + column * pack, b_row, steps, sums + i * sums_row + column, sums_row);
        ahead.some();
      }
      for (; i < rows; ++i)
        outer_tile<1, NV, T>(a + i * pack, a_row, b + column * pack, b_row, steps, sums + i * sums_row + column, sums_row);
    });
}

// ---- signals to rows ---------------------------------------------------------------------------------------------

// Squares of the transposition: `W` steps of W (pairs of) channels.
template <class T, class M, class S>
INLINE void stage_square(M* out, int64_t row, const S* x, int64_t channel_stride) {
  if constexpr (kPack<T, M> == 1) {
    copy_transposed<T>(out, row, x, channel_stride);
  } else {
    constexpr int W = kLanes<T>;
    vec<T> pairs[W];
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j)
      store_pair(reinterpret_cast<bfloat16*>(&pairs[j]), x + 2 * j * channel_stride, x + (2 * j + 1) * channel_stride, W);
    transpose(pairs);
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) std::memcpy(out + j * row, &pairs[j], sizeof pairs[j]);
  }
}

// out[r * row + c] = x at step `first` + r, 0 outside [0, length); columns from `channels` up to `row_columns` are 0 too.
template <class T, class M, class S>
void stage_rows(M* out, int64_t row, int64_t row_columns, const Signal<const S>& x, int64_t channels, int64_t first, int64_t rows,
                int64_t length) {
  constexpr int W = kLanes<T>, wide = W * kPack<T, M>;
  const int64_t begin = x.data ? std::clamp<int64_t>(-first, 0, rows) : rows;
  const int64_t end = x.data ? std::clamp<int64_t>(length - first, begin, rows) : rows;
  for (int64_t r = 0; r < begin; ++r) std::fill_n(out + r * row, row_columns, M{});
  for (int64_t r = end; r < rows; ++r) std::fill_n(out + r * row, row_columns, M{});
  if (begin == end) return;
  const S* source = x.data + first * x.t;
  auto copy = [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
    for (int64_t r = r0; r < r1; ++r)
      for (int64_t c = c0; c < c1; ++c) out[r * row + c] = from_compute<M>(to_compute(source[r * x.t + c * x.c]));
  };
  if (x.c == 1) {
    for (int64_t r = begin; r < end; ++r) {
      int64_t c = 0;
      if constexpr (std::is_same_v<M, S>) {
        std::memcpy(out + r * row, source + r * x.t, channels * sizeof(M));
        c = channels;
      } else {
        for (; c + W <= channels; c += W) store(out + r * row + c, load(source + r * x.t + c));
      }
      copy(r, r + 1, c, channels);
    }
  } else {
    int64_t c = 0;
    for (; c + wide <= channels && x.t == 1; c += wide) {
      int64_t r = begin;
      for (; r + W <= end; r += W) stage_square<T>(out + r * row + c, row, source + r + c * x.c, x.c);
      copy(r, end, c, c + wide);
    }
    copy(begin, end, c, channels);
  }
  for (int64_t r = begin; r < end; ++r) std::fill(out + r * row + channels, out + r * row + row_columns, M{});
}

// Pairs of rows side by side, out[r / 2][column][2], a row past the last one 0. `columns` are whole vectors of M.
INLINE void pair_rows(bfloat16* out, int64_t out_row, const bfloat16* source, int64_t source_row, int64_t rows, int64_t columns) {
  constexpr int W = 2 * kLanes<float>;
  typedef uint16_t words __attribute__((vector_size(ISA_VECTOR_BYTES)));
  words low, high;
#pragma GCC unroll 32
  for (int i = 0; i < W; ++i) low[i] = i / 2 + i % 2 * W, high[i] = low[i] + W / 2;
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t c = 0; c < columns; c += W) {
      words first, second = {};
      std::memcpy(&first, source + r * source_row + c, sizeof first);
      if (r + 1 < rows) std::memcpy(&second, source + (r + 1) * source_row + c, sizeof second);
      const words pairs[2] = {__builtin_shuffle(first, second, low), __builtin_shuffle(first, second, high)};
      std::memcpy(out + r * out_row + 2 * c, pairs, sizeof pairs);
    }
}

// ---- rows to signals ---------------------------------------------------------------------------------------------

// out = y + bias + added, for `rows` steps from the signals' first on and n <= one vector of channels; y has whole vectors, of
// as many rows as a whole number of squares. `added` may be without data, bias null.
template <class T, class S>
void finish_rows(const T* y, int64_t y_row, int64_t rows, int64_t n, const T* bias, const Signal<const S>& added, const Signal<S>& out) {
  constexpr int W = kLanes<T>;
  const vec<T> shift = bias ? load(bias) : vec<T>{};
  if (out.c == 1 && (!added.data || added.c == 1)) {
    for (int64_t r = 0; r < rows; ++r) {
      vec<T> v = load(y + r * y_row) + shift;
      if (n == W) {
        if (added.data) v += load(added.data + r * added.t);
        store(out.data + r * out.t, v);
      } else {
        if (added.data) v += load_partial(added.data + r * added.t, n);
        store_partial(out.data + r * out.t, v, n);
      }
    }
  } else if (out.t == 1 && (!added.data || added.t == 1)) {
    for (int64_t r = 0; r < rows; r += W) {
      const int64_t steps = std::min<int64_t>(W, rows - r);
      vec<T> square[W];
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) square[j] = load(y + (r + j) * y_row) + shift;
      transpose(square);
      for (int64_t c = 0; c < n; ++c) {
        S* to = out.data + c * out.c + r;
        const S* from = added.data ? added.data + c * added.c + r : nullptr;
        vec<T> v = square[c];
        if (steps == W) {
          if (from) v += load(from);
          store(to, v);
        } else {
          if (from) v += load_partial(from, steps);
          store_partial(to, v, steps);
        }
      }
    }
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < n; ++c) {
        T v = y[r * y_row + c] + (bias ? bias[c] : T(0));
        if (added.data) v += to_compute(added.data[r * added.t + c * added.c]);
        out.data[r * out.t + c * out.c] = from_compute<S>(v);
      }
  }
}
