// Vectors of one instruction set, on GCC's vector extensions: one source for float and double, for any vector width.
// Included by for_each_isa.h inside the namespace of the set; ISA_VECTOR_BYTES is the width.
//
// The arithmetic type of float and bfloat16 storage is float, that of double is double. Operators (+ - * / < ?:) are the
// compiler's own; a comparison gives a mask, `mask ? a : b` blends. Sources: range reduction and polynomials after
// Cody & Waite and Moshier's Cephes (exp); errors are below 3 ulp, tested in tests/test_simd.py.

#define INLINE inline __attribute__((always_inline))
// What is large and called seldom: a copy at every call costs minutes of compilation and gains nothing.
#define NOINLINE __attribute__((noinline, noclone))

template <class T>
struct vec_of {
  typedef T type __attribute__((vector_size(ISA_VECTOR_BYTES)));
};
template <class T>
using vec = typename vec_of<T>::type;  // of float or double

template <class V>
using lane_t = std::remove_reference_t<decltype(std::declval<V&>()[0])>;

// The type a storage type is computed in.
template <class T>
struct compute_of {
  using type = T;
};
template <>
struct compute_of<bfloat16> {
  using type = float;
};
template <class T>
using compute_t = typename compute_of<T>::type;

// How many elements of storage type T one vector of its compute type holds.
template <class T>
inline constexpr int kLanes = ISA_VECTOR_BYTES / sizeof(compute_t<T>);

template <class T>
INLINE vec<T> broadcast(T x) {
  return x - vec<T>{};  // x - 0 is x for every x, -0 too, so the compiler drops the subtraction; x + 0 it must keep
}

// ---- storage ----------------------------------------------------------------------------------------------------

INLINE float to_float(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
INLINE float to_compute(bfloat16 x) { return to_float(x); }
INLINE float to_compute(float x) { return x; }
INLINE double to_compute(double x) { return x; }

// Rounds to the nearest even bfloat16; a NaN stays a NaN.
INLINE bfloat16 to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <class T>
INLINE T from_compute(compute_t<T> x) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return to_bfloat16(x);
  else
    return x;
}

typedef uint16_t half_bits __attribute__((vector_size(ISA_VECTOR_BYTES / 2)));
typedef uint32_t full_bits __attribute__((vector_size(ISA_VECTOR_BYTES)));

// The same numbers in lanes of 32 bits, and back in 16, which must hold them. The compiler's own conversions between vectors of
// different length go by parts: five instructions for one.
template <class Narrow>
INLINE auto widen(Narrow v) {
  using Lane = lane_t<Narrow>;
  typedef std::conditional_t<std::is_signed_v<Lane>, int32_t, uint32_t> words __attribute__((vector_size(ISA_VECTOR_BYTES)));
#if ISA_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<Lane, uint16_t>) return reinterpret_cast<words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(v)));
  if constexpr (std::is_same_v<Lane, uint8_t>) return reinterpret_cast<words>(_mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(v)));
  if constexpr (std::is_same_v<Lane, int8_t>) return reinterpret_cast<words>(_mm512_cvtepi8_epi32(reinterpret_cast<__m128i>(v)));
#elif ISA_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<Lane, uint16_t>) return reinterpret_cast<words>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(v)));
#endif
  return __builtin_convertvector(v, words);
}
INLINE half_bits narrow(full_bits v) {
#if ISA_VECTOR_BYTES == 64
  return reinterpret_cast<half_bits>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(v)));
#elif ISA_VECTOR_BYTES == 32
  const __m256i w = reinterpret_cast<__m256i>(v);
  return reinterpret_cast<half_bits>(_mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
#else
  return __builtin_convertvector(v, half_bits);
#endif
}

template <class T>
INLINE vec<compute_t<T>> load(const T* p) {
  using V = vec<compute_t<T>>;
  if constexpr (std::is_same_v<T, bfloat16>) {
    half_bits h;
    std::memcpy(&h, p, sizeof h);
    return reinterpret_cast<V>(widen(h) << 16);
  } else {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
}

// As to_bfloat16.
INLINE half_bits rounded_bits(vec<float> v) {
  const full_bits bits = reinterpret_cast<full_bits>(v);
  const full_bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const full_bits quiet_nan = full_bits{} + 0x7fc0;
  return narrow(v == v ? rounded : quiet_nan);
}

template <class T>
INLINE void store(T* p, vec<compute_t<T>> v) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const half_bits h = rounded_bits(v);
    std::memcpy(p, &h, sizeof h);
  } else {
    std::memcpy(p, &v, sizeof v);
  }
}

