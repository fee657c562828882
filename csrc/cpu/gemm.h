// Matrix products in registers. Included by for_each_isa.h inside the namespace of each instruction set.
//
//   C[m, n] (+)= sum_k A[m, k] B[k, n]
//
// One primitive serves products, convolutions (A is a strided window of the input) and attention: `Tile::multiply`
// keeps kRows x kColumns of C in vector registers, reads A one broadcast at a time with any two strides, and reads B
// packed: panels of kColumns consecutive columns, [K][kColumns], so that each step loads kVectors whole vectors.
//
// Floor: 2 M N K operations at the machine's multiply-add peak. A step issues kRows * kVectors multiply-adds for
// kRows + kVectors loads, so both load ports stay below the two multiply-add ports. The columns of a panel past N are
// zeros, so only stores are masked.

// Accumulators leave room for kVectors of B and one broadcast: 8 x 3 + 3 + 1 of 32 registers, 6 x 2 + 2 + 1 of 16.
template <class T>
struct Tile {
#if ISA_VECTOR_BYTES == 64
  static constexpr int kRows = 8, kVectors = 3;
#else
  static constexpr int kRows = 6, kVectors = 2;
#endif
  static constexpr int kColumns = kVectors * kLanes<T>;
};

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
  constexpr int64_t panel = Tile<T>::kColumns;
  return (columns + panel - 1) / panel * panel * depth;
}

// Packs the whole of B for `gemm_packed`, in parallel.
template <class T, class S>
inline void pack_b(T* packed, const S* b, int64_t row_stride, int64_t column_stride, int64_t depth, int64_t columns) {
  constexpr int64_t panel = Tile<T>::kColumns;
  const int64_t panels = (columns + panel - 1) / panel;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, depth * panel));
  torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    pack_panels<T>(packed, b, row_stride, column_stride, depth, columns, panel, begin, end);
  });
}

// c[r][v] (+)= acc[r][v], of which `columns` columns exist. Tiles at the right edge and bfloat16 take a loop through memory: written
// out for every vector, partial stores were most of a product's code.
template <int R, int NV, class T, class C>
INLINE void store_tile(const vec<T> (&acc)[R][NV], C* c, int64_t c_row, int64_t columns, bool add) {
  constexpr int W = kLanes<T>;
  if (std::is_same_v<C, T> && columns >= NV * W) {
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
      const vec<T> sum = load(sums + r * NV * W + j);
      store_partial(at, add ? load_partial(at, n) + sum : sum, n);
    }
}

// R rows x one panel of C. accumulate: C += instead of C =.
template <int R, class T, class C>
NOINLINE void gemm_tile(const T* a, int64_t a_row, int64_t a_step, const T* panel, int64_t depth, C* c, int64_t c_row, int64_t columns,
                        bool accumulate) {
  constexpr int NV = Tile<T>::kVectors;
  vec<T> acc[R][NV] = {};
  multiply_tile<R, NV, T>(acc, a, a_row, a_step, panel, Tile<T>::kColumns, depth);
  store_tile<R, NV, T>(acc, c, c_row, columns, accumulate);
}

