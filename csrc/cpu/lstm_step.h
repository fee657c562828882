// One step of an LSTM over some sequences and some hidden units, the packed weights it reads, and how the threads share a
// layer. Included by lstm_kernel.h.
#include "tiles.h"

#include "tile_product.h"

template <class T, class S>
INLINE void load_row(T* out, const S* source, int64_t n, int64_t row) {
  for (int64_t j = 0; j < n; ++j) out[j] = from_compute<T>(to_compute(source[j]));
  for (int64_t j = n; j < row; ++j) out[j] = T{};
}
template <class S>
INLINE void store_row(S* out, const compute_t<S>* source, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] = from_compute<S>(source[j]);
}

// ---- sharing a layer among the threads ---------------------------------------------------------------------------

// Every `stride`-th sequence from `first` on.
struct Rows {
  int64_t first, stride;
  int64_t operator[](int64_t r) const { return first + r * stride; }
  // How many of them are among the first n sequences.
  int64_t count(int64_t n) const { return n > first ? (n - first + stride - 1) / stride : 0; }
};

struct Plan {
  int64_t groups;     // of sequences, per direction
  bool share_panels;  // one group, every step shared among the threads
  // These two are a matter of the shape alone, never of the threads:
  bool hoist_input;  // W_ih x for all tokens before the time loop
  bool direct;       // weights read as they lie: too few sequences and steps for packing to pay
  bool dot;          // products of the bfloat16 numbers themselves, two to a lane
};

template <class S>
bool dots(const LstmShape& shape) {
  return std::is_same_v<S, bfloat16> && selected_isa() == Isa::avx512_bf16 && !shape.projected;
}

template <class S>
Plan make_plan(const LstmShape& shape) {
  const int64_t threads = torch::stable::get_num_threads();
  Plan plan;
  plan.direct = shape.steps == 1 && shape.batch <= 16 && !shape.projected;
  plan.dot = dots<S>(shape) && (plan.direct || (shape.input % 2 == 0 && shape.state % 2 == 0));
  // A step of few sequences hardly reuses what it loads of W_ih, and weights past the third-level cache should come once.
  const int64_t all_bytes = shape.gates() * (shape.input + shape.state) * (plan.dot ? 2 : 4);
  plan.hoist_input = !plan.direct && (shape.batch < 8 || all_bytes >= int64_t{16} << 20);
  const int64_t wanted = threads % shape.directions == 0 ? threads / shape.directions : threads;
  // More than 64 sequences at a time would push the states out of the first-level cache.
  const int64_t balanced = (shape.batch + wanted * 64 - 1) / (wanted * 64) * wanted;
  plan.groups = std::max<int64_t>(1, std::min(shape.batch, balanced));
  const int64_t weight_bytes =
      plan.dot ? shape.gates() * (shape.state + (plan.hoist_input ? 0 : shape.input)) * 2 : shape.gates() * shape.state * 4;
  const int64_t rows = (shape.batch + plan.groups - 1) / std::max<int64_t>(plan.groups, 1);
  const bool big =
      plan.direct ? weight_bytes >= 1 << 16 : weight_bytes >= 1 << (plan.dot ? 20 : 21) || (weight_bytes >= 1 << 19 && rows <= 12);
  plan.share_panels = threads > 1 && !shape.projected && big;
  if (plan.share_panels || plan.direct) plan.groups = 1;
  return plan;
}

// f(first, last) over [0, count): on this thread, or shared among all of them.
template <class F>
INLINE void for_range(bool share, int64_t count, F f) {
  if (share)
    torch::stable::parallel_for(0, count, 1, f);
  else
    f(int64_t{0}, count);
}

// f(first, last, meet) over the panels that a thread has of every step: see team.h.
template <class F>
INLINE void for_team(bool share, int64_t panels, F f) {
  if (share)
    run_team(panels, f);
  else
    f(int64_t{0}, panels, [] {});
}

