// Gradients, with the probabilities computed once more from lse, and nothing of size Sq x Sk in memory:
//   p = e^(s - lse);  dv = p^T do;  dp = do v^T;  ds = p (dp - delta);  dq = ds k;  dk = ds^T q
//   delta = sum_d do o - dlse    (the derivative of the normalisation, and of lse itself)
// With dropout the p of dv and the dp are those kept, over 1 - dropout_p. With softcap ds is times 1 - tanh^2.
//
// A task is a group (a batch entry and a key/value head) and a part of its keys: it owns dk and dv of those keys and one
// partial dq, and meets its blocks of keys one by one, each with all rows. The partial dq are added in order. The
// number of parts depends on the shape alone, so the results never depend on the number of threads.

// A block of rows against a block of keys: operands, products and probabilities. Operands are of type A: T, or bfloat16 where it
// is multiplied in pairs or in tiles. Then q is not scaled, p and ds are rounded, and what is summed over rows lies in pairs of
// them. In tiles p and ds are the other operand, whose pairs need no transposition: dv^T = do^T p and dk^T = q^T ds, [d][keys].
template <class T, class A = T>
struct GradBlock {
  static constexpr int64_t kRows = kBlockRows<T>, kKeys = kBlockKeys, kLd = kBlockKeys, step = kStep<A>;
  static constexpr bool kPaired = step == 2;
  const bool tiled = kPaired && in_tiles();
  const int64_t strip_tiles = tiled ? 4 : 2, strip_rows = strip_tiles * kTileRows<T>;
  const AttentionArgs* a;
  const AttentionGradArgs* g;
  const T* deltas;                                 // [B, Hq, Sq]
  const int64_t depth, width, depth_ld, value_ld;  // D and Dv in whole steps, and in whole vectors
  Scratch<A> keys_t, values_t, keys;               // panels of [depth][kPanel] and [width][kPanel]; rows [kKeys][depth_ld]
  Scratch<A> q, grad_out;                          // rows [kRows][depth_ld] and [kRows][value_ld]; q is times scores.factor
  Scratch<A> p, ds;                                // [kRows][kKeys]: first the products q k^T and do v^T
  Scratch<A> q_pairs, grad_pairs, ds_pairs;        // q, grad_out and ds once more as [pair of rows][..][2]; p is only that
  Scratch<A> q_t, grad_t;                          // in tiles: their transposes [depth_ld][kRows] and [value_ld][kRows]
  Scratch<T> p_strip, ds_strip;                    // the products of a few tiles of rows, before they are rounded
  SetAside<T> q_aside, grad_out_aside;
  Scores<T> scores;
  int64_t k0 = 0, n = 0;       // the block of keys
  int64_t lo[8], hi[8];        // the part of it that each tile of rows needs
  T lse[kRows], delta[kRows];  // of the block of rows, lse is +inf where there is none
  bool any_aside = false;      // whether q or grad_out, not in pairs, hold what is to be set aside
  const TileTask tile_task{tiled};

  GradBlock(const AttentionArgs& args, const AttentionGradArgs& grads, const T* all_deltas)
      : a(&args),
        g(&grads),
        deltas(all_deltas),
        depth(round_up(a->head_dim, tiled ? kTileSteps : step)),
        width(round_up(a->value_dim, tiled ? kTileSteps : step)),
        depth_ld(row_elements<T>(a->head_dim, tiled)),
        value_ld(row_elements<T>(a->value_dim, tiled)),
        keys_t(kKeys * depth),
        values_t(kKeys * width),
        keys(kKeys * depth_ld),
        q(kRows * depth_ld),
        grad_out(kRows * value_ld),
        p(kRows * kLd),
        ds(kRows * kLd),
        q_pairs(kPaired ? kRows * depth_ld : 0),
        grad_pairs(kPaired ? kRows * value_ld : 0),
        ds_pairs(kPaired ? kRows * kLd : 0),
        q_t(tiled ? kRows * depth_ld : 0),
        grad_t(tiled ? kRows * value_ld : 0),
        p_strip(kPaired ? strip_rows * kLd : 0),
        ds_strip(kPaired ? strip_rows * kLd : 0),
        scores(args) {}

