// The forward for at most kFewRows rows of a group, as in decoding: keys and values are read once, where they lie, for all of the rows.
// A task is one group (a sequence and a key/value head) and a part of its keys; parts are merged in order, and how many
// there are depends on the lengths alone.
//
// A vector of scores holds R rows (a power of two, as many as there are or more) of W / R keys: lane key * R + row. Its W sums are
// reduced together, and the softmax needs no step across lanes but one for each block of keys.
// While a block's scores are computed the next block's values come into the second-level cache, and while values are added up its keys:
// the first-level cache has too few places for lines that are on their way from memory, and sums would wait for one.
//
// Floor: the bytes of the caches at the speed memory is read with (50 GB/s on two Zen 5 cores, of which one reaches 42; on two Zen 4 cores
// 30 in pages of 4 KiB), as long as the products, 4 R D operations for each key, take less. For 8 rows of depth 128 in float32 those take
// 64 cycles a key and core (128 on Zen 4), sums across lanes and softmax some 25, and reading 1 KiB 160 where two cores share the memory.

constexpr int64_t kFewKeys = 32;  // keys of a block: 16 KiB of depth 128 in float32, and as much of values, fit the first-level cache

// Whether keys and values are read where they lie: with more rows, or fewer keys, packing them for whole tiles takes less time.
inline bool read_in_place(const AttentionArgs& a) {
  return a.group_rows() <= 4 || (a.group_rows() <= kFewRows && a.k_len >= 2 * kFewKeys);
}

// Where a block of keys lies: a pointer to each of its rows.
template <class C>
struct KeyRows {
  const C *keys[kFewKeys], *values[kFewKeys];
};

// Walks the rows of the caches of one sequence and key/value head.
class CacheWalk {
 public:
  CacheWalk(const AttentionArgs& args, const AttentionCache* in_pages, int64_t b, int64_t h) : a(args), cache(in_pages), batch(b), head(h) {}

  // Calls row(i, page, position) for keys first + i, 0 <= i < count.
  template <class Row>
  INLINE void each(int64_t first, int64_t count, Row row) const {
    if (!cache || !cache->table) {
      for (int64_t i = 0; i < count; ++i) row(i, batch, first + i);
      return;
    }
    const int64_t* page = cache->table + batch * cache->table_row + first / cache->page_size;
    int64_t position = first % cache->page_size;
    for (int64_t i = 0; i < count; ++i, ++position) {
      if (position == cache->page_size) position = 0, ++page;
      row(i, *page, position);
    }
  }

  // Rows past the last key point to it: they are read and left out.
  template <class C>
  INLINE void find(KeyRows<C>& rows, int64_t first, int64_t count) const {
    each(first, count, [&](int64_t i, int64_t page, int64_t position) {
      rows.keys[i] = a.k.at<C>(page, head, position);
      rows.values[i] = a.v.at<C>(page, head, position);
    });
    for (int64_t i = count; i < kFewKeys; ++i) rows.keys[i] = rows.keys[count - 1], rows.values[i] = rows.values[count - 1];
  }

  const AttentionArgs& a;
  const AttentionCache* cache;
  const int64_t batch, head;
};

template <class T, class Q>
struct FewScratch {
  const int64_t padded_depth, padded_value;
  Scratch<Q> q;                       // [kFewRows][padded]
  Scratch<T> o;                       // [kFewRows][padded]
  Scratch<T> keys, values;            // [kFewKeys][padded]: rows that cannot be read where they lie
  alignas(64) T s[kFewKeys * kFewRows];      // scores, then probabilities: [set of W rows][key][R]
  alignas(64) T extra[kFewKeys * kFewRows];  // biases, then what is kept of dropout; laid out in the same way
  vec<T> m[kFewRows], l[kFewRows], alpha[kFewRows];  // of each set of rows, in every key's lanes; l is summed by lane
  T largest[kFewRows], sum[kFewRows];                // m and l by row, at the end
  int64_t last_lo, first_hi;                         // keys between them are attended by all rows

