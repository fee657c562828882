// Matrix products in registers. Included by for_each_isa.h inside the namespace of each instruction set.
//
//   C[m, n] (+)= sum_k A[m, k] B[k, n]
//
// One primitive serves products, convolutions (A is a strided window of the input) and attention: a tile of R rows x NV vectors of C
// stays in registers, reads A one broadcast at a time with any two strides, and reads B packed: panels of so many consecutive
// columns, [K][columns], so that each step loads NV whole vectors.
//
// Floor: 2 M N K operations at the machine's multiply-add peak. A step issues R * NV multiply-adds for R + NV loads, so both load
// ports stay below the two multiply-add ports. The columns of a panel past N are zeros, so only stores are masked. One Zen 4 core,
// A of 512 x 512 where it lies: 6 x 4 reaches 114 of 117 GFLOP/s, 8 x 3 108, 12 x 2 102, 14 x 2 100; A packed by tiles gains nothing.

// Fetches the line at p, which is about to be written: without it a store that misses waits for the line. The compiler's own is for
// reading only, but where all processors meant have the instruction.
INLINE void fetch_for_writing(const void* p) {
#if defined(__x86_64__) && ISA_VECTOR_BYTES > 16
  asm volatile("prefetchw %0" ::"m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 1);
#endif
}

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// n rounded up to whole vectors.
template <class T>
INLINE int64_t padded(int64_t n) {
  return round_up(n, kLanes<T>);
}

// B is cut into panels of kVectors vectors of columns; the last one has as many as are left.
template <class T>
struct PanelTile {
#if ISA_VECTOR_BYTES == 64
  static constexpr int kVectors = 4, kAccumulators = 24;  // of 32 registers, with 4 vectors of B and 1 broadcast
#else
  static constexpr int kVectors = 2, kAccumulators = 12;  // of 16
#endif
  static constexpr int kColumns = kVectors * kLanes<T>;
  static constexpr int rows(int vectors) { return std::min(12, kAccumulators / vectors); }
  static int64_t panels(int64_t columns) { return (columns + kColumns - 1) / kColumns; }
  // Of the panel that starts with `column`.
  static int64_t vectors(int64_t columns, int64_t column) { return std::min<int64_t>(kVectors, padded<T>(columns - column) / kLanes<T>); }
};

// f(n as a constant), 1 <= n <= N.
template <int N, class F>
INLINE void with_constant(int64_t n, F f) {
  if (n == N)
    f(std::integral_constant<int, N>{});
  else if constexpr (N > 1)
    with_constant<N - 1>(n, f);
}

// C tile += one column of A times one row of B.
template <int R, int NV, class T, class A>
INLINE void multiply_step(vec<T> (&c)[R][NV], const A* a, int64_t row_stride, const T* b) {
  constexpr int W = kLanes<T>;
  vec<T> bk[NV];
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) bk[v] = load(b + v * W);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const vec<T> ar = broadcast<T>(to_compute(a[r * row_stride]));
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) c[r][v] += ar * bk[v];
  }
}

// Without fused multiply-adds every term is rounded by itself as well: where nothing else bounds a chain of additions, so many
// terms are added up one after the other before their sum is added to the rest.
inline constexpr bool kFused = ISA_VECTOR_BYTES > 16;
inline constexpr int64_t kUnfusedChain = 16;

// C tile += A B over `depth` steps. A(r, k) = a[r * row_stride + k * step_stride]; b is a packed panel of NV vectors
// with `b_stride` elements between steps.
template <int R, int NV, class T, class A>
INLINE void multiply_tile(vec<T> (&c)[R][NV], const A* a, int64_t row_stride, int64_t step_stride, const T* b, int64_t b_stride,
                          int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) multiply_step<R, NV, T>(c, a + k * step_stride, row_stride, b + k * b_stride);
}

// As multiply_tile, four steps to a round: a branch predictor does not foresee the exit of a long loop of single steps, and the
// multiply-add units run dry once a tile.
template <int R, int NV, class T, class A>
INLINE void multiply_chain(vec<T> (&c)[R][NV], const A* a, int64_t row_stride, int64_t step_stride, const T* b, int64_t b_stride,
                           int64_t depth) {
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) multiply_step<R, NV, T>(c, a + (k + i) * step_stride, row_stride, b + (k + i) * b_stride);
  for (; k < depth; ++k) multiply_step<R, NV, T>(c, a + k * step_stride, row_stride, b + k * b_stride);
}

