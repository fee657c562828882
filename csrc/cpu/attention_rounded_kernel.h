// Results of products that are final: rounded to bfloat16 from the registers they were summed in. So they are on their way to memory
// while the next tile is computed, and are not written, read and written once more.

// Where results go, rows `row` apart, or nowhere. They are multiplied by a factor: one for all, or one for each row.
struct Rounded {
  bfloat16* out = nullptr;
  int64_t row = 0;
  const float* factors = nullptr;
  bool each = false;

  Rounded at(int64_t r, int64_t column) const {
    return out ? Rounded{out + r * row + column, row, each ? factors + r : factors, each} : Rounded{};
  }
};

#if ISA_VECTOR_BYTES == 64
template <int R, bool added, bool each>
__attribute__((target("avx512bf16"))) void rounded_tile(const bfloat16* a, int64_t a_row, int64_t a_step, const bfloat16* b, int64_t b_step,
                                                        int64_t steps, const float* c, int64_t c_row, Rounded to) {
  product_by_rows<R, 2>(
      a, a_row, a_step, b, b_step, steps, [=](const vec<float>(&acc)[2], int r) __attribute__((target("avx512bf16"), always_inline)) {
        vec<float> x = acc[0], y = acc[1];
        if constexpr (added) x = load(c + r * c_row) + x, y = load(c + r * c_row + kLanes<float>) + y;
        const float factor = to.factors[each ? r : 0];
        x *= factor, y *= factor;
        _mm512_storeu_si512(to.out + r * to.row,
                            reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(y), reinterpret_cast<__m512>(x))));
      });
}

// As `product`, of two vectors of columns and of exactly kTileRows rows or half as many.
template <bool each>
INLINE void rounded_product(int64_t rows, const bfloat16* a, int64_t a_row, int64_t a_step, const bfloat16* b, int64_t b_step,
                            int64_t steps, const float* c, int64_t c_row, bool added, const Rounded& to) {
  constexpr int R = kTileRows<float>;
  const auto run = [&](auto tile) __attribute__((always_inline)) { tile(a, a_row, a_step, b, b_step, steps, c, c_row, to); };
  if (rows == R)
    added ? run(rounded_tile<R, true, each>) : run(rounded_tile<R, false, each>);
  else
    added ? run(rounded_tile<R / 2, true, each>) : run(rounded_tile<R / 2, false, each>);
}
#endif

// The product of a tile of `count` rows, with C if `added`, to its results; false where that is not asked for or cannot be.
template <bool each, class A, class T>
INLINE bool round_tile(int64_t count, const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t b_step, int64_t steps, const T* c,
                       int64_t c_row, bool added, const Rounded& to) {
#if ISA_VECTOR_BYTES == 64
  if constexpr (kStep<A> == 2) {
    if (!to.out || (count != kTileRows<T> && count != kTileRows<T> / 2)) return false;
    rounded_product<each>(count, a, a_row, a_step, b, b_step, steps, c, c_row, added, to);
    return true;
  }
#endif
  return false;
}

// A panel of `count` rows of sums to its results.
template <class T>
INLINE void round_sums(const T* sums, int64_t row, int64_t count, const Rounded& to) {
#if ISA_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>)
    for (int64_t r = 0; to.out && r < count; ++r) round_scaled(to.out + r * to.row, sums + r * row, kPanel<T>, to.factors[to.each ? r : 0]);
#endif
}