  FewScratch(const AttentionArgs& a, bool copied)
      : padded_depth(round_up(a.head_dim, kLanes<T>)),
        padded_value(round_up(a.value_dim, kLanes<T>)),
        q(kFewRows * padded_depth),
        o(kFewRows * padded_value),
        keys(copied ? kFewKeys * padded_depth : 0),
        values(copied ? kFewKeys * padded_value : 0) {}
};

// W elements of a cache of 8 bits. float8_e4m3fn has the bits of a float with a bias 120 lower, and no infinities.
template <class C>
INLINE auto load_cache(const C* p) {
  if constexpr (sizeof(C) > 1) {
    return load(p);
  } else {
    using number = std::conditional_t<std::is_same_v<C, int8_t>, int8_t, uint8_t>;
    typedef number bytes __attribute__((vector_size(ISA_VECTOR_BYTES / 4)));
    typedef int32_t words __attribute__((vector_size(ISA_VECTOR_BYTES)));
    bytes b;
    std::memcpy(&b, p, sizeof b);
    const words wide = reinterpret_cast<words>(widen(b));
    if constexpr (std::is_same_v<C, int8_t>) {
      return __builtin_convertvector(wide, vec<float>);
    } else {
      const vec<float> size = reinterpret_cast<vec<float>>((wide & 0x7f) << 20) * 0x1p120f;
      const vec<float> value = reinterpret_cast<vec<float>>(reinterpret_cast<words>(size) | ((wide & 0x80) << 24));
      return (wide & 0x7f) == 0x7f ? broadcast(std::numeric_limits<float>::quiet_NaN()) : value;
    }
  }
}

// One row of n elements times `scale`, padded with zeros.
template <class T, class C>
inline void copy_cache_row(T* out, const C* row, int64_t stride, int64_t n, int64_t padded, T scale) {
  constexpr int64_t W = kLanes<T>;
  for (int64_t d = 0; d < padded; d += W) {
    if (stride == 1 && d + W <= n) {
      store(out + d, load_cache(row + d) * scale);
      continue;
    }
    C some[W] = {};
    for (int64_t i = 0; i < std::min(W, n - d); ++i) some[i] = row[(d + i) * stride];
    store(out + d, load_cache(some) * scale);
  }
}

// A block of rows copied to the compute type, each times its scale where the cache has scales.
template <class C, class T, class Q>
inline void copy_block(const CacheWalk& walk, int64_t first, int64_t count, FewScratch<T, Q>& x) {
  const AttentionArgs& a = walk.a;
  const bool scaled = walk.cache && walk.cache->k_scale.data;
  walk.each(first, count, [&](int64_t i, int64_t page, int64_t position) {
    const T k_scale = scaled ? *walk.cache->k_scale.template at<float>(page, walk.head, position) : T(1);
    const T v_scale = scaled ? *walk.cache->v_scale.template at<float>(page, walk.head, position) : T(1);
    copy_cache_row(x.keys + i * x.padded_depth, a.k.template at<C>(page, walk.head, position), a.k.stride[3], a.head_dim, x.padded_depth,
                   k_scale);
    copy_cache_row(x.values + i * x.padded_value, a.v.template at<C>(page, walk.head, position), a.v.stride[3], a.value_dim,
                   x.padded_value, v_scale);
  });
}

// s[key][R] = the products of R rows of q with `count` keys, times `factor`. Meanwhile their values come into the first-level cache and
// those of the block ahead into the second.
template <int R, class T, class Q, class C>
void multiply_keys(const Q* q, int64_t ld, const KeyRows<C>& rows, const KeyRows<C>& ahead, int64_t count, int64_t depth, T factor, T* s) {
  constexpr int W = kLanes<T>, K = W / R;
  for (int64_t j = 0; j < count; j += K) {
    vec<T> sums[W];
    const C *key[K], *value[K], *value_ahead[K];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) sums[i] = vec<T>{};  // one by one: initialised as an array they live in memory
#pragma GCC unroll 16
    for (int i = 0; i < K; ++i) key[i] = rows.keys[j + i], value[i] = rows.values[j + i], value_ahead[i] = ahead.values[j + i];
    for (int64_t d = 0; d < depth; d += kTerms<Q>) {
      vec<T> k[K];
#pragma GCC unroll 16
      for (int i = 0; i < K; ++i) {
        k[i] = load_operand<Q>(key[i] + d);
        __builtin_prefetch(value[i] + d);
        __builtin_prefetch(value_ahead[i] + d, 0, 2);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vec<T> qd = load_operand<Q>(q + r * ld + d);
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) add_product<Q>(sums[i * R + r], qd, k[i]);
      }
    }
    store(s + j * R, sum_each<T>(sums) * factor);
  }
}

