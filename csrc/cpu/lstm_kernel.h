// The forward pass of one LSTM layer, whole sequences in one call.
//
//   [i f g o] = x_t W_ih^T + b_ih + h_(t-1) W_hh^T + b_hh        i, f, o through sigmoid, g through tanh
//   c_t = f c_(t-1) + i g         h_t = o tanh(c_t)              (projected: h_t = W_hr (o tanh(c_t)))
//
// Both weight matrices are packed once per call into panels of one vector of hidden units, their four gates side by side:
// [I + P][4][lanes]. A register tile of kRows sequences x one panel therefore ends with i, f, g and o of the same units,
// and the pointwise part follows at once, on numbers that never left the first-level cache.
//
// Who owns what: with enough sequences for every thread, a thread owns every n-th sequence of one direction from the first
// step to the last, and meets the others only at the end of the layer. Sequences are sorted by length when packed, so taking
// every n-th also shares out the tokens. With few sequences and weights too big for one second-level cache, the threads
// own panels (hidden units) instead and meet after every step (team.h). A number is computed by the same operations in the same
// order either way: results do not depend on the number of threads.
// clang-format off: each builds on those before it
#include "strips.h"
#include "dots.h"
#include "lstm_step.h"
#include "lstm_step_direct.h"
// clang-format on

// h_n and c_n are the states each sequence has after the step it ends with.
template <class S>
void store_final_states(const LstmShape& shape, const LstmForward<S, compute_t<S>>& layer, int64_t d, int64_t row, const compute_t<S>* c) {
  const int64_t last = d == 0 ? shape.lengths[row] - 1 : 0;
  const S* h = shape.lengths[row] > 0 ? layer.output + (shape.offsets[last] + row) * shape.width() + d * shape.state
                                      : layer.h0 + (d * shape.batch + row) * shape.state;
  S* h_n = layer.h_n + (d * shape.batch + row) * shape.state;
  if (h_n != h) std::memcpy(h_n, h, shape.state * sizeof(S));  // of a single step the output is h_n
  S* c_n = layer.c_n + (d * shape.batch + row) * shape.hidden;
  for (int64_t j = 0; j < shape.hidden; ++j) c_n[j] = from_compute<S>(c[j]);
}

// The sequences `rows.first`, `rows.first + rows.stride`, ... of direction d, from the first step to the last.
// `cell` is null if the weights are read as they lie.
// M: see PackedCell.
template <class S, class M>
void lstm_rows_forward(const LstmShape& shape, const LstmForward<S, compute_t<S>>& layer, const PackedCell<compute_t<S>, M>* cell,
                       int64_t d, Rows rows, const compute_t<S>* x_product, bool share_panels) {
  using T = compute_t<S>;
  const int64_t count = rows.count(shape.batch);
  const int64_t H = shape.hidden, P = shape.state, G = shape.gates();
  const int64_t h_row = padded<T>(P), c_row = padded<T>(H);
  // h_t is written while h_(t-1) is still read. Both start as h0: a sequence that joins later finds it in either.
  Scratch<M> h_memory(2 * count * h_row);
  Scratch<T> c_memory(count * c_row), u_memory(shape.projected ? count * c_row : 0);
  // Every thread converts the input it reads: on a machine without dot products it has time for it.
  const int64_t converted = std::is_same_v<S, M> || x_product || !cell ? 0 : count * shape.input;
  Scratch<T> x_memory(converted * (share_panels ? torch::stable::get_num_threads() : 1));
  for (int64_t r = 0; r < count; ++r) {
    M* h = h_memory + r * h_row;
    load_row(h, layer.h0 + (d * shape.batch + rows[r]) * P, P, h_row);
    std::memcpy(h + count * h_row, h, h_row * sizeof(M));
    load_row<T>(c_memory + r * c_row, layer.c0 + (d * shape.batch + rows[r]) * H, H, c_row);
  }
  std::atomic<int64_t> members{0};
  for_team(share_panels, padded<T>(H) / kLanes<T>, [&](int64_t first, int64_t last, auto meet) {
    M *h = h_memory, *h_next = h + count * h_row;
    T* own_x = x_memory + converted * members++;
    const TileTask task(cell && cell_in_tiles<M>(shape));
    for (int64_t s = 0; s < shape.steps; ++s) {
      const int64_t t = d == 0 ? s : shape.steps - 1 - s;
      const int64_t active = rows.count(shape.batch_sizes[t]);
      if (active == 0) continue;
      const int64_t token = shape.offsets[t] + rows.first;
      CellStep<S, M> step{};
      step.rows = active;
      step.row_stride = rows.stride;
      if (!cell) {
        // lstm_step_direct takes the input in its own type.
      } else if (x_product) {
        step.x_product = x_product + token * G;
      } else if constexpr (std::is_same_v<S, M>) {
        step.x = layer.x + token * shape.input;
        step.x_row = rows.stride * shape.input;
        if (s + 1 < shape.steps) {
          const int64_t next = d == 0 ? t + 1 : t - 1;
          step.x_next = layer.x + (shape.offsets[next] + rows.first) * shape.input;
          step.x_next_rows = rows.count(shape.batch_sizes[next]);
        }
      } else {
        for (int64_t r = 0; r < active; ++r)
          load_row<T>(own_x + r * shape.input, layer.x + (token + r * rows.stride) * shape.input, shape.input, shape.input);
        step.x = own_x;
        step.x_row = shape.input;
      }
      step.h = h;
      step.h_row = h_row;
      step.c = c_memory;
      step.c_row = c_row;
      step.out = h_next;
      step.out_row = h_row;
      if constexpr (std::is_same_v<T, M>)
        if (shape.projected) step.out = u_memory.get(), step.out_row = c_row;
      if (!shape.projected) step.output = layer.output + token * shape.width() + d * P;
      step.output_row = rows.stride * shape.width();
      if (layer.gates) {
        step.gates = layer.gates + (d * shape.tokens + token) * G;
        step.cells = layer.cells + (d * shape.tokens + token) * H;
        step.fetch = !share_panels && active >= 8;  // below, weights come slower than lines to write
      }
      if (cell)
        lstm_step(task, shape, *cell, step, first, last);
      else
        lstm_step_direct(shape, layer.weights[d], step, layer.x + token * shape.input, first, last);
      if constexpr (std::is_same_v<T, M>)
        if (shape.projected) {
          gemm_packed_serial<T>(active, P, H, u_memory.get(), c_row, cell->projection.get(), h_next, h_row, false);
          for (int64_t r = 0; r < active; ++r)
            store_row(layer.output + (token + r * rows.stride) * shape.width() + d * P, h_next + r * h_row, P);
        }
      std::swap(h, h_next);
      meet();
    }
  });
  for (int64_t r = 0; r < count; ++r) store_final_states(shape, layer, d, rows[r], c_memory + r * c_row);
}