// f(direction, rows) for every direction and group of sequences.
template <class F>
void for_tasks(const LstmShape& shape, const Plan& plan, F f) {
  const int64_t tasks = shape.directions * plan.groups;
  const bool serial = plan.share_panels || shape.tokens * shape.gates() * (shape.input + shape.state) < 65536;
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) f(task / plan.groups, Rows{task % plan.groups, plan.groups});
  };
  for_range(!serial, tasks, run);
}

// ---- packed weights ----------------------------------------------------------------------------------------------

// One panel of gates of one matrix w [4 H, depth]: out[k * 4 lanes + gate * lanes + unit].
template <class T, class S>
void pack_gate_panel(T* out, const S* w, int64_t hidden, int64_t depth, int64_t panel) {
  constexpr int W = kLanes<T>;
  const int64_t units = std::min<int64_t>(W, hidden - panel * W);
  for (int64_t gate = 0; gate < 4; ++gate) {
    const S* source = w + (gate * hidden + panel * W) * depth;
    for (int64_t k0 = 0; k0 < depth; k0 += W) {
      T* block = out + (k0 * 4 + gate) * W;
      if (units == W && k0 + W <= depth) {
        copy_transposed(block, 4 * W, source + k0, depth);
        continue;
      }
      for (int64_t k = 0; k < std::min<int64_t>(W, depth - k0); ++k)
        for (int64_t j = 0; j < W; ++j) block[k * 4 * W + j] = j < units ? T(to_compute(source[j * depth + k0 + k])) : T(0);
    }
  }
}

// The same in bfloat16, two steps to a lane: out[k / 2 * 8 lanes + gate * 2 lanes + 2 unit + k % 2], depth even.
template <class T>
void pack_gate_panel(bfloat16* out, const bfloat16* w, int64_t hidden, int64_t depth, int64_t panel) {
  constexpr int W = kLanes<float>;
  const int64_t units = std::min<int64_t>(W, hidden - panel * W), pairs = depth / 2;
  for (int64_t gate = 0; gate < 4; ++gate) {
    const bfloat16* source = w + (gate * hidden + panel * W) * depth;
    for (int64_t k0 = 0; k0 < pairs; k0 += W) {
      bfloat16* block = out + (k0 * 4 + gate) * 2 * W;
      vec<float> rows[W] = {};  // bits of pairs, only moved
      const int64_t n = std::min<int64_t>(W, pairs - k0);
      for (int64_t j = 0; j < units; ++j) std::memcpy(&rows[j], source + j * depth + 2 * k0, n * 2 * sizeof(bfloat16));
      transpose(rows);
      for (int64_t k = 0; k < n; ++k) std::memcpy(block + k * 8 * W, &rows[k], sizeof rows[k]);
    }
  }
}

// The parameters of one direction as the steps read them: M is T, or bfloat16 for dot products.
template <class T, class M>
struct PackedCell {
  int64_t panels;
  Scratch<M> w_ih;        // [panels][I][4][lanes]
  Scratch<M> w_hh;        // [panels][P][4][lanes]
  Scratch<T> bias;        // [panels][4][lanes]: b_ih + b_hh
  Scratch<T> projection;  // W_hr for gemm_packed

  template <class S>
  PackedCell(const LstmShape& shape, const LstmWeights<const S>& weights)
      : panels(padded<T>(shape.hidden) / kLanes<T>),
        w_ih(panels * shape.input * 4 * kLanes<T>),
        w_hh(panels * shape.state * 4 * kLanes<T>),
        bias(panels * 4 * kLanes<T>),
        projection(shape.projected ? packed_size<T>(shape.hidden, shape.state) : 0) {
    constexpr int W = kLanes<T>;
    const int64_t H = shape.hidden;
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, (shape.input + shape.state) * 4 * W));
    torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        pack_gate_panel<T>(w_ih + p * shape.input * 4 * W, weights.w_ih, H, shape.input, p);
        pack_gate_panel<T>(w_hh + p * shape.state * 4 * W, weights.w_hh, H, shape.state, p);
        for (int64_t gate = 0; gate < 4; ++gate)
          for (int64_t j = 0; j < W; ++j) {
            const int64_t unit = p * W + j;
            T sum = 0;
            if (weights.b_ih && unit < H) sum = to_compute(weights.b_ih[gate * H + unit]) + to_compute(weights.b_hh[gate * H + unit]);
            bias[(p * 4 + gate) * W + j] = sum;
          }
      }
    });
    if (shape.projected) pack_b<T>(projection.get(), weights.w_hr, 1, H, H, shape.state);
  }
};

