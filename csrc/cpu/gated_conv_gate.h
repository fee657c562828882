// The gate of gated_conv on one panel of z: a = t s with t = tanh(z_filter + bias), s = sigmoid(z_gate + bias), and its gradient.
// Included by gated_conv_kernel.h.
//
// A training step in bfloat16 keeps t and s, times 2^15 in half precision: numbers from 2^-29 on have 11 bits, three more than
// bfloat16, so that 1 - t^2 and 1 - s are eight times as accurate as from a tanh and a sigmoid in bfloat16, which PyTorch keeps. For
// each vector of gates a row has its t, then its s.
//
// With dot products two rows are rounded at once and stored as rows and in pairs of rows, as the products want them. The exponentials
// there have relative errors of 2e-5 and 3e-6, a hundredth of a rounding, and share one division:
//   t = m / (m + 2), s = 1 / (1 + e)    with m = e^(2 z_filter) - 1, e = e^-z_gate:    r = 1 / ((m + 2) (1 + e)),  a = m r

inline constexpr float kKeptScale = 1 << 15;

// Half precision of numbers up to 2^15, and back; below 2^-14 it is 0 where the CPU does not convert them itself.
INLINE half_bits to_half(vec<float> v) {
#if ISA_VECTOR_BYTES == 64
  return reinterpret_cast<half_bits>(_mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif ISA_VECTOR_BYTES == 32
  return reinterpret_cast<half_bits>(_mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const full_bits bits = reinterpret_cast<full_bits>(v), size = bits & 0x7fffffff, nan = full_bits{} + 0x7e00;
  const full_bits rounded = ((size + 0xfff + ((size >> 13) & 1)) >> 13) - (112 << 10);
  const full_bits half = size > 0x7f800000 ? nan : (size < (113u << 23) ? full_bits{} : rounded);
  return narrow(half | ((bits >> 16) & 0x8000));
#endif
}
INLINE vec<float> from_half(half_bits h) {
#if ISA_VECTOR_BYTES == 64
  return reinterpret_cast<vec<float>>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(h)));
#elif ISA_VECTOR_BYTES == 32
  return reinterpret_cast<vec<float>>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(h)));
#else
  const full_bits bits = widen(h), size = bits & 0x7fff, nan = full_bits{} + 0x7fc00000;
  const full_bits number = size == 0 ? size : (size << 13) + (112 << 23);
  return reinterpret_cast<vec<float>>((size > 0x7c00 ? nan : number) | ((bits & 0x8000) << 16));
#endif
}

// One vector of t and of s at `kept`.
INLINE void keep(uint16_t* kept, vec<float> scaled_t, vec<float> scaled_s) {
  const half_bits both[2] = {to_half(scaled_t), to_half(scaled_s)};
  std::memcpy(kept, both, sizeof both);
}
struct TanhSigmoid {
  vec<float> t, s;
};
INLINE TanhSigmoid kept_values(const uint16_t* kept) {
  half_bits both[2];
  std::memcpy(both, kept, sizeof both);
  return {from_half(both[0]) * (1 / kKeptScale), from_half(both[1]) * (1 / kKeptScale)};
}

// Sums z of a panel, [rows][filters, then gates], each `vectors` vectors; the biases of either.
template <class T, class M>
struct GatePanel {
  int64_t rows, vectors;
  const T *z, *filter_bias, *gate_bias;
  M* a;  // of the panel
  int64_t a_row;
  uint16_t* kept;  // of the panel, or null
  int64_t kept_row;
};

template <class T, class M>
void gate_values(const GatePanel<T, M>& p) {
  constexpr int W = kLanes<T>;
  for (int64_t v = 0; v < p.vectors; ++v) {
    const vec<T> filter_bias = load(p.filter_bias + v * W), gate_bias = load(p.gate_bias + v * W);
    for (int64_t r = 0; r < p.rows; ++r) {
      const T* z = p.z + (2 * p.vectors * r + v) * W;
      const vec<T> t = tanh(load(z) + filter_bias), s = sigmoid(load(z + p.vectors * W) + gate_bias);
      store(p.a + r * p.a_row + v * W, t * s);
      if constexpr (std::is_same_v<T, float>)
        if (p.kept) keep(p.kept + r * p.kept_row + 2 * v * W, t * kKeptScale, s * kKeptScale);
    }
  }
}

