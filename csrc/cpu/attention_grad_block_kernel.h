// One step of the backward: a block of query rows against a block of keys. Formulas in attention_backward_kernel.h.

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
  const A *q_rows, *grad_rows;                     // the same, or in pairs the tensors themselves, their rows a stride apart
  int64_t q_stride, grad_stride;
  Scratch<A> p, ds;                                // [kRows][kKeys]: first the products q k^T and do v^T
  Scratch<A> q_pairs, grad_pairs, ds_pairs;        // q, grad_out and ds once more as [pair of rows][..][2]; p is only that
  Scratch<A> q_t, grad_t;                          // in tiles: their transposes [depth_ld][kRows] and [value_ld][kRows]
  Scratch<T> p_strip, ds_strip;                    // the products of a few tiles of rows, before they are rounded
  Scratch<T> slopes;                               // of softcap, for a tile of rows
  SetAside<T> q_aside, grad_out_aside;
  Scores<T> scores;
  int64_t k0 = 0, n = 0;       // the block of keys
  int64_t lo[8], hi[8];        // the part of it that each tile of rows needs
  T lse[kRows], delta[kRows];  // of the block of rows, lse is +inf where there is none
  T row_factor[kRows];         // what p is to be multiplied by
  T* bias_sums = nullptr;      // where the mask's gradient is wanted: attention_dbias_kernel.h
  bool any_aside = false;      // whether q or grad_out, not in pairs, hold what is to be set aside
  const TileTask tile_task{tiled};
  Fetcher fetcher;

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
        slopes(args.softcap > 0 ? kTileRows<T> * kLd : 0),
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
    if (!kPaired || !g->kept) pack_transposed(keys_t.get(), k, a->k.stride[2], a->k.stride[3], n, a->head_dim, depth);
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
    q_aside.clear(), grad_out_aside.clear();
    if constexpr (kPaired) {
      pair_rows(rows, a->q, a->head_dim, depth_ld, q, q_pairs, q_aside, q_rows, q_stride);
      pair_rows(rows, g->grad_out, a->value_dim, value_ld, grad_out, grad_pairs, grad_out_aside, grad_rows, grad_stride);
      if (tiled) {
        pad_rows(q_pairs, rows.count, depth_ld), pad_rows(grad_pairs, rows.count, value_ld);
        transpose_pairs(q_t, kRows, q_pairs, depth_ld, rows.count);
        transpose_pairs(grad_t, kRows, grad_pairs, value_ld, rows.count);
      }
    } else {
      const vec<T> poison = copy_rows<S>(rows, a->q, a->head_dim, depth_ld, q, scores.factor) +
                            copy_rows<S>(rows, g->grad_out, a->value_dim, value_ld, grad_out, T(1));
      any_aside = reduce_add(poison) != 0;
      q_rows = q, q_stride = depth_ld, grad_rows = grad_out, grad_stride = value_ld;
    }
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t b = rows.batch, h = rows.head[r], i = rows.query[r];
      const T saved = *g->lse.at<T>(b, h, i);
      lse[r] = saved == -infinity ? infinity : static_cast<T>(saved + alibi_of_row(*a, rows, r));
      if (in_block(rows, r / kTileRows<T>))
        delta[r] = g->grad_lse.data ? -*g->grad_lse.at<T>(b, h, i) : T(0);
      else
        delta[r] = deltas[(b * a->heads + h) * a->q_len + i];
    }
  }

  // Copies the rows of a tensor of queries, times `factor` but in pairs; rows up to whole tiles become 0.
  template <class S>
  vec<T> copy_rows(const RowBlock<T>& rows, const Strided& from, int64_t columns, int64_t ld, A* to, T factor) const {
    std::fill(to + rows.count * ld, to + round_up(rows.tiles * kTileRows<T>, tiled ? kTileSide : 1) * ld, A{});
    vec<T> poison = {};
    for (int64_t r = 0; r < rows.count; ++r) {
      const S* row = from.at<S>(rows.batch, rows.head[r], rows.query[r]);
      if constexpr (kPaired)
        copy_row(to + r * ld, row, from.stride[3], columns, ld);
      else
        poison += pack_row<S, T>(to + r * ld, row, from.stride[3], columns, ld, factor);
    }
    return poison;
  }

  // The same in pairs of rows too. Rows of one head are read where they lie, unless a tile would read past their end.
  void pair_rows(const RowBlock<T>& rows, const Strided& from, int64_t columns, int64_t ld, A* copies, A* pairs, SetAside<T>& aside,
                 const A*& at, int64_t& stride) const {
    const bool in_place = read_in_pairs(from, rows, columns) && !tiled;
    if (!in_place) copy_rows<A>(rows, from, columns, ld, copies, T(1));
    at = in_place ? from.at<A>(rows.batch, rows.head[0], rows.query[0]) : copies;
    stride = in_place ? from.stride[2] : ld;
    pack_rows(pairs, at, stride, 1, rows.count, in_place ? columns : ld, ld, 0, aside);
  }

  bool nothing_aside() const { return q_aside.rows.empty() && grad_out_aside.rows.empty(); }

  // p and ds of the block; both are 0 for every key that a row does not attend, over the whole block.
  NOINLINE void probabilities(const RowBlock<T>& rows) {
    if (scores.plain() && !scores.dropped)
      probabilities_of<false>(rows, false);
    else
      probabilities_of<true>(rows, scores.capped);
  }

  template <bool featured>
  INLINE void probabilities_of(const RowBlock<T>& rows, bool sloped) {
    constexpr int64_t R = kTileRows<T>, P = kPanel<T>;
    if constexpr (kPaired) {
      const int64_t end = row_elements<T>(n, tiled);
      for (int64_t strip = 0; strip < rows.tiles; strip += strip_tiles) {
        const int64_t tiles = tiled ? strip + strip_tiles : std::min(rows.tiles, strip + strip_tiles);
        fetch_mask(*a, rows, strip * R, std::min(rows.count, tiles * R), k0, n);
        if (tiled) products_in_tiles(rows, strip);
        for (int64_t j = 0; j < n && !tiled; j += P)
          for (int64_t t = strip; t < tiles; ++t) products(rows, t, j, p_strip + (t - strip) * R * kLd, ds_strip + (t - strip) * R * kLd);
        for (int64_t t = strip; t < tiles; ++t) {
          T *p_rows = p_strip + (t - strip) * R * kLd, *ds_rows = ds_strip + (t - strip) * R * kLd;
          const bool at_once = !in_block(rows, t);
          if (at_once)
            weigh_tile<featured, true>(rows, t, sloped, p_rows, ds_rows);
          else
            weigh_tile<featured, false>(rows, t, sloped, p_rows, ds_rows);
          for (int64_t r = 0; r < R; r += 2) {
            const int64_t at = (t * R + r) * kLd, row = r * kLd;
            if (at_once)
              round_gradients(p + at, ds_pairs + at, ds + at, kLd, end, Finished<T>{p_rows + row, ds_rows + row},
                              Finished<T>{p_rows + row + kLd, ds_rows + row + kLd});
            else
              round_gradients(p + at, ds_pairs + at, ds + at, kLd, end, weighed<featured>(rows, t, r, sloped, p_rows, ds_rows),
                              weighed<featured>(rows, t, r + 1, sloped, p_rows, ds_rows));
          }
        }
      }
    } else {
      fetch_mask(*a, rows, 0, rows.count, k0, n);
      for (int64_t j = 0; j < n; j += P)
        for (int64_t t = 0; t < rows.tiles; ++t) products(rows, t, j, p + t * R * kLd, ds + t * R * kLd);
      for (int64_t t = 0; t < rows.tiles; ++t) {
        T *p_rows = p + t * R * kLd, *ds_rows = ds + t * R * kLd;
        if (!in_block(rows, t)) {
          weigh_tile<featured, true>(rows, t, sloped, p_rows, ds_rows);
          continue;
        }
        weigh_tile<featured, false>(rows, t, sloped, p_rows, ds_rows);
        for (int64_t r = 0; r < R; ++r) {
          const Weighed<featured, T> row = weighed<featured>(rows, t, r, sloped, p_rows, ds_rows);
          for (int64_t j = 0; j < round_up(n, kLanes<T>); j += kLanes<T>) {
            const auto [weight, gradient] = row.at(j);
            store(p_rows + r * kLd + j, weight), store(ds_rows + r * kLd + j, gradient);
          }
        }
      }
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
                        .steps = depth_ld, .a = q_rows + row * depth_ld, .a_row = depth_ld, .b = keys_t + panels.lo * depth,
                        .b_pair = 2 * P, .b_block = P * depth, .c = p_strip + panels.lo, .c_row = kLd, .add = false};
    tile_scores(tile_task, product, scores.factor);
    product.steps = product.a_row = value_ld, product.a = grad_rows + row * value_ld;
    product.b = values_t + panels.lo * width, product.b_block = P * width, product.c = ds_strip + panels.lo;
    tile_task.multiply(product);
  }

  // q k^T, where p_rows is given, and do v^T of a tile of rows and a panel of keys.
  INLINE void products(const RowBlock<T>& rows, int64_t t, int64_t j, T* p_rows, T* ds_rows) {
    constexpr int64_t R = kTileRows<T>, W = kLanes<T>, P = kPanel<T>;
    if (lo[t] >= j + P || hi[t] <= j || lo[t] >= hi[t]) return;
    const int64_t vectors = hi[t] - j > W ? 2 : 1;
    fetcher.some();
    if (p_rows)
      product<kRawScores<A>>(rows.tile_count(t), vectors, q_rows + t * R * q_stride, q_stride, step, keys_t + j * depth, P * step,
                             depth / step, p_rows + j, kLd, &scores.factor);
    product<Start::zero>(rows.tile_count(t), vectors, grad_rows + t * R * grad_stride, grad_stride, step, values_t + j * width, P * step,
                         width / step, ds_rows + j, kLd);
  }

  // Whether all keys that a tile of rows attends to are in this block. Then p is divided by its sum and delta is the sum of p dp:
  // out was rounded to the dtype of the tensors and lse to float, and where there are few keys dp - delta cancels.
  bool in_block(const RowBlock<T>& rows, int64_t t) const {
    return t < rows.tiles && rows.tile_lo[t] >= k0 && rows.tile_hi[t] <= k0 + n;
  }

  // Turns the products of a tile of rows into p and ds, or into what `weighed` reads, which has the sums over all of a row.
  template <bool featured, bool at_once>
  INLINE void weigh_tile(const RowBlock<T>& rows, int64_t t, bool sloped, T* p_rows, T* ds_rows) {
    constexpr int64_t R = kTileRows<T>, W = kLanes<T>;
    const int64_t end = std::min(kLd, std::max(round_up(n, R), row_elements<T>(n, tiled)));
    const bool any = t < rows.tiles && lo[t] < hi[t];
    const int64_t begin = any ? lo[t] / W * W : 0, last_end = any ? round_up(hi[t], W) : 0;
    for (int64_t some = 0; some < R; some += W) {
      const int64_t count = std::min(W, R - some);
      vec<T> p_sums[W], dp_sums[W];
      if constexpr (!at_once)
#pragma GCC unroll 16
        for (int64_t i = 0; i < W; ++i) p_sums[i] = dp_sums[i] = vec<T>{};
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (some + i) * kLd, r = t * R + some + i;
        T *p_row = p_rows + at, *ds_row = ds_rows + at;
        const bool used = any && r < rows.count;
        const int64_t first = used ? begin : 0, last = used ? last_end : 0;
        if (first > 0) std::fill(p_row, p_row + first, T(0)), std::fill(ds_row, ds_row + first, T(0));
        if (last < end) std::fill(p_row + last, p_row + end, T(0)), std::fill(ds_row + last, ds_row + end, T(0));
        if (!used) continue;
        if constexpr (featured) scores.read_biases(rows, r, k0, first, hi[t]), scores.read_kept(rows, r, k0, hi[t]);
        weigh_row<featured, at_once>({p_row, first, last, rows.lo[r] - k0, rows.hi[r] - k0}, ds_row, lse[r], delta[r],
                                     sloped ? slopes + at : nullptr, at_once ? row_of_sums(*a, *g, rows, r, bias_sums) : nullptr, p_sums[i],
                                     dp_sums[i]);
      }
      if constexpr (!at_once) {
        const bool whole = in_block(rows, t);
        T factors[W], sums[W];
        if (whole) {
          const vec<T> p_sum = sum_each<T>(p_sums), factor = p_sum == 0 ? vec<T>{} : 1 / p_sum;
          store(factors, factor), store(sums, sum_each<T>(dp_sums) * factor);
        }
        for (int64_t i = 0; i < count; ++i) {
          const int64_t r = t * R + some + i;
          row_factor[r] = whole ? factors[i] : T(1);
          if (whole) delta[r] += sums[i];
        }
      }
    }
  }

  // at_once: turns the products of a row into the p that dv takes and ds. Else into p, negative where it is dropped, and what
  // dropout leaves of dp, and sums p and p dp by lane.
  template <bool featured, bool at_once>
  INLINE void weigh_row(const ScoreRow<T>& row, T* dp_row, T row_lse, T row_delta, T* slope_row, T* bias_row, vec<T>& p_sum,
                        vec<T>& dp_sum) const {
    constexpr int64_t W = kLanes<T>;
    const T kept = a->dropout_p < 1 ? static_cast<T>(1 / (1 - a->dropout_p)) : T(0);
    const auto one = [&](int64_t j, bool edge) __attribute__((always_inline)) {
      vec<T> x = load(row.s + j), dp = load(dp_row + j), slope = broadcast(T(1));
      if constexpr (featured) {
        if (scores.capped) {
          x = tanh(x);
          slope = 1 - x * x;
          x = x * scores.cap;
        }
        x = scores.finish(x, j);
      }
      if (edge) x = limit<T>(x, j, row.lo, row.hi);
      const vec<T> probability = exp_nonpositive<T>(x - row_lse);
      vec<T> weight = probability;
      if constexpr (featured) {
        if (scores.dropped) {
          const auto drop = load(scores.keep + j) == 0;
          dp = drop ? vec<T>{} : dp * kept;
          weight = drop ? (at_once ? vec<T>{} : -probability) : probability;
        }
      }
      // Selected rather than multiplied: dp is NaN where a masked value is.
      if constexpr (at_once) {
        vec<T> gradient = probability * (dp - row_delta);
        if (featured && bias_row) add_to_sums<T>(bias_row + j, probability, gradient);
        if (featured && slope_row) gradient *= slope;
        dp = probability == 0 ? vec<T>{} : gradient;
      } else {
        p_sum += probability;
        dp_sum += probability == 0 ? vec<T>{} : probability * dp;
        if (featured && slope_row) store(slope_row + j, slope);
      }
      store(row.s + j, weight);
      if (at_once || (featured && scores.dropped)) store(dp_row + j, dp);
    };
    const int64_t whole_begin = std::clamp(round_up(row.lo, W), row.begin, row.end);
    const int64_t whole_end = std::clamp(row.hi / W * W, whole_begin, row.end);
    for (int64_t j = row.begin; j < whole_begin; j += W) one(j, true);
#pragma GCC unroll 2
    for (int64_t j = whole_begin; j < whole_end; j += W) one(j, false);
    for (int64_t j = whole_end; j < row.end; j += W) one(j, true);
  }

  template <bool featured>
  INLINE Weighed<featured, T> weighed(const RowBlock<T>& rows, int64_t t, int64_t row, bool sloped, const T* p_rows,
                                      const T* dp_rows) const {
    const int64_t r = t * kTileRows<T> + row, at = row * kLd;
    const T* slope = sloped ? slopes.get() + at : nullptr;
    T* sums = row_of_sums(*a, *g, rows, r, bias_sums);
    return {p_rows + at, dp_rows + at, slope, sums, broadcast(row_factor[r]), broadcast(delta[r]), scores.dropped};
  }

  // The next three add to what is there, or where it is `fresh` memory, replace it; in tiles it is to be 0 first. Where `to` is given the
  // sums are final, and rounded to there instead; but for what is set aside, of which there is to be nothing.
  void add_dv(const RowBlock<T>& rows, T* dv, bool fresh, const Rounded& to) {
    if constexpr (kPaired) {
      if (tiled)
        add_in_tiles(rows, p, grad_t, value_ld, grad_out_aside, dv);
      else
        add_transposed(rows, p, grad_pairs, value_ld, grad_out_aside, dv, fresh, to);
    } else {
      if (any_aside) grad_out_aside.take(grad_out, rows.count, value_ld, 0);
      add_transposed(rows, p, grad_out, value_ld, grad_out_aside, dv, fresh, to);
    }
  }

  void add_dk(const RowBlock<T>& rows, T* dk, bool fresh, const Rounded& to) {
    if constexpr (kPaired) {
      if (tiled)
        add_in_tiles(rows, ds_pairs, q_t, depth_ld, q_aside, dk);
      else
        add_transposed(rows, ds_pairs, q_pairs, depth_ld, q_aside, dk, fresh, to);
    } else {
      if (any_aside) q_aside.take(q, rows.count, depth_ld, 0);
      add_transposed(rows, ds, q, depth_ld, q_aside, dk, fresh, to);
    }
  }

  // C[keys, columns] += w^T b, w being p or ds and b rows of the block; only rows whose tiles attend to a key.
  NOINLINE void add_transposed(const RowBlock<T>& rows, const A* w, const A* b, int64_t columns, const SetAside<T>& aside, T* c, bool fresh,
                               const Rounded& to) {
    constexpr int64_t R = kTileRows<T>, W = kLanes<T>, P = kPanel<T>;
    for (int64_t key = 0; key < n; key += R) {
      int64_t first = rows.tiles, last = 0;
      for (int64_t t = 0; t < rows.tiles; ++t)
        if (lo[t] < key + R && hi[t] > key && lo[t] < hi[t]) first = std::min(first, t), last = t + 1;
      const int64_t keys_here = std::min(R, n - key), row = first * R, count = std::min(rows.count, last * R) - row;
      const int64_t steps = (count + step - 1) / step;
      for (int64_t d = 0; d < columns; d += P) {
        T* sums = c + key * columns + d;
        const A *a_from = w + row * kLd + key * step, *b_from = b + row * columns + d * step;
        if (first >= last) {
          if (fresh) clear(sums, columns, std::min(P, columns - d));
        } else {
          fetcher.some();
          if (round_tile<false>(keys_here, a_from, step, step * kLd, b_from, step * columns, steps, sums, columns, !fresh, to.at(key, d)))
            continue;
          add_or_replace(fresh, keys_here, (columns - d) / W, a_from, step, step * kLd, b_from, step * columns, steps, sums, columns);
        }
        round_sums(sums, columns, keys_here, to.at(key, d));
      }
    }
    aside.add(c, columns, n, columns, 0, rows.count, weight_of(w));
  }

  // Zeros of a tile of sums.
  static void clear(T* sums, int64_t row, int64_t columns) {
    for (int64_t r = 0; r < kTileRows<T>; ++r) std::fill(sums + r * row, sums + r * row + columns, T(0));
  }

  template <class... Rest>
  INLINE static void add_or_replace(bool replace, Rest... rest) {
    if (replace)
      product<Start::zero>(rest...);
    else
      product<Start::add>(rest...);
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
  NOINLINE void add_dq(const RowBlock<T>& rows, T* dq, bool fresh, const Rounded& to) {
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
        T* sums = dq + t * R * depth_ld + d;
        const A *a_from = ds + t * R * kLd + from, *b_from = keys + from * depth_ld + d * step;
        const int64_t count = rows.tile_count(t), steps = (hi[t] - from + step - 1) / step;
        if (lo[t] < hi[t]) {
          if (round_tile<false>(count, a_from, kLd, step, b_from, depth_ld * step, steps, sums, depth_ld, !fresh, to.at(t * R, d)))
            continue;
          add_or_replace(fresh, count, (depth_ld - d) / W, a_from, kLd, step, b_from, depth_ld * step, steps, sums, depth_ld);
        } else if (fresh) {
          clear(sums, depth_ld, std::min(P, depth_ld - d));
        }
        round_sums(sums, depth_ld, count, to.at(t * R, d));
      }
  }
};
