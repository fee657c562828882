// The gradient of an additive mask: ds summed over every dimension that the mask is broadcast along.
//
// ds is added up where the backward has it in registers. A task of the backward keeps the sums of its block of keys and takes one
// after the other the groups that share a part of the mask. Where that leaves few tasks, those groups are cut into runs, a task
// for each, whose sums are added in order afterwards. How many depends on the shape alone. Rows of sums are kBlockKeys wide; a mask
// that is broadcast along the keys has one task for all of them, and each of its rows is reduced at the end.

// Which groups a task of the backward takes: one, or where the mask's gradient is wanted a run of those that share its sums.
struct GroupRuns {
  int64_t sets, runs = 1, run = 1;         // sets of runs * run groups each
  int64_t set_step = 1, step = 1;          // from the first group of a set to that of the next, and from group to group
  int64_t rows = 0, columns = 0, all = 0;  // of the mask: those of one set, and its elements

  explicit GroupRuns(const AttentionBackward& problem) : sets(problem.a.groups()) {
    const auto& [a, g] = problem;
    if (!g.dmask) return;
    const int64_t* size = g.mask_size;
    const bool each_batch = size[0] > 1, each_head = size[1] > 1;
    sets = (each_batch ? a.batch : 1) * (each_head ? a.kv_heads : 1);
    set_step = each_batch && !each_head ? a.kv_heads : 1, step = each_head ? a.kv_heads : 1;
    rows = (each_head ? a.heads / a.kv_heads : 1) * size[2], columns = size[3];
    all = size[0] * size[1] * size[2] * size[3];
    constexpr int64_t kWantedTasks = 24, kMostSums = 8 << 20;
    const int64_t sharing = a.groups() / sets, tasks = sets * (each_key() ? key_blocks(a) : 1);
    for (int64_t cut = 1; cut <= sharing && tasks * runs < kWantedTasks; ++cut)
      if (sharing % cut == 0 && cut * all <= kMostSums) runs = cut;
    run = sharing / runs;
  }

  static int64_t key_blocks(const AttentionArgs& a) { return (a.k_len + kBlockKeys - 1) / kBlockKeys; }
  bool each_key() const { return columns > 1; }
  int64_t tasks() const { return sets * runs; }
  int64_t group(int64_t task, int64_t i) const { return task / runs * set_step + (task % runs * run + i) * step; }
};

// Of the sums of a task those of row r of a block, or null where there are none.
template <class T>
INLINE T* row_of_sums(const AttentionArgs& a, const AttentionGradArgs& g, const RowBlock<T>& rows, int64_t r, T* sums) {
  if (!sums || r >= rows.count) return nullptr;
  const int64_t head = g.mask_size[1] > 1 ? rows.head[r] % (a.heads / a.kv_heads) : 0, query = g.mask_size[2] > 1 ? rows.query[r] : 0;
  return sums + (head * g.mask_size[2] + query) * kBlockKeys;
}

// Adds a vector of ds, selected by p: it is NaN where a masked value is.
template <class T>
INLINE void add_to_sums(T* sums, vec<T> p, vec<T> ds) {
  store(sums, load(sums) + (p == 0 ? vec<T>{} : ds));
}

// Writes n sums from element `first` on, in the mask's dtype.
template <class T>
inline void write_dmask(const AttentionArgs& a, void* dmask, int64_t first, const T* sum, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    if (a.mask_type == MaskType::float32)
      static_cast<float*>(dmask)[first + j] = static_cast<float>(sum[j]);
    else if (a.mask_type == MaskType::float64)
      static_cast<double*>(dmask)[first + j] = static_cast<double>(sum[j]);
    else
      static_cast<bfloat16*>(dmask)[first + j] = to_bfloat16(static_cast<float>(sum[j]));
  }
}

// The sums of a task for n keys from k0 on: to the mask's gradient, or where there are more runs to this one's [all elements].
template <class T>
NOINLINE void finish_sums(const AttentionBackward& problem, const GroupRuns& of, int64_t task, int64_t k0, int64_t n, T* sums, T* parts) {
  const auto& [a, g] = problem;
  const int64_t first = of.group(task, 0), *size = g.mask_size, group_heads = a.heads / a.kv_heads;
  const int64_t head = size[1] > 1 ? first % a.kv_heads * group_heads : 0, batch = size[0] > 1 ? first / a.kv_heads : 0;
  for (int64_t r = 0; r < of.rows; ++r) {
    T* row = sums + r * kBlockKeys;
    const int64_t at = ((batch * size[1] + head) * size[2] + r) * size[3] + (of.each_key() ? k0 : 0);
    if (!of.each_key()) {
      vec<T> sum = {};
      for (int64_t j = 0; j < kBlockKeys; j += kLanes<T>) sum += load(row + j);
      row[0] = reduce_add(sum), n = 1;
    }
    if (of.runs > 1)
      std::copy(row, row + n, parts + task % of.runs * of.all + at);
    else
      write_dmask(a, g.dmask, at, row, n);
  }
}

// Adds up the runs.
template <class T>
void merge_sums(const AttentionBackward& problem, const GroupRuns& of, T* parts) {
  constexpr int64_t kGrain = 16384;
  torch::stable::parallel_for(0, of.all, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t run = 1; run < of.runs; ++run)
      for (int64_t j = begin; j < end; ++j) parts[j] += parts[run * of.all + j];
    write_dmask(problem.a, problem.g.dmask, begin, parts + begin, end - begin);
  });
}
