// Which keys a row attends to, and what is added to its scores: ranges, masks, ALiBi, dropout.

// Keys that query i attends, by causality, window and length; none where lo >= hi. Both ends grow with i.
struct KeyRange {
  int64_t lo, hi;
};
inline KeyRange key_range(const AttentionArgs& a, int64_t i) {
  const int64_t position = i + a.offset;
  return {a.left < 0 ? 0 : std::clamp<int64_t>(position - a.left, 0, a.k_len),
          a.right < 0 ? a.k_len : std::clamp<int64_t>(position + a.right + 1, 0, a.k_len)};
}

// Rows that are read or written soon, whose cache lines are asked for a few at a time while something else is computed: all at once would
// fill the queue of misses. In tensors [B, S, H, D] the rows of a head lie apart, and nothing else would ask for them.
class Fetcher {
 public:
  void clear() { runs_ = run_ = row_ = rows_ = share_ = 0; }

  // `count` rows of `columns` elements. What does not fit is not asked for.
  template <class S>
  void add(const S* rows, int64_t row_stride, int64_t count, int64_t columns, bool to_write = false) {
    constexpr int64_t kMostBytes = 4096;
    const int64_t bytes = columns * static_cast<int64_t>(sizeof(S));
    if (runs_ == kMost || count <= 0 || bytes > kMostBytes) return;
    run_at_[runs_++] = {reinterpret_cast<const char*>(rows), row_stride * static_cast<int64_t>(sizeof(S)), count, bytes, to_write};
    rows_ += count;
  }
  // A block of rows of a group in a tensor of queries.
  template <class S>
  void add_queries(const AttentionArgs& a, const Strided& queries, int64_t columns, int64_t group, int64_t first_row) {
    const int64_t first_head = group % a.kv_heads * (a.heads / a.kv_heads);
    const int64_t end = std::min(a.group_rows(), first_row + kBlockRows<compute_t<S>>);
    for (int64_t r = first_row, count; r < end; r += count) {
      count = std::min(end - r, a.q_len - r % a.q_len);
      add(queries.at<S>(group / a.kv_heads, first_head + r / a.q_len, r % a.q_len), queries.stride[2], count, columns);
    }
  }

  template <class S>
  void add_keys(const AttentionArgs& a, int64_t group, int64_t first_key, int64_t count) {
    const int64_t b = group / a.kv_heads, h = group % a.kv_heads;
    add(a.k.at<S>(b, h, first_key), a.k.stride[2], count, a.head_dim);
    add(a.v.at<S>(b, h, first_key), a.v.stride[2], count, a.value_dim);
  }

  // How often `some` will be called.
  void share_among(int64_t calls) { share_ = calls > 0 ? (rows_ + calls - 1) / calls : 0; }

  // The next few rows. Inlined always: GCC takes a function that only prefetches for one without effect, and drops the call.
  INLINE void some() {
    for (int64_t count = share_; count > 0 && run_ < runs_; --count) {
      const Run& run = run_at_[run_];
      const char* row = run.first + row_ * run.step;
      if (run.to_write)
        for (int64_t i = 0; i < run.bytes; i += kLine) fetch_for_writing(row + i);
      else
        for (int64_t i = 0; i < run.bytes; i += kLine) __builtin_prefetch(row + i, 0, 2);
      if (++row_ == run.count) ++run_, row_ = 0;
    }
  }

 private:
  static constexpr int64_t kMost = 16, kLine = 64;
  struct Run {
    const char* first;
    int64_t step, count, bytes;
    bool to_write;
  };
  Run run_at_[kMost];
  int64_t runs_ = 0, run_ = 0, row_ = 0, rows_ = 0, share_ = 0;
};

// Rows of one group (a batch entry and a key/value head): its query heads one after the other, so that the heads that
// share keys share tiles too. Row r of a group is query r % Sq of head r / Sq.
template <class T>
struct RowBlock {
  static constexpr int64_t kMax = kBlockRows<T>, kTiles = 8;
  int64_t first, count, tiles, batch;
  int64_t head[kMax], query[kMax];
  int64_t lo[kMax], hi[kMax];  // keys attended; 0 and 0 where there are none
  int64_t nearest[kMax];       // the distance from the query's own position to the nearest of them
  int64_t tile_lo[kTiles], tile_hi[kTiles];
  int64_t block_lo, block_hi;

