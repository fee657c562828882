// What a forward keeps of its probabilities for its backward, where bfloat16 is multiplied by dot products and all keys are one block.
//
// e^(s - max s) of every score, times 2^15 in half precision: 11 bits down to 2^-29 of the largest of a row, eight times as fine
// as the rounding of p and ds for their products. A row is divided by the sum of what was kept of it, so that its p still add up to 1.
// The backward then has neither q k^T nor an exponential to compute: of five products and a softmax four products are left, for
// 32 bytes written and read for 16 scores. keeps_probabilities (attention_args.h) bounds the memory.

#if ISA_VECTOR_BYTES == 64
inline constexpr float kKeptScale = 1 << 15;

INLINE vec<float> kept_value(const uint16_t* kept) {
  return reinterpret_cast<vec<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kept))));
}

// As round_row, of numbers that are kept too.
__attribute__((target("avx512bf16"))) inline void round_and_keep(bfloat16* out, uint16_t* kept, const float* row, int64_t n) {
  for (int64_t j = 0; j < n; j += 16) {
    const __m512 x = _mm512_loadu_ps(row + j);
    const __m256bh rounded = _mm512_cvtneps_pbh(x);
    std::memcpy(out + j, &rounded, sizeof rounded);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(kept + j),
                        _mm512_cvtps_ph(_mm512_mul_ps(x, _mm512_set1_ps(kKeptScale)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

// A row of what was kept and of dp, and what makes p and ds of them; `summed`: ds is added to the sums of the mask's gradient too.
template <bool summed>
struct KeptRow {
  const uint16_t* kept;
  const float* dp;
  float* sums;
  vec<float> factor, delta;

  INLINE std::pair<vec<float>, vec<float>> at(int64_t j) const {
    const vec<float> p = kept_value(kept + j), weight = p == 0 ? p : p * factor, gradient = weight * (load(dp + j) - delta);
    if constexpr (summed)
      if (sums) add_to_sums<float>(sums + j, p, gradient);
    return {weight, p == 0 ? p : gradient};
  }
};
inline constexpr uint16_t kNothingKept[kBlockKeys] = {};

// The sums by lane of what was kept of a row for keys [begin, end), and of it times dp. A key that is not attended has 0, and may
// have a dp that is NaN.
INLINE void sum_kept(const uint16_t* kept, const float* dp, int64_t begin, int64_t end, vec<float>& p_sum, vec<float>& dp_sum) {
#pragma GCC unroll 2
  for (int64_t j = begin; j < end; j += 16) {
    const vec<float> p = kept_value(kept + j);
    p_sum += p;
    dp_sum = p == 0 ? dp_sum : dp_sum + p * load(dp + j);
  }
}

// p and ds of a block of rows from what the forward kept of them; x is a GradBlock.
template <class Block>
NOINLINE void kept_probabilities(Block& x, const RowBlock<float>& rows, const uint16_t* kept) {
  constexpr int64_t R = kTileRows<float>, P = kPanel<float>, W = kLanes<float>, ld = kBlockKeys;
  static_assert(2 * R == W);
  const int64_t end = round_up(x.n, W), kept_row = x.a->kept_row();
  for (int64_t strip = 0; strip < rows.tiles; strip += 2) {
    const int64_t tiles = std::min(rows.tiles, strip + 2), first_row = strip * R, count = std::min(rows.count - first_row, W);
    for (int64_t j = 0; j < x.n; j += P)
      for (int64_t t = strip; t < tiles; ++t) x.products(rows, t, j, nullptr, x.ds_strip + (t - strip) * R * ld);
    const auto begin_of = [&](int64_t i) { return i < count ? x.lo[strip + i / R] / W * W : 0; };
    const auto end_of = [&](int64_t i) {
      const int64_t t = strip + i / R;
      return i < count && x.lo[t] < x.hi[t] ? round_up(x.hi[t], W) : 0;
    };
    vec<float> p_sums[W], dp_sums[W];
    for (int64_t i = 0; i < W; ++i) {
      p_sums[i] = dp_sums[i] = vec<float>{};
      sum_kept(kept + (first_row + i) * kept_row, x.ds_strip + i * ld, begin_of(i), end_of(i), p_sums[i], dp_sums[i]);
    }
    const vec<float> p_sum = sum_each<float>(p_sums), inverse = p_sum == 0 ? vec<float>{} : 1 / p_sum;
    const vec<float> deltas = load(x.delta + first_row) + sum_each<float>(dp_sums) * inverse;
    for (int64_t i = 0; i < count; i += 2) {
      const int64_t row = (first_row + i) * ld, first = begin_of(i), last = std::max(first, end_of(i));
      bfloat16 *p = x.p + row, *ds_pairs = x.ds_pairs + row, *ds = x.ds + row;
      const auto clear = [&](int64_t from, int64_t to) {
        if (from >= to) return;
        std::fill(p + 2 * from, p + 2 * to, bfloat16{}), std::fill(ds_pairs + 2 * from, ds_pairs + 2 * to, bfloat16{});
        std::fill(ds + from, ds + to, bfloat16{}), std::fill(ds + ld + from, ds + ld + to, bfloat16{});
      };
      const auto round = [&](auto summed) __attribute__((always_inline)) {
        const auto of_row = [&](int64_t r)->KeptRow<summed.value> {
          const float* dp = x.ds_strip + std::min(r, count - 1) * ld + first;
          if (r >= count) return {kNothingKept, dp, nullptr, vec<float>{}, vec<float>{}};
          float* sums = summed.value ? row_of_sums(*x.a, *x.g, rows, first_row + r, x.bias_sums) + first : nullptr;
          return {kept + (first_row + r) * kept_row + first, dp, sums, broadcast(inverse[r]), broadcast(deltas[r])};
        };
        round_gradients(p + 2 * first, ds_pairs + 2 * first, ds + first, ld, last - first, of_row(i), of_row(i + 1));
      };
      clear(0, first);
      if (x.bias_sums)
        round(std::true_type{});
      else
        round(std::false_type{});
      clear(last, end);
    }
  }
}
#endif
