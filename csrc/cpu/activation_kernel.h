// Activations on vectors and their derivatives. Included by for_each_isa.h inside the namespace of each instruction set.

// The distribution function of the normal distribution. Below 0 it is e^P(|x|), beyond -6, where it is 1e-9, 0; P was fitted to its
// logarithm so that neither the result nor its product with x is off by more than 3e-9, to which the arithmetic adds half a step at 0.5.
// (By a polynomial near 0 and two quotients of erf beyond it took twice as long.)
INLINE vec<float> normal_cdf(vec<float> x) {
  constexpr float kLogarithm[] = {3.0569833597837714e-7f, -5.933297416049754e-6f, 4.805260323337279e-5f,  -1.855099108070135e-4f,
                                  -8.986845386971254e-6f, 4.822724498808384e-3f,  -3.635455295443535e-2f, -3.18305641412735e-1f,
                                  -7.978849411010742e-1f, -6.931471824645996e-1f};
  const vec<float> a = absolute(x);
  vec<float> p = broadcast(kLogarithm[0]);
#pragma GCC unroll 9
  for (int i = 1; i < 10; ++i) p = p * a + kLogarithm[i];
  const ExpParts<vec<float>> e = exp_parts(p);
  const vec<float> below = a < 6.0f ? e.scale + e.scale * e.minus_one : vec<float>{};
  return x < 0 ? below : 1 - below;
}

// The C library's, lane by lane: double precision is there to check the gradients, not for speed.
INLINE vec<double> normal_cdf(vec<double> x) {
  constexpr int W = kLanes<double>;
#pragma GCC unroll 8
  for (int i = 0; i < W; ++i) x[i] = 0.5 * std::erfc(x[i] * -0.70710678118654752440);
  return x;
}

// The larger; a NaN beats every number. Of a NaN and a number the two maxima are one each, and a number's bits in those of a
// NaN leave a NaN; otherwise they are the same.
template <class V>
INLINE V larger(V a, V b) {
  using bits = typename bits_of<V>::type;
  return reinterpret_cast<V>(reinterpret_cast<bits>(maximum(a, b)) | reinterpret_cast<bits>(maximum(b, a)));
}

// A non-decreasing activation may follow a max-pool instead of preceding it.
INLINE bool is_monotone(Activation a) { return a != Activation::gelu && a != Activation::silu && a != Activation::tanh_sigmoid; }

// The derivative of these is known from the activation's value; the others need what came before.
INLINE bool derivative_from_output(Activation a) { return is_monotone(a); }

template <Activation kActivation, class V>
INLINE V activate(V z, lane_t<V> slope) {
  if constexpr (kActivation == Activation::relu) return z < 0 ? V{} : z;
  if constexpr (kActivation == Activation::leaky_relu) return z < 0 ? z * slope : z;
  if constexpr (kActivation == Activation::tanh) return tanh(z);
  if constexpr (kActivation == Activation::sigmoid) return sigmoid(z);
  if constexpr (kActivation == Activation::gelu) return z * normal_cdf(z);
  if constexpr (kActivation == Activation::silu) return z / (1 + exp(-z));
  return z;
}

// d activation / d z (`slope`: of the leaky ReLU); `known` is the activation's value, or z where derivative_from_output is false.
template <Activation kActivation, class V>
INLINE V derivative(V known, lane_t<V> slope) {
  using T = lane_t<V>;
  const V one = V{} + 1;
  if constexpr (kActivation == Activation::relu) return known <= 0 ? V{} : one;
  if constexpr (kActivation == Activation::leaky_relu) return known > 0 ? one : broadcast(slope);
  if constexpr (kActivation == Activation::tanh) return 1 - known * known;
  if constexpr (kActivation == Activation::sigmoid) return known * (1 - known);
  if constexpr (kActivation == Activation::gelu) {
    return normal_cdf(known) + known * exp(known * known * static_cast<T>(-0.5)) * static_cast<T>(0.39894228040143267794);
  }
  if constexpr (kActivation == Activation::silu) {
    const V s = 1 / (1 + exp(-known));  // 0 from -88 on, where sigmoid() is the smallest number: known times that is not
    return s * (1 + known * (1 - s));
  }
  return one;
}

// Calls f with the activation as a compile-time constant: f(std::integral_constant<Activation, ..>). The gated one is a
// function of two channels and is not among them.
template <class F>
INLINE void with_activation(Activation a, F f) {
  switch (a) {
#define CASE(name) \
  case Activation::name: return f(std::integral_constant<Activation, Activation::name>{});
    CASE(relu)
    CASE(leaky_relu)
    CASE(tanh)
    CASE(sigmoid)
    CASE(gelu)
    CASE(silu)
    default: return f(std::integral_constant<Activation, Activation::none>{});
#undef CASE
  }
}

template <class T>
NOINLINE void activate_vectors(vec<T>* z, int count, Activation a, T slope) {
  with_activation(a, [&](auto kind) {
    for (int i = 0; i < count; ++i) z[i] = activate<kind.value>(z[i], slope);
  });
}

// An activation chosen at run time, for large code that is not worth a copy for each: none and relu are one comparison.
template <class T>
struct AnyActivation {
  Activation kind;
  T slope, floor;
  AnyActivation(Activation kind, T slope)
      : kind(kind), slope(slope), floor(kind == Activation::relu ? T(0) : -std::numeric_limits<T>::infinity()) {}
  bool is_floor() const { return kind == Activation::none || kind == Activation::relu; }
  INLINE vec<T> at_floor(vec<T> z) const { return z < floor ? broadcast(floor) : z; }
  INLINE vec<T> operator()(vec<T> z) const {
    if (__builtin_expect(is_floor(), 1)) return at_floor(z);
    vec<T> copy[1] = {z};
    activate_vectors<T>(copy, 1, kind, slope);
    return copy[0];
  }
};