// ---- one step ----------------------------------------------------------------------------------------------------

// M is the type of what is multiplied.
template <class S, class M>
struct CellStep {
  using T = compute_t<S>;
  int64_t rows, row_stride;  // active sequences; how far apart their rows are in the tensors indexed by token
  const M* x;                // the rows' input, or null:
  int64_t x_row;
  const T* x_product;  // W_ih x, [.., 4 H] by token
  const M* x_next;     // the input of the next step's rows, to be fetched in the meantime, or null
  int64_t x_next_rows;
  const M* h;
  int64_t h_row;
  T* c;  // updated in place
  int64_t c_row;
  M* out;  // o tanh(c): the new h, or what the projection takes
  int64_t out_row;
  S* output;  // the same by token; null with a projection
  int64_t output_row;
  T* gates;  // by token; null unless a backward follows
  T* cells;
  bool fetch;  // the lines that are going to be written, see StoreAhead
};

// How many sequences a tile of four gates takes.
template <class T>
struct CellTile {
#if ISA_VECTOR_BYTES == 64
  static constexpr int kRows = 6;  // 24 accumulators, 4 vectors of weights, 1 broadcast: 29 of 32 registers
#else
  static constexpr int kRows = 2;  // 8 + 4 + 1 of 16
#endif
};

// At most kSumDepth terms are added up one after the other: one long chain rounds worse than torch's own product does. The
// part of a panel that such a chain takes also stays in the first-level cache for the kRowBlock sequences it is used for.
inline constexpr int64_t kSumDepth = 128, kRowBlock = 48;

inline constexpr int64_t kFetchSteps = 16;

// Fetches the lines that cell_pointwise is going to write for a backward, a sequence's at a time, while products are computed: many
// misses at once would hold up those as well.
template <class S>
struct StoreAhead {
  using T = compute_t<S>;
  T* gates = nullptr;  // of the first sequence and unit
  T* cells = nullptr;
  S* output = nullptr;  // or null
  int64_t hidden = 0, row = 0, output_row = 0;  // row: from one sequence to the next, in tokens
  int64_t rows = 0;                             // that are left
  int64_t at_a_time = 0;

  // Before all: how often `some` will be called.
  void expect(int64_t calls) { at_a_time = (rows + calls - 1) / std::max<int64_t>(calls, 1); }

  // Steps of a product from one call of `some` to the next, of `steps` in a chain.
  INLINE int64_t run(int64_t steps) const { return rows > 0 ? kFetchSteps : steps; }

  INLINE void some() {
    for (int64_t i = 0; i < at_a_time && rows > 0; ++i, --rows) {
      for (int gate = 0; gate < 4; ++gate) fetch_for_writing(gates + gate * hidden);
      fetch_for_writing(cells);
      if (output) fetch_for_writing(output), output += output_row;
      gates += row * 4 * hidden, cells += row * hidden;
    }
  }
};
// gates[R][4][lanes] += the products of R rows and a panel of weights, over `depth` steps.
template <int R, class T, class S>
void add_products(T* gates, const T* a, int64_t a_row, const T* panel, int64_t depth, StoreAhead<S>& ahead) {
  constexpr int W = kLanes<T>;
  vec<T> acc[R][4] = {};
  const int64_t run = ahead.run(depth);
  for (int64_t k = 0; k < depth; k += run) {
    multiply_chain<R, 4, T>(acc, a + k, a_row, 1, panel + k * 4 * W, 4 * W, std::min(run, depth - k));
    ahead.some();
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      T* sum = gates + (r * 4 + g) * W;
      store(sum, load(sum) + acc[r][g]);
    }
}

