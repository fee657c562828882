// Products and packing of the attention kernels, on tiles of kTileRows x 2 vectors.
//
// Everything inside a kernel is in the compute type and padded: rows to whole tiles, feature dimensions to whole
// vectors, keys to whole panels, all with zeros. So no tile has a tail; tails exist where tensors are read and written.
//
// A tile of R x 2 keeps R * 2 sums in registers, enough to cover the multiply-add latency, for R + 2 loads a step.
// Measured on one Zen 5 core: 8 x 2 reaches 241 of 241 GFLOP/s at depth 64, the same as 8 x 3, 6 x 4 and 12 x 2,
// and divides the usual 64, 128 and 1024 without waste.

constexpr int kTileVectors = 2;
template <class T>
inline constexpr int kTileRows = ISA_VECTOR_BYTES == 64 ? 8 : 6;
template <class T>
inline constexpr int64_t kPanel = kTileVectors * kLanes<T>;  // columns of a panel
// Steps of a product that an operand of type A is read by at a time: bfloat16 numbers come in pairs.
template <class A>
inline constexpr int64_t kStep = std::is_same_v<A, bfloat16> ? 2 : 1;
// Whether bfloat16 tensors are multiplied by the CPU's dot products, or in tiles.
inline bool multiplied_in_pairs(const AttentionArgs& a) {
  return selected_isa() == Isa::avx512_bf16 && a.group_rows() >= kFewestPairedRows;
}

template <class T>
inline constexpr int64_t kBlockRows = 8 * kTileRows<T>;  // query rows of a block
inline constexpr int64_t kBlockKeys = 192;               // keys of a block: whole panels, tiles and Philox groups
static_assert(kBlockKeys % 64 == 0 && kBlockKeys == kMostKeysKept);

// Elements from a row of head_dim or value_dim numbers to the next: whole vectors, or whole tiles, which are read past the end.
template <class T>
int64_t row_elements(int64_t n, bool tiled) {
  return round_up(n, tiled ? kTileSteps : int64_t{kLanes<T>});
}

// What a product does to C: replaces it, replaces it times factor[0], is added to it, or to C with row r times factor[r].
enum class Start { zero, times, add, scaled };

// Row r of a tile.
template <Start start, int NV, class T>
INLINE void finish_row(const vec<T> (&acc)[NV], int r, T* c, int64_t c_row, const T* factor) {
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
    T* at = c + r * c_row + v * kLanes<T>;
    if constexpr (start == Start::zero)
      store(at, acc[v]);
    else if constexpr (start == Start::times)
      store(at, acc[v] * factor[0]);
    else if constexpr (start == Start::add)
      store(at, load(at) + acc[v]);
    else
      store(at, load(at) * factor[r] + acc[v]);
  }
}

template <Start start, int R, int NV, class T>
INLINE void finish_tile(const vec<T> (&acc)[R][NV], T* c, int64_t c_row, const T* factor) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) finish_row<start>(acc[r], r, c, c_row, factor);
}

template <int R, int NV, Start start, class T>
void product_tile(const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step, int64_t steps, T* c, int64_t c_row,
                  const T* factor) {
  vec<T> acc[R][NV] = {};
  if constexpr (kFused) {
    multiply_tile<R, NV, T>(acc, a, a_row, a_step, b, b_step, steps);
  } else {
    for (int64_t k = 0; k < steps; k += kUnfusedChain) {
      vec<T> chain[R][NV] = {};
      multiply_tile<R, NV, T>(chain, a + k * a_step, a_row, a_step, b + k * b_step, b_step, std::min(steps - k, kUnfusedChain));
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) acc[r][v] += chain[r][v];
    }
  }
  finish_tile<start>(acc, c, c_row, factor);
}