// o = o alpha + p values, N rows and V vectors of columns at a time; meanwhile the keys of the block ahead come into the second-level
// cache.
template <int R, int N, int V, class T, class C>
void add_values(T* o, int64_t value_ld, const T* p, const KeyRows<C>& rows, const KeyRows<C>& ahead, int64_t count, int64_t column,
                const T* alpha) {
  constexpr int W = kLanes<T>;
  vec<T> sums[N][V];
#pragma GCC unroll 8
  for (int r = 0; r < N; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) sums[r][i] = vec<T>{};
  for (int64_t j = 0; j < count; ++j) {
    vec<T> v[V];
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) {
      v[i] = load(rows.values[j] + column + i * W);
      __builtin_prefetch(ahead.keys[j] + column + i * W, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < V; ++i) sums[r][i] += p[j * R + r] * v[i];
  }
#pragma GCC unroll 8
  for (int r = 0; r < N; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) {
      T* at = o + r * value_ld + column + i * W;
      store(at, load(at) * alpha[r] + sums[r][i]);
    }
}

// The same row by row and key by key, where something that a row leaves out is an infinity or a NaN.
template <int R, class T, class C>
void add_values_apart(T* o, int64_t value_ld, const T* p, const KeyRows<C>& rows, int64_t count, int64_t row_count, const T* alpha) {
  constexpr int W = kLanes<T>;
  for (int64_t r = 0; r < row_count; ++r)
    for (int64_t d = 0; d < value_ld; d += W) {
      vec<T> sum = {};
      for (int64_t j = 0; j < count; ++j)
        if (p[j * R + r] != 0) sum += p[j * R + r] * load(rows.values[j] + d);
      T* at = o + r * value_ld + d;
      store(at, load(at) * alpha[r] + sum);
    }
}

template <class T, class C>
inline bool values_finite(const KeyRows<C>& rows, int64_t count, int64_t value_ld) {
  vec<T> poison = {};
  for (int64_t j = 0; j < count; ++j)
    for (int64_t d = 0; d < value_ld; d += kLanes<T>) poison += load(rows.values[j] + d) * 0;
  return reduce_add(poison) == 0;
}

// The largest of the lanes of each row (or their sum), in all lanes of the row.
template <int R, class T, class Combine>
INLINE vec<T> across_keys(vec<T> x, Combine combine) {
  const ints<T> lane = lane_numbers<T>();
#pragma GCC unroll 4
  for (int step = R; step < kLanes<T>; step *= 2) x = combine(x, __builtin_shuffle(x, lane ^ step));
  return x;
}

// extra[key][R] of rows first .. first + R: what `read(row of numbers, r)` gives for row r, `otherwise` for rows that are not there.
template <int R, class T, class Read>
inline void spread_rows(T* extra, int64_t rows, int64_t count, T otherwise, Read read) {
  T row[2 * kBlockKeys];
  for (int64_t r = 0; r < R; ++r) {
    if (r < rows)
      read(row, r);
    else
      std::fill(row, row + count, otherwise);
    for (int64_t j = 0; j < count; ++j) extra[j * R + r] = row[j];
  }
}