// Up to R rows, by a tile of exactly that many.
template <class T, class C, int R = Tile<T>::kRows>
void gemm_rows(int64_t rows, const T* a, int64_t a_row, int64_t a_step, const T* panel, int64_t depth, C* c, int64_t c_row, int64_t columns,
               bool accumulate) {
  if (rows == R)
    gemm_tile<R>(a, a_row, a_step, panel, depth, c, c_row, columns, accumulate);
  else if constexpr (R > 1)
    gemm_rows<T, C, R - 1>(rows, a, a_row, a_step, panel, depth, c, c_row, columns, accumulate);
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
PRODUCT void gemm_rows<float, float>(int64_t, const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t, int64_t, bool);
PRODUCT void gemm_rows<float, bfloat16>(int64_t, const float*, int64_t, int64_t, const float*, int64_t, bfloat16*, int64_t, int64_t, bool);
PRODUCT void gemm_rows<double, double>(int64_t, const double*, int64_t, int64_t, const double*, int64_t, double*, int64_t, int64_t, bool);

// Steps summed up before C is updated. A block of a panel fits the first-level cache; and sums of sums round less: one run
// of 384 steps had three times the largest error of MKL's product, blocks of 192 have the same error as MKL's.
// C in bfloat16 must not be rounded between blocks: then there is one block.
template <class C>
inline int64_t depth_block(int64_t depth) {
  return std::is_same_v<C, compute_t<C>> ? 192 : std::max<int64_t>(depth, 1);
}

// C[rows, columns] (+)= A B on the calling thread, B packed whole by pack_b (or panels `first_panel..` of it).
// The depth is walked in blocks so that one block of a panel stays in the first-level cache over all rows.
template <class T, class C>
inline void gemm_packed_serial(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* packed,
                               C* c, int64_t c_row, bool accumulate) {
  constexpr int R = Tile<T>::kRows;
  constexpr int64_t panel_columns = Tile<T>::kColumns;
  const int64_t block = depth_block<C>(depth);
  if (depth == 0 && !accumulate) {
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t n = 0; n < columns; ++n) c[m * c_row + n] = from_compute<C>(0);
    return;
  }
  for (int64_t k0 = 0; k0 < depth; k0 += block) {
    const int64_t steps = std::min(block, depth - k0);
    const bool add = accumulate || k0 > 0;
    for (int64_t n = 0; n < columns; n += panel_columns) {
      const T* panel = packed + n * depth + k0 * panel_columns;
      for (int64_t m = 0; m < rows; m += R)
        gemm_rows(std::min<int64_t>(R, rows - m), a + m * a_row + k0 * a_step, a_row, a_step, panel, steps, c + m * c_row + n, c_row,
                  columns - n, add);
    }
  }
}

// Packs `rows` rows of A into groups of kRows, [group][depth][kRows] of the compute type, rows past the end 0.
// Worth it when A's steps are not contiguous, or when A is stored in bfloat16 and used for several panels.
template <class T, class S>
inline void pack_a(T* packed, const S* a, int64_t row_stride, int64_t step_stride, int64_t rows, int64_t depth) {
  constexpr int R = Tile<T>::kRows;
  for (int64_t m = 0; m < rows; m += R) {
    T* out = packed + m * depth;
    const int64_t n = std::min<int64_t>(R, rows - m);
    for (int64_t k0 = 0; k0 < depth; k0 += 16) {
      const int64_t k1 = std::min<int64_t>(k0 + 16, depth);
      if (step_stride == 1) {
        for (int64_t r = 0; r < n; ++r)
          for (int64_t k = k0; k < k1; ++k) out[k * R + r] = to_compute(a[(m + r) * row_stride + k]);
      } else {
        for (int64_t k = k0; k < k1; ++k)
          for (int64_t r = 0; r < n; ++r) out[k * R + r] = to_compute(a[(m + r) * row_stride + k * step_stride]);
      }
      for (int64_t k = k0; k < k1; ++k)
        for (int64_t r = n; r < R; ++r) out[k * R + r] = 0;
    }
  }
}

// What gemm_packed does with each tile of C once its sums are complete, by default nothing.
struct NoFinish {
  template <class C>
  INLINE void operator()(C*, int64_t, int64_t, int64_t, int64_t) const {}
};

