// Dot products of rows as they lie, whose lanes are terms: what several ops share. Included by the kernel headers that use it, inside the
// namespace of each instruction set.

template <class V, size_t... I>
INLINE V interleave_low(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I % 2 ? sizeof...(I) + I / 2 : I / 2)...);
}
template <class V, size_t... I>
INLINE V interleave_high(V a, V b, std::index_sequence<I...>) {
  constexpr size_t half = sizeof...(I) / 2;
  return __builtin_shufflevector(a, b, (I % 2 ? sizeof...(I) + half + I / 2 : half + I / 2)...);
}
// Lane i is what `combine` makes of the lanes of x[i], for kLanes vectors at once: half as many vectors in every round, each
// with the lanes of two interleaved.
template <int kHalf, class T, class Combine>
INLINE void reduce_round(vec<T> (&x)[kLanes<T>], Combine combine) {
  constexpr auto lanes = std::make_index_sequence<kLanes<T>>{};
#pragma GCC unroll 8
  for (int i = 0; i < kHalf; ++i) x[i] = combine(interleave_low(x[i], x[i + kHalf], lanes), interleave_high(x[i], x[i + kHalf], lanes));
  if constexpr (kHalf > 1) reduce_round<kHalf / 2, T>(x, combine);
}
template <class T, class Combine>
INLINE vec<T> reduce_each(vec<T> (&x)[kLanes<T>], Combine combine) {
  reduce_round<kLanes<T> / 2, T>(x, combine);
  return x[0];
}
template <class T>
INLINE vec<T> sum_each(vec<T> (&x)[kLanes<T>]) {
  return reduce_each<T>(x, [](vec<T> a, vec<T> b) __attribute__((always_inline)) { return a + b; });
}
template <class T>
INLINE vec<T> largest_of_each(vec<T> (&x)[kLanes<T>]) {
  return reduce_each<T>(x, [](vec<T> a, vec<T> b) __attribute__((always_inline)) { return maximum(a, b); });
}

// What dot products are taken of. Q: the type of one side; bfloat16, the other side too, for the CPU's dot products of numbers as they lie,
// two to a lane: half as many operations as of numbers converted to floats.
template <class Q>
inline constexpr int kTerms = (std::is_same_v<Q, bfloat16> ? 2 : 1) * kLanes<compute_t<Q>>;  // of an operand

template <class Q, class C>
INLINE auto load_operand(const C* p) {
  if constexpr (std::is_same_v<Q, bfloat16>) {
    vec<float> pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    return pairs;
  } else {
    return load(p);
  }
}
// The first n terms; the others are 0.
template <class Q, class C>
INLINE auto load_operand(const C* p, int64_t n) {
#if ISA_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<Q, bfloat16>)
    return reinterpret_cast<vec<float>>(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p));
  else
#endif
    return load_partial(p, n);
}

template <class Q, class V>
INLINE void add_product(V& sum, V a, V b) {
#if ISA_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<Q, bfloat16>)
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));  // the compiler's function could not be inlined here
  else
#endif
    sum += a * b;
}
