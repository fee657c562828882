// Online softmax over blocks of keys: a block of rows keeps its running maximum m, sum l and output o, and meets one block of keys after
// the other:
//   s = q k^T;  m' = max(m, max s);  p = e^(s - m');  o = o e^(m - m') + p v;  l = l e^(m - m') + sum p
//
// A task is a block of rows and a part of the keys. Parts exist only where there are too few blocks to keep a machine
// busy (decoding); how many depends on the shape alone, and parts are merged in order: results never depend on the
// number of threads.

// Operands of the products are of type A: T, or bfloat16 where it is multiplied in pairs or in tiles. Then q is not scaled yet,
// s holds the scores of a few tiles and p is s rounded; else p is s itself.
template <class T, class A>
struct ForwardScratch {
  static constexpr bool kPaired = kStep<A> == 2;
  static constexpr int64_t kRows = kBlockRows<T>, kMostStripTiles = kPaired ? 4 : 8;
  const bool tiled = kPaired && in_tiles();
  const int64_t strip_tiles = kPaired && !tiled ? 2 : kMostStripTiles;
  const int64_t padded_depth, padded_value;
  Scratch<A> q, rounded;
  Scratch<T> s, o;
  T m[kRows], l[kRows], alpha[kRows];
  T factors[kRows];      // 1 / l, where o is rounded straight to the result
  bool written = false;  // whether it was
  const TileTask tile_task{tiled};

  explicit ForwardScratch(const AttentionArgs& a)
      : padded_depth(row_elements<T>(a.head_dim, tiled)),
        padded_value(round_up(a.value_dim, kLanes<T>)),
        q(kRows * padded_depth),
        rounded(kPaired ? kRows * kBlockKeys : 0),
        s(strip_tiles * kTileRows<T> * kBlockKeys),
        o(kRows * padded_value) {
    static_assert((kPaired ? 2 : kMostStripTiles) * kTileRows<T> % kLanes<T> == 0);  // rows are softmaxed a vector of them at a time
  }

  // The probabilities of row r of the block.
  A* p(int64_t r) {
    if constexpr (kPaired)
      return rounded + r * kBlockKeys;
    else
      return s + r * kBlockKeys;
  }

  void start() {
    std::fill(m, m + kRows, -std::numeric_limits<T>::infinity());
    std::fill(l, l + kRows, T(0));
  }
  // Of rows begin .. end, whole vectors of them; `kept` of l is not dropped.
  void find_factors(int64_t begin, int64_t end, T kept) {
    for (int64_t r = begin; r < end; r += kLanes<T>) {
      const vec<T> sums = load(l + r) * kept;
      store(factors + r, sums == 0 ? sums : 1 / sums);
    }
  }
  void clear_output(int64_t begin, int64_t end) { std::fill(o + begin * padded_value, o + end * padded_value, T(0)); }
};

// Keys and values of one group, packed once for all of its rows.
template <class T, class A>
struct PackedGroup {
  static constexpr bool kPaired = kStep<A> == 2;
  const int64_t depth;  // D in whole steps
  Scratch<A> keys;      // panels of [depth][kPanel], in pairs [depth / 2][kPanel][2]
  Scratch<A> values;    // [Sk][padded Dv], in pairs [Sk / 2][padded Dv][2]
  SetAside<T> aside;
  int64_t group = -1, begin = 0, end = 0;

  PackedGroup(const AttentionArgs& a, int64_t most_keys)
      : depth(round_up(a.head_dim, kPaired && in_tiles() ? kTileSteps : kStep<A>)),
        keys(round_up(most_keys, kPanel<T>) * depth),
        values(round_up(most_keys, kPaired ? kTileSteps : 1) * round_up(a.value_dim, kLanes<T>)) {}

  template <class S>
  void pack(const AttentionArgs& a, int64_t new_group, int64_t k_begin, int64_t k_end) {
    if (group == new_group && begin == k_begin && end == k_end) return;
    group = new_group, begin = k_begin, end = k_end;
    const int64_t b = group / a.kv_heads, h = group % a.kv_heads, value_ld = round_up(a.value_dim, kLanes<T>);
    const S *k = a.k.at<S>(b, h, begin), *v = a.v.at<S>(b, h, begin);
    aside.clear();
    pack_transposed(keys.get(), k, a.k.stride[2], a.k.stride[3], end - begin, a.head_dim, depth);
    pack_rows(values.get(), v, a.v.stride[2], a.v.stride[3], end - begin, a.value_dim, value_ld, begin, aside);
    if constexpr (kPaired) pad_rows(values, end - begin, value_ld);
  }
};