// A block of keys k0 .. k0 + count against rows first .. first + R, as far as there are any. C: the type that the rows are read as.
template <int R, class S, class T, class Q, class C>
inline void attend_block(const AttentionArgs& a, const RowBlock<T>& rows, const Scores<T>& scores, int64_t first, int64_t k0, int64_t count,
                         const KeyRows<C>& at, const KeyRows<C>& ahead, FewScratch<T, Q>& x) {
  constexpr int W = kLanes<T>, K = W / R;
  const int64_t set = first / W, present = std::min<int64_t>(R, rows.count - first), vectors = (count + K - 1) / K;
  const vec<T> lowest = broadcast(-std::numeric_limits<T>::infinity());
  const ints<T> lane = lane_numbers<T>();
  using Lane = lane_t<ints<T>>;
  T *s = x.s + set * kFewKeys * W, *o = x.o + first * x.padded_value;

  multiply_keys<R, T>(x.q.get() + first * x.padded_depth, x.padded_depth, at, ahead, count, x.padded_depth, scores.factor, s);

  const bool all = count % K == 0 && k0 >= x.last_lo && k0 + count <= x.first_hi;  // every row attends to every key of the block
  ints<T> lo = {}, hi = {};
  if (!all)
    for (int i = 0; i < W; ++i) {
      const int64_t r = std::min<int64_t>(first + i % R, rows.count - 1);
      lo[i] = static_cast<Lane>(std::clamp<int64_t>(rows.lo[r] - k0, 0, count));
      hi[i] = static_cast<Lane>(std::clamp<int64_t>(rows.hi[r] - k0, 0, count));
    }
  if (scores.capped)
    for (int64_t v = 0; v < vectors; ++v) store(s + v * W, tanh(load(s + v * W)) * scores.cap);
  if (scores.biased)
    spread_rows<R>(x.extra, present, count, T(0), [&](T* row, int64_t r) { read_bias(row, a, rows, first + r, k0, count); });
  vec<T> largest = lowest;
  for (int64_t v = 0; v < vectors; ++v) {
    vec<T> score = load(s + v * W);
    if (scores.biased) {
      const vec<T> bias = load(x.extra + v * W);
      score = bias == lowest ? lowest : score + bias;
    }
    if (!all) {
      const ints<T> key = lane / R + static_cast<Lane>(v * K);
      score = ((key >= lo) & (key < hi)) ? score : lowest;
    }
    store(s + v * W, score);
    largest = maximum(largest, score);
  }
  largest = across_keys<R, T>(largest, [](vec<T> u, vec<T> v) __attribute__((always_inline)) { return maximum(u, v); });
  const vec<T> new_m = maximum(x.m[set], largest), reference = new_m == lowest ? vec<T>{} : new_m;
  const vec<T> factor = exp_nonpositive<T>(x.m[set] - reference);
  x.m[set] = new_m;
  x.alpha[set] = factor;
  vec<T> sum = {};
  for (int64_t v = 0; v < vectors; ++v) {
    const vec<T> p = exp_nonpositive<T>(load(s + v * W) - reference);
    sum += p;
    store(s + v * W, p);
  }
  x.l[set] = x.l[set] * factor + sum;
  if (scores.dropped) {
    spread_rows<R>(x.extra, present, count, T(0), [&](T* row, int64_t r) {
      const int64_t from = k0 / 64 * 64;
      T kept[2 * kBlockKeys];
      read_dropout(kept, a, rows, first + r, from, k0 - from + count);
      std::copy(kept + (k0 - from), kept + (k0 - from) + count, row);
    });
    for (int64_t v = 0; v < vectors; ++v) store(s + v * W, load(x.extra + v * W) == 0 ? vec<T>{} : load(s + v * W));
  }

  alignas(64) T alpha[W];
  store(alpha, factor);
  if ((!all || scores.biased || scores.dropped) && !values_finite<T>(at, count, x.padded_value))
    return add_values_apart<R>(o, x.padded_value, s, at, count, present, alpha);
  constexpr int N = std::min(R, 8), V = N == 8 ? 2 : 4;
  for (int64_t r = 0; r < R; r += N) {
    int64_t column = 0;
    for (; column + V * W <= x.padded_value; column += V * W)
      add_values<R, N, V>(o + r * x.padded_value, x.padded_value, s + r, at, ahead, count, column, alpha + r);
    for (; column < x.padded_value; column += W)
      add_values<R, N, 1>(o + r * x.padded_value, x.padded_value, s + r, at, ahead, count, column, alpha + r);
  }
}