// C (+)= A B with all of the threads; A of any strides and storage type, B packed by pack_b.
// Blocks of rows x chunks of panels are the tasks; each packs its block of A once and runs it over its panels, unless the
// panels are too few to pay for that and A's steps are contiguous. `finish(c, row, column, rows, columns)` is called for every
// complete tile, which is then in the first-level cache: c is where the tile begins, row and column its place in C.
// Sums run over the depth in the same order whatever the number of threads: results do not depend on it. `chain` is how many
// terms are added up one after the other, where the sums of a caller need shorter blocks than depth_block.
template <class T, class A, class C, class Finish = NoFinish>
inline void gemm_packed(int64_t rows, int64_t columns, int64_t depth, const A* a, int64_t a_row, int64_t a_step, const T* packed, C* c,
                        int64_t c_row, bool accumulate = false, std::optional<int64_t> chain = std::nullopt, Finish finish = {}) {
  constexpr int R = Tile<T>::kRows;
  constexpr int64_t panel_columns = Tile<T>::kColumns;
  constexpr int64_t kWorthPacking = 8;  // panels
  const int64_t panels = (columns + panel_columns - 1) / panel_columns;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t work = rows * columns * depth;
  // Enough tasks for the threads, rows first: a block of at most 96 rows keeps its packed A in the second-level cache.
  const int64_t row_block = std::min<int64_t>(96, std::max<int64_t>(R, ((rows + threads - 1) / threads + R - 1) / R * R));
  const int64_t row_blocks = (rows + row_block - 1) / row_block;
  const int64_t chunks = std::min(panels, std::max<int64_t>(1, (4 * threads + row_blocks - 1) / std::max<int64_t>(row_blocks, 1)));
  const int64_t chunk_panels = (panels + chunks - 1) / std::max<int64_t>(chunks, 1);
  const int64_t tasks = row_blocks * chunks;
  const int64_t grain = work < 65536 ? tasks : 1;
  const bool in_place = std::is_same_v<A, T> && a_step == 1 && chunk_panels < kWorthPacking;
  torch::stable::parallel_for(0, tasks, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    Scratch<T> block(in_place ? 0 : row_block * depth);
    int64_t packed_block = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t m0 = task / chunks * row_block, p0 = task % chunks * chunk_panels;
      const int64_t m1 = std::min(rows, m0 + row_block), p1 = std::min(panels, p0 + chunk_panels);
      if (p0 >= p1) continue;
      if (!in_place && packed_block != m0) {
        pack_a<T>(block.get(), a + m0 * a_row, a_row, a_step, m1 - m0, depth);
        packed_block = m0;
      }
      const int64_t step = chain.value_or(depth_block<C>(depth));
      for (int64_t k0 = 0; k0 == 0 || k0 < depth; k0 += step) {
        const int64_t steps = std::min(step, depth - k0);
        const bool add = accumulate || k0 > 0, complete = k0 + steps >= depth;
        for (int64_t p = p0; p < p1; ++p) {
          const int64_t n = p * panel_columns;
          const T* panel = packed + n * depth + k0 * panel_columns;
          for (int64_t m = m0; m < m1; m += R) {
            C* tile = c + m * c_row + n;
            const T* rows_of_a = block.get() + (m - m0) * depth + k0 * R;
            int64_t row_stride = 1, step_stride = R;
            if constexpr (std::is_same_v<A, T>)
              if (in_place) rows_of_a = a + m * a_row + k0, row_stride = a_row, step_stride = 1;
            gemm_rows(std::min<int64_t>(R, m1 - m), rows_of_a, row_stride, step_stride, panel, steps, tile, c_row, columns - n, add);
            if (complete) finish(tile, m, n, std::min<int64_t>(R, m1 - m), std::min(panel_columns, columns - n));
          }
        }
      }
    }
  });
}

// C[rows, columns] (+)= A B, all three with any row and column stride but C, whose columns are contiguous.
template <class A, class B, class C, class Finish = NoFinish>
inline void gemm(int64_t rows, int64_t columns, int64_t depth, const A* a, int64_t a_row, int64_t a_step, const B* b, int64_t b_row,
                 int64_t b_column, C* c, int64_t c_row, bool accumulate = false, Finish finish = {}) {
  using T = compute_t<A>;
  Scratch<T> packed(packed_size<T>(depth, columns));
  pack_b<T>(packed.get(), b, b_row, b_column, depth, columns);
  gemm_packed<T>(rows, columns, depth, a, a_row, a_step, packed.get(), c, c_row, accumulate, std::nullopt, finish);
}
