// Kernels that go over rows: a row in vectors, with sums over it. Included inside the namespace of each instruction set.

// body(column, sum, size): with one of kRowSums independent sums to add to, and a size that is a constant but at the row's end.
inline constexpr int kRowSums = 4;
template <class T, class Body>
INLINE void for_each_vector(int64_t columns, Body&& body) {
  constexpr int W = kLanes<T>;
  constexpr std::integral_constant<int, W> whole;
  int64_t j = 0;
  for (; j + kRowSums * W <= columns; j += kRowSums * W)
#pragma GCC unroll 4
    for (int i = 0; i < kRowSums; ++i) body(j + i * W, i, whole);
  for (; j + W <= columns; j += W) body(j, 0, whole);
  if (j < columns) body(j, 0, columns - j);
}

template <class Size>
inline constexpr bool kIsWhole = !std::is_same_v<Size, int64_t>;

template <class S, class Size>
INLINE vec<compute_t<S>> load_size(const S* p, Size n) {
  if constexpr (kIsWhole<Size>)
    return load(p);
  else
    return load_partial(p, n);
}
template <class S, class Size>
INLINE void store_size(S* p, vec<compute_t<S>> v, Size n) {
  if constexpr (kIsWhole<Size>)
    store(p, v);
  else
    store_partial(p, v, n);
}
// v with 0 in the lanes past n.
template <class V, class Size>
INLINE V first_lanes(V v, Size n) {
  if constexpr (kIsWhole<Size>) {
    return v;
  } else {
    lane_t<V> lanes[sizeof(V) / sizeof(lane_t<V>)];
    store(lanes, v);
    return load_partial(lanes, n);
  }
}

template <class V>
INLINE lane_t<V> total(const V (&sums)[kRowSums]) {
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Rows of a task: some 16 thousand elements, below which a thread costs more than it does.
inline int64_t row_grain(int64_t columns) { return std::max<int64_t>(1, (int64_t{1} << 14) / columns); }