// Gradients d_a of a panel, [rows][vectors], to those of z; what the sums are of comes from `values(row, vector)`.
template <class T, class M>
struct GateGradient {
  int64_t rows, vectors;
  const T* d_a;
  M *d_filter, *d_gate, *a;  // rows of the panel's columns
  int64_t z_row, a_row;
  T *filter_sums, *gate_sums;  // or null
};

template <class T, class M, class F>
INLINE void gate_gradients(const GateGradient<T, M>& g, const F& values) {
  constexpr int W = kLanes<T>;
  for (int64_t v = 0; v < g.vectors; ++v) {
    vec<T> filter_sum = {}, gate_sum = {};
    for (int64_t r = 0; r < g.rows; ++r) {
      const auto [t, s] = values(r, v);
      const vec<T> d = load(g.d_a + (g.vectors * r + v) * W);
      const vec<T> d_filter = d * s * (1 - t * t), d_gate = d * t * s * (1 - s);
      store(g.a + r * g.a_row + v * W, t * s);
      store(g.d_filter + r * g.z_row + v * W, d_filter);
      store(g.d_gate + r * g.z_row + v * W, d_gate);
      filter_sum += d_filter;
      gate_sum += d_gate;
    }
    if (g.filter_sums) {
      store(g.filter_sums + v * W, load(g.filter_sums + v * W) + filter_sum);
      store(g.gate_sums + v * W, load(g.gate_sums + v * W) + gate_sum);
    }
  }
}

#if ISA_VECTOR_BYTES == 64
#define GATE_DOTS __attribute__((target("avx512bf16")))

INLINE vec<float> nearest_integer(vec<float> v) {
  return reinterpret_cast<vec<float>>(
      _mm512_roundscale_ps(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE vec<float> times_power(vec<float> v, vec<float> exponent) {
  return reinterpret_cast<vec<float>>(_mm512_scalef_ps(reinterpret_cast<__m512>(v), reinterpret_cast<__m512>(exponent)));
}

// a, and where kept t and s times kKeptScale, of z in units of ln 2: y = 2 z_filter / ln 2, x = -z_gate / ln 2.
template <bool kKept>
INLINE vec<float> gate_of(vec<float> y, vec<float> x, TanhSigmoid& kept) {
  constexpr float kTanhIsOne = 26.5f, kSigmoidIsNothing = 87;  // the product of the two denominators stays finite
  y = minimum(broadcast(kTanhIsOne), maximum(broadcast(-kTanhIsOne), y));
  x = minimum(broadcast(kSigmoidIsNothing), x);
  const vec<float> n = nearest_integer(y), f = y - n, k = nearest_integer(x), h = x - k;
  const vec<float> one = broadcast(1.0f), power = times_power(one, n);
  // 2^f - 1, of small relative error near 0, and 2^h.
  const vec<float> part = f * (((f * 0.00961811066f + 0.0558372883f) * f + 0.240232522f) * f + 0.693136858f);
  const vec<float> e = (((h * 0.00957010179f + 0.0559178603f) * h + 0.240247448f) * h + 0.693121815f) * h + 0.999999261f;
  const vec<float> m = power * part + (power - 1), below_t = m + 2, below_s = times_power(e, k) + 1;
  const vec<float> r = 1 / (below_t * below_s);
  if constexpr (kKept) {
    const vec<float> scaled = r * kKeptScale;
    kept = {m * (below_s * scaled), below_t * scaled};
  }
  return m * r;
}

template <int NV, bool kKept>
GATE_DOTS void gate_values_of(const GatePanel<float, bfloat16>& p) {
  constexpr int W = kLanes<float>;
  constexpr float kLog2e = 1.44269504088896341f;
  vec<float> filter_bias[NV], gate_bias[NV];
  for (int v = 0; v < NV; ++v)
    filter_bias[v] = load(p.filter_bias + v * W) * (2 * kLog2e), gate_bias[v] = load(p.gate_bias + v * W) * -kLog2e;
  for (int64_t r = 0; r < p.rows; ++r) {
    const float* z = p.z + r * 2 * NV * W;
    vec<float> a[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      TanhSigmoid kept;
      a[v] = gate_of<kKept>(load(z + v * W) * (2 * kLog2e) + filter_bias[v], load(z + (NV + v) * W) * -kLog2e + gate_bias[v], kept);
      if constexpr (kKept) keep(p.kept + r * p.kept_row + 2 * v * W, kept.t, kept.s);
    }
    bfloat16* out = p.a + r * p.a_row;
    if constexpr (NV == 2) {
      const __m512bh rounded = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(a[1]), reinterpret_cast<__m512>(a[0]));
      std::memcpy(out, &rounded, sizeof rounded);
    } else {
      const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(a[0]));
      std::memcpy(out, &rounded, sizeof rounded);
    }
  }
}
INLINE void gate_values(const GatePanel<float, bfloat16>& p) {
  with_constant<2>(p.vectors, [&](auto vectors) {
    if (p.kept)
      gate_values_of<vectors.value, true>(p);
    else
      gate_values_of<vectors.value, false>(p);
  });
}

// Rows r and r + 1 of two vectors, rounded: as rows, where `rows` is given, and as pairs; without the second one it counts as 0.
template <bool kBoth>
GATE_DOTS INLINE void store_two_rows(bfloat16* rows, int64_t row, bfloat16* pairs, vec<float> first, vec<float> second) {
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
  if (rows) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows), _mm512_castsi512_si256(both));
    if (kBoth) _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + row), _mm512_extracti64x4_epi64(both, 1));
  }
  _mm512_storeu_si512(pairs, interleaved(both));
}