#if ISA_VECTOR_BYTES == 64
// add_products of bfloat16 numbers packed in pairs.
template <int R>
__attribute__((target("avx512bf16"))) void add_products(float* gates, const bfloat16* a, int64_t a_row, const bfloat16* panel,
                                                        int64_t depth, StoreAhead<bfloat16>& ahead) {
  constexpr int W = kLanes<float>;
  vec<float> acc[R][4] = {};
  const int64_t run = ahead.run(depth);
  for (int64_t k = 0; k < depth; k += run) {
    multiply_pairs<R, 4>(acc, a + k, a_row, 2, panel + k * 4 * W, std::min(run, depth - k) / 2);
    ahead.some();
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      float* sum = gates + (r * 4 + g) * W;
      store(sum, load(sum) + acc[r][g]);
    }
}
#endif

template <int R, class T, class M, class S>
INLINE void add_products_rows(int64_t rows, T* gates, const M* a, int64_t a_row, const M* panel, int64_t depth, StoreAhead<S>& ahead) {
  if constexpr (R > 0) {
    if (rows == R)
      add_products<R>(gates, a, a_row, panel, depth, ahead);
    else
      add_products_rows<R - 1>(rows, gates, a, a_row, panel, depth, ahead);
  }
}

// Whether the bfloat16 numbers of a layer are multiplied in tiles where the steps come in whole ones. A matter of the shape alone;
// a tile of a few rows takes about the time of their dot products.
template <class M>
bool cell_in_tiles(const LstmShape& shape) {
  constexpr int64_t kFewestSequences = 4;
  return std::is_same_v<M, bfloat16> && in_tiles() && shape.batch >= kFewestSequences;
}

// The same for any number of rows. They are dealt out evenly to the tiles: a tile of one or two rows would wait for its few
// accumulators.
template <class S, class T, class M>
INLINE void add_product(const TileTask& task, int64_t rows, T* gates, const M* a, int64_t a_row, const M* panel, int64_t depth,
                        StoreAhead<S>& ahead) {
  constexpr int R = CellTile<T>::kRows, W = kLanes<T>;
  if constexpr (std::is_same_v<M, bfloat16>)
    if (task.tiled() && depth % kTileSteps == 0)
      return task.multiply({.rows = rows, .columns = 4 * W, .steps = depth, .a = a, .a_row = a_row, .b = panel, .b_pair = 8 * W,
                            .b_block = 4 * kTileSide, .c = gates, .c_row = 4 * W, .add = true});
  const int64_t tiles = (rows + R - 1) / R;
  if (ahead.rows > 0) ahead.expect(tiles * (depth / kFetchSteps));
  for (int64_t k0 = 0; k0 < depth; k0 += kSumDepth)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = tile * rows / tiles, count = (tile + 1) * rows / tiles - row;
      add_products_rows<R>(count, gates + row * 4 * W, a + row * a_row + k0, a_row, panel + k0 * 4 * W, std::min(kSumDepth, depth - k0),
                           ahead);
    }
}