  // Goes on with another attention of the same widths and options.
  void enter(const AttentionBackward& problem, const T* its_deltas) {
    a = scores.a = &problem.a, g = &problem.g, deltas = its_deltas;
  }

  // What is left of the scale of q in dk.
  T dk_factor() const { return kPaired ? static_cast<T>(a->scale) : scores.capped ? static_cast<T>(a->softcap) : T(1); }

  template <class S>
  NOINLINE void load_keys(int64_t group, int64_t first_key) {
    k0 = first_key, n = std::min(kKeys, a->k_len - k0);
    const int64_t b = group / a->kv_heads, h = group % a->kv_heads;
    const S *k = a->k.at<S>(b, h, k0), *v = a->v.at<S>(b, h, k0);
    pack_transposed(keys_t.get(), k, a->k.stride[2], a->k.stride[3], n, a->head_dim, depth);
    pack_transposed(values_t.get(), v, a->v.stride[2], a->v.stride[3], n, a->value_dim, width);
    // A key that is attended and not finite has made ds NaN already, which it stays times 0: nothing is to be added afterwards.
    SetAside<T> aside;
    pack_rows(keys.get(), k, a->k.stride[2], a->k.stride[3], n, a->head_dim, depth_ld, 0, aside);
    if constexpr (kPaired) pad_rows(keys, n, depth_ld);
  }

  // Which keys of the block the tiles of `rows` need; false where there are none.
  bool meet(const RowBlock<T>& rows) {
    bool any = false;
    for (int64_t t = 0; t < rows.tiles; ++t) {
      lo[t] = std::clamp<int64_t>(rows.tile_lo[t] - k0, 0, n);
      hi[t] = std::clamp<int64_t>(rows.tile_hi[t] - k0, 0, n);
      any |= lo[t] < hi[t];
    }
    return any;
  }

