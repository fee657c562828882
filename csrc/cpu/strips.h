// Products with all of the threads: C = A B. Included by the kernel headers that use it, inside the namespace of each instruction set.
//
// C is cut into strips of columns and parts of rows. The task of a strip, or of several of a short depth, packs a block of its B that
// stays in the second-level cache, multiplies all its rows of A with it, where they lie, and goes on with the next block of the depth:
// packed numbers never travel, and no thread waits for another. 64 rows of 3136 x 128 took 340 us on one thread and 390 on two where every
// thread read what both had packed, 166 so; 512 x 768 x 3072 14.7 ms and 12.9 on two Zen 4 threads, MKL 16.7. Floor: 2 rows columns depth
// operations at the multiply-add peak, and reading B once a part.

// The share i of n of `rows` rows of `length` adjacent numbers is asked for: they lie so far apart that no hardware prefetcher follows.
template <class S>
inline void prefetch_rows(const S* first, int64_t row, int64_t rows, int64_t length, int64_t i, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(S);
  for (int64_t r = rows * i / n; r < rows * (i + 1) / n; ++r)
    for (int64_t k = 0; k < length; k += kLine) __builtin_prefetch(first + r * row + k, 0, 2);
}

template <class T, class S>
struct StripProduct {
  int64_t rows, columns, depth;
  const T* a;  // steps are adjacent
  int64_t a_row;
  const S* b;
  int64_t b_row, b_column;
  T* c;  // null: the sums of a strip lie in the task's own memory until `finish` has seen them
  int64_t c_row;
  bool add = false;  // to what c holds
  int64_t chain = kProductBlock;
  const Tail<T>* tail = nullptr;
};

// Up to it sums are complete at once, and the rows of a tile lie so close together that they are fetched ahead without being asked for.
inline constexpr int64_t kShortDepth = 2 * kProductBlock;

// How a product is shared out: tasks of `group` strips of `width` columns, for each of `parts` parts of the rows.
struct StripShares {
  int64_t width, strips, group, parts, block;  // block: steps of the depth that are packed at a time
  int64_t groups() const { return (strips + group - 1) / group; }
};

template <class T, class S>
inline StripShares strip_shares(const StripProduct<T, S>& p) {
  using Tile = PanelTile<T>;
  constexpr int64_t kGroupBytes = 256 << 10, kFewestRows = 96, kHalf = Tile::kColumns / 2;
  const int64_t threads = torch::stable::get_num_threads(), most_parts = std::clamp<int64_t>(p.rows / kFewestRows, 1, threads);
  StripShares shares;
  // The cut whose slowest thread has the least to do. Narrow strips cost more loads for each multiply-add, a part repeats the packing.
  double least = std::numeric_limits<double>::infinity();
  for (const int64_t width : {2 * kHalf, kHalf})
    for (int64_t parts = 1; parts <= most_parts; ++parts) {
      const int64_t strips = (p.columns + width - 1) / width, rows = (p.rows + parts - 1) / parts;
      const int64_t columns =
          parts % threads == 0 ? parts / threads * round_up(p.columns, kHalf) : (strips * parts + threads - 1) / threads * width;
      const double cost = static_cast<double>(columns) * static_cast<double>(rows + 16) * (width == kHalf ? 1.15 : 1.0);
      if (cost < least) least = cost, shares.width = width, shares.strips = strips, shares.parts = parts;
    }
  shares.group = 1;
  shares.block = p.chain * std::max<int64_t>(1, kProductBlock / p.chain);
  // Where the depth is short, sums are complete at once, and rows of A are read from the first-level cache for all strips of a group.
  if (p.depth <= kShortDepth) {
    shares.block = std::max<int64_t>(1, p.depth);
    const int64_t of_thread = std::max<int64_t>(1, shares.strips * shares.parts / threads);
    const int64_t most = std::max<int64_t>(1, kGroupBytes / static_cast<int64_t>(shares.block * shares.width * sizeof(T)));
    shares.group = std::min(of_thread, shares.strips);
    const int64_t pieces = (shares.group + most - 1) / most;
    shares.group = (shares.group + pieces - 1) / pieces;
  }
  return shares;
}