#if ISA_VECTOR_BYTES == 64
// The same of bfloat16 numbers, two to a step; finish(row of sums, r) takes row r. The last steps are taken row by row and a row is
// finished right after its own: 16 stores one after the other held up the products of the next tile for some 40 cycles, of 568 for a tile
// of 32 steps.
template <int R, int NV, class Finish>
__attribute__((target("avx512bf16"), always_inline)) inline void product_by_rows(const bfloat16* a, int64_t a_row, int64_t a_step,
                                                                                 const bfloat16* b, int64_t b_step, int64_t steps,
                                                                                 Finish finish) {
  constexpr int kLast = 4;
  vec<float> acc[R][NV] = {};
  if (steps < kLast) {
    multiply_pairs<R, NV>(acc, a, a_row, a_step, b, steps, b_step);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) finish(acc[r], r);
    return;
  }
  steps -= kLast;
  multiply_pairs<R, NV>(acc, a, a_row, a_step, b, steps, b_step);
  a += steps * a_step, b += steps * b_step;
  __m512bh last[kLast][NV];
#pragma GCC unroll 4
  for (int k = 0; k < kLast; ++k)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) last[k][v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + k * b_step + v * 32));
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int k = 0; k < kLast; ++k) {
      int32_t pair;
      std::memcpy(&pair, a + r * a_row + k * a_step, sizeof pair);
      const __m512bh both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        acc[r][v] = reinterpret_cast<vec<float>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc[r][v]), both, last[k][v]));
    }
    finish(acc[r], r);
    asm volatile("" ::: "memory");  // or the compiler gathers the stores at the end
  }
}

template <int R, int NV, Start start>
__attribute__((target("avx512bf16"))) void product_tile(const bfloat16* a, int64_t a_row, int64_t a_step, const bfloat16* b, int64_t b_step,
                                                        int64_t steps, float* c, int64_t c_row, const float* factor) {
  product_by_rows<R, NV>(a, a_row, a_step, b, b_step, steps,
                         [=](const vec<float>(&acc)[NV], int r)
                             __attribute__((target("avx512bf16"), always_inline)) { finish_row<start>(acc, r, c, c_row, factor); });
}
#endif

// Scores are products of queries that were scaled when packed; bfloat16 numbers are not, so that they stay what they are.
template <class A>
inline constexpr Start kRawScores = std::is_same_v<A, bfloat16> ? Start::times : Start::zero;

// One tile of kTileRows rows (the first `rows` of them matter) and `vectors` columns' vectors (1 or 2).
template <Start start, class A, class T>
INLINE void product(int64_t rows, int64_t vectors, const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t b_step, int64_t steps,
                    T* c, int64_t c_row, const T* factor = nullptr) {
  constexpr int R = kTileRows<T>;
  if (rows > R / 2) {
    if (vectors > 1)
      product_tile<R, 2, start>(a, a_row, a_step, b, b_step, steps, c, c_row, factor);
    else
      product_tile<R, 1, start>(a, a_row, a_step, b, b_step, steps, c, c_row, factor);
  } else {
    if (vectors > 1)
      product_tile<R / 2, 2, start>(a, a_row, a_step, b, b_step, steps, c, c_row, factor);
    else
      product_tile<R / 2, 1, start>(a, a_row, a_step, b, b_step, steps, c, c_row, factor);
  }
}

// ---- vectors ----------------------------------------------------------------------------------------------------

template <class T>
struct ints_of {
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> type __attribute__((vector_size(ISA_VECTOR_BYTES)));
};
template <class T>
using ints = typename ints_of<T>::type;

template <class T>
INLINE ints<T> lane_numbers() {
  ints<T> out;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) out[i] = i;
  return out;
}