  template <class S>
  NOINLINE void load_rows(const RowBlock<T>& rows) {
    const T infinity = std::numeric_limits<T>::infinity();
    const int64_t padded = round_up(rows.tiles * kTileRows<T>, tiled ? kTileSide : 1);
    std::fill(q + rows.count * depth_ld, q + padded * depth_ld, A{});
    std::fill(grad_out + rows.count * value_ld, grad_out + padded * value_ld, A{});
    q_aside.clear(), grad_out_aside.clear();
    vec<T> poison = {};
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t b = rows.batch, h = rows.head[r], i = rows.query[r];
      const S *query = a->q.at<S>(b, h, i), *grad = g->grad_out.at<S>(b, h, i);
      if constexpr (kPaired) {
        copy_row(q + r * depth_ld, query, a->q.stride[3], a->head_dim, depth_ld);
        copy_row(grad_out + r * value_ld, grad, g->grad_out.stride[3], a->value_dim, value_ld);
      } else {
        poison += pack_row<S, T>(q + r * depth_ld, query, a->q.stride[3], a->head_dim, depth_ld, scores.factor);
        poison += pack_row<S, T>(grad_out + r * value_ld, grad, g->grad_out.stride[3], a->value_dim, value_ld, T(1));
      }
      const T saved = *g->lse.at<T>(b, h, i);
      lse[r] = saved == -infinity ? infinity : saved;
      delta[r] = deltas[(b * a->heads + h) * a->q_len + i];
    }
    if constexpr (kPaired) {
      pack_rows(q_pairs.get(), q.get(), depth_ld, 1, rows.count, depth_ld, depth_ld, 0, q_aside);
      pack_rows(grad_pairs.get(), grad_out.get(), value_ld, 1, rows.count, value_ld, value_ld, 0, grad_out_aside);
      if (tiled) {
        pad_rows(q_pairs, rows.count, depth_ld), pad_rows(grad_pairs, rows.count, value_ld);
        transpose_pairs(q_t, kRows, q_pairs, depth_ld, rows.count);
        transpose_pairs(grad_t, kRows, grad_pairs, value_ld, rows.count);
      }
    } else {
      any_aside = reduce_add(poison) != 0;
    }
  }

  // p and ds of the block; both are 0 for every key that a row does not attend, over the whole block.
  // cap_slope: ds is the gradient of the product (with softcap), not of the score that the mask is added to.
  NOINLINE void probabilities(const RowBlock<T>& rows, bool cap_slope) {
    constexpr int64_t R = kTileRows<T>, P = kPanel<T>;
    if constexpr (kPaired) {
      const int64_t end = row_elements<T>(n, tiled);
      for (int64_t strip = 0; strip < rows.tiles; strip += strip_tiles) {
        const int64_t tiles = tiled ? strip + strip_tiles : std::min(rows.tiles, strip + strip_tiles), strip_row = strip * R;
        if (tiled) products_in_tiles(rows, strip);
        for (int64_t j = 0; j < n && !tiled; j += P)
          for (int64_t t = strip; t < tiles; ++t) products(rows, t, j, p_strip + (t - strip) * R * kLd, ds_strip + (t - strip) * R * kLd);
        for (int64_t t = strip; t < tiles; ++t)
          tile_probabilities(rows, t, cap_slope, p_strip + (t - strip) * R * kLd, ds_strip + (t - strip) * R * kLd);
        for (int64_t r = strip_row; r < tiles * R; r += 2) {
          const T *p_rows = p_strip + (r - strip_row) * kLd, *ds_rows = ds_strip + (r - strip_row) * kLd;
          round_rows<false>(p + r * kLd, p_rows, p_rows + kLd, end, nullptr, nullptr);
          round_rows<true>(ds_pairs + r * kLd, ds_rows, ds_rows + kLd, end, ds + r * kLd, ds + (r + 1) * kLd);
        }
      }
    } else {
      for (int64_t j = 0; j < n; j += P)
        for (int64_t t = 0; t < rows.tiles; ++t) products(rows, t, j, p + t * R * kLd, ds + t * R * kLd);
      for (int64_t t = 0; t < rows.tiles; ++t) tile_probabilities(rows, t, cap_slope, p + t * R * kLd, ds + t * R * kLd);
    }
  }

  // The keys, in whole panels, that tiles first .. last of rows need; none where lo >= hi.
  KeyRange panels_of(const RowBlock<T>& rows, int64_t first, int64_t last) const {
    KeyRange panels{n, 0};
    for (int64_t t = first; t < std::min(rows.tiles, last); ++t)
      if (lo[t] < hi[t]) panels = {std::min(panels.lo, lo[t] / kPanel<T> * kPanel<T>), std::max(panels.hi, round_up(hi[t], kPanel<T>))};
    return panels;
  }

  // q k^T and do v^T of a strip, in tiles.
  void products_in_tiles(const RowBlock<T>& rows, int64_t strip) {
    constexpr int64_t P = kPanel<T>;
    const KeyRange panels = panels_of(rows, strip, strip + strip_tiles);
    if (panels.lo >= panels.hi) return;
    const int64_t row = strip * kTileRows<T>;
    TileProduct product{.rows = round_up(std::min(strip_rows, rows.count - row), kTileSide), .columns = panels.hi - panels.lo,
                        .steps = depth_ld, .a = q + row * depth_ld, .a_row = depth_ld, .b = keys_t + panels.lo * depth, .b_pair = 2 * P,
                        .b_block = P * depth, .c = p_strip + panels.lo, .c_row = kLd, .add = false};
    tile_scores(tile_task, product, scores.factor);
    product.steps = product.a_row = value_ld, product.a = grad_out + row * value_ld;
    product.b = values_t + panels.lo * width, product.b_block = P * width, product.c = ds_strip + panels.lo;
    tile_task.multiply(product);
  }

  // q k^T and do v^T of a tile of rows and a panel of keys.
  INLINE void products(const RowBlock<T>& rows, int64_t t, int64_t j, T* p_rows, T* ds_rows) {
    constexpr int64_t R = kTileRows<T>, W = kLanes<T>, P = kPanel<T>;
    if (lo[t] >= j + P || hi[t] <= j || lo[t] >= hi[t]) return;
    const int64_t vectors = hi[t] - j > W ? 2 : 1;
    product<kRawScores<A>>(rows.tile_count(t), vectors, q + t * R * depth_ld, depth_ld, step, keys_t + j * depth, P * step, depth / step,
                           p_rows + j, kLd, &scores.factor);
    product<Start::zero>(rows.tile_count(t), vectors, grad_out + t * R * value_ld, value_ld, step, values_t + j * width, P * step,
                         width / step, ds_rows + j, kLd);
  }

  // Turns the products of a tile of rows into p and ds.
  INLINE void tile_probabilities(const RowBlock<T>& rows, int64_t t, bool cap_slope, T* p_rows, T* ds_rows) {
    constexpr int64_t R = kTileRows<T>, W = kLanes<T>;
    const int64_t end = std::min(kLd, std::max(round_up(n, R), row_elements<T>(n, tiled)));
    for (int64_t r = t * R; r < (t + 1) * R; ++r) {
      T *p_row = p_rows + (r - t * R) * kLd, *ds_row = ds_rows + (r - t * R) * kLd;
      const bool used = r < rows.count && lo[t] < hi[t];
      const int64_t first = used ? lo[t] / W * W : 0, last = used ? round_up(hi[t], W) : 0;
      std::fill(p_row, p_row + first, T(0)), std::fill(p_row + last, p_row + end, T(0));
      std::fill(ds_row, ds_row + first, T(0)), std::fill(ds_row + last, ds_row + end, T(0));
      if (!used) continue;
      scores.read_biases(rows, r, k0, first, hi[t]);
      scores.read_kept(rows, r, k0, hi[t]);
      if (scores.plain() && !scores.dropped)
        probability_row<false>(p_row, ds_row, first, last, rows.lo[r] - k0, rows.hi[r] - k0, lse[r], delta[r], cap_slope);
      else
        probability_row<true>(p_row, ds_row, first, last, rows.lo[r] - k0, rows.hi[r] - k0, lse[r], delta[r], cap_slope);
    }
  }

  template <bool featured>
  INLINE void probability_row(T* p_row, T* ds_row, int64_t first, int64_t last, int64_t row_lo, int64_t row_hi, T row_lse, T row_delta,
                              bool cap_slope) const {
    constexpr int64_t W = kLanes<T>;
    const T kept = a->dropout_p < 1 ? static_cast<T>(1 / (1 - a->dropout_p)) : T(0);
    const auto one = [&](int64_t j, bool edge) __attribute__((always_inline)) {
      vec<T> x = load(p_row + j), dp = load(ds_row + j), slope = broadcast(T(1));
      if constexpr (featured) {
        if (scores.capped) {
          x = tanh(x);
          if (cap_slope) slope = 1 - x * x;
          x = x * scores.cap;
        }
        x = scores.finish(x, j);
      }
      if (edge) x = limit<T>(x, j, row_lo, row_hi);
      vec<T> probability = exp_nonpositive<T>(x - row_lse);
      vec<T> weight = probability;
      if constexpr (featured) {
        if (scores.dropped) {
          const auto drop = load(scores.keep + j) == 0;
          dp = drop ? vec<T>{} : dp * kept;
          weight = drop ? vec<T>{} : probability;
        }
      }
      // Selected rather than multiplied: dp is NaN where a masked value is.
      const vec<T> gradient = probability == 0 ? vec<T>{} : probability * (dp - row_delta) * slope;
      store(p_row + j, weight);
      store(ds_row + j, gradient);
    };
    const int64_t whole_begin = std::clamp(round_up(row_lo, W), first, last), whole_end = std::clamp(row_hi / W * W, whole_begin, last);
    for (int64_t j = first; j < whole_begin; j += W) one(j, true);
#pragma GCC unroll 2
    for (int64_t j = whole_begin; j < whole_end; j += W) one(j, false);
    for (int64_t j = whole_end; j < last; j += W) one(j, true);
  }

  void add_dv(const RowBlock<T>& rows, T* dv) {
    if constexpr (kPaired) {
      if (tiled)
        add_in_tiles(rows, p, grad_t, value_ld, grad_out_aside, dv);
      else
        add_transposed(rows, p, grad_pairs, value_ld, grad_out_aside, dv);
    } else {
      if (any_aside) grad_out_aside.take(grad_out, rows.count, value_ld, 0);
      add_transposed(rows, p, grad_out, value_ld, grad_out_aside, dv);
    }
  }

  void add_dk(const RowBlock<T>& rows, T* dk) {
    if constexpr (kPaired) {
      if (tiled)
        add_in_tiles(rows, ds_pairs, q_t, depth_ld, q_aside, dk);
      else
        add_transposed(rows, ds_pairs, q_pairs, depth_ld, q_aside, dk);
    } else {
      if (any_aside) q_aside.take(q, rows.count, depth_ld, 0);
      add_transposed(rows, ds, q, depth_ld, q_aside, dk);
    }
  }

  // C[keys, columns] += w^T b, w being p or ds and b rows of the block; only rows whose tiles attend to a key.
  NOINLINE void add_transposed(const RowBlock<T>& rows, const A* w, const A* b, int64_t columns, const SetAside<T>& aside, T* c) const {
    constexpr int64_t R = kTileRows<T>, W = kLanes<T>, P = kPanel<T>;
    for (int64_t d = 0; d < columns; d += P)
      for (int64_t key = 0; key < n; key += R) {
        int64_t first = rows.tiles, last = 0;
        for (int64_t t = 0; t < rows.tiles; ++t)
          if (lo[t] < key + R && hi[t] > key && lo[t] < hi[t]) first = std::min(first, t), last = t + 1;
        if (first >= last) continue;
        const int64_t row = first * R, count = std::min(rows.count, last * R) - row;
        product<Start::add>(std::min(R, n - key), (columns - d) / W, w + row * kLd + key * step, step, step * kLd,
                            b + row * columns + d * step, step * columns, (count + step - 1) / step, c + key * columns + d, columns);
      }
    aside.add(c, columns, n, columns, 0, rows.count, weight_of(w));
  }

  // C[columns, keys] += b w, b being transposed rows [columns][kRows]; only strips of rows that attend to a key of a panel.
  void add_in_tiles(const RowBlock<T>& rows, const A* w, const A* b, int64_t columns, const SetAside<T>& aside, T* c) const {
    constexpr int64_t P = kPanel<T>;
    for (int64_t key = 0; key < n; key += P) {
      int64_t first = kRows, last = 0;
      for (int64_t strip = 0; strip < rows.tiles; strip += strip_tiles) {
        const KeyRange panels = panels_of(rows, strip, strip + strip_tiles);
        if (panels.lo > key || panels.hi <= key) continue;
        first = std::min(first, strip * kTileRows<T>), last = (strip + strip_tiles) * kTileRows<T>;
      }
      if (first >= last) continue;
      tile_task.multiply({.rows = columns, .columns = P, .steps = last - first, .a = b + first, .a_row = kRows,
                          .b = w + first * kLd + key * step, .b_pair = step * kLd, .b_block = step * P, .c = c + key, .c_row = kLd,
                          .add = true});
    }
    aside.add(c, 1, n, columns, 0, rows.count, weight_of(w), kLd);
  }

  // What a row set aside is multiplied by for a key, w lying in steps of rows.
  auto weight_of(const A* w) const {
    return [w](int64_t key, int64_t r) { return static_cast<T>(to_compute(w[r / step * step * kLd + key * step + r % step])); };
  }

  // [keys, columns] of sums: as they are, or what was summed as [columns, keys], in `rows`.
  const T* sum_rows(const T* sums, int64_t columns, T* rows) const {
    constexpr int64_t W = kLanes<T>;
    if (!tiled) return sums;
    for (int64_t j = 0; j < n; j += W)
      for (int64_t d = 0; d < columns; d += W) copy_transposed(rows + j * columns + d, columns, sums + d * kLd + j, kLd);
    return rows;
  }

  // dq[rows, depth_ld] += ds k
  NOINLINE void add_dq(const RowBlock<T>& rows, T* dq) {
    constexpr int64_t R = kTileRows<T>, W = kLanes<T>, P = kPanel<T>;
    if constexpr (kPaired)
      for (int64_t strip = 0; strip < rows.tiles && tiled; strip += strip_tiles) {
        const KeyRange panels = panels_of(rows, strip, strip + strip_tiles);
        const int64_t row = strip * R;
        if (panels.lo < panels.hi)
          tile_task.multiply({.rows = round_up(std::min(strip_rows, rows.count - row), kTileSide), .columns = depth_ld,
                              .steps = panels.hi - panels.lo, .a = ds + row * kLd + panels.lo, .a_row = kLd,
                              .b = keys + panels.lo * depth_ld, .b_pair = step * depth_ld, .b_block = step * P, .c = dq + row * depth_ld,
                              .c_row = depth_ld, .add = true});
      }
    for (int64_t d = 0; d < depth_ld && !tiled; d += P)
      for (int64_t t = 0; t < rows.tiles; ++t) {
        const int64_t from = lo[t] / step * step;
        if (lo[t] < hi[t])
          product<Start::add>(rows.tile_count(t), (depth_ld - d) / W, ds + t * R * kLd + from, kLd, step, keys + from * depth_ld + d * step,
                              depth_ld * step, (hi[t] - from + step - 1) / step, dq + t * R * depth_ld + d, depth_ld);
      }
  }
};