// product[tokens, 4 H] = x W_ih^T
template <class S, class M>
void lstm_input_product(const LstmShape& shape, const S* x, const PackedCell<compute_t<S>, M>& cell, compute_t<S>* product) {
  using T = compute_t<S>;
  constexpr int W = kLanes<T>;
  const int64_t I = shape.input, H = shape.hidden;
  Scratch<M> converted(std::is_same_v<S, M> ? 0 : shape.tokens * I);
  const M* rows;
  if constexpr (std::is_same_v<S, M>)
    rows = x;
  else
    rows = converted, load_row<M>(converted.get(), x, shape.tokens * I, 0);
  const bool small = shape.tokens * shape.gates() * I < 65536;
  torch::stable::parallel_for(0, cell.panels, small ? cell.panels : 1, [&](int64_t begin, int64_t end) {
    alignas(64) T gates[kRowBlock * 4 * W];
    const TileTask task(cell_in_tiles<M>(shape));
    StoreAhead<S> none;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t units = std::min<int64_t>(W, H - panel * W);
      for (int64_t token = 0; token < shape.tokens; token += kRowBlock) {
        const int64_t count = std::min(kRowBlock, shape.tokens - token);
        std::fill_n(gates, count * 4 * W, T(0));
        add_product(task, count, gates, rows + token * I, I, cell.w_ih.get() + panel * I * 4 * W, I, none);
        for (int64_t r = 0; r < count; ++r)
          for (int gate = 0; gate < 4; ++gate)
            store_partial(product + (token + r) * 4 * H + gate * H + panel * W, load(gates + (r * 4 + gate) * W), units);
      }
    }
  });
}

template <class S, class M>
void lstm_layer_forward(const LstmShape& shape, const LstmForward<S, compute_t<S>>& layer, const Plan& plan) {
  using T = compute_t<S>;
  std::optional<PackedCell<T, M>> cells[2];
  for (int64_t d = 0; d < shape.directions && !plan.direct; ++d) cells[d].emplace(shape, layer.weights[d]);

  // W_ih x for all tokens at once, where a step has too few sequences to reuse what it loads of W_ih.
  std::optional<Scratch<T>> products[2];
  T* x_product[2] = {};
  for (int64_t d = 0; d < shape.directions && plan.hoist_input; ++d) {
    if (layer.gates)
      x_product[d] = layer.gates + d * shape.tokens * shape.gates();
    else
      x_product[d] = products[d].emplace(shape.tokens * shape.gates());
    lstm_input_product<S, M>(shape, layer.x, *cells[d], x_product[d]);
  }
  for_tasks(shape, plan, [&](int64_t d, Rows rows) {
    lstm_rows_forward<S, M>(shape, layer, cells[d] ? &*cells[d] : nullptr, d, rows, x_product[d], plan.share_panels);
  });
}

template <class S>
void lstm_layer_forward(const LstmShape& shape, const LstmForward<S, compute_t<S>>& layer) {
  const Plan plan = make_plan<S>(shape);
#if ISA_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<S, bfloat16>)
    if (plan.dot) return lstm_layer_forward<S, bfloat16>(shape, layer, plan);
#endif
  lstm_layer_forward<S, compute_t<S>>(shape, layer, plan);
}
#include "lstm_backward_kernel.h"

// f(i, n) for every vector of n elements at i.
template <class S, class F>
INLINE void for_vectors(int64_t count, F f) {
  constexpr int64_t W = kLanes<S>;
  torch::stable::parallel_for(0, (count + W - 1) / W, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * W; i < std::min(end * W, count); i += W) f(i, std::min(W, count - i));
  });
}

// out[i] = a[i] * b[i]: dropout between two layers, and its gradient.
template <class Out, class A, class B>
void multiply(Out* out, const A* a, const B* b, int64_t count) {
  for_vectors<Out>(count, [&](int64_t i, int64_t n) { store_partial(out + i, load_partial(a + i, n) * load_partial(b + i, n), n); });
}

template <class Out, class In>
void convert(Out* out, const In* in, int64_t count) {
  for_vectors<Out>(count, [&](int64_t i, int64_t n) { store_partial(out + i, load_partial(in + i, n), n); });
}