// The first n elements (0 <= n <= kLanes<T>); the other lanes are 0. Touches no memory past p + n.
template <class T>
INLINE vec<compute_t<T>> load_partial(const T* p, int64_t n) {
#if ISA_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) {
    return reinterpret_cast<vec<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
  } else if constexpr (std::is_same_v<T, double>) {
    return reinterpret_cast<vec<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p));
  } else {
    const __m256i h = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
    return reinterpret_cast<vec<float>>(widen(reinterpret_cast<half_bits>(h)) << 16);
  }
#endif
  T buffer[kLanes<T>] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

template <class T>
INLINE void store_partial(T* p, vec<compute_t<T>> v, int64_t n) {
#if ISA_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m512>(v));
    return;
  } else if constexpr (std::is_same_v<T, double>) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), reinterpret_cast<__m512d>(v));
    return;
  } else {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m256i>(rounded_bits(v)));
    return;
  }
#endif
  T buffer[kLanes<T>];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

// m[i][j] <-> m[j][i]: log2(W) rounds that swap the off-diagonal halves of every square.
template <int kHalf, class T, int... kLane>
INLINE void swap_halves(vec<T>& a, vec<T>& b, std::integer_sequence<int, kLane...>) {
  constexpr int W = kLanes<T>;
  const vec<T> low = __builtin_shufflevector(a, b, ((kLane & kHalf) ? W + kLane - kHalf : kLane)...);
  b = __builtin_shufflevector(a, b, ((kLane & kHalf) ? W + kLane : kLane + kHalf)...);
  a = low;
}
template <int kHalf, class T>
INLINE void transpose_round(vec<T> (&m)[kLanes<T>]) {
  constexpr int W = kLanes<T>;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & kHalf)) swap_halves<kHalf, T>(m[i], m[i + kHalf], std::make_integer_sequence<int, W>{});
  if constexpr (kHalf > 1) transpose_round<kHalf / 2, T>(m);
}
template <class T>
INLINE void transpose(vec<T> (&m)[kLanes<T>]) {
  transpose_round<kLanes<T> / 2, T>(m);
}

// ---- arithmetic -------------------------------------------------------------------------------------------------

// maximum/minimum: where either is NaN the second argument comes back. One instruction: the compiler knows the form.
template <class V>
INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}
template <class V>
INLINE V minimum(V a, V b) {
  return a < b ? a : b;
}

// The bits of a vector, as integers of its lanes' size.
template <class V>
struct bits_of {
  using lane = std::conditional_t<sizeof(lane_t<V>) == 4, uint32_t, uint64_t>;
  static constexpr lane sign = ~(std::numeric_limits<lane>::max() >> 1);
  typedef lane type __attribute__((vector_size(ISA_VECTOR_BYTES)));
};

template <class V>
INLINE V absolute(V x) {
  using bits = bits_of<V>;
  return reinterpret_cast<V>(reinterpret_cast<typename bits::type>(x) & ~bits::sign);
}
// `size` (not negative) with the sign of `sign`.
template <class V>
INLINE V with_sign(V size, V sign) {
  using bits = bits_of<V>;
  return reinterpret_cast<V>(reinterpret_cast<typename bits::type>(size) |
                             (reinterpret_cast<typename bits::type>(sign) & bits::sign));
}

