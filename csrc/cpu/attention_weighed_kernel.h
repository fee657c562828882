// p and ds of a row of the backward, a vector of keys at a time, as they are rounded or stored.

// The p that dv takes and ds, as GradBlock::weigh_row leaves them at once.
template <class T>
struct Finished {
  const T *p, *ds;
  INLINE std::pair<vec<T>, vec<T>> at(int64_t j) const { return {load(p + j), load(ds + j)}; }
};

// What GradBlock::weigh_row leaves of a row otherwise, and the two numbers that were not known before its end.
template <bool featured, class T>
struct Weighed {
  const T *p, *dp, *slope;
  T* bias_row;
  vec<T> factor, delta;
  bool dropped;

  // The p that dv takes, and ds, at key j.
  INLINE std::pair<vec<T>, vec<T>> at(int64_t j) const {
    const vec<T> signed_p = load(p + j);
    vec<T> weight = signed_p * factor, probability = weight;
    if constexpr (featured) {
      if (dropped) {
        const auto drop = reinterpret_cast<ints<T>>(signed_p) < 0;
        probability = drop ? -weight : weight;
        weight = drop ? vec<T>{} : weight;
      }
    }
    vec<T> gradient = probability * (load(dp + j) - delta);
    if constexpr (featured) {
      if (bias_row) add_to_sums<T>(bias_row + j, signed_p, gradient);
      if (slope) gradient *= load(slope + j);
    }
    return {weight, signed_p == 0 ? vec<T>{} : gradient};
  }
};