// The scores of a row for one block of keys, s[begin, end): whole vectors, of which [lo, hi) are the keys attended.
template <class T>
struct ScoreRow {
  T* s;
  int64_t begin, end, lo, hi;
};

// Turns products into scores; gives the largest of each lane.
template <class T>
INLINE vec<T> finish_scores(const ScoreRow<T>& row, const Scores<T>& scores) {
  constexpr int64_t W = kLanes<T>;
  const int64_t whole_begin = std::clamp(round_up(row.lo, W), row.begin, row.end);
  const int64_t whole_end = std::clamp(row.hi / W * W, whole_begin, row.end);
  T* s = row.s;
  vec<T> largest = broadcast(-std::numeric_limits<T>::infinity());
  const auto partial = [&](int64_t j) {
    const vec<T> x = limit<T>(scores.finish(load(s + j), j), j, row.lo, row.hi);
    store(s + j, x);
    largest = maximum(largest, x);
  };
  if (scores.capped)
    for (int64_t j = row.begin; j < row.end; j += W) store(s + j, tanh(load(s + j)) * scores.cap);
  for (int64_t j = row.begin; j < whole_begin; j += W) partial(j);
  if (scores.biased) {
    for (int64_t j = whole_begin; j < whole_end; j += W) {
      const vec<T> x = scores.finish(load(s + j), j);
      store(s + j, x);
      largest = maximum(largest, x);
    }
  } else {
#pragma GCC unroll 4
    for (int64_t j = whole_begin; j < whole_end; j += W) largest = maximum(largest, load(s + j));
  }
  for (int64_t j = whole_end; j < row.end; j += W) partial(j);
  return largest;
}

// Turns scores into probabilities relative to e^reference, drops some, and gives their sums by lane, those dropped included.
template <class T>
INLINE vec<T> exponentiate(const ScoreRow<T>& row, const Scores<T>& scores, T reference) {
  constexpr int64_t W = kLanes<T>;
  vec<T> sum = {};
#pragma GCC unroll 4
  for (int64_t j = row.begin; j < row.end; j += W) {
    const vec<T> p = exp_nonpositive<T>(load(row.s + j) - reference);
    sum += p;
    store(row.s + j, p);
  }
  if (scores.dropped)
    for (int64_t j = row.begin; j < row.end; j += W) {
      const vec<T> p = load(row.s + j);
      store(row.s + j, load(scores.keep + j) == 0 ? vec<T>{} : p);
    }
  return sum;
}

// Turns the products of rows first .. first + count (at most one vector of them) with keys from k0 on into probabilities and
// moves their m and l on; alpha is what o is to be multiplied by. place(r) is the ScoreRow of row r; begin == end: no keys.
// What has one value for each row is computed in the lanes of one vector.
template <class T, class Place>
INLINE void softmax_rows(const RowBlock<T>& rows, int64_t first, int64_t count, int64_t k0, Place place, Scores<T>& scores, T* m, T* l,
                         T* alpha) {
  constexpr int64_t W = kLanes<T>;
  const vec<T> lowest = broadcast(-std::numeric_limits<T>::infinity());
  vec<T> largest[W], sums[W];
#pragma GCC unroll 16
  for (int64_t i = 0; i < W; ++i) largest[i] = lowest, sums[i] = vec<T>{};
  for (int64_t i = 0; i < count; ++i) {
    const ScoreRow<T> row = place(first + i);
    if (row.begin >= row.end) continue;
    scores.read_biases(rows, first + i, k0, row.begin, row.end);
    largest[i] = finish_scores<T>(row, scores);
  }
  const vec<T> old_m = load(m + first), new_m = maximum(old_m, largest_of_each<T>(largest));
  const vec<T> reference = new_m == lowest ? vec<T>{} : new_m, factor = exp_nonpositive<T>(old_m - reference);
  for (int64_t i = 0; i < count; ++i) {
    const ScoreRow<T> row = place(first + i);
    if (row.begin >= row.end) continue;
    scores.read_kept(rows, first + i, k0, row.end);
    sums[i] = exponentiate<T>(row, scores, reference[i]);
  }
  store(m + first, new_m);
  store(alpha + first, factor);
  store(l + first, load(l + first) * factor + sum_each<T>(sums));
}