// All rows of a group against keys [k_begin, k_end).
template <int R, class S, class T, class Q>
inline void attend_few(const AttentionArgs& a, const AttentionCache* cache, const RowBlock<T>& rows, int64_t group, int64_t k_begin,
                       int64_t k_end, FewScratch<T, Q>& x, bool copied) {
  constexpr int64_t W = kLanes<T>;
  const CacheWalk walk(a, cache, group / a.kv_heads, group % a.kv_heads);
  const Scores<T> scores(a);
  const int64_t sets = (rows.count + W - 1) / W;
  for (int64_t i = 0; i < sets; ++i) x.m[i] = broadcast(-std::numeric_limits<T>::infinity()), x.l[i] = vec<T>{};
  std::fill(x.o.get(), x.o.get() + sets * R * x.padded_value, T(0));
  for (int64_t r = 0; r < sets * R; ++r) {
    Q* row = x.q + r * x.padded_depth;
    if (r >= rows.count)
      std::fill(row, row + x.padded_depth, Q{});
    else if constexpr (std::is_same_v<Q, T>)
      pack_row<S, T>(row, a.q.at<S>(rows.batch, rows.head[r], rows.query[r]), a.q.stride[3], a.head_dim, x.padded_depth, T(1));
    else
      copy_row(row, a.q.at<S>(rows.batch, rows.head[r], rows.query[r]), a.q.stride[3], a.head_dim, x.padded_depth);
  }
  x.last_lo = *std::max_element(rows.lo, rows.lo + rows.count), x.first_hi = *std::min_element(rows.hi, rows.hi + rows.count);
  const int64_t begin = std::max(k_begin, rows.block_lo / kFewKeys * kFewKeys), end = std::min(k_end, rows.block_hi);
  const auto each_set = [&](int64_t k0, const auto& at, const auto& ahead) {
    for (int64_t i = 0; i < sets; ++i) attend_block<R, S>(a, rows, scores, i * W, k0, std::min(kFewKeys, end - k0), at, ahead, x);
  };
  const auto attend_copies = [&] {
    KeyRows<T> at;
    for (int64_t i = 0; i < kFewKeys; ++i) at.keys[i] = x.keys + i * x.padded_depth, at.values[i] = x.values + i * x.padded_value;
    for (int64_t k0 = begin; k0 < end; k0 += kFewKeys) {
      const int64_t count = std::min(kFewKeys, end - k0);
      const CacheType type = cache ? cache->type : CacheType::same;
      if (type == CacheType::same) copy_block<S>(walk, k0, count, x);
      if constexpr (std::is_same_v<T, float>) {
        if (type == CacheType::int8) copy_block<int8_t>(walk, k0, count, x);
        if (type == CacheType::float8) copy_block<Float8>(walk, k0, count, x);
      }
      each_set(k0, at, at);
    }
  };
  const auto attend_in_place = [&] {
    KeyRows<S> blocks[2];
    if (begin < end) walk.find(blocks[0], begin, std::min(kFewKeys, end - begin));
    for (int64_t k0 = begin, i = 0; k0 < end; k0 += kFewKeys, i ^= 1) {
      const int64_t left = end - k0 - kFewKeys;
      if (left > 0) walk.find(blocks[i ^ 1], k0 + kFewKeys, std::min(kFewKeys, left));
      each_set(k0, blocks[i], left > 0 ? blocks[i ^ 1] : blocks[i]);
    }
  };
  if constexpr (std::is_same_v<Q, T>)
    copied ? attend_copies() : attend_in_place();
  else
    attend_in_place();
  const auto add = [](vec<T> u, vec<T> v) __attribute__((always_inline)) { return u + v; };
  for (int64_t i = 0; i < sets; ++i) {
    alignas(64) T m[W], l[W];
    store(m, x.m[i]);
    store(l, across_keys<R, T>(x.l[i], add));
    const int64_t count = std::min<int64_t>(R, rows.count - i * W);
    std::copy(m, m + count, x.largest + i * W);
    std::copy(l, l + count, x.sum + i * W);
  }
}