template <class S, class T>
INLINE void write_scaled(S* out, const T* row, int64_t n, T factor) {
  for (int64_t d = 0; d < n; d += kLanes<T>) store_any(out + d, load(row + d) * factor, n - d);
}

// The sums of `parts` parts of dq of a block of rows, part_step apart, times the scale.
template <class S, class T>
inline void write_dq(const AttentionBackward& problem, const RowBlock<T>& rows, T* parts_dq, int64_t parts, int64_t part_step,
                     int64_t depth_ld) {
  const auto& [a, g] = problem;
  for (int64_t r = 0; r < rows.count; ++r) {
    T* sum = parts_dq + (rows.first + r) * depth_ld;
    for (int64_t part = 1; part < parts; ++part) {
      const T* other = sum + part * part_step;
      for (int64_t d = 0; d < depth_ld; d += kLanes<T>) store(sum + d, load(sum + d) + load(other + d));
    }
    const int64_t row = (rows.batch * a.q_len + rows.query[r]) * a.heads + rows.head[r];
    write_scaled(static_cast<S*>(g.dq) + row * a.head_dim, sum, a.head_dim, static_cast<T>(a.scale));
  }
}

// Problems differ in sizes and addresses only. A group whose keys are one part has its deltas and its dq to itself: both stay in the
// cache of the thread that needs them.
template <class S, class A>
void attention_backward_of(const AttentionBackward* problems, int64_t count) {
  using T = compute_t<S>;
  constexpr int64_t kRows = kBlockRows<T>, kWantedTasks = 32;
  const AttentionArgs& any = problems[0].a;
  const bool tiled = std::is_same_v<A, bfloat16> && in_tiles();
  const int64_t depth_ld = row_elements<T>(any.head_dim, tiled), value_ld = row_elements<T>(any.value_dim, tiled);
  int64_t all_groups = 0, delta_count = 0, dq_count = 0, own_dq = 0;
  for (int64_t i = 0; i < count; ++i) all_groups += problems[i].a.groups();
  if (all_groups == 0) return;
  struct Plan {
    int64_t blocks, key_blocks, parts, padded_rows;
    int64_t first_dq;  // its dq of every part, [groups][parts][rows][depth_ld], among all problems'
  };
  std::vector<Plan> plans(count);
  CostedTasks costed, apart, summed;
  for (int64_t i = 0; i < count; ++i) {
    const AttentionArgs& a = problems[i].a;
    const int64_t groups = a.groups(), rows = a.group_rows(), key_blocks = (a.k_len + kBlockKeys - 1) / kBlockKeys;
    const int64_t parts = std::clamp<int64_t>((kWantedTasks + all_groups - 1) / all_groups, 1, std::max<int64_t>(1, key_blocks));
    plans[i] = {(rows + kRows - 1) / kRows, key_blocks, parts, round_up(rows, tiled ? kTileSide : kTileRows<T>), dq_count};
    const int64_t part_dq = plans[i].padded_rows * depth_ld;
    delta_count += a.batch * a.heads * a.q_len;
    costed.add(groups * parts, 2 * rows * ((a.k_len + parts - 1) / parts) * (a.head_dim + a.value_dim));
    if (parts == 1) {
      own_dq = std::max(own_dq, part_dq);
      apart.add(0, 0), summed.add(0, 0);
    } else {
      dq_count += groups * parts * part_dq;
      add_deltas(apart, a);
      summed.add(groups * plans[i].blocks, std::min(kRows, rows) * parts * depth_ld);
    }
  }
  Scratch<T> delta_values(delta_count), dq_values(dq_count);
  std::vector<T*> deltas(count);
  for (int64_t i = 0, first = 0; i < count; ++i) {
    deltas[i] = delta_values + first;
    first += problems[i].a.batch * problems[i].a.heads * problems[i].a.q_len;
  }
  if (apart.total() > 0) all_deltas<S, T>(apart, problems, deltas.data());
  constexpr int64_t kGrain = 200000 / CostedTasks::kUnit;
  torch::stable::parallel_for(0, costed.total(), kGrain, [&](int64_t begin, int64_t end) {
    GradBlock<T, A> x(any, problems[0].g, deltas[0]);
    const int64_t padded_keys = round_up(kBlockKeys, kTileRows<T>);
    Scratch<T> dk(padded_keys * depth_ld), dv(padded_keys * value_ld), dq(own_dq);
    Scratch<T> dk_rows(tiled ? padded_keys * depth_ld : 0), dv_rows(tiled ? padded_keys * value_ld : 0);
    costed.each(begin, end, [&](int64_t problem, int64_t task) {
      const auto& [a, g] = problems[problem];
      const auto& [blocks, key_blocks, parts, padded_rows, first_dq] = plans[problem];
      x.enter(problems[problem], deltas[problem]);
      const int64_t group = task / parts, part = task % parts, b = group / a.kv_heads, h = group % a.kv_heads;
      const int64_t group_heads = a.heads / a.kv_heads;
      T* part_dq = parts == 1 ? dq.get() : dq_values + first_dq + task * padded_rows * depth_ld;
      std::fill(part_dq, part_dq + padded_rows * depth_ld, T(0));
      for (int64_t head = h * group_heads; parts == 1 && head < (h + 1) * group_heads; ++head)
        head_deltas<S>(problems[problem], b, head, deltas[problem] + (b * a.heads + head) * a.q_len);
      for (int64_t i = part * key_blocks / parts; i < (part + 1) * key_blocks / parts; ++i) {
        x.template load_keys<S>(group, from_both_ends(i, key_blocks) * kBlockKeys);
        std::fill(dk.get(), dk + padded_keys * depth_ld, T(0));
        std::fill(dv.get(), dv + padded_keys * value_ld, T(0));
        for (int64_t block = 0; block < blocks; ++block) {
          const RowBlock<T> rows(a, group, block * kRows);
          if (!x.meet(rows)) continue;
          x.template load_rows<S>(rows);
          x.probabilities(rows, true);
          x.add_dv(rows, dv);
          x.add_dk(rows, dk);
          x.add_dq(rows, part_dq + block * kRows * depth_ld);
        }
        const T dk_factor = x.dk_factor();
        const T dv_factor = a.dropout_p < 1 ? static_cast<T>(1 / (1 - a.dropout_p)) : T(0);
        const T *dk_sums = x.sum_rows(dk, depth_ld, dk_rows), *dv_sums = x.sum_rows(dv, value_ld, dv_rows);
        for (int64_t j = 0; j < x.n; ++j) {
          const int64_t row = (b * a.k_len + x.k0 + j) * a.kv_heads + h;
          write_scaled(static_cast<S*>(g.dk) + row * a.head_dim, dk_sums + j * depth_ld, a.head_dim, dk_factor);
          write_scaled(static_cast<S*>(g.dv) + row * a.value_dim, dv_sums + j * value_ld, a.value_dim, dv_factor);
        }
      }
      for (int64_t block = 0; parts == 1 && block < blocks; ++block)
        write_dq<S>(problems[problem], RowBlock<T>(a, group, block * kRows), part_dq, 1, 0, depth_ld);
    });
  });
  if (summed.total() == 0) return;
  torch::stable::parallel_for(0, summed.total(), kGrain, [&](int64_t begin, int64_t end) {
    summed.each(begin, end, [&](int64_t problem, int64_t task) {
      const auto& [blocks, key_blocks, parts, padded_rows, first_dq] = plans[problem];
      const int64_t group = task / blocks, part_step = padded_rows * depth_ld;
      const RowBlock<T> rows(problems[problem].a, group, task % blocks * kRows);
      write_dq<S>(problems[problem], rows, dq_values + first_dq + group * parts * part_step, parts, part_step, depth_ld);
    });
  });
}

template <class S>
void attention_backward(const AttentionBackward* problems, int64_t count) {
#if ISA_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<S, bfloat16>)
    if (multiplied_in_pairs(problems[0].a)) return attention_backward_of<S, bfloat16>(problems, count);
#endif
  attention_backward_of<S, compute_t<S>>(problems, count);
}