// Activations, cell update and all stores of `rows` sequences x one panel. Not inlined into the tiles of different
// heights: one compilation, so that a sequence gets the same bits whichever tile it falls into.
template <class S, class M>
__attribute__((noinline)) void cell_pointwise(const LstmShape& shape, const CellStep<S, M>& step, int64_t row, int64_t rows, int64_t panel,
                                              const compute_t<S>* pre) {
  using T = compute_t<S>;
  constexpr int W = kLanes<T>;
  const int64_t H = shape.hidden, unit = panel * W, units = std::min<int64_t>(W, H - unit);
  for (int64_t r = 0; r < rows; ++r, pre += 4 * W) {
    const vec<T> i = sigmoid(load(pre)), f = sigmoid(load(pre + W)), g = tanh(load(pre + 2 * W)), o = sigmoid(load(pre + 3 * W));
    T* c_at = step.c + (row + r) * step.c_row + unit;
    const vec<T> c = f * load(c_at) + i * g;
    const vec<T> h = o * tanh(c);
    store(c_at, c);
    store(step.out + (row + r) * step.out_row + unit, h);
    const int64_t at = (row + r) * step.row_stride;
    if (units == W) {
      if (step.output) store(step.output + (row + r) * step.output_row + unit, h);
      if (step.gates) {
        T* gates = step.gates + at * 4 * H + unit;
        store(gates, i), store(gates + H, f), store(gates + 2 * H, g), store(gates + 3 * H, o);
        store(step.cells + at * H + unit, c);
      }
    } else {
      if (step.output) store_partial(step.output + (row + r) * step.output_row + unit, h, units);
      if (step.gates) {
        T* gates = step.gates + at * 4 * H + unit;
        store_partial(gates, i, units), store_partial(gates + H, f, units);
        store_partial(gates + 2 * H, g, units), store_partial(gates + 3 * H, o, units);
        store_partial(step.cells + at * H + unit, c, units);
      }
    }
  }
}

// Fetches one of `parts` of what the next step reads of x. Else it would wait for memory in every row.
template <class S, class M>
INLINE void fetch_next_input(const CellStep<S, M>& step, int64_t input, int64_t part, int64_t parts) {
  constexpr int64_t line = 64 / sizeof(M);
  for (int64_t r = part * step.x_next_rows / parts; r < (part + 1) * step.x_next_rows / parts; ++r)
    for (int64_t i = 0; i < input; i += line) __builtin_prefetch(step.x_next + r * step.x_row + i);
}

// All active sequences x the panels [first, last).
template <class S, class M>
void lstm_step(const TileTask& task, const LstmShape& shape, const PackedCell<compute_t<S>, M>& cell, const CellStep<S, M>& step,
               int64_t first, int64_t last) {
  using T = compute_t<S>;
  constexpr int W = kLanes<T>;
  alignas(64) T gates[kRowBlock * 4 * W];
  StoreAhead<S> ahead{.hidden = shape.hidden, .row = step.row_stride, .output_row = step.output_row};
  const int64_t blocks = (step.rows + kRowBlock - 1) / kRowBlock;
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t units = std::min<int64_t>(W, shape.hidden - panel * W);
    const T* bias = cell.bias.get() + panel * 4 * W;
    if (step.x_next) fetch_next_input(step, shape.input, panel - first, last - first);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = block * step.rows / blocks, rows = (block + 1) * step.rows / blocks - row;
      for (int64_t r = 0; r < rows; ++r)
        for (int g = 0; g < 4; ++g) {
          vec<T> start = load(bias + g * W);
          if (step.x_product) {
            const T* product = step.x_product + (row + r) * step.row_stride * shape.gates() + g * shape.hidden + panel * W;
            start += units == W ? load(product) : load_partial(product, units);
          }
          store(gates + (r * 4 + g) * W, start);
        }
      if (step.x)
        add_product(task, rows, gates, step.x + row * step.x_row, step.x_row, cell.w_ih.get() + panel * shape.input * 4 * W, shape.input,
                    ahead);
      if (step.fetch) {
        const int64_t token = row * step.row_stride;
        ahead.gates = step.gates + token * shape.gates() + panel * W;
        ahead.cells = step.cells + token * shape.hidden + panel * W;
        if (step.output) ahead.output = step.output + row * step.output_row + panel * W;
        ahead.rows = rows;
      }
      add_product(task, rows, gates, step.h + row * step.h_row, step.h_row, cell.w_hh.get() + panel * shape.state * 4 * W, shape.state,
                  ahead);
      ahead.rows = 0;
      cell_pointwise(shape, step, row, rows, panel, gates);
    }
  }
}