// o = alpha o + p v in tiles, for rows first .. first + count and the keys begin .. end of a block in whole panels, p
// being 0 where a row attends to no key.
template <class T, class A>
INLINE void tile_output(ForwardScratch<T, A>& x, int64_t first, int64_t count, const A* values, int64_t begin, int64_t end) {
  const int64_t ld = x.padded_value;
  for (int64_t r = first; r < first + count; ++r)
    for (int64_t d = r * ld; d < (r + 1) * ld; d += kLanes<T>) store(x.o + d, load(x.o + d) * x.alpha[r]);
  x.tile_task.multiply({.rows = round_up(count, kTileSide), .columns = ld, .steps = end - begin, .a = x.p(first) + begin,
                        .a_row = kBlockKeys, .b = values + begin * ld, .b_pair = 2 * ld, .b_block = 4 * kTileSide, .c = x.o + first * ld,
                        .c_row = ld, .add = true});
}

// A block of rows against keys [k_begin, k_end), which `packed` holds; k_begin is a multiple of kBlockKeys. Where there is one block of
// keys its probabilities may be kept, from the first row on, and o goes `to` the result where that can be: see written. What `fetcher` has
// is fetched meanwhile.
template <class S, class T, class A>
inline void attend(const AttentionArgs& a, const RowBlock<T>& rows, const PackedGroup<T, A>& packed, int64_t k_begin, int64_t k_end,
                   Scores<T>& scores, ForwardScratch<T, A>& x, uint16_t* kept, const Rounded& to, Fetcher& fetcher) {
  constexpr int64_t R = kTileRows<T>, W = kLanes<T>, P = kPanel<T>, step = kStep<A>;
  const int64_t D = packed.depth, ld = x.padded_depth, value_ld = x.padded_value, strip_tiles = x.strip_tiles;
  x.start();
  fetcher.share_among(std::max<int64_t>(0, std::min(k_end, rows.block_hi) - k_begin + P - 1) / P * rows.tiles);  // tiles of scores
  const bool plain = step == 2 && !x.tiled && scores.plain() && !scores.dropped && scores.factor > 0;            // see round_softmax
  const A* q_rows = x.q;
  int64_t q_stride = ld;
  bool in_place = false;
  if constexpr (step == 2) in_place = read_in_pairs(a.q, rows, a.head_dim) && !x.tiled;
  if constexpr (step == 2)
    if (in_place) q_rows = a.q.at<A>(rows.batch, rows.head[0], rows.query[0]), q_stride = a.q.stride[2];
  for (int64_t r = 0; !in_place && r < round_up(rows.tiles * R, x.tiled ? kTileSide : R); ++r) {
    A* q = x.q + r * ld;
    if (r >= rows.count) {
      std::fill(q, q + ld, A{});
      continue;
    }
    const S* row = a.q.at<S>(rows.batch, rows.head[r], rows.query[r]);
    if constexpr (step == 2)
      copy_row(q, row, a.q.stride[3], a.head_dim, ld);
    else
      pack_row<S, T>(q, row, a.q.stride[3], D, ld, scores.factor);
  }
  const int64_t first = std::max(k_begin, rows.block_lo / kBlockKeys * kBlockKeys), last = std::min(k_end, rows.block_hi);
  if (first >= last || x.tiled) x.clear_output(0, kBlockRows<T>);
  x.written = false;
  for (int64_t k0 = first; k0 < last; k0 += kBlockKeys) {
    const bool fresh = k0 == first && !x.tiled;  // what o holds is replaced
    const int64_t n = std::min(kBlockKeys, k_end - k0);
    // The part of the block that each tile of rows needs, in keys of the block.
    int64_t lo[8], hi[8];
    for (int64_t t = 0; t < rows.tiles; ++t) {
      lo[t] = std::clamp<int64_t>(rows.tile_lo[t] - k0, 0, n);
      hi[t] = std::clamp<int64_t>(rows.tile_hi[t] - k0, 0, n);
      if (fresh && lo[t] >= hi[t]) x.clear_output(t * R, (t + 1) * R);
    }
    // With one block of keys o is final at once.
    x.written = to.out && last - first <= kBlockKeys && packed.aside.rows.empty() && std::equal(lo, lo + rows.tiles, hi, std::less<>());
    for (int64_t strip = 0; strip < rows.tiles; strip += strip_tiles) {
      const int64_t tiles = std::min(rows.tiles, strip + strip_tiles), last_row = std::min(rows.count, tiles * R);
      const A* keys = packed.keys.get() + (k0 - k_begin) * D;
      const A* values = packed.values.get() + (k0 - k_begin) * value_ld;
      // The panels that any row of the strip needs.
      int64_t strip_lo = n, strip_hi = 0;
      for (int64_t t = strip; t < tiles; ++t)
        if (lo[t] < hi[t]) strip_lo = std::min(strip_lo, lo[t] / P * P), strip_hi = std::max(strip_hi, round_up(hi[t], P));
      if (strip_lo >= strip_hi) continue;
      fetch_mask(a, rows, strip * R, last_row, k0 + strip_lo, std::min(n, strip_hi) - strip_lo);
      if constexpr (step == 2)
        if (x.tiled)
          tile_scores(x.tile_task,
                      {.rows = round_up(last_row - strip * R, kTileSide), .columns = strip_hi - strip_lo, .steps = ld,
                       .a = x.q + strip * R * ld, .a_row = ld, .b = keys + strip_lo * D, .b_pair = 2 * P, .b_block = P * D,
                       .c = x.s + strip_lo, .c_row = kBlockKeys, .add = false},
                      scores.factor);
      for (int64_t j = 0; j < n && !x.tiled; j += P) {
        const A* panel = keys + j * D;
        for (int64_t t = strip; t < tiles; ++t) {
          if (lo[t] >= j + P || hi[t] <= j || lo[t] >= hi[t]) continue;
          const auto raw_scores = [&](auto start) __attribute__((always_inline)) {
            product<start.value>(rows.tile_count(t), hi[t] - j > W ? 2 : 1, q_rows + t * R * q_stride, q_stride, step, panel, P * step,
                                 D / step, x.s + (t - strip) * R * kBlockKeys + j, kBlockKeys, &scores.factor);
          };
          fetcher.some();
          if (plain)
            raw_scores(std::integral_constant<Start, Start::zero>{});
          else
            raw_scores(std::integral_constant<Start, kRawScores<A>>{});
        }
      }
      const auto place = [&](int64_t r) -> ScoreRow<T> {
        const int64_t t = r / R;
        if (lo[t] >= hi[t]) return {};
        return {x.s + (r - strip * R) * kBlockKeys, lo[t] / W * W, round_up(hi[t], W), rows.lo[r] - k0, rows.hi[r] - k0};
      };
      for (int64_t r = strip * R; r < last_row && !plain; r += W)
        softmax_rows<T>(rows, r, std::min(W, last_row - r), k0, place, scores, x.m, x.l, x.alpha);
      if constexpr (step == 2)
        for (int64_t r = strip * R; r < last_row && plain; r += W) {
          const int64_t count = std::min(W, last_row - r);
          if (kept)
            round_softmax<true>(r, count, place, scores.factor, x.m, x.l, x.alpha, x.p(0), kept, a.kept_row());
          else
            round_softmax<false>(r, count, place, scores.factor, x.m, x.l, x.alpha, x.p(0), nullptr, 0);
        }
      if constexpr (step == 2)
        for (int64_t r = strip * R; r < last_row && !plain; ++r) {
          const ScoreRow<T> row = place(r);
          if (kept)
            round_and_keep(x.p(r) + row.begin, kept + r * a.kept_row() + row.begin, row.s + row.begin, row.end - row.begin);
          else
            round_row(x.p(r) + row.begin, row.s + row.begin, row.end - row.begin);
          if (!x.tiled) continue;
          const bool any = row.begin < row.end;
          std::fill(x.p(r) + strip_lo, x.p(r) + (any ? row.begin : strip_hi), A{});
          if (any) std::fill(x.p(r) + row.end, x.p(r) + strip_hi, A{});
        }
      if constexpr (step == 2)
        if (x.tiled) tile_output(x, strip * R, last_row - strip * R, values, strip_lo, strip_hi);
      if (x.written) x.find_factors(strip * R, last_row, static_cast<T>(1 - a.dropout_p));
      for (int64_t d = 0; d < value_ld && !x.tiled; d += P)
        for (int64_t t = strip; t < tiles; ++t) {
          const int64_t from = lo[t] / step * step;
          if (lo[t] >= hi[t]) continue;
          if constexpr (step == 2)
            if (x.written) {
              round_tile<true>(rows.tile_count(t), x.p(t * R) + from, kBlockKeys, step, values + from * value_ld + d * step,
                               value_ld * step, (hi[t] - from + step - 1) / step, x.o.get(), 0, false,
                               Rounded{to.out, to.row, x.factors, true}.at(t * R, d));
              continue;
            }
          const auto output = [&](auto start) __attribute__((always_inline)) {
            product<start.value>(rows.tile_count(t), (value_ld - d) / W, x.p(t * R) + from, kBlockKeys, step,
                                 values + from * value_ld + d * step, value_ld * step, (hi[t] - from + step - 1) / step,
                                 x.o + t * R * value_ld + d, value_ld, x.alpha + t * R);
          };
          if (fresh)
            output(std::integral_constant<Start, Start::zero>{});
          else
            output(std::integral_constant<Start, Start::scaled>{});
        }
    }
    packed.aside.add(x.o.get(), value_ld, rows.count, value_ld, k0, k0 + n, [&](int64_t r, int64_t key) {
      return key >= rows.lo[r] && key < rows.hi[r] ? static_cast<T>(to_compute(x.p(r)[key - k0])) : T(0);
    });
  }
  for (int64_t r = 0; plain && r < kBlockRows<T>; r += W) store(x.m + r, load(x.m + r) * scores.factor);
}