// Transposes kLanes vectors in place: log2 rounds of interleaving each vector with the one half the square away.
template <class T>
INLINE void transpose_square(vec<T> (&x)[kLanes<T>]) {
  constexpr int W = kLanes<T>;
  constexpr auto lanes = std::make_index_sequence<W>{};
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    vec<T> y[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      y[2 * i] = interleave_low(x[i], x[i + W / 2], lanes);
      y[2 * i + 1] = interleave_high(x[i], x[i + W / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = y[i];
  }
}

// e^x for x <= 0 (a rounding step above 0 is fine): exactly 0 below the smallest normal number and for -inf, NaN for NaN.
// x log2(e) = n + f, |f| <= 1/2, with f from one fused multiply-add; 2^f is a polynomial, n is added to its exponent bits.
// float: minimax of degree 6, error 2e-9; double: Taylor of degree 13, error below 2^-57.
template <class T>
struct Exponential;
template <>
struct Exponential<float> {
  static constexpr float kLow = -87.33f, kMagic = 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
  static constexpr int kMantissa = 23;
  static constexpr float kTerms[] = {
      1.5353363546e-4f, 1.3398874450e-3f, 9.6184373528e-3f, 5.5503324710e-2f, 2.4022647914e-1f, 6.9314720286e-1f, 1.0f};
};
template <>
struct Exponential<double> {
  static constexpr double kLow = -708.39, kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52;
  static constexpr double kTerms[] = {1.36914888539041241e-12, 2.56784359934881958e-11,
                                      4.44553827187081007e-10, 7.05491162080112088e-09,
                                      1.01780860092396960e-07, 1.32154867901443053e-06,
                                      1.52527338040598377e-05, 1.54035303933816061e-04,
                                      1.33335581464284411e-03, 9.61812910762847688e-03,
                                      5.55041086648215762e-02, 2.40226506959100694e-01,
                                      6.93147180559945286e-01, 1.0};
};

template <class T>
INLINE vec<T> exp_nonpositive(vec<T> x) {
  using E = Exponential<T>;
  constexpr T kLog2e = static_cast<T>(1.44269504088896340736);
  constexpr int terms = sizeof(E::kTerms) / sizeof(T);
  const vec<T> clamped = maximum(broadcast(E::kLow), x);
  const vec<T> shifted = clamped * kLog2e + E::kMagic;
  const vec<T> f = clamped * kLog2e - (shifted - E::kMagic);
  vec<T> p = f * E::kTerms[0] + E::kTerms[1];
#pragma GCC unroll 16
  for (int i = 2; i < terms; ++i) p = p * f + E::kTerms[i];
  using bits = typename bits_of<vec<T>>::type;
  const vec<T> scaled = reinterpret_cast<vec<T>>(reinterpret_cast<bits>(p) + (reinterpret_cast<bits>(shifted) << E::kMantissa));
  return x >= E::kLow ? scaled : maximum(vec<T>{}, x);  // a NaN stays one, whatever its bits
}

// log x of normal numbers, with an error below 3e-11: of float sums it is rounded to float afterwards.
// x = 2^n f with f from 0.7 to 1.4, log f = 2 (s + s^3 / 3 + s^5 / 5 + ...) with s = (f - 1) / (f + 1).
template <class T>
INLINE void log_each(double* out, const T* x) {
  constexpr int64_t W = kLanes<T>, H = kLanes<double>;
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t i = 0; i < W; ++i) out[i] = std::log(x[i]);
  } else {
    typedef T half __attribute__((vector_size(ISA_VECTOR_BYTES / 2)));
    constexpr int64_t kRootOfHalf = 0x3fe6a09e667f3bcd;
    constexpr int kMantissa = 52;
    for (int64_t i = 0; i < W; i += H) {
      half part;
      std::memcpy(&part, x + i, sizeof part);
      const vec<double> wide = __builtin_convertvector(part, vec<double>);
      const ints<double> bits = reinterpret_cast<ints<double>>(wide), n = (bits - kRootOfHalf) >> kMantissa;
      const vec<double> f = reinterpret_cast<vec<double>>(bits - (n << kMantissa)), s = (f - 1) / (f + 1), square = s * s;
      vec<double> series = broadcast(1.0 / 13);
#pragma GCC unroll 6
      for (int term = 11; term > 0; term -= 2) series = series * square + 1.0 / term;
      const vec<double> sum = __builtin_convertvector(n, vec<double>) * 0.69314718055994530942 + 2 * s * series;
      store(out + i, sum + (wide - wide));  // a NaN stays one
    }
  }
}

// ---- packing ----------------------------------------------------------------------------------------------------

// n elements (0 <= n <= kLanes) of a row of any stride.
template <class S>
INLINE vec<compute_t<S>> load_any(const S* p, int64_t stride, int64_t n) {
  if (stride == 1) return n == kLanes<S> ? load(p) : load_partial(p, n);
  compute_t<S> x[kLanes<S>] = {};
  for (int64_t i = 0; i < n; ++i) x[i] = to_compute(p[i * stride]);
  return load(x);
}