template <class V>
INLINE lane_t<V> reduce_add(V v) {
  constexpr int n = sizeof(V) / sizeof(lane_t<V>);
  lane_t<V> x[n];
  std::memcpy(x, &v, sizeof v);
#pragma GCC unroll 16
  for (int half = n / 2; half; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}
template <class V>
INLINE lane_t<V> reduce_max(V v) {
  constexpr int n = sizeof(V) / sizeof(lane_t<V>);
  lane_t<V> x[n];
  std::memcpy(x, &v, sizeof v);
#pragma GCC unroll 16
  for (int half = n / 2; half; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  return x[0];
}

// Transposes a square of vectors: afterwards lane j of rows[i] is what lane i of rows[j] was. Each stage interleaves the
// lanes of the first half of the rows with those of the second.
template <class V>
INLINE void transpose(V (&rows)[sizeof(V) / sizeof(lane_t<V>)]) {
  constexpr int W = sizeof(V) / sizeof(lane_t<V>);
  typename bits_of<V>::type low, high;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    low[i] = i / 2 + (i % 2) * W;
    high[i] = low[i] + W / 2;
  }
#pragma GCC unroll 4
  for (int stage = 1; stage < W; stage *= 2) {
    V next[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + W / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + W / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

// out[k * out_row + j] = source[j * source_row + k] for one square of kLanes x kLanes elements.
template <class T, class S>
INLINE void copy_transposed(T* out, int64_t out_row, const S* source, int64_t source_row) {
  constexpr int W = kLanes<T>;
  vec<T> rows[W];
#pragma GCC unroll 16
  for (int j = 0; j < W; ++j) rows[j] = load(source + j * source_row);
  transpose(rows);
#pragma GCC unroll 16
  for (int k = 0; k < W; ++k) store(out + k * out_row, rows[k]);
}

// ---- exp, tanh, sigmoid -----------------------------------------------------------------------------------------

// x = n ln 2 + r with |r| <= ln 2 / 2, so that e^x = 2^n (1 + (e^r - 1)).
template <class V>
struct ExpParts {
  V scale;      // 2^n
  V minus_one;  // e^r - 1
};

// Below kExpLow e^x is less than the smallest normal number; up to kExpHigh 2^n is finite.
template <class T>
inline constexpr T kExpLow = std::is_same_v<T, float> ? T(-87.33) : T(-708.39);
template <class T>
inline constexpr T kExpHigh = std::is_same_v<T, float> ? T(88.02) : T(709.08);

INLINE ExpParts<vec<float>> exp_parts(vec<float> x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
  const vec<float> shifted = x * 1.44269504088896341f + kMagic;
  const vec<float> n = shifted - kMagic;
  vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const auto power = (reinterpret_cast<bits_of<vec<float>>::type>(shifted) << 23) + 0x3f800000;
  return {reinterpret_cast<vec<float>>(power), p * (r * r) + r};
}

INLINE ExpParts<vec<double>> exp_parts(vec<double> x) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  const vec<double> shifted = x * 1.4426950408889634 + kMagic;
  const vec<double> n = shifted - kMagic;
  vec<double> r = x - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  // Taylor series to r^13 / 13!: the first term left out is below 2^-57 for |r| <= ln 2 / 2.
  constexpr double kInverseFactorial[] = {1.6059043836821613e-10, 2.08767569878681e-9,   2.505210838544172e-8,  2.755731922398589e-7,
                                          2.7557319223985893e-6,  2.48015873015873e-5,   1.984126984126984e-4,  1.388888888888889e-3,
                                          8.333333333333333e-3,   4.1666666666666664e-2, 1.6666666666666666e-1, 0.5};
  vec<double> p = broadcast(kInverseFactorial[0]);
#pragma GCC unroll 16
  for (int i = 1; i < 12; ++i) p = p * r + kInverseFactorial[i];
  const auto power = (reinterpret_cast<bits_of<vec<double>>::type>(shifted) << 52) + 0x3ff0000000000000;
  return {reinterpret_cast<vec<double>>(power), p * (r * r) + r};
}

// Below the smallest normal number the result is 0; above the largest it is inf; NaN stays NaN.
template <class V>
INLINE V exp(V x) {
  using T = lane_t<V>;
  constexpr T kOverflow = std::is_same_v<T, float> ? T(88.72283) : T(709.782712893384);
  const ExpParts<V> e = exp_parts(minimum(broadcast(kOverflow), maximum(broadcast(kExpLow<T>), x)));
  // The power of two is added to the exponent bits: 2^n alone is infinite for the largest x.
  using bits = typename bits_of<V>::type;
  const V mantissa = 1 + e.minus_one;
  const V value =
      reinterpret_cast<V>(reinterpret_cast<bits>(mantissa) + (reinterpret_cast<bits>(e.scale) - reinterpret_cast<bits>(broadcast(T(1)))));
  // What is not above the lowest x is below it or a NaN, of whose bits, added to, a number could have been left.
  return x > kOverflow ? broadcast(std::numeric_limits<T>::infinity()) : (x >= kExpLow<T> ? value : maximum(V{}, x));
}

template <class V>
INLINE V sigmoid(V x) {
  using T = lane_t<V>;
  const ExpParts<V> e = exp_parts(minimum(broadcast(kExpHigh<T>), maximum(broadcast(kExpLow<T>), -x)));
  return 1 / (1 + (e.scale + e.scale * e.minus_one));
}

// (e^2|x| - 1) / (e^2|x| + 1), where e^2|x| - 1 = 2^n (e^r - 1) + (2^n - 1) keeps its relative accuracy near 0.
template <class V>
INLINE V tanh(V x) {
  using T = lane_t<V>;
  constexpr T kOne = std::is_same_v<T, float> ? T(9.2) : T(19.2);  // rounds to 1 from here on
  const V a = minimum(broadcast(kOne), absolute(x));
  const ExpParts<V> e = exp_parts(a + a);
  const V minus_one = e.scale * e.minus_one + (e.scale - 1);
  return with_sign(minus_one / (minus_one + 2), x);
}