// The product of one task: rows top.. of A with columns first.. of B. `packed` holds a block of B, `own` the sums where p.c does not.
template <class T, class S, class Finish>
inline void multiply_group(const StripProduct<T, S>& p, const StripShares& shares, int64_t task, bool last_task, T* packed, T* own,
                           Finish finish) {
  using Tile = PanelTile<T>;
  constexpr int64_t kHalf = Tile::kColumns / 2, kRowBlock = 96;
  const int64_t unit = shares.group * shares.width, first = task % shares.groups() * unit, columns = std::min(unit, p.columns - first);
  const int64_t part = task / shares.groups(), top = p.rows * part / shares.parts, rows = p.rows * (part + 1) / shares.parts - top;
  const int64_t strips = (columns + shares.width - 1) / shares.width, row_blocks = strips == 1 ? 1 : (rows + kRowBlock - 1) / kRowBlock;
  const int64_t c_row = p.c ? p.c_row : unit;
  T* c = p.c ? p.c + top * p.c_row + first : own;
  for (int64_t k0 = 0; k0 == 0 || k0 < p.depth; k0 += shares.block) {
    const int64_t steps = std::min(shares.block, p.depth - k0);
    const bool add = p.add || k0 > 0, complete = k0 + shares.block >= p.depth;
    const int64_t next = complete ? (task + 1) % shares.groups() * unit : first, next_k = complete ? 0 : k0 + shares.block;
    const S* following = p.b + next_k * p.b_row + next * p.b_column;
    const int64_t next_columns = std::min(unit, p.columns - next), next_steps = std::min(shares.block, p.depth - next_k);
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t column = strip * shares.width, count = std::min(shares.width, columns - column);
      pack_panels<T>(packed + column * steps, p.b + k0 * p.b_row + (first + column) * p.b_column, p.b_row, p.b_column, steps, count,
                     count <= kHalf ? kHalf : shares.width, 0, 1);
    }
    for (int64_t block = 0; block < row_blocks; ++block) {
      const int64_t block_top = rows * block / row_blocks, block_rows = rows * (block + 1) / row_blocks - block_top;
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t column = strip * shares.width, count = std::min(shares.width, columns - column);
        const bool narrow = count <= kHalf;
        const int64_t R = Tile::rows(narrow ? Tile::kVectors / 2 : Tile::kVectors), tiles = (block_rows + R - 1) / R;
        const T* panel = packed + column * steps;
        for (int64_t i = 0, m = block_top; i < tiles; ++i) {
          const int64_t height = (block_top + block_rows - m + tiles - i - 1) / (tiles - i);  // of as equal a size as can be
          const int64_t done = (block * strips + strip) * tiles + i, all = row_blocks * strips * tiles;
          if (!(complete && last_task)) {
            if (p.b_row == 1) prefetch_rows(following, p.b_column, next_columns, next_steps, done, all);
            if (p.b_column == 1 && p.b_row != 1) prefetch_rows(following, p.b_row, next_steps, next_columns, done, all);
          }
          const T* a = p.a + (top + m) * p.a_row + k0;
          if (p.depth > kShortDepth && i + 1 < tiles) prefetch_rows(a + height * p.a_row, p.a_row, height, steps, 0, 1);
          T* tile = c + m * c_row + column;
          Tail<T> tail;
          if (p.tail) tail = p.tail->at(top + m, first + column);
          const Tail<T>* last = p.tail && complete ? &tail : nullptr;
          if (narrow)
            multiply_rows<Tile::kVectors / 2, T>(height, a, p.a_row, panel, steps, p.chain, tile, c_row, count, add, last);
          else
            multiply_rows<Tile::kVectors, T>(height, a, p.a_row, panel, steps, p.chain, tile, c_row, count, add, last);
          if (complete) finish(tile, c_row, top + m, first + column, height, count);
          m += height;
        }
      }
    }
  }
}

// finish(tile, tile_row, row, column, rows, columns) is called for every complete tile, which is then in the first-level cache. Sums do
// not depend on how they are shared out.
template <class T, class S, class Finish>
inline void multiply_strips(const StripProduct<T, S>& p, Finish finish) {
  if (p.rows == 0 || p.columns == 0) return;
  const StripShares shares = strip_shares(p);
  const int64_t unit = shares.group * shares.width;
  torch::stable::parallel_for(0, shares.groups() * shares.parts, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> packed(std::min(shares.block, p.depth) * unit), own(p.c ? 0 : (p.rows / shares.parts + 1) * unit);
    for (int64_t task = begin; task < end; ++task) multiply_group(p, shares, task, task + 1 == end, packed.get(), own.get(), finish);
  });
}

// A of any strides and storage type as rows of adjacent steps of the compute type; read where it lies if it is that already.
template <class T, class A>
class AdjacentSteps {
 public:
  AdjacentSteps(const A* a, int64_t a_row, int64_t a_step, int64_t rows, int64_t depth) : row_(a_row) {
    constexpr int64_t W = kLanes<T>, kBlock = 64;
    if constexpr (std::is_same_v<A, T>) {
      data_ = a;
      if (a_step == 1 || depth <= 1) return;
    }
    row_ = padded<T>(depth) + W;  // a distance of many whole pages would lay all rows on the same few sets of the first-level cache
    copy_.emplace(rows * row_);
    data_ = copy_->get();
    torch::stable::parallel_for(0, (rows + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kBlock, last = std::min(end * kBlock, rows);
      pack_panels<T>(copy_->get() + first * row_, a + first * a_row, a_row, a_step, last - first, depth, row_, 0, 1);
    });
  }
  const T* data() const { return data_; }
  int64_t row() const { return row_; }

 private:
  const T* data_ = nullptr;
  int64_t row_;
  std::optional<Scratch<T>> copy_;
};

// C[rows, columns] (+)= A B, all three with any row and column stride but C, whose columns are contiguous. C is added to only in the
// compute type.
template <class A, class B, class C>
inline void gemm(int64_t rows, int64_t columns, int64_t depth, const A* a, int64_t a_row, int64_t a_step, const B* b, int64_t b_row,
                 int64_t b_column, C* c, int64_t c_row, bool add = false, int64_t chain = kProductBlock) {
  using T = compute_t<A>;
  const AdjacentSteps<T, A> steps(a, a_row, a_step, rows, depth);
  StripProduct<T, B> p{rows, columns, depth, steps.data(), steps.row(), b, b_row, b_column, nullptr, 0, add, chain};
  if constexpr (std::is_same_v<C, T>) {
    p.c = c, p.c_row = c_row;
    multiply_strips(p, [](auto...) {});
  } else {
    multiply_strips(p, [&](const T* tile, int64_t tile_row, int64_t row, int64_t column, int64_t count, int64_t width) {
      for (int64_t r = 0; r < count; ++r)
        for (int64_t j = 0; j < width; j += kLanes<T>) {
          const int64_t n = std::min<int64_t>(kLanes<T>, width - j);
          store_partial(c + (row + r) * c_row + column + j, load_partial(tile + r * tile_row + j, n), n);
        }
    });
  }
}
