// Vectors of one instruction set, on GCC's vector extensions: one source for float and double, for any vector width.
// Included by for_each_isa.h inside the namespace of the set; ISA_VECTOR_BYTES is the width.
//
// The arithmetic type of float and bfloat16 storage is float, that of double is double. Operators (+ - * / < ?:) are the
// compiler's own; a comparison gives a mask, `mask ? a : b` blends. Sources: range reduction and polynomials after
// Cody & Waite (exp) and Moshier's Cephes (tanh, erf); errors are below 2 ulp, tested in tests/test_simd.py.

#define INLINE inline __attribute__((always_inline))

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

template <class T>
INLINE vec<compute_t<T>> load(const T* p) {
  using V = vec<compute_t<T>>;
  if constexpr (std::is_same_v<T, bfloat16>) {
    typedef uint16_t half_bits __attribute__((vector_size(ISA_VECTOR_BYTES / 2)));
    typedef uint32_t full_bits __attribute__((vector_size(ISA_VECTOR_BYTES)));
    half_bits h;
    std::memcpy(&h, p, sizeof h);
    return reinterpret_cast<V>(__builtin_convertvector(h, full_bits) << 16);
  } else {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
}

template <class T>
INLINE void store(T* p, vec<compute_t<T>> v) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    typedef uint16_t half_bits __attribute__((vector_size(ISA_VECTOR_BYTES / 2)));
    typedef uint32_t full_bits __attribute__((vector_size(ISA_VECTOR_BYTES)));
    const full_bits bits = reinterpret_cast<full_bits>(v);
    const full_bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const full_bits quiet_nan = full_bits{} + 0x7fc0;
    const half_bits h = __builtin_convertvector(v == v ? rounded : quiet_nan, half_bits);
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
  }
#endif
  T buffer[kLanes<T>];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

// ---- arithmetic -------------------------------------------------------------------------------------------------

// maximum/minimum: where either is NaN the second argument comes back, as the x86 instructions do.
INLINE vec<float> maximum(vec<float> a, vec<float> b) {
#if ISA_VECTOR_BYTES == 64
  return reinterpret_cast<vec<float>>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif ISA_VECTOR_BYTES == 32
  return reinterpret_cast<vec<float>>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}
INLINE vec<double> maximum(vec<double> a, vec<double> b) {
#if ISA_VECTOR_BYTES == 64
  return reinterpret_cast<vec<double>>(_mm512_max_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b)));
#elif ISA_VECTOR_BYTES == 32
  return reinterpret_cast<vec<double>>(_mm256_max_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b)));
#else
  return a > b ? a : b;
#endif
}
template <class V>
INLINE V minimum(V a, V b) {
  return -maximum(-a, -b);
}
template <class V>
INLINE V absolute(V x) {
  return x < 0 ? -x : x;
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

// ---- exp, tanh, sigmoid -----------------------------------------------------------------------------------------

// x = n ln 2 + r, |r| <= ln 2 / 2; e^x = 2^n p(r). The power of two is added to the exponent bits of p(r).
// Below the smallest normal number the result is 0; above the largest it is inf; NaN stays NaN.
INLINE vec<float> exp(vec<float> x) {
  typedef int32_t ints __attribute__((vector_size(ISA_VECTOR_BYTES)));
  constexpr float kLow = -87.33f, kHigh = 88.72283f, kMagic = 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
  const vec<float> clamped = x > kHigh ? broadcast(kHigh) : (x < kLow ? broadcast(kLow) : x);
  const vec<float> shifted = clamped * 1.44269504088896341f + kMagic;
  const vec<float> n = shifted - kMagic;
  vec<float> r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const ints power = reinterpret_cast<ints>(shifted) << 23;
  const vec<float> scaled = reinterpret_cast<vec<float>>(reinterpret_cast<ints>(p) + power);
  const vec<float> finite = x < kLow ? vec<float>{} : (x > kHigh ? broadcast(std::numeric_limits<float>::infinity()) : scaled);
  return x == x ? finite : x;
}

INLINE vec<double> exp(vec<double> x) {
  typedef int64_t ints __attribute__((vector_size(ISA_VECTOR_BYTES)));
  constexpr double kLow = -708.39, kHigh = 709.782712893384, kMagic = 6755399441055744.0;  // 1.5 * 2^52
  const vec<double> clamped = x > kHigh ? broadcast(kHigh) : (x < kLow ? broadcast(kLow) : x);
  const vec<double> shifted = clamped * 1.4426950408889634 + kMagic;
  const vec<double> n = shifted - kMagic;
  vec<double> r = clamped - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  // Taylor series to r^13 / 13!: the first term left out is below 2^-57 for |r| <= ln 2 / 2.
  constexpr double kInverseFactorial[] = {1.6059043836821613e-10, 2.08767569878681e-9,   2.505210838544172e-8,  2.755731922398589e-7,
                                          2.7557319223985893e-6,  2.48015873015873e-5,   1.984126984126984e-4,  1.388888888888889e-3,
                                          8.333333333333333e-3,   4.1666666666666664e-2, 1.6666666666666666e-1, 0.5};
  vec<double> p = broadcast(kInverseFactorial[0]);
#pragma GCC unroll 16
  for (int i = 1; i < 12; ++i) p = p * r + kInverseFactorial[i];
  p = p * (r * r) + r + 1.0;
  const ints power = reinterpret_cast<ints>(shifted) << 52;
  const vec<double> scaled = reinterpret_cast<vec<double>>(reinterpret_cast<ints>(p) + power);
  const vec<double> finite = x < kLow ? vec<double>{} : (x > kHigh ? broadcast(std::numeric_limits<double>::infinity()) : scaled);
  return x == x ? finite : x;
}

template <class V>
INLINE V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}

// Odd polynomial (float) or rational (double) near 0, where 1 - 2 / (e^2|x| + 1) would lose the relative accuracy.
INLINE vec<float> tanh(vec<float> x) {
  const vec<float> a = absolute(x), z = x * x;
  vec<float> p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vec<float> near = x + x * z * p;
  const vec<float> far = 1 - 2 / (exp(2 * a) + 1);
  return a < 0.625f ? near : (x < 0 ? -far : far);
}
INLINE vec<double> tanh(vec<double> x) {
  const vec<double> a = absolute(x), z = x * x;
  const vec<double> p = (z * -9.64399179425052238628e-1 - 9.92877231001918586564e1) * z - 1.61468768441708447952e3;
  const vec<double> q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3;
  const vec<double> near = x + x * z * (p / q);
  const vec<double> far = 1 - 2 / (exp(2 * a) + 1);
  return a < 0.625 ? near : (x < 0 ? -far : far);
}
