// The softmax of a forward whose products are dot products of bfloat16 numbers, where nothing is added to their scores: scaled, raised to
// a power, rounded and kept while in registers. The general way, softmax_rows, stores and loads them again after every step.

#if ISA_VECTOR_BYTES == 64
// 2^f for |f| <= 1/2 by the smallest largest relative error, 7.5e-8.
inline constexpr float kPower[] = {1.3276471871e-3f, 9.6755413276e-3f, 5.5507132739e-2f, 2.4022119724e-1f, 6.9314696706e-1f, 1.0f};

// Two to the power of x, for x up to about 0: 0 for -inf, NaN for NaN.
INLINE __m512 power_of_two(__m512 x) {
  const __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-1000.0f), x);  // a NaN stays one: the second is given
  const __m512 n = _mm512_roundscale_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(clamped, n);
  __m512 p = _mm512_set1_ps(kPower[0]);
#pragma GCC unroll 5
  for (int i = 1; i < 6; ++i) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kPower[i]));
  return _mm512_scalef_ps(p, n);
}

// softmax_rows of plain scores that are still to be multiplied by `factor`, which is positive, and so is m; and the rounding of what it
// gives: row r to p + r * kBlockKeys, and where `keeps` to kept + r * kept_row. What the general way stores and loads again stays in
// registers. The largest p of a row is 1 and not 2^(a rounding step of its score), which its rounding would lose and l would not.
template <bool keeps, class Place>
__attribute__((target("avx512bf16"))) NOINLINE void round_softmax(int64_t first, int64_t count, Place place, float factor, float* m,
                                                                  float* l, float* alpha, bfloat16* p, uint16_t* kept, int64_t kept_row) {
  constexpr int64_t W = kLanes<float>;
  constexpr float kLog2e = 1.44269504088896340736f;
  const vec<float> lowest = broadcast(-std::numeric_limits<float>::infinity());
  vec<float> largest[W], sums[W];
#pragma GCC unroll 16
  for (int64_t i = 0; i < W; ++i) largest[i] = lowest, sums[i] = vec<float>{};
  for (int64_t i = 0; i < count; ++i) {
    const auto row = place(first + i);
    const int64_t whole_begin = std::clamp(round_up(row.lo, W), row.begin, row.end);
    const int64_t whole_end = std::clamp(row.hi / W * W, whole_begin, row.end);
    vec<float> most[2] = {lowest, lowest};
    const auto edge = [&](int64_t j) __attribute__((always_inline)) {
      const vec<float> x = limit<float>(load(row.s + j), j, row.lo, row.hi);
      store(row.s + j, x);
      most[0] = maximum(most[0], x);
    };
    for (int64_t j = row.begin; j < whole_begin; j += W) edge(j);
    int64_t j = whole_begin;
    for (; j + 2 * W <= whole_end; j += 2 * W) {
      most[0] = maximum(most[0], load(row.s + j));
      most[1] = maximum(most[1], load(row.s + j + W));
    }
    if (j < whole_end) most[0] = maximum(most[0], load(row.s + j));
    for (j = whole_end; j < row.end; j += W) edge(j);
    largest[i] = maximum(most[0], most[1]);
  }
  const vec<float> old_m = load(m + first), new_m = maximum(old_m, largest_of_each<float>(largest));
  const vec<float> reference = new_m == lowest ? vec<float>{} : new_m;
  const __m512 times = _mm512_set1_ps(factor * kLog2e);
  for (int64_t i = 0; i < count; ++i) {
    const auto row = place(first + i);
    const __m512 most = _mm512_set1_ps(reference[i]);
    bfloat16* out = p + (first + i) * kBlockKeys;
    uint16_t* kept_at = keeps ? kept + (first + i) * kept_row : nullptr;
    __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int64_t j = row.begin; j < row.end; j += W) {
      const __m512 x = power_of_two(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(row.s + j), most), times));
      sum = _mm512_add_ps(sum, x);
      const __m256bh rounded = _mm512_cvtneps_pbh(x);
      std::memcpy(out + j, &rounded, sizeof rounded);
      if constexpr (keeps)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(kept_at + j),
                            _mm512_cvtps_ph(_mm512_mul_ps(x, _mm512_set1_ps(kKeptScale)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    sums[i] = reinterpret_cast<vec<float>>(sum);
  }
  const vec<float> change = exp_nonpositive<float>((old_m - reference) * factor);
  store(m + first, new_m);
  store(alpha + first, change);
  store(l + first, load(l + first) * change + sum_each<float>(sums));
}
#endif