// What a task leaves of its part: m[kFewRows], l[kFewRows], o[rows][padded value].
inline int64_t few_state(const AttentionArgs& a, int64_t padded_value) { return 2 * kFewRows + a.group_rows() * padded_value; }

// Merges the parts of a group, in order, and writes o / l and lse, as write_rows does; a row that attends to nothing gets 0 and -inf.
template <class S, class T>
inline void write_few(const AttentionArgs& a, const RowBlock<T>& rows, const T* states, int64_t parts, T* weights, S* out, T* lse,
                      int16_t* rest) {
  constexpr int64_t W = kLanes<T>;
  const int64_t value_ld = round_up(a.value_dim, W), step = few_state(a, value_ld);
  const T infinity = std::numeric_limits<T>::infinity(), kept = static_cast<T>(1 - a.dropout_p);
  for (int64_t r = 0; r < rows.count; ++r) {
    T m = -infinity, l = 0;
    for (int64_t i = 0; i < parts; ++i) m = std::max(m, states[i * step + r]);
    for (int64_t i = 0; i < parts; ++i) {
      const T theirs = states[i * step + r];
      weights[i] = theirs == -infinity ? T(0) : std::exp(theirs - m);
      l += weights[i] * states[i * step + kFewRows + r];
    }
    const T divisor = l == 0 || kept <= 0 ? infinity : l * kept;
    S* row = out + ((rows.batch * a.q_len + rows.query[r]) * a.heads + rows.head[r]) * a.value_dim;
    int16_t* row_rest = rest_of(a, rest, rows.batch, rows.head[r], rows.query[r]);
    for (int64_t d = 0; d < a.value_dim; d += W) {
      vec<T> sum = {};
      for (int64_t i = 0; i < parts; ++i)
        if (weights[i] != 0) sum += weights[i] * load(states + i * step + 2 * kFewRows + r * value_ld + d);
      store_with_rest(row + d, row_rest ? row_rest + d : nullptr, sum / divisor, a.value_dim - d);
    }
    lse[(rows.batch * a.heads + rows.head[r]) * a.lse_stride + rows.query[r]] =
        l == 0 ? -infinity : static_cast<T>(m + std::log(static_cast<double>(l)) - alibi_of_row(a, rows, r));
  }
}

// The arguments of sequence b alone, whose keys may be fewer than others'.
inline AttentionArgs of_sequence(const AttentionArgs& a, const AttentionCache* cache, int64_t b) {
  AttentionArgs one = a;
  if (cache) one.k_len = cache->lengths[b], one.offset = one.k_len - a.q_len;
  return one;
}