// Row r of a block in the result.
template <class S, class T>
INLINE S* row_of(const AttentionArgs& a, S* out, const RowBlock<T>& rows, int64_t r) {
  return out + ((rows.batch * a.q_len + rows.query[r]) * a.heads + rows.head[r]) * a.value_dim;
}

// Writes o / l and lse = m + log l, less what ALiBi takes from all scores, of a block of rows; a row without keys gets 0 and -inf.
// The backward takes e^(s - lse), where a rounding step of lse counts |lse| times: lse is rounded once, from double.
template <class S, class T, class A>
inline void write_rows(const AttentionArgs& a, const RowBlock<T>& rows, const ForwardScratch<T, A>& x, S* out, T* lse, int16_t* rest) {
  constexpr int64_t W = kLanes<T>;
  const T kept = static_cast<T>(1 - a.dropout_p);
  double logs[W];
  T factors[W];
  for (int64_t r = 0; r < rows.count; ++r) {
    if (r % W == 0) {
      log_each<T>(logs, x.l + r);
      const vec<T> l = load(x.l + r) * kept;
      store(factors, l == 0 ? l : 1 / l);
    }
    const bool empty = x.l[r] == 0;
    S* row = row_of(a, out, rows, r);
    int16_t* row_rest = rest_of(a, rest, rows.batch, rows.head[r], rows.query[r]);
    const T* o = x.o.get() + r * x.padded_value;
    if constexpr (kStep<A> == 2) {
      if (!x.written) round_scaled(row, o, a.value_dim, factors[r % W]);
      if (row_rest) round_rest(row_rest, o, a.value_dim, factors[r % W]);
    } else {
      const T divisor = empty || kept <= 0 ? std::numeric_limits<T>::infinity() : x.l[r] * kept;
      for (int64_t d = 0; d < a.value_dim; d += W)
        store_with_rest(row + d, row_rest ? row_rest + d : nullptr, load(o + d) / divisor, a.value_dim - d);
    }
    const double row_lse = x.m[r] + logs[r % W] - alibi_of_row(a, rows, r);
    lse[(rows.batch * a.heads + rows.head[r]) * a.lse_stride + rows.query[r]] =
        empty ? -std::numeric_limits<T>::infinity() : static_cast<T>(row_lse);
  }
}

