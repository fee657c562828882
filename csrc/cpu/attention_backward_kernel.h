// Gradients, with the probabilities computed once more from lse, and nothing of size Sq x Sk in memory:
//   p = e^(s - lse);  dv = p^T do;  dp = do v^T;  ds = p (dp - delta);  dq = ds k;  dk = ds^T q
//   delta = sum_d do o - dlse    (the derivative of the normalisation, and of lse itself)
// With dropout the p of dv and the dp are those kept, over 1 - dropout_p. With softcap ds is times 1 - tanh^2.
//
// A task is a group (a batch entry and a key/value head) and a part of its keys: it owns dk and dv of those keys and one
// partial dq, and meets its blocks of keys one by one, each with all rows. The partial dq are added in order. The
// number of parts depends on the shape alone, so the results never depend on the number of threads. Where the gradient of a mask is
// wanted a task has a run of groups: attention_dbias_kernel.h.

// A is the type that was multiplied.
template <class A, class S, class T>
INLINE void write_scaled(S* out, const T* row, int64_t n, T factor) {
#if ISA_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<A, bfloat16>) return round_scaled(out, row, n, factor);
#endif
  for (int64_t d = 0; d < n; d += kLanes<T>) store_any(out + d, load(row + d) * factor, n - d);
}

// The sums of `parts` parts of dq of a block of rows, part_step apart, times the scale.
template <class S, class A, class T>
inline void write_dq(const AttentionBackward& problem, const RowBlock<T>& rows, T* parts_dq, int64_t parts, int64_t part_step,
                     int64_t depth_ld) {
  const auto& [a, g] = problem;
  for (int64_t r = 0; r < rows.count; ++r) {
    T* sum = parts_dq + (rows.first + r) * depth_ld;
    for (int64_t part = 1; part < parts; ++part) {
      const T* other = sum + part * part_step;
      for (int64_t d = 0; d < depth_ld; d += kLanes<T>) store(sum + d, load(sum + d) + load(other + d));
    }
    write_scaled<A>(g.dq.at<S>(rows.batch, rows.head[r], rows.query[r], a.head_dim), sum, a.head_dim, static_cast<T>(a.scale));
  }
}