// cache: null where all sequences have a.k_len keys, as they lie in a.k.
template <int R, class S>
void attention_few_of(const AttentionArgs& a, const AttentionCache* cache, void* out, void* lse, int16_t* rest) {
  using T = compute_t<S>;
  constexpr int64_t W = kLanes<T>, kWantedTasks = 64, kShortestPart = 4 * kFewKeys, kWorkOfThread = 200000;
  struct Task {
    int64_t group, k_begin, k_end;
  };
  std::vector<Task> tasks;
  std::vector<int64_t> first_task;  // of each group, and the end
  int64_t keys = 0, most_parts = 1;
  const auto range = [&](int64_t b) -> KeyRange {
    const AttentionArgs one = of_sequence(a, cache, b);
    const KeyRange first = key_range(one, 0), last = key_range(one, a.q_len - 1);
    return {first.lo / kFewKeys * kFewKeys, std::max(first.lo / kFewKeys * kFewKeys, last.hi)};
  };
  for (int64_t b = 0; b < a.batch; ++b) keys += range(b).hi - range(b).lo;
  const int64_t part_keys = round_up(std::max(kShortestPart, keys * a.kv_heads / kWantedTasks), kFewKeys);
  for (int64_t group = 0; group < a.groups(); ++group) {
    first_task.push_back(static_cast<int64_t>(tasks.size()));
    const KeyRange all = range(group / a.kv_heads);
    int64_t k0 = all.lo;
    do tasks.push_back({group, k0, std::min(all.hi, k0 + part_keys)});
    while ((k0 += part_keys) < all.hi);
    most_parts = std::max(most_parts, static_cast<int64_t>(tasks.size()) - first_task.back());
  }
  first_task.push_back(static_cast<int64_t>(tasks.size()));

  const bool copied = (cache && cache->type != CacheType::same) || a.k.stride[3] != 1 || a.v.stride[3] != 1 || a.head_dim % W ||
                      a.value_dim % W;
  const int64_t value_ld = round_up(a.value_dim, W), step = few_state(a, value_ld);
  Scratch<T> states(static_cast<int64_t>(tasks.size()) * step);
  T* const state = states.get();
  const int64_t work = a.group_rows() * std::max<int64_t>(1, keys / std::max<int64_t>(1, a.batch)) * (a.head_dim + a.value_dim);
  const int64_t work_of_task = std::max<int64_t>(1, work * a.groups() / std::max<int64_t>(1, static_cast<int64_t>(tasks.size())));
  const auto attend_tasks = [&](int64_t begin, int64_t end, auto zero) {
    FewScratch<T, decltype(zero)> x(a, copied);
    for (int64_t i = begin; i < end; ++i) {
      const Task& task = tasks[i];
      const AttentionArgs one = of_sequence(a, cache, task.group / a.kv_heads);
      const RowBlock<T> rows(one, task.group, 0);
      attend_few<R, S>(one, cache, rows, task.group, task.k_begin, task.k_end, x, copied);
      T* to = state + i * step;
      std::copy(x.largest, x.largest + kFewRows, to);
      std::copy(x.sum, x.sum + kFewRows, to + kFewRows);
      std::copy(x.o.get(), x.o.get() + rows.count * value_ld, to + 2 * kFewRows);
    }
  };
  const int64_t grain = std::max<int64_t>(1, kWorkOfThread / work_of_task);
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), grain, [&](int64_t begin, int64_t end) {
#if ISA_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<S, bfloat16>)
      if (!copied && selected_isa() == Isa::avx512_bf16 && a.head_dim % (2 * W) == 0) return attend_tasks(begin, end, bfloat16{});
#endif
    attend_tasks(begin, end, T(0));
  });
  const int64_t merging = std::max<int64_t>(1, a.group_rows() * most_parts * a.value_dim);
  torch::stable::parallel_for(0, a.groups(), std::max<int64_t>(1, kWorkOfThread / merging), [&](int64_t begin, int64_t end) {
    Scratch<T> weights(most_parts);
    for (int64_t group = begin; group < end; ++group)
      write_few(a, RowBlock<T>(of_sequence(a, cache, group / a.kv_heads), group, 0), state + first_task[group] * step,
                first_task[group + 1] - first_task[group], weights.get(), static_cast<S*>(out), static_cast<T*>(lse), rest);
  });
}

template <class S>
void attention_few(const AttentionArgs& a, const AttentionCache* cache, void* out, void* lse, int16_t* rest) {
  constexpr int W = kLanes<compute_t<S>>;
  if (a.groups() == 0) return;
  const int64_t rows = a.group_rows();
  if constexpr (W >= 16)
    if (rows > 8) return attention_few_of<16, S>(a, cache, out, lse, rest);
  if constexpr (W >= 8)
    if (rows > 4) return attention_few_of<8, S>(a, cache, out, lse, rest);
  if constexpr (W >= 4)
    if (rows > 2) return attention_few_of<4, S>(a, cache, out, lse, rest);
  if (rows > 1) return attention_few_of<2, S>(a, cache, out, lse, rest);
  attention_few_of<1, S>(a, cache, out, lse, rest);
}
