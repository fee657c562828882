// Activations on vectors and their derivatives. Included by for_each_isa.h inside the namespace of each instruction set.

// Moshier's Cephes erff: an odd polynomial up to 1, beyond it 1 - e^(-x^2) P(1/x^2) / x. Absolute error below 1e-7.
INLINE vec<float> erf(vec<float> x) {
  const vec<float> a = absolute(x), z = x * x;
  vec<float> p = z * 7.853861353153693e-5f - 8.010193625184903e-4f;
  p = p * z + 5.188327685732524e-3f;
  p = p * z - 2.685381193529856e-2f;
  p = p * z + 1.128358514861418e-1f;
  p = p * z - 3.761262582423300e-1f;
  p = p * z + 1.128379165726710f;
  const vec<float> near = x * p;
  const vec<float> inverse = 1 / (a > 1.0f ? a : broadcast(1.0f)), t = inverse * inverse;
  constexpr float kMiddle[] = {2.326819970068386e-2f,  -1.387039388740657e-1f, 3.687424674597105e-1f,
                               -5.824733027278666e-1f, 6.210004621745983e-1f,  -4.944515323274145e-1f,
                               3.404879937665872e-1f,  -2.741127028184656e-1f, 5.638259427386472e-1f};
  constexpr float kFar[] = {-1.047766399936249e+1f, 1.297719955372516e+1f, -7.495518717768503e+0f, 2.921019019210786e+0f,
                            -1.015265279202700e+0f, 4.218463358204948e-1f, -2.820767439740514e-1f, 5.641895067754075e-1f};
  vec<float> middle = broadcast(kMiddle[0]), far = broadcast(kFar[0]);
#pragma GCC unroll 8
  for (int i = 1; i < 9; ++i) middle = middle * t + kMiddle[i];
#pragma GCC unroll 8
  for (int i = 1; i < 8; ++i) far = far * t + kFar[i];
  const vec<float> tail = 1 - exp(-z) * inverse * (a < 2.0f ? middle : far);
  return a < 1.0f ? near : (x < 0 ? -tail : x == x ? tail : x);
}

// The C library's, lane by lane: double precision is there to check the gradients, not for speed.
INLINE vec<double> erf(vec<double> x) {
  constexpr int W = kLanes<double>;
#pragma GCC unroll 8
  for (int i = 0; i < W; ++i) x[i] = std::erf(x[i]);
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
  using T = lane_t<V>;
  if constexpr (kActivation == Activation::relu) return z < 0 ? V{} : z;
  if constexpr (kActivation == Activation::leaky_relu) return z < 0 ? z * slope : z;
  if constexpr (kActivation == Activation::tanh) return tanh(z);
  if constexpr (kActivation == Activation::sigmoid) return sigmoid(z);
  if constexpr (kActivation == Activation::gelu) return z * (erf(z * static_cast<T>(0.70710678118654752440)) + 1) * static_cast<T>(0.5);
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
    const V cdf = (erf(known * static_cast<T>(0.70710678118654752440)) + 1) * static_cast<T>(0.5);
    return cdf + known * exp(known * known * static_cast<T>(-0.5)) * static_cast<T>(0.39894228040143267794);
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
