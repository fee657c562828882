// What register tiles of several ops share: padded sizes, and products of bfloat16 numbers in pairs. Included by the kernel headers that
// use it, inside the namespace of each instruction set.

// Two rows of at most one vector of columns, interleaved; a row that is null counts as 0.
INLINE void store_pair(bfloat16* out, const bfloat16* first, const bfloat16* second, int64_t columns) {
  half_bits rows[2] = {};
  if (columns >= kLanes<float>) {
    if (first) std::memcpy(&rows[0], first, sizeof rows[0]);
    if (second) std::memcpy(&rows[1], second, sizeof rows[1]);
  } else {
    if (first) std::memcpy(&rows[0], first, columns * sizeof(bfloat16));
    if (second) std::memcpy(&rows[1], second, columns * sizeof(bfloat16));
  }
  const full_bits pairs = widen(rows[0]) | (widen(rows[1]) << 16);
  std::memcpy(out, &pairs, sizeof pairs);
}

#if ISA_VECTOR_BYTES == 64
// The halves of 32 numbers of 16 bits, interleaved.
INLINE __m512i interleaved(__m512i halves) {
  typedef uint16_t words __attribute__((vector_size(64)));
  words order;
#pragma GCC unroll 32
  for (int i = 0; i < 32; ++i) order[i] = i / 2 + i % 2 * 16;
  return _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(order), halves);
}
// Two vectors rounded to bfloat16, side by side in every lane.
__attribute__((target("avx512bf16"), always_inline)) inline __m512i interleaved(vec<float> first, vec<float> second) {
  return interleaved(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first))));
}

// As multiply_tile, of bfloat16 numbers in pairs of steps: pair k of row r of A is at a[r * row + k * step], B is packed as
// [pair][NV vectors of columns][2], a pair every b_step elements.
template <int R, int NV>
__attribute__((target("avx512bf16"), always_inline)) inline void multiply_pairs(vec<float> (&c)[R][NV], const bfloat16* a, int64_t row,
                                                                                int64_t step, const bfloat16* b, int64_t pairs,
                                                                                int64_t b_step = NV * 32) {
#pragma GCC unroll 4
  for (int64_t k = 0; k < pairs; ++k, b += b_step) {
    __m512i bk[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bk[v] = _mm512_loadu_si512(b + v * 32);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * row + k * step, sizeof pair);
      const __m512i both = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        c[r][v] = reinterpret_cast<vec<float>>(
            _mm512_dpbf16_ps(reinterpret_cast<__m512>(c[r][v]), reinterpret_cast<__m512bh>(both), reinterpret_cast<__m512bh>(bk[v])));
    }
  }
}
#endif