  RowBlock(const AttentionArgs& a, int64_t group, int64_t first_row, int64_t most = kMax) {
    first = first_row;
    count = std::min(most, a.group_rows() - first);
    tiles = (count + kTileRows<T> - 1) / kTileRows<T>;
    batch = group / a.kv_heads;
    const int64_t first_head = group % a.kv_heads * (a.heads / a.kv_heads);
    block_lo = a.k_len, block_hi = 0;
    int64_t next_head = first_head, next_query = 0;  // a division for each row would show
    if (count > 0) next_head += first / a.q_len, next_query = first % a.q_len;
    const bool every_key = a.left < 0 && a.right < 0 && !a.alibi;
    for (int64_t t = 0; t < tiles; ++t) {
      tile_lo[t] = every_key ? 0 : a.k_len, tile_hi[t] = every_key ? a.k_len : 0;
      for (int64_t r = t * kTileRows<T>; r < (t + 1) * kTileRows<T>; ++r) {
        lo[r] = hi[r] = nearest[r] = 0;
        if (r >= count) continue;
        head[r] = next_head, query[r] = next_query;
        if (++next_query == a.q_len) ++next_head, next_query = 0;
        if (every_key) {
          hi[r] = a.k_len;
          continue;
        }
        const KeyRange range = key_range(a, query[r]);
        if (range.lo >= range.hi) continue;
        lo[r] = range.lo, hi[r] = range.hi;
        const int64_t position = query[r] + a.offset;
        nearest[r] = std::max<int64_t>(0, std::max(range.lo - position, position - (range.hi - 1)));
        tile_lo[t] = std::min(tile_lo[t], lo[r]);
        tile_hi[t] = std::max(tile_hi[t], hi[r]);
      }
      if (tile_lo[t] >= tile_hi[t]) tile_lo[t] = tile_hi[t] = 0;
      if (tile_hi[t] == 0) continue;
      block_lo = std::min(block_lo, tile_lo[t]);
      block_hi = std::max(block_hi, tile_hi[t]);
    }
    if (block_lo >= block_hi) block_lo = block_hi = 0;
  }

  int64_t tile_count(int64_t t) const { return std::min<int64_t>(kTileRows<T>, count - t * kTileRows<T>); }
};

// Whether rows of bfloat16 may be multiplied in pairs where they lie: those of one head, of which no tile reads past the last one.
template <class T>
inline bool read_in_pairs(const Strided& queries, const RowBlock<T>& rows, int64_t columns) {
  return queries.stride[3] == 1 && columns % 2 == 0 && rows.count % (kTileRows<T> / 2) == 0 && rows.head[0] == rows.head[rows.count - 1];
}

// Tasks walk the row blocks of a group from both ends in turn: any run of tasks then has an even share of causal work.
inline int64_t from_both_ends(int64_t i, int64_t n) { return i % 2 == 0 ? i / 2 : n - 1 - i / 2; }

// Copies n mask values; 0 and -inf for a boolean mask.
template <class T, class M>
INLINE void read_mask(T* out, const M* mask, int64_t stride, int64_t n) {
  const T infinity = std::numeric_limits<T>::infinity();
  const auto value = [&](M x) -> T {
    if constexpr (std::is_same_v<M, uint8_t>)
      return x ? T(0) : -infinity;
    else
      return static_cast<T>(to_compute(x));
  };
  if (stride == 1)
    for (int64_t j = 0; j < n; ++j) out[j] = value(mask[j]);
  else
    for (int64_t j = 0; j < n; ++j) out[j] = value(mask[j * stride]);
}

template <class T>
INLINE float alibi_slope(const AttentionArgs& a, const RowBlock<T>& rows, int64_t r) {
  return a.alibi[rows.batch * a.alibi_batch_stride + rows.head[r]];
}

// What ALiBi takes from every score of row r. Only the rest is added to them: far from its keys a row would lose the digits of their
// differences. lse has all of it.
template <class T>
INLINE double alibi_of_row(const AttentionArgs& a, const RowBlock<T>& rows, int64_t r) {
  return a.alibi ? static_cast<double>(alibi_slope(a, rows, r)) * static_cast<double>(rows.nearest[r]) : 0;
}

// What is added to the scores of row r for keys k0 .. k0 + n, but for alibi_of_row; -inf excludes a key.
template <class T>
NOINLINE void read_bias(T* out, const AttentionArgs& a, const RowBlock<T>& rows, int64_t r, int64_t k0, int64_t n) {
  const int64_t b = rows.batch, h = rows.head[r], i = rows.query[r], stride = a.mask.stride[3];
  switch (a.mask_type) {
    case MaskType::none: std::fill(out, out + n, T(0)); break;
    case MaskType::boolean: read_mask(out, a.mask.at<uint8_t>(b, h, i) + k0 * stride, stride, n); break;
    case MaskType::float32: read_mask(out, a.mask.at<float>(b, h, i) + k0 * stride, stride, n); break;
    case MaskType::float64: read_mask(out, a.mask.at<double>(b, h, i) + k0 * stride, stride, n); break;
    case MaskType::bfloat16: read_mask(out, a.mask.at<bfloat16>(b, h, i) + k0 * stride, stride, n); break;
  }
  if (a.alibi) {
    const T slope = alibi_slope(a, rows, r);
    const int64_t distance = i + a.offset - k0;
    for (int64_t j = 0; j < n; ++j) out[j] -= slope * static_cast<T>(std::abs(distance - j) - rows.nearest[r]);
  }
}

