// The gradient of an additive mask: ds summed over every dimension that the mask is broadcast along.
//
// A task is one entry of the mask's batch and head, a chunk of rows and a block of keys; it owns that part of the sum and
// computes ds again for each batch entry and head that shares it, in order. Two more products than the rest of the
// backward needs, for a sum that is deterministic and never larger than the mask.

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

template <class S>
void attention_dbias(const AttentionBackward& problem) {
  using T = compute_t<S>;
  constexpr int64_t kRows = kBlockRows<T>, kChunk = 4 * kRows;
  const AttentionArgs& a = problem.a;
  const AttentionGradArgs& g = problem.g;
  const auto* size = g.mask_size;
  const int64_t key_blocks = (a.k_len + kBlockKeys - 1) / kBlockKeys;
  const bool each_row = size[2] > 1 || a.q_len == 1, each_key = size[3] > 1 || a.k_len == 1;
  const int64_t chunk_rows = each_row ? std::min(kChunk, a.q_len) : a.q_len, chunks = (a.q_len + chunk_rows - 1) / chunk_rows;
  const int64_t task_keys = each_key ? 1 : key_blocks, key_tasks = (key_blocks + task_keys - 1) / task_keys;
  const int64_t sum_rows = each_row ? chunk_rows : 1, sum_keys = each_key ? kBlockKeys : 1;
  Scratch<T> deltas(a.batch * a.heads * a.q_len);
  T* const all = deltas.get();
  CostedTasks costed;
  add_deltas(costed, a);
  all_deltas<S, T>(costed, &problem, &all);
  torch::stable::parallel_for(0, size[0] * size[1] * chunks * key_tasks, 1, [&](int64_t begin, int64_t end) {
    GradBlock<T> x(a, g, deltas);
    Scratch<T> sum(sum_rows * sum_keys);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t key_task = task % key_tasks, chunk = task / key_tasks % chunks;
      const int64_t mask_head = task / (key_tasks * chunks) % size[1], mask_batch = task / (key_tasks * chunks * size[1]);
      const int64_t row_begin = chunk * chunk_rows, row_end = std::min(a.q_len, row_begin + chunk_rows);
      std::fill(sum.get(), sum + sum_rows * sum_keys, T(0));
      for (int64_t b = size[0] > 1 ? mask_batch : 0; b < (size[0] > 1 ? mask_batch + 1 : a.batch); ++b)
        for (int64_t h = size[1] > 1 ? mask_head : 0; h < (size[1] > 1 ? mask_head + 1 : a.heads); ++h) {
          const int64_t group_heads = a.heads / a.kv_heads, group = b * a.kv_heads + h / group_heads;
          for (int64_t block = key_task * task_keys; block < std::min(key_blocks, (key_task + 1) * task_keys); ++block) {
            x.template load_keys<S>(group, block * kBlockKeys);
            for (int64_t i = row_begin; i < row_end; i += kRows) {
              const RowBlock<T> rows(a, group, h % group_heads * a.q_len + i, std::min(kRows, row_end - i));
              if (!x.meet(rows)) continue;
              x.template load_rows<S>(rows);
              x.probabilities(rows, false);
              for (int64_t r = 0; r < rows.count; ++r) {
                const T* ds = x.ds + r * GradBlock<T>::kLd;
                T* out = sum + (each_row ? i - row_begin + r : 0) * sum_keys;
                for (int64_t j = 0; j < x.n; ++j) out[each_key ? j : 0] += ds[j];
              }
            }
          }
        }
      const int64_t k0 = key_task * kBlockKeys, n = each_key ? std::min(kBlockKeys, a.k_len - k0) : 1;
      for (int64_t r = 0; r < (each_row ? row_end - row_begin : 1); ++r) {
        const int64_t row = (mask_batch * size[1] + mask_head) * size[2] + (each_row ? row_begin + r : 0);
        write_dmask(a, g.dmask, row * size[3] + (each_key ? k0 : 0), sum + r * sum_keys, n);
      }
    }
  });
}