// As gate_gradients, with the steps of d_z in rows and in pairs, and those of a in pairs: pair k of a column is 2 k rows further.
struct PairedGateGradient : GateGradient<float, bfloat16> {
  const uint16_t* kept;  // of the panel
  int64_t kept_row;
  bfloat16 *d_filter_pairs, *d_gate_pairs;
};

template <int NV, bool kBoth>
GATE_DOTS INLINE void gate_gradient_rows(const PairedGateGradient& g, int64_t r, vec<float> (&filter_sums)[NV],
                                         vec<float> (&gate_sums)[NV]) {
  constexpr int W = kLanes<float>;
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
    vec<float> d_filter[2] = {}, d_gate[2] = {}, a[2] = {};
#pragma GCC unroll 2
    for (int i = 0; i < (kBoth ? 2 : 1); ++i) {
      const auto [t, s] = kept_values(g.kept + (r + i) * g.kept_row + 2 * v * W);
      const vec<float> of_s = load(g.d_a + (NV * (r + i) + v) * W) * s, of_both = of_s * t;
      d_filter[i] = of_s - of_both * t, d_gate[i] = of_both - of_both * s, a[i] = t * s;
      filter_sums[v] += d_filter[i];
      gate_sums[v] += d_gate[i];
    }
    store_two_rows<kBoth>(g.d_filter + r * g.z_row + v * W, g.z_row, g.d_filter_pairs + r * g.z_row + 2 * v * W, d_filter[0], d_filter[1]);
    store_two_rows<kBoth>(g.d_gate + r * g.z_row + v * W, g.z_row, g.d_gate_pairs + r * g.z_row + 2 * v * W, d_gate[0], d_gate[1]);
    store_two_rows<kBoth>(nullptr, 0, g.a + r * g.a_row + 2 * v * W, a[0], a[1]);
  }
}
template <int NV>
GATE_DOTS void gate_gradients_of(const PairedGateGradient& g) {
  constexpr int W = kLanes<float>;
  vec<float> filter_sums[NV] = {}, gate_sums[NV] = {};
  int64_t r = 0;
  for (; r + 1 < g.rows; r += 2) gate_gradient_rows<NV, true>(g, r, filter_sums, gate_sums);
  if (r < g.rows) gate_gradient_rows<NV, false>(g, r, filter_sums, gate_sums);
  if (!g.filter_sums) return;
  for (int v = 0; v < NV; ++v) {
    store(g.filter_sums + v * W, load(g.filter_sums + v * W) + filter_sums[v]);
    store(g.gate_sums + v * W, load(g.gate_sums + v * W) + gate_sums[v]);
  }
}
INLINE void gate_gradients(const GateGradient<float, bfloat16>& g, const uint16_t* kept, int64_t kept_row, bfloat16* d_filter_pairs,
                           bfloat16* d_gate_pairs) {
  const PairedGateGradient paired{g, kept, kept_row, d_filter_pairs, d_gate_pairs};
  with_constant<2>(g.vectors, [&](auto vectors) { gate_gradients_of<vectors.value>(paired); });
}
#undef GATE_DOTS
#endif
