// Gradients, with the probabilities computed once more from lse, and nothing of size Sq x Sk in memory:
//   p = e^(s - lse);  dv = p^T do;  dp = do v^T;  ds = p (dp - delta);  dq = ds k;  dk = ds^T q
//   delta = sum_d do o - dlse    (the derivative of the normalisation, and of lse itself)
// With dropout the p of dv and the dp are those kept, over 1 - dropout_p. With softcap ds is times 1 - tanh^2.
//
// A task is a group (a batch entry and a key/value head) and a part of its keys: it owns dk and dv of those keys and one
// partial dq, and meets its blocks of keys one by one, each with all rows. The partial dq are added in order. The
// number of parts depends on the shape alone, so the results never depend on the number of threads.

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
    const int64_t row = (rows.batch * a.q_len + rows.query[r]) * a.heads + rows.head[r];
    write_scaled<A>(static_cast<S*>(g.dq) + row * a.head_dim, sum, a.head_dim, static_cast<T>(a.scale));
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
      if (tiled || key_blocks == 0) std::fill(part_dq, part_dq + padded_rows * depth_ld, T(0));
      for (int64_t head = h * group_heads; parts == 1 && needs_deltas(a) && head < (h + 1) * group_heads; ++head)
        head_deltas<S>(problems[problem], b, head, deltas[problem] + (b * a.heads + head) * a.q_len);
      for (int64_t i = part * key_blocks / parts; i < (part + 1) * key_blocks / parts; ++i) {
        x.template load_keys<S>(group, from_both_ends(i, key_blocks) * kBlockKeys);
        const auto clear_keys = [&] {
          std::fill(dk.get(), dk + padded_keys * depth_ld, T(0));
          std::fill(dv.get(), dv + padded_keys * value_ld, T(0));
        };
        if (tiled) clear_keys();
        const bool fresh_dq = !tiled && i == part * key_blocks / parts;
        bool fresh_keys = !tiled;
        for (int64_t block = 0; block < blocks; ++block) {
          const RowBlock<T> rows(a, group, block * kRows);
          T* block_dq = part_dq + block * kRows * depth_ld;
          const bool last_rows = block + 1 == blocks, last_keys = i + 1 == (part + 1) * key_blocks / parts;
          // Written block by block: all of dq at once would wait for memory.
          const auto finish_dq = [&] {
            if (parts == 1 && last_keys) write_dq<S, A>(problems[problem], rows, part_dq, 1, 0, depth_ld);
          };
          if (!x.meet(rows)) {
            if (fresh_dq) std::fill(block_dq, block_dq + rows.tiles * kTileRows<T> * depth_ld, T(0));
            finish_dq();
            continue;
          }
          x.template load_rows<S>(rows);
          // While this block is computed, what comes next is fetched.
          const int64_t next_task = last_rows && last_keys ? task + 1 : task, next_group = next_task / parts;
          if (next_group < a.groups()) {
            fetch_queries<S>(a, a.q, a.head_dim, next_group, last_rows ? 0 : (block + 1) * kRows);
            fetch_queries<S>(a, g.grad_out, a.value_dim, next_group, last_rows ? 0 : (block + 1) * kRows);
            if (last_rows) {
              const int64_t first_key = from_both_ends(last_keys ? next_task % parts * key_blocks / parts : i + 1, key_blocks) * kBlockKeys;
              fetch_keys<S>(a, next_group, first_key, std::min(kBlockKeys, a.k_len - first_key));
            }
          }
          const uint16_t* kept = g.kept ? g.kept + (group * a.group_rows() + rows.first) * a.kept_row() : nullptr;
          if constexpr (std::is_same_v<A, bfloat16>)
            if (kept) kept_probabilities(x, rows, kept);
          if (!kept) x.probabilities(rows, true);
          x.add_dv(rows, dv, fresh_keys);
          x.add_dk(rows, dk, fresh_keys);
          x.add_dq(rows, block_dq, fresh_dq);
          finish_dq();
          fresh_keys = false;
        }
        if (fresh_keys) clear_keys();
        const T dk_factor = x.dk_factor();
        const T dv_factor = a.dropout_p < 1 ? static_cast<T>(1 / (1 - a.dropout_p)) : T(0);
        const T *dk_sums = x.sum_rows(dk, depth_ld, dk_rows), *dv_sums = x.sum_rows(dv, value_ld, dv_rows);
        for (int64_t j = 0; j < x.n; ++j) {
          const int64_t row = (b * a.k_len + x.k0 + j) * a.kv_heads + h;
          write_scaled<A>(static_cast<S*>(g.dk) + row * a.head_dim, dk_sums + j * depth_ld, a.head_dim, dk_factor);
          write_scaled<A>(static_cast<S*>(g.dv) + row * a.value_dim, dv_sums + j * value_ld, a.value_dim, dv_factor);
        }
      }
      for (int64_t block = 0; key_blocks == 0 && block < blocks; ++block)
        write_dq<S, A>(problems[problem], RowBlock<T>(a, group, block * kRows), part_dq, 1, 0, depth_ld);
    });
  });
  if (summed.total() == 0) return;
  torch::stable::parallel_for(0, summed.total(), kGrain, [&](int64_t begin, int64_t end) {
    summed.each(begin, end, [&](int64_t problem, int64_t task) {
      const auto& [blocks, key_blocks, parts, padded_rows, first_dq] = plans[problem];
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