// Packs B[k, n] = b[k * row_stride + n * column_stride] (storage type S) into panels of `panel` columns.
// The result has ceil(columns / panel) panels of [depth][panel]; columns past the end are 0.
template <class T, class S>
NOINLINE void pack_panels(T* packed, const S* b, int64_t row_stride, int64_t column_stride, int64_t depth, int64_t columns, int64_t panel,
                          int64_t first_panel, int64_t last_panel) {
  constexpr int W = kLanes<T>;
  for (int64_t p = first_panel; p < last_panel; ++p) {
    T* out = packed + p * depth * panel;
    const int64_t n = std::min(panel, columns - p * panel);
    const S* source = b + p * panel * column_stride;
    if (column_stride == 1) {
      for (int64_t k = 0; k < depth; ++k, out += panel, source += row_stride) {
        int64_t j = 0;
        for (; j + W <= n; j += W) store(out + j, load(source + j));
        for (; j < n; ++j) out[j] = to_compute(source[j]);
        for (; j < panel; ++j) out[j] = 0;
      }
    } else if (row_stride == 1) {
      // Columns that lie in one piece each: squares are transposed in registers.
      for (int64_t j = 0; j < panel; j += W) {
        const int64_t lanes = std::clamp<int64_t>(n - j, 0, W);
        for (int64_t k = 0; k < depth; k += W) {
          const int64_t count = std::min<int64_t>(W, depth - k);
          vec<T> m[W];
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) m[i] = i < lanes ? load_partial(source + (j + i) * column_stride + k, count) : vec<T>{};
          transpose<T>(m);
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i)
            if (i < count) store(out + (k + i) * panel + j, m[i]);
        }
      }
    } else {
      // Short runs of k for every column, so that reads stay in a few cache lines and writes in one panel.
      for (int64_t k0 = 0; k0 < depth; k0 += 16) {
        const int64_t k1 = std::min<int64_t>(k0 + 16, depth);
        for (int64_t j = 0; j < n; ++j)
          for (int64_t k = k0; k < k1; ++k) out[k * panel + j] = to_compute(source[j * column_stride + k * row_stride]);
        for (int64_t k = k0; k < k1; ++k)
          for (int64_t j = n; j < panel; ++j) out[k * panel + j] = 0;
      }
    }
  }
}

template <class T>
inline int64_t packed_size(int64_t depth, int64_t columns) {
  constexpr int64_t panel = PanelTile<T>::kColumns;
  return (columns + panel - 1) / panel * panel * depth;
}

// Packs the whole of B for `gemm_packed`, in parallel.
template <class T, class S>
inline void pack_b(T* packed, const S* b, int64_t row_stride, int64_t column_stride, int64_t depth, int64_t columns) {
  constexpr int64_t panel = PanelTile<T>::kColumns;
  const int64_t panels = (columns + panel - 1) / panel;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, depth * panel));
  torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    pack_panels<T>(packed, b, row_stride, column_stride, depth, columns, panel, begin, end);
  });
}

// What becomes of complete sums on their way from the registers to C: max(sum + bias, floor) + residual. Another pass over the tile took
// a sixth of a product of 128 steps.
template <class T>
struct Tail {
  const T* bias;  // of the columns, or null
  T floor;        // 0 for ReLU, minus infinity for none
  const T* residual;
  int64_t residual_row;

  Tail at(int64_t row, int64_t column) const {
    return {bias ? bias + column : nullptr, floor, residual ? residual + row * residual_row + column : nullptr, residual_row};
  }
  INLINE vec<T> operator()(vec<T> sum, int64_t row, int64_t column, int64_t n) const {
    if (bias) sum += load_partial(bias + column, n);
    sum = floor > sum ? broadcast(floor) : sum;  // keeps NaN
    if (residual) sum += load_partial(residual + row * residual_row + column, n);
    return sum;
  }
};

// c[r][v] (+)= acc[r][v], of which `columns` columns exist. Tiles at the right edge, with a residual and in bfloat16 take a loop
// through memory: written out for every vector, partial stores were most of a product's code.
template <int R, int NV, class T, class C>
INLINE void store_tile(const vec<T> (&acc)[R][NV], C* c, int64_t c_row, int64_t columns, bool add, const Tail<T>* tail = nullptr) {
  constexpr int W = kLanes<T>;
  const bool whole = std::is_same_v<C, T> && columns >= NV * W;
  if (whole && tail && tail->bias && !tail->residual) {
    vec<T> bias[NV];
    const vec<T> floor = broadcast(tail->floor);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) bias[v] = load(tail->bias + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const vec<T> sum = (add ? load(c + r * c_row + v * W) + acc[r][v] : acc[r][v]) + bias[v];
        store(c + r * c_row + v * W, floor > sum ? floor : sum);
      }
    return;
  }
  if (whole && !tail) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) store(c + r * c_row + v * W, add ? load(c + r * c_row + v * W) + acc[r][v] : acc[r][v]);
    return;
  }
  T sums[R * NV * W];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(sums + (r * NV + v) * W, acc[r][v]);