// Asks for the mask of rows first .. last for n keys from k0 on, before the products that need it: its rows lie too far apart for the
// processor to foresee the next one.
template <class T>
INLINE void fetch_mask(const AttentionArgs& a, const RowBlock<T>& rows, int64_t first, int64_t last, int64_t k0, int64_t n) {
  if (a.mask_type == MaskType::none || a.mask.stride[3] != 1) return;
  constexpr int64_t kLine = 64;
  const MaskType type = a.mask_type;
  const int64_t size = type == MaskType::boolean ? 1 : type == MaskType::bfloat16 ? 2 : type == MaskType::float32 ? 4 : 8;
  if (a.mask.stride[2] == 0) last = std::min(last, first + 1);
  for (int64_t r = first; r < last; ++r) {
    const int64_t* stride = a.mask.stride;
    const int64_t first_key = rows.batch * stride[0] + rows.head[r] * stride[1] + rows.query[r] * stride[2] + k0;
    const char* row = static_cast<const char*>(a.mask.data) + first_key * size;
    for (int64_t at = 0; at < n * size; at += kLine) __builtin_prefetch(row + at, 0, 2);
  }
}

// Philox 4x32-10 (Salmon et al., SC 2011). The counter of key j of query i in head h of batch entry b is
// (j / 64 * 16 + j % 16, i, b * Hq + h, 0), the key is the seed, and word j % 64 / 16 of the result decides: kept
// when it is at least p * 2^32. So one round of 16 lanes serves 64 keys, whatever the tiling.
// keep[0 .. n) = 1 or 0 for keys k0 .. k0 + n; k0 a multiple of 64, room for a multiple of 64.
template <class T>
NOINLINE void read_dropout(T* keep, const AttentionArgs& a, const RowBlock<T>& rows, int64_t r, int64_t k0, int64_t n) {
  const uint32_t threshold = static_cast<uint32_t>(std::min(a.dropout_p * 4294967296.0, 4294967295.0));
  const uint32_t row = static_cast<uint32_t>(rows.query[r]);
  const uint32_t head = static_cast<uint32_t>((a.first_batch + rows.batch) * a.heads + rows.head[r]);
  for (int64_t j = 0; j < n; j += 64) {
    uint32_t c0[16], c1[16], c2[16], c3[16];
    for (int i = 0; i < 16; ++i) c0[i] = static_cast<uint32_t>((k0 + j) / 4 + i), c1[i] = row, c2[i] = head, c3[i] = 0;
    uint32_t key0 = static_cast<uint32_t>(a.seed), key1 = static_cast<uint32_t>(a.seed >> 32);
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u)
      for (int i = 0; i < 16; ++i) {
        const uint64_t p0 = uint64_t{0xD2511F53u} * c0[i], p1 = uint64_t{0xCD9E8D57u} * c2[i];
        c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ key0;
        c1[i] = static_cast<uint32_t>(p1);
        c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ key1;
        c3[i] = static_cast<uint32_t>(p0);
      }
    for (int i = 0; i < 16; ++i) {
      keep[j + i] = c0[i] >= threshold;
      keep[j + 16 + i] = c1[i] >= threshold;
      keep[j + 32 + i] = c2[i] >= threshold;
      keep[j + 48 + i] = c3[i] >= threshold;
    }
  }
}

// Everything that turns a raw product into a score.
// Queries are packed times `factor`: the product is then the score already, or with softcap the argument of tanh.
template <class T>
struct Scores {
  const AttentionArgs* a;  // may be replaced by another of the same options
  const bool capped, biased, dropped;
  const T factor, cap;
  T bias[kBlockKeys], keep[kBlockKeys];

  explicit Scores(const AttentionArgs& args)
      : a(&args),
        capped(args.softcap > 0),
        biased(args.mask_type != MaskType::none || args.alibi),
        dropped(args.dropout_p > 0),
        factor(capped ? args.scale / args.softcap : args.scale),
        cap(args.softcap) {}

  bool plain() const { return !capped && !biased; }

  // Read what row r needs for keys k0 + [begin, end) of a block.
  void read_biases(const RowBlock<T>& rows, int64_t r, int64_t k0, int64_t begin, int64_t end) {
    if (biased) read_bias(bias + begin, *a, rows, r, k0 + begin, std::min(end, a->k_len - k0) - begin);
  }
  void read_kept(const RowBlock<T>& rows, int64_t r, int64_t k0, int64_t end) {
    if (dropped) read_dropout(keep, *a, rows, r, k0, std::min(end, a->k_len - k0));
  }

  // The scores of one vector of products at key `j` of the block.
  INLINE vec<T> finish(vec<T> x, int64_t j) const {
    if (biased) {
      const vec<T> b = load(bias + j);
      const vec<T> excluded = broadcast(-std::numeric_limits<T>::infinity());
      x = b == excluded ? excluded : x + b;
    }
    return x;
  }
};

// Lanes outside [lo, hi), counted from key j, become -inf.
template <class T>
INLINE vec<T> limit(vec<T> x, int64_t j, int64_t lo, int64_t hi) {
  using Lane = lane_t<ints<T>>;
  const ints<T> lane = lane_numbers<T>();
  const ints<T> inside = (lane >= static_cast<Lane>(lo - j)) & (lane < static_cast<Lane>(hi - j));
  return inside ? x : broadcast(-std::numeric_limits<T>::infinity());
}
