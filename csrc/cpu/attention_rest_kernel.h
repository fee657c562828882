// What rounding takes from out in bfloat16, kept for the backward where a row's keys lie in several blocks: the lower half of every
// float32, signed, so that 2 bytes beside out make up the whole number again.
//   delta = sum_d do o - dlse, with o = out and its lower half
// Where few keys have nearly all the weight dp - delta cancels, and a delta from the rounded out leaves nothing of ds. Where the
// keys are one block delta is the sum of p dp, which over several would take q k^T, do v^T and the exponentials twice.
using Bits = decltype(vec<float>{} == vec<float>{});
typedef int16_t LowerHalves __attribute__((vector_size(sizeof(vec<float>) / 2)));

// Row i of head h of batch entry b, or null where nothing is kept.
template <class P>
INLINE P* rest_of(const AttentionArgs& a, P* rest, int64_t b, int64_t h, int64_t i) {
  return rest ? rest + ((b * a.heads + h) * a.q_len + i) * a.value_dim : nullptr;
}

// Stores up to a vector of n numbers and, where `rest` is given, what they lose.
template <class S>
INLINE void store_with_rest(S* out, int16_t* rest, vec<compute_t<S>> x, int64_t n) {
  store_any(out, x, n);
  if constexpr (std::is_same_v<S, bfloat16>) {
    if (!rest) return;
    n = std::min<int64_t>(n, kLanes<float>);
    Bits left = reinterpret_cast<Bits>(x) - reinterpret_cast<Bits>(load_any(out, 1, n));
    left = left > 0x7fff ? Bits{} + 0x7fff : left;  // half a step, rounded down
    left = left < -0x8000 ? Bits{} - 0x8000 : left;
    const LowerHalves halves = __builtin_convertvector(left, LowerHalves);
    std::memcpy(rest, &halves, n * sizeof *rest);
  }
}

// Up to a vector of n numbers, with what they lost where that is given.
template <class S>
INLINE vec<compute_t<S>> load_with_rest(const S* out, int64_t stride, const int16_t* rest, int64_t n) {
  const vec<compute_t<S>> x = load_any(out, stride, n);
  if constexpr (std::is_same_v<S, bfloat16>) {
    if (!rest) return x;
    LowerHalves halves{};
    if (n == kLanes<float>)
      std::memcpy(&halves, rest, sizeof halves);
    else
      std::memcpy(&halves, rest, n * sizeof *rest);
    return reinterpret_cast<vec<float>>(reinterpret_cast<Bits>(x) + __builtin_convertvector(halves, Bits));
  }
  return x;
}

#if ISA_VECTOR_BYTES == 64
// What round_scaled takes away.
__attribute__((target("avx512bf16"))) inline void round_rest(int16_t* rest, const float* row, int64_t n, float factor) {
  const __m512 times = _mm512_set1_ps(factor);
  const auto of = [&](int64_t j) __attribute__((target("avx512bf16"), always_inline)) {
    const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(row + j), times);
    const __m512i rounded = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
    return _mm512_cvtsepi32_epi16(_mm512_sub_epi32(_mm512_castps_si512(x), _mm512_slli_epi32(rounded, 16)));
  };
  for (int64_t j = 0; j < n; j += 32) {
    const __m256i first = of(j), second = n - j > 16 ? of(j + 16) : first;
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
    if (n - j >= 32)
      _mm512_storeu_si512(rest + j, both);
    else
      _mm512_mask_storeu_epi16(rest + j, (__mmask32{1} << (n - j)) - 1, both);
  }
}
#endif