#pragma GCC unroll 1
  for (int r = 0; r < R; ++r)
    for (int64_t j = 0; j < std::min<int64_t>(columns, NV * W); j += W) {
      C* at = c + r * c_row + j;
      const int64_t n = std::min<int64_t>(columns - j, W);
      vec<T> sum = load(sums + r * NV * W + j);
      if (add) sum += load_partial(at, n);
      store_partial(at, tail ? (*tail)(sum, r, j, n) : sum, n);
    }
}

template <int R, int NV, class T>
NOINLINE void multiply_rows_tile(const T* a, int64_t a_row, const T* panel, int64_t steps, T* c, int64_t c_row, int64_t columns, bool add,
                                 const Tail<T>* tail) {
  if (!add)  // lines that are written for the first time: they were an eighth of 1792 x 128 x 256 on two threads
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < NV; ++v) fetch_for_writing(c + r * c_row + v * kLanes<T>);
  vec<T> acc[R][NV] = {};
  multiply_chain<R, NV, T>(acc, a, a_row, 1, panel, NV * kLanes<T>, steps);
  store_tile<R, NV, T>(acc, c, c_row, columns, add, tail);
}

// Up to PanelTile::rows(NV) rows of c (+)= a B, A's steps adjacent; `chain` terms are added up one after the other, then to what c holds.
template <int NV, class T>
void multiply_rows(int64_t rows, const T* a, int64_t a_row, const T* panel, int64_t steps, int64_t chain, T* c, int64_t c_row,
                   int64_t columns, bool add, const Tail<T>* tail) {
  with_constant<PanelTile<T>::rows(NV)>(rows, [&](auto constant) {
    for (int64_t k = 0; k == 0 || k < steps; k += chain) {
      const bool last = k + chain >= steps;
      multiply_rows_tile<constant.value, NV, T>(a + k, a_row, panel + k * NV * kLanes<T>, std::min(chain, steps - k), c, c_row, columns,
                                                add || k > 0, last ? tail : nullptr);
    }
  });
}

// Compiled in gemm.cpp alone: the same products in every file that needs one were a third of the build.
#ifdef COMPILE_PRODUCTS
#define PRODUCT template
#else
#define PRODUCT extern template
#endif
PRODUCT void pack_panels<float, float>(float*, const float*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
PRODUCT void pack_panels<float, bfloat16>(float*, const bfloat16*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
PRODUCT void pack_panels<double, double>(double*, const double*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
PRODUCT void multiply_rows<PanelTile<float>::kVectors, float>(int64_t, const float*, int64_t, const float*, int64_t, int64_t, float*,
                                                              int64_t, int64_t, bool, const Tail<float>*);
PRODUCT void multiply_rows<PanelTile<float>::kVectors / 2, float>(int64_t, const float*, int64_t, const float*, int64_t, int64_t, float*,
                                                                  int64_t, int64_t, bool, const Tail<float>*);
PRODUCT void multiply_rows<PanelTile<double>::kVectors, double>(int64_t, const double*, int64_t, const double*, int64_t, int64_t, double*,
                                                                int64_t, int64_t, bool, const Tail<double>*);
PRODUCT void multiply_rows<PanelTile<double>::kVectors / 2, double>(int64_t, const double*, int64_t, const double*, int64_t, int64_t,
                                                                    double*, int64_t, int64_t, bool, const Tail<double>*);

// Steps of a block of B that is multiplied by all rows before the next: it stays in the second-level cache. As many terms are added up
// one after the other where a caller does not say how many: sums of sums round less. One run of 384 steps had three times the largest
// error of MKL's product, blocks of 192 have the same error as MKL's.
inline constexpr int64_t kProductBlock = 192;

// C[rows, columns] (+)= A B on the calling thread, B packed whole by pack_b (or panels `first_panel..` of it).
template <class T>
inline void gemm_packed_serial(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, const T* packed, T* c,
                               int64_t c_row, bool add) {
  constexpr int NV = PanelTile<T>::kVectors;
  constexpr int64_t R = PanelTile<T>::rows(NV), kColumns = PanelTile<T>::kColumns;
  for (int64_t k0 = 0; k0 == 0 || k0 < depth; k0 += kProductBlock)
    for (int64_t n = 0; n < columns; n += kColumns)
      for (int64_t m = 0; m < rows; m += R)
        multiply_rows<NV, T>(std::min(R, rows - m), a + m * a_row + k0, a_row, packed + n * depth + k0 * kColumns,
                             std::min(kProductBlock, depth - k0), kProductBlock, c + m * c_row + n, c_row, columns - n, add || k0 > 0,
                             nullptr);
}