// Adds the part (m, l, o) of the same rows to x.
template <class T, class A>
inline void merge(ForwardScratch<T, A>& x, const T* m, const T* l, const T* o, int64_t count) {
  constexpr int64_t W = kLanes<T>;
  for (int64_t r = 0; r < count; ++r) {
    if (l[r] == 0) continue;
    const T new_m = std::max(x.m[r], m[r]);
    const T ours = x.l[r] == 0 ? T(0) : std::exp(x.m[r] - new_m), theirs = std::exp(m[r] - new_m);
    x.m[r] = new_m;
    x.l[r] = x.l[r] * ours + l[r] * theirs;
    for (int64_t d = 0; d < x.padded_value; d += W) {
      T* row = x.o + r * x.padded_value + d;
      store(row, load(row) * ours + load(o + r * x.padded_value + d) * theirs);
    }
  }
}

// How the tasks of one problem are laid out: blocks of rows of each group, times parts of the keys.
struct ForwardPlan {
  int64_t blocks = 0, parts = 1, part_keys = 0, k_first = 0, k_last = 0;
  int64_t first_task = 0;  // among all problems'

  int64_t most_keys() const { return std::min(part_keys, k_last - k_first); }
};

// Problems differ in sizes and addresses only.
template <class S, class A>
void attention_forward_of(const AttentionForward* problems, int64_t count) {
  using T = compute_t<S>;
  constexpr int64_t kRows = kBlockRows<T>, kWantedTasks = 32;
  std::vector<ForwardPlan> plans(count);
  int64_t all_blocks = 0;
  for (int64_t i = 0; i < count; ++i) {
    plans[i].blocks = (problems[i].a.group_rows() + kRows - 1) / kRows;
    all_blocks += problems[i].a.groups() * plans[i].blocks;
  }
  if (all_blocks == 0) return;
  const AttentionArgs& any = problems[0].a;
  CostedTasks costed, merged;
  int64_t tasks = 0, most_keys = 0, most_parts = 1;
  for (int64_t i = 0; i < count; ++i) {
    const AttentionArgs& a = problems[i].a;
    ForwardPlan& plan = plans[i];
    const int64_t block_tasks = a.groups() * plan.blocks;
    if (block_tasks != 0) {
      const KeyRange first = key_range(a, 0), last = key_range(a, a.q_len - 1);
      plan.k_first = first.lo / kBlockKeys * kBlockKeys, plan.k_last = std::max(plan.k_first, last.hi);
      const int64_t key_blocks = std::max<int64_t>(1, (plan.k_last - plan.k_first + kBlockKeys - 1) / kBlockKeys);
      const int64_t wanted_parts = std::min((kWantedTasks + all_blocks - 1) / all_blocks, std::max<int64_t>(1, key_blocks / 3));
      plan.part_keys = (key_blocks + wanted_parts - 1) / wanted_parts * kBlockKeys;
      plan.parts = (key_blocks * kBlockKeys + plan.part_keys - 1) / plan.part_keys;
    }
    plan.first_task = tasks;
    tasks += block_tasks * plan.parts;
    most_keys = std::max(most_keys, plan.most_keys()), most_parts = std::max(most_parts, plan.parts);
    const int64_t work = std::min(kRows, a.group_rows()) * (a.head_dim + a.value_dim);
    costed.add(block_tasks * plan.parts, work * plan.most_keys());
    merged.add(block_tasks, work * plan.parts);
  }
  const int64_t state = kRows * (2 + round_up(any.value_dim, kLanes<T>));
  Scratch<T> partial(most_parts > 1 ? tasks * state : 0);
  // A task below some 10 microseconds of work is not worth a thread.
  constexpr int64_t kGrain = 200000 / CostedTasks::kUnit;
  costed.run(kGrain, [&](const auto& each_task) {
    ForwardScratch<T, A> x(any);
    Scores<T> scores(any);
    PackedGroup<T, A> packed(any, most_keys);
    Fetcher fetcher;
    each_task([&](int64_t problem, int64_t task) {
      const auto& [a, out, lse, kept, rest] = problems[problem];
      const auto& [blocks, parts, part_keys, k_first, k_last, first_task] = plans[problem];
      if (scores.a != &a) scores.a = &a, packed.group = -1;
      const int64_t group = task / (blocks * parts), part = task / blocks % parts;
      const RowBlock<T> rows(a, group, from_both_ends(task % blocks, blocks) * kRows);
      const int64_t k_begin = std::min(k_last, k_first + part * part_keys), k_end = std::min(k_last, k_begin + part_keys);
      packed.template pack<S>(a, group, k_begin, k_end);
      // While this block is computed, its lines of the result and what the next block needs are fetched.
      const int64_t next_group = (task + 1) / (blocks * parts), next_block = from_both_ends((task + 1) % blocks, blocks);
      fetcher.clear();
      if (rows.count > 0 && rows.head[0] == rows.head[rows.count - 1])
        fetcher.add(row_of(a, static_cast<S*>(out), rows, 0), a.heads * a.value_dim, rows.count, a.value_dim, true);
      if (rest && rows.count > 0)
        fetcher.add(rest_of(a, rest, rows.batch, rows.head[0], rows.query[0]), a.value_dim, rows.count, a.value_dim, true);
      if (next_group < a.groups()) {
        fetcher.add_queries<S>(a, a.q, a.head_dim, next_group, next_block * kRows);
        if (next_group != group) fetcher.add_keys<S>(a, next_group, k_first, std::min(2 * kBlockKeys, plans[problem].most_keys()));
      }
      Rounded results;
      if constexpr (kStep<A> == 2)
        if (parts == 1 && !rest && a.value_dim % kPanel<T> == 0 && rows.count % (kTileRows<T> / 2) == 0 && !x.tiled &&
            rows.head[0] == rows.head[rows.count - 1])
          results = {row_of(a, static_cast<A*>(out), rows, 0), a.heads * a.value_dim};
      attend<S>(a, rows, packed, k_begin, k_end, scores, x, kept ? kept + (group * a.group_rows() + rows.first) * a.kept_row() : nullptr,
                results, fetcher);
      if (parts == 1) {
        write_rows<S>(a, rows, x, static_cast<S*>(out), static_cast<T*>(lse), rest);
      } else {
        T* saved = partial + (first_task + task) * state;
        std::copy(x.m, x.m + kRows, saved);
        std::copy(x.l, x.l + kRows, saved + kRows);
        std::copy(x.o.get(), x.o.get() + kRows * x.padded_value, saved + 2 * kRows);
      }
    });
  });
  if (most_parts == 1) return;
  merged.run(kGrain, [&](const auto& each_task) {
    ForwardScratch<T, A> x(any);
    each_task([&](int64_t problem, int64_t task) {
      const auto& [a, out, lse, kept, rest] = problems[problem];
      const auto& [blocks, parts, part_keys, k_first, k_last, first_task] = plans[problem];
      if (parts == 1) return;
      const int64_t group = task / blocks;
      const RowBlock<T> rows(a, group, from_both_ends(task % blocks, blocks) * kRows);
      x.start();
      x.clear_output(0, kRows);
      for (int64_t part = 0; part < parts; ++part) {
        const T* saved = partial + (first_task + (group * parts + part) * blocks + task % blocks) * state;
        merge(x, saved, saved + kRows, saved + 2 * kRows, rows.count);
      }
      write_rows<S>(a, rows, x, static_cast<S*>(out), static_cast<T*>(lse), rest);
    });
  });
}

template <class S>
void attention_forward(const AttentionForward* problems, int64_t count) {
  const AttentionForward& first = problems[0];
  if (count == 1 && read_in_place(first.a)) return attention_few<S>(first.a, nullptr, first.out, first.lse, first.rest);
#if ISA_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<S, bfloat16>)
    if (multiplied_in_pairs(problems[0].a)) return attention_forward_of<S, bfloat16>(problems, count);
#endif
  attention_forward_of<S, compute_t<S>>(problems, count);
}