// Where rows of a gradient go from the registers they are summed in, from row i of a head on; nowhere where that is not possible.
template <class A, class T>
inline Rounded results_of(const GradientRows& gradient, int64_t columns, int64_t b, int64_t h, int64_t i, const T* factor) {
  if constexpr (std::is_same_v<A, bfloat16>)
    if (columns % kPanel<T> == 0 && !in_tiles()) return {gradient.at<bfloat16>(b, h, i, columns), gradient.token * columns, factor};
  return {};
}
// The same of a block of rows.
template <class A, class T>
inline Rounded results_of(const GradientRows& gradient, int64_t columns, const RowBlock<T>& rows, const T* factor) {
  if (rows.head[0] != rows.head[rows.count - 1]) return {};
  return results_of<A>(gradient, columns, rows.batch, rows.head[0], rows.query[0], factor);
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
    GroupRuns of;
    int64_t blocks, key_blocks, parts, padded_rows;
    int64_t first_dq;  // its dq of every part, [groups][parts][rows][depth_ld], among all problems'
    bool own;          // a task has dq of its group to itself
  };
  std::vector<Plan> plans;
  plans.reserve(count);
  CostedTasks costed, apart, summed;
  for (int64_t i = 0; i < count; ++i) {
    const AttentionArgs& a = problems[i].a;
    const GroupRuns of(problems[i]);
    const int64_t groups = a.groups(), rows = a.group_rows(), key_blocks = GroupRuns::key_blocks(a);
    const int64_t wanted = problems[i].g.dmask ? (of.each_key() ? key_blocks : 1) : (kWantedTasks + all_groups - 1) / all_groups;
    const int64_t parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, key_blocks));
    const bool own = parts == 1 && !problems[i].g.dmask;
    plans.push_back({of, (rows + kRows - 1) / kRows, key_blocks, parts, round_up(rows, tiled ? kTileSide : kTileRows<T>), dq_count, own});
    const int64_t part_dq = plans[i].padded_rows * depth_ld;
    delta_count += a.batch * a.heads * a.q_len;
    costed.add(of.tasks() * parts, 2 * of.run * rows * ((a.k_len + parts - 1) / parts) * (a.head_dim + a.value_dim));
    if (own) {
      own_dq = std::max(own_dq, part_dq);
      apart.add(0, 0), summed.add(0, 0);
    } else {
      dq_count += groups * parts * part_dq;
      add_deltas(apart, a);
      summed.add(groups * plans[i].blocks, std::min(kRows, rows) * parts * depth_ld);
    }
  }
  const GroupRuns& masked = plans[0].of;  // one of many sequences has no mask
  Scratch<T> mask_sums(masked.runs > 1 ? masked.runs * masked.all : 0);
  Scratch<T> delta_values(delta_count), dq_values(dq_count);
  std::vector<T*> deltas(count);
  for (int64_t i = 0, first = 0; i < count; ++i) {
    deltas[i] = delta_values + first;
    first += problems[i].a.batch * problems[i].a.heads * problems[i].a.q_len;
  }
  if (apart.total() > 0) all_deltas<S, T>(apart, problems, deltas.data());
  constexpr int64_t kGrain = 200000 / CostedTasks::kUnit;
  costed.run(kGrain, [&](const auto& each_task) {
    GradBlock<T, A> x(any, problems[0].g, deltas[0]);
    const int64_t padded_keys = round_up(kBlockKeys, kTileRows<T>);
    Scratch<T> dk(padded_keys * depth_ld), dv(padded_keys * value_ld), dq(own_dq);
    Scratch<T> sums(masked.rows * kBlockKeys);
    Scratch<T> dk_rows(tiled ? padded_keys * depth_ld : 0), dv_rows(tiled ? padded_keys * value_ld : 0);
    each_task([&](int64_t problem, int64_t task) {
      const auto& [a, g] = problems[problem];
      const auto& [of, blocks, key_blocks, parts, padded_rows, first_dq, own] = plans[problem];
      x.enter(problems[problem], deltas[problem]);
      const int64_t part = task % parts, first_block = part * key_blocks / parts, last_block = (part + 1) * key_blocks / parts;
      const int64_t group_heads = a.heads / a.kv_heads;
      const auto dq_of = [&](int64_t group) {
        return own ? dq.get() : dq_values + first_dq + (group * parts + part) * padded_rows * depth_ld;
      };
      for (int64_t i = 0; i < of.run; ++i) {
        const int64_t group = of.group(task / parts, i), b = group / a.kv_heads, h = group % a.kv_heads;
        if (tiled || key_blocks == 0) std::fill(dq_of(group), dq_of(group) + padded_rows * depth_ld, T(0));
        for (int64_t head = h * group_heads; own && needs_deltas(a) && head < (h + 1) * group_heads; ++head)
          head_deltas<S>(problems[problem], b, head, deltas[problem] + (b * a.heads + head) * a.q_len);
      }
      // Block of keys after block of keys, each with all groups of the run.
      for (int64_t step = first_block * of.run; step < last_block * of.run; ++step) {
        const int64_t i = step / of.run, group = of.group(task / parts, step % of.run), b = group / a.kv_heads, h = group % a.kv_heads;
        const bool first_of_run = step % of.run == 0, last_of_run = (step + 1) % of.run == 0;
        if (g.dmask && first_of_run && (of.each_key() || i == first_block)) std::fill(sums.get(), sums + of.rows * kBlockKeys, T(0));
        if (g.dmask) x.bias_sums = sums;
        T* part_dq = dq_of(group);
        x.template load_keys<S>(group, from_both_ends(i, key_blocks) * kBlockKeys);
        const auto clear_keys = [&] {
          std::fill(dk.get(), dk + padded_keys * depth_ld, T(0));
          std::fill(dv.get(), dv + padded_keys * value_ld, T(0));
        };
        if (tiled) clear_keys();
        const T dq_factor = static_cast<T>(a.scale), dk_factor = x.dk_factor();
        const T dv_factor = a.dropout_p < 1 ? static_cast<T>(1 / (1 - a.dropout_p)) : T(0);
        Rounded dk_results, dv_results;  // of the last block of rows
        const bool fresh_dq = !tiled && i == first_block;
        bool fresh_keys = !tiled;
        for (int64_t block = 0; block < blocks; ++block) {
          const RowBlock<T> rows(a, group, block * kRows);
          T* block_dq = part_dq + block * kRows * depth_ld;
          const bool last_rows = block + 1 == blocks, last_keys = i + 1 == last_block;
          // Written block by block: all of dq at once would wait for memory.
          const Rounded dq_results = own && last_keys ? results_of<A>(g.dq, a.head_dim, rows, &dq_factor) : Rounded{};
          const auto finish_dq = [&] {
            if (own && last_keys) write_dq<S, A>(problems[problem], rows, part_dq, 1, 0, depth_ld);
          };
          if (!x.meet(rows)) {
            if (fresh_dq) std::fill(block_dq, block_dq + rows.tiles * kTileRows<T> * depth_ld, T(0));
            finish_dq();
            continue;
          }
          x.template load_rows<S>(rows);
          // While this block is computed, what comes next is fetched, and what is written soon.
          const int64_t next_task = task + (last_rows && last_keys && last_of_run);
          const int64_t next_group = of.group(next_task / parts, (step + last_rows) % of.run),
                        next_row = last_rows ? 0 : (block + 1) * kRows;
          x.fetcher.clear();
          if (next_task < of.tasks() * parts) {
            x.fetcher.template add_queries<S>(a, a.q, a.head_dim, next_group, next_row);
            x.fetcher.template add_queries<S>(a, g.grad_out, a.value_dim, next_group, next_row);
            if (g.kept)
              x.fetcher.add(g.kept + (next_group * a.group_rows() + next_row) * a.kept_row(), a.kept_row(),
                            std::min(kRows, a.group_rows() - next_row), a.k_len);
            if (last_rows) {
              const int64_t next_block = next_task == task ? (step + 1) / of.run : next_task % parts * key_blocks / parts;
              const int64_t first_key = from_both_ends(next_block, key_blocks) * kBlockKeys;
              x.fetcher.template add_keys<S>(a, next_group, first_key, std::min(kBlockKeys, a.k_len - first_key));
            }
          }
          if (own && last_keys && rows.head[0] == rows.head[rows.count - 1])
            x.fetcher.add(g.dq.at<S>(b, rows.head[0], rows.query[0], a.head_dim), g.dq.token * a.head_dim, rows.count, a.head_dim, true);
          if (last_rows) {
            x.fetcher.add(g.dk.at<S>(b, h, x.k0, a.head_dim), g.dk.token * a.head_dim, x.n, a.head_dim, true);
            x.fetcher.add(g.dv.at<S>(b, h, x.k0, a.value_dim), g.dv.token * a.value_dim, x.n, a.value_dim, true);
          }
          constexpr int64_t R = kTileRows<T>, P = kPanel<T>;  // of the tiles of products, roughly
          x.fetcher.share_among(rows.tiles * (x.n + P - 1) / P + (x.n + R - 1) / R * (depth_ld + value_ld + P) / P);
          const uint16_t* kept = g.kept ? g.kept + (group * a.group_rows() + rows.first) * a.kept_row() : nullptr;
          if constexpr (std::is_same_v<A, bfloat16>)
            if (kept) kept_probabilities(x, rows, kept);
          if (!kept) x.probabilities(rows);
          if (last_rows && x.nothing_aside()) {
            dk_results = results_of<A>(g.dk, a.head_dim, b, h, x.k0, &dk_factor);
            dv_results = results_of<A>(g.dv, a.value_dim, b, h, x.k0, &dv_factor);
          }
          x.add_dv(rows, dv, fresh_keys, dv_results);
          x.add_dk(rows, dk, fresh_keys, dk_results);
          x.add_dq(rows, block_dq, fresh_dq, dq_results);
          if (!dq_results.out) finish_dq();
          fresh_keys = false;
        }
        if (fresh_keys) clear_keys();
        const T *dk_sums = x.sum_rows(dk, depth_ld, dk_rows), *dv_sums = x.sum_rows(dv, value_ld, dv_rows);
        for (int64_t j = 0; j < x.n; ++j) {
          if (!dk_results.out) write_scaled<A>(g.dk.at<S>(b, h, x.k0 + j, a.head_dim), dk_sums + j * depth_ld, a.head_dim, dk_factor);
          if (!dv_results.out) write_scaled<A>(g.dv.at<S>(b, h, x.k0 + j, a.value_dim), dv_sums + j * value_ld, a.value_dim, dv_factor);
        }
        if (g.dmask && last_of_run && (of.each_key() || i + 1 == last_block))
          finish_sums<T>(problems[problem], of, task / parts, x.k0, x.n, sums, mask_sums);
      }
      for (int64_t block = 0; key_blocks == 0 && block < blocks; ++block)
        write_dq<S, A>(problems[problem], RowBlock<T>(a, of.group(task, 0), block * kRows), dq.get(), 1, 0, depth_ld);
    });
  });
  if (masked.runs > 1) merge_sums<T>(problems[0], masked, mask_sums);
  summed.run(kGrain, [&](const auto& each_task) {
    each_task([&](int64_t problem, int64_t task) {
      const auto& [of, blocks, key_blocks, parts, padded_rows, first_dq, own] = plans[problem];
      const int64_t group = task / blocks, part_step = padded_rows * depth_ld;
      const RowBlock<T> rows(problems[problem].a, group, task % blocks * kRows);
      write_dq<S, A>(problems[problem], rows, dq_values + first_dq + group * parts * part_step, parts, part_step, depth_ld);
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