template <class S>
INLINE void store_any(S* p, vec<compute_t<S>> x, int64_t n) {
  if (n >= kLanes<S>)
    store(p, x);
  else
    store_partial(p, x, n);
}

// One row of n elements, times factor, to `padded` columns. Returns a vector that is NaN where an element is not finite.
template <class S, class T>
INLINE vec<T> pack_row(T* out, const S* row, int64_t stride, int64_t n, int64_t padded, T factor) {
  constexpr int64_t W = kLanes<T>;
  vec<T> poison = {};
  for (int64_t d = 0; d < padded; d += W) {
    const vec<T> x = load_any(row + d * stride, stride, std::clamp<int64_t>(n - d, 0, W)) * factor;
    store(out + d, x);
    poison += x * 0;
  }
  return poison;
}

// Keys first .. first + count of a [keys, depth] matrix, transposed to panels of [depth][kPanel]; keys past the end are 0.
// The depth is padded for tiles of bfloat16 numbers only.
template <class T, class S>
NOINLINE void pack_transposed(T* packed, const S* rows, int64_t row_stride, int64_t stride, int64_t count, int64_t depth,
                              int64_t /*padded*/) {
  constexpr int64_t W = kLanes<T>, P = kPanel<T>;
  for (int64_t j = 0; j < round_up(count, P); j += W) {
    T* out = packed + j / P * P * depth + j % P;
    const int64_t n = std::clamp<int64_t>(count - j, 0, W);
    for (int64_t d = 0; d < depth; d += W) {
      const int64_t m = std::min(W, depth - d);
      vec<T> x[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) x[i] = i < n ? load_any(rows + (j + i) * row_stride + d * stride, stride, m) : vec<T>{};
      transpose_square<T>(x);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i)
        if (i < m) store(out + (d + i) * P, x[i]);
    }
  }
}

// ---- infinities and NaNs ----------------------------------------------------------------------------------------

// Rows of a packed matrix that hold an infinity or a NaN. A product over all rows would spread them to every sum, since
// 0 * NaN is NaN: they are set to 0 there, and added afterwards only where their weight is not 0. So nothing that a mask
// excludes ever leaks.
template <class T>
struct SetAside {
  std::vector<int64_t> rows;
  std::vector<T> values;

  void clear() { rows.clear(), values.clear(); }

  // Takes the rows with such values out of packed[count][width], whose first row has the number `first`; false where there are none.
  NOINLINE bool take(T* packed, int64_t count, int64_t width, int64_t first) {
    const size_t before = rows.size();
    for (int64_t r = 0; r < count; ++r) {
      T* row = packed + r * width;
      if (std::all_of(row, row + width, [](T x) { return std::isfinite(x); })) continue;
      rows.push_back(first + r);
      values.insert(values.end(), row, row + width);
      std::fill(row, row + width, T(0));
    }
    return rows.size() > before;
  }

  // C[m, :] += weight(m, row) * row, for every row set aside in [begin, end) and m < count.
  template <class Weight>
  void add(T* c, int64_t c_row, int64_t count, int64_t width, int64_t begin, int64_t end, Weight weight, int64_t c_column = 1) const {
    for (size_t i = 0; i < rows.size(); ++i) {
      if (rows[i] < begin || rows[i] >= end) continue;
      for (int64_t m = 0; m < count; ++m) {
        const T w = weight(m, rows[i]);
        if (w == 0) continue;
        for (int64_t d = 0; d < width; ++d) c[m * c_row + d * c_column] += w * values[i * width + d];
      }
    }
  }
};

// Packs rows first .. first + count of a matrix to packed[count][padded], what is not finite set aside.
template <class S, class T>
NOINLINE void pack_rows(T* packed, const S* rows, int64_t row_stride, int64_t stride, int64_t count, int64_t columns, int64_t padded,
                        int64_t first, SetAside<T>& aside) {
  vec<T> poison = {};
  for (int64_t r = 0; r < count; ++r) poison += pack_row(packed + r * padded, rows + r * row_stride, stride, columns, padded, T(1));
  if (reduce_add(poison) != 0) aside.take(packed, count, padded, first);
}
