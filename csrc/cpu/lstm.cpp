// LSTM over whole sequences: all layers and directions in one call, dense or packed. The kernels take one layer at a time.
#define KERNEL_SOURCE "lstm_kernel.h"
#include "lstm.h"

#include "for_each_isa.h"

#include <torch/csrc/stable/library.h>

#include "../check.h"
#include "new_tensor.h"
#include "pooled_tensor.h"

namespace bmk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

ScalarType compute_dtype(ScalarType storage) { return storage == ScalarType::BFloat16 ? ScalarType::Float : storage; }

template <class S>
const S* data(const Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}
template <class S>
S* mutable_data(Tensor& t) {
  return static_cast<S*>(t.mutable_data_ptr());
}
template <class S>
const S* data_or_null(const std::optional<Tensor>& t) {
  return t ? data<S>(*t) : nullptr;
}

// The sizes that all layers share, and the tables that LstmShape points to.
struct Problem {
  LstmShape shape{};  // of layer 0
  int64_t layers;
  size_t weights_per_direction;
  bool biases;
  std::vector<int64_t> batch_sizes, offsets, lengths;

  LstmShape of_layer(int64_t layer) const {
    LstmShape out = shape;
    if (layer > 0) out.input = shape.width();
    return out;
  }
};

// Checks every size that the kernels will rely on. Dense x is [T, B, I], packed x is [tokens, I] with batch_sizes [T].
Problem describe(const Tensor& x, const Tensor& h0, const Tensor& c0, const std::vector<Tensor>& weights,
                 const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& dropout_mask, int64_t num_layers,
                 bool bidirectional) {
  Problem p;
  p.layers = num_layers;
  LstmShape& s = p.shape;
  s.directions = bidirectional ? 2 : 1;
  const int64_t cells = num_layers * s.directions;
  STD_TORCH_CHECK(num_layers > 0, "num_layers must be positive, got ", num_layers);
  CHECK_DIM(c0, 3);
  CHECK_DIM(h0, 3);
  s.batch = c0.size(1), s.hidden = c0.size(2), s.state = h0.size(2);
  CHECK_SHAPE(h0, cells, s.batch, s.state);
  CHECK_SHAPE(c0, cells, s.batch, s.hidden);
  p.weights_per_direction = weights.size() / cells;
  STD_TORCH_CHECK(weights.size() % cells == 0 && p.weights_per_direction >= 2 && p.weights_per_direction <= 5,
                  "weights must hold 2 to 5 tensors for each of ", cells, " layers and directions, got ", weights.size());
  p.biases = p.weights_per_direction >= 4;
  s.projected = p.weights_per_direction % 2 == 1;
  STD_TORCH_CHECK(s.projected || s.state == s.hidden, "h0 must have size ", s.hidden, " in its last dimension, got ", s.state);
  if (batch_sizes) {
    CHECK_DIM(x, 2);
    const Tensor& sizes = *batch_sizes;
    CHECK_CPU(sizes);
    CHECK_DIM(sizes, 1);
    CHECK_DTYPE_IS(sizes, ScalarType::Long);
    s.steps = sizes.size(0), s.tokens = x.size(0), s.input = x.size(1);
    for (int64_t t = 0; t < s.steps; ++t) p.batch_sizes.push_back(data<int64_t>(sizes)[t * sizes.stride(0)]);
  } else {
    CHECK_DIM(x, 3);
    STD_TORCH_CHECK(x.size(1) == s.batch, "x must have ", s.batch, " sequences, as c0 has, got ", x.size(1));
    s.steps = x.size(0), s.tokens = x.size(0) * x.size(1), s.input = x.size(2);
    p.batch_sizes.assign(s.steps, s.batch);
  }
  int64_t offset = 0, previous = s.batch;
  p.lengths.assign(s.batch, 0);
  for (int64_t t = 0; t < s.steps; ++t) {
    const int64_t size = p.batch_sizes[t];
    STD_TORCH_CHECK(size >= 0 && size <= previous, "batch_sizes must not increase and stay within the batch of ", s.batch, ", got ", size,
                    " after ", previous);
    for (int64_t row = size; row < previous; ++row) p.lengths[row] = t;
    p.offsets.push_back(offset);
    offset += size;
    previous = size;
  }
  for (int64_t row = 0; row < previous; ++row) p.lengths[row] = s.steps;
  STD_TORCH_CHECK(offset == s.tokens, "batch_sizes must add up to the ", s.tokens, " rows of x, got ", offset);
  s.batch_sizes = p.batch_sizes.data(), s.offsets = p.offsets.data(), s.lengths = p.lengths.data();
  if (dropout_mask) {
    const Tensor& mask = *dropout_mask;
    CHECK_SHAPE(mask, num_layers - 1, s.tokens, s.width());
    CHECK_SAME_DTYPE(mask, x);
    CHECK_CONTIGUOUS(mask);
  }
  for (const Tensor* t : {&x, &h0, &c0}) {
    CHECK_CPU(*t);
    CHECK_SAME_DTYPE(*t, x);
    CHECK_CONTIGUOUS(*t);
  }
  for (int64_t cell = 0; cell < cells; ++cell) {
    const Tensor* w = &weights[cell * p.weights_per_direction];
    const int64_t input = p.of_layer(cell / s.directions).input;
    CHECK_SHAPE(w[0], s.gates(), input);
    CHECK_SHAPE(w[1], s.gates(), s.state);
    if (p.biases) CHECK_SHAPE(w[2], s.gates());
    if (p.biases) CHECK_SHAPE(w[3], s.gates());
    if (s.projected) CHECK_SHAPE(w[p.weights_per_direction - 1], s.state, s.hidden);
    for (size_t i = 0; i < p.weights_per_direction; ++i) {
      CHECK_CPU(w[i]);
      CHECK_SAME_DTYPE(w[i], x);
      CHECK_CONTIGUOUS(w[i]);
    }
  }
  return p;
}

template <class S, class Pointer>
LstmWeights<S> weights_of(const Problem& p, int64_t cell, const Pointer& pointer) {
  const size_t first = cell * p.weights_per_direction, last = first + p.weights_per_direction - 1;
  return {pointer(first), pointer(first + 1), p.biases ? pointer(first + 2) : nullptr, p.biases ? pointer(first + 3) : nullptr,
          p.shape.projected ? pointer(last) : nullptr};
}

template <class S>
void run_forward(const Problem& p, const Tensor& x, const Tensor& h0, const Tensor& c0, const std::vector<Tensor>& weights,
                 const std::optional<Tensor>& dropout_mask, Tensor& output, Tensor& h_n, Tensor& c_n, Tensor& gates, Tensor& states,
                 Tensor& hidden, bool save) {
  using T = any_isa::compute_t<S>;
  const LstmShape& s = p.shape;
  const int64_t size = s.tokens * s.width();
  Scratch<S> between(save ? 0 : std::min<int64_t>(p.layers - 1, 2) * size), dropped(dropout_mask ? size : 0);
  const S* input = data<S>(x);
  for (int64_t l = 0; l < p.layers; ++l) {
    const int64_t cell = l * s.directions;
    LstmForward<S, T> layer{};
    for (int64_t d = 0; d < s.directions; ++d)
      layer.weights[d] = weights_of<const S>(p, cell + d, [&](size_t i) { return data<S>(weights[i]); });
    layer.x = input;
    layer.h0 = data<S>(h0) + cell * s.batch * s.state;
    layer.c0 = data<S>(c0) + cell * s.batch * s.hidden;
    layer.output = l + 1 == p.layers ? mutable_data<S>(output) : save ? mutable_data<S>(hidden) + l * size : between + (l % 2) * size;
    layer.h_n = mutable_data<S>(h_n) + cell * s.batch * s.state;
    layer.c_n = mutable_data<S>(c_n) + cell * s.batch * s.hidden;
    layer.gates = save ? mutable_data<T>(gates) + cell * s.tokens * s.gates() : nullptr;
    layer.cells = save ? mutable_data<T>(states) + cell * s.tokens * s.hidden : nullptr;
    ISA_CALL(lstm_layer_forward<S>, p.of_layer(l), layer);
    input = layer.output;
    if (dropout_mask && l + 1 < p.layers) {
      ISA_CALL(multiply, dropped.get(), input, data<S>(*dropout_mask) + l * size, size);
      input = dropped;
    }
  }
}

template <class S>
void run_backward(const Problem& p, const std::optional<Tensor>& d_output, const std::optional<Tensor>& d_h_n,
                  const std::optional<Tensor>& d_c_n, const Tensor& output, const Tensor& gates, const Tensor& states, const Tensor& hidden,
                  const Tensor& x, const Tensor& h0, const Tensor& c0, const std::vector<Tensor>& weights,
                  const std::optional<Tensor>& dropout_mask, bool need_d_x, Tensor& d_x, Tensor& d_h0, Tensor& d_c0,
                  std::vector<Tensor>& d_weights) {
  using T = any_isa::compute_t<S>;
  const LstmShape& s = p.shape;
  const int64_t size = s.tokens * s.width();
  constexpr bool same = std::is_same_v<S, T>;
  // Gradients of the outputs of two layers: the one above, and the one whose input it was.
  Scratch<T> buffers(2 * size), bottom(need_d_x && !same ? x.numel() : 0);
  Scratch<S> dropped(dropout_mask ? size : 0);
  const T* d_above = buffers;
  if (!d_output)
    std::fill_n(buffers.get(), size, T(0));
  else if constexpr (same)
    d_above = data<S>(*d_output);
  else
    ISA_CALL(convert, buffers.get(), data<S>(*d_output), size);
  for (int64_t l = p.layers - 1; l >= 0; --l) {
    const int64_t cell = l * s.directions;
    T* d_below = buffers + (p.layers - l) % 2 * size;
    const S* mask = dropout_mask && l > 0 ? data<S>(*dropout_mask) + (l - 1) * size : nullptr;
    const auto states_of = [&](const std::optional<Tensor>& t, int64_t n) { return t ? data<S>(*t) + cell * s.batch * n : nullptr; };
    LstmBackward<S, T> layer{};
    for (int64_t d = 0; d < s.directions; ++d) {
      layer.weights[d] = weights_of<const S>(p, cell + d, [&](size_t i) { return data<S>(weights[i]); });
      if (!d_weights.empty()) layer.d_weights[d] = weights_of<S>(p, cell + d, [&](size_t i) { return mutable_data<S>(d_weights[i]); });
    }
    layer.x = l > 0 ? data<S>(hidden) + (l - 1) * size : data<S>(x);
    if (mask) {
      ISA_CALL(multiply, dropped.get(), layer.x, mask, size);
      layer.x = dropped;
    }
    layer.h0 = states_of(h0, s.state);
    layer.c0 = states_of(c0, s.hidden);
    layer.output = l + 1 == p.layers ? data<S>(output) : data<S>(hidden) + l * size;
    layer.gates = data<T>(gates) + cell * s.tokens * s.gates();
    layer.cells = data<T>(states) + cell * s.tokens * s.hidden;
    layer.d_output = d_above;
    layer.d_h_n = states_of(d_h_n, s.state);
    layer.d_c_n = states_of(d_c_n, s.hidden);
    if constexpr (same)
      layer.d_x = l > 0 ? d_below : need_d_x ? mutable_data<S>(d_x) : nullptr;
    else
      layer.d_x = l > 0 ? d_below : need_d_x ? bottom.get() : nullptr;
    layer.d_h0 = mutable_data<S>(d_h0) + cell * s.batch * s.state;
    layer.d_c0 = mutable_data<S>(d_c0) + cell * s.batch * s.hidden;
    ISA_CALL(lstm_layer_backward<S>, p.of_layer(l), layer);
    if (mask) ISA_CALL(multiply, d_below, d_below, mask, size);
    d_above = d_below;
  }
  if constexpr (!same)
    if (need_d_x) ISA_CALL(convert, mutable_data<S>(d_x), bottom.get(), x.numel());
}

}  // namespace

void lstm_cell_step(ScalarType dtype, const LstmCell& cell) {
  const int64_t offset = 0;
  const std::vector<int64_t> lengths(cell.batch, 1);
  LstmShape shape{};
  shape.steps = shape.directions = 1;
  shape.batch = shape.tokens = cell.batch;
  shape.input = cell.input;
  shape.hidden = shape.state = cell.hidden;
  shape.batch_sizes = &cell.batch, shape.offsets = &offset, shape.lengths = lengths.data();
  DISPATCH_FLOATING(dtype, "lstm_cell", [&] {
    using S = scalar_t;
    const auto in = [](const void* p) { return static_cast<const S*>(p); };
    LstmForward<S, any_isa::compute_t<S>> layer{};
    layer.weights[0] = {in(cell.w_ih), in(cell.w_hh), in(cell.b_ih), in(cell.b_hh), nullptr};
    layer.x = in(cell.x), layer.h0 = in(cell.h), layer.c0 = in(cell.c);
    layer.output = layer.h_n = static_cast<S*>(cell.h_new);
    layer.c_n = static_cast<S*>(cell.c_new);
    ISA_CALL(lstm_layer_forward<S>, shape, layer);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_fwd(const Tensor& x, const Tensor& h0, const Tensor& c0,
                                                                    const std::vector<Tensor>& weights,
                                                                    const std::optional<Tensor>& batch_sizes,
                                                                    const std::optional<Tensor>& dropout_mask, int64_t num_layers,
                                                                    bool bidirectional, bool save) {
  const Problem p = describe(x, h0, c0, weights, batch_sizes, dropout_mask, num_layers, bidirectional);
  const LstmShape& s = p.shape;
  const int64_t cells = p.layers * s.directions, kept = save ? cells : 0;
  Tensor output =
      batch_sizes ? new_contiguous({s.tokens, s.width()}, x.scalar_type()) : new_contiguous({s.steps, s.batch, s.width()}, x.scalar_type());
  Tensor h_n = new_like(h0), c_n = new_like(c0);
  const ScalarType dtype = compute_dtype(x.scalar_type());
  const size_t element_size = dtype == ScalarType::Double ? sizeof(double) : sizeof(float);
  Tensor gates = pooled_empty({kept, s.tokens, s.gates()}, dtype, element_size);
  Tensor states = pooled_empty({kept, s.tokens, s.hidden}, dtype, element_size);
  Tensor hidden = pooled_empty({p.layers - 1, save ? s.tokens : 0, s.width()}, x.scalar_type(),
                               x.scalar_type() == ScalarType::BFloat16 ? sizeof(bfloat16) : element_size);
  DISPATCH_FLOATING(x.scalar_type(), "lstm",
                    [&] { run_forward<scalar_t>(p, x, h0, c0, weights, dropout_mask, output, h_n, c_n, gates, states, hidden, save); });
  return {output, h_n, c_n, gates, states, hidden};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> lstm_bwd(
    const std::optional<Tensor>& d_output, const std::optional<Tensor>& d_h_n, const std::optional<Tensor>& d_c_n, const Tensor& output,
    const Tensor& gates, const Tensor& states, const Tensor& hidden, bool need_d_x, bool need_d_weights, const Tensor& x, const Tensor& h0,
    const Tensor& c0, const std::vector<Tensor>& weights, const std::optional<Tensor>& batch_sizes,
    const std::optional<Tensor>& dropout_mask, int64_t num_layers, bool bidirectional) {
  const Problem p = describe(x, h0, c0, weights, batch_sizes, dropout_mask, num_layers, bidirectional);
  const LstmShape& s = p.shape;
  const int64_t cells = p.layers * s.directions, size = s.tokens * s.width();
  CHECK_SHAPE(gates, cells, s.tokens, s.gates());
  CHECK_SHAPE(states, cells, s.tokens, s.hidden);
  CHECK_SHAPE(hidden, p.layers - 1, s.tokens, s.width());
  CHECK_SAME_DTYPE(states, gates);
  CHECK_DTYPE_IS(gates, compute_dtype(x.scalar_type()));
  STD_TORCH_CHECK(output.numel() == size, "output must have ", size, " elements, got shape ", shape_string(output));
  for (const Tensor* t : {&output, &hidden}) {
    CHECK_SAME_DTYPE(*t, x);
    CHECK_CONTIGUOUS(*t);
  }
  CHECK_CONTIGUOUS(gates);
  CHECK_CONTIGUOUS(states);
  const auto check_gradient = [&](const std::optional<Tensor>& gradient, const char* name, int64_t numel) {
    STD_TORCH_CHECK(!gradient || (gradient->is_cpu() && gradient->scalar_type() == x.scalar_type() && gradient->is_contiguous() &&
                                  gradient->numel() == numel),
                    name, " must be a contiguous CPU tensor of the dtype of x with ", numel, " elements");
  };
  check_gradient(d_output, "d_output", size);
  check_gradient(d_h_n, "d_h_n", h0.numel());
  check_gradient(d_c_n, "d_c_n", c0.numel());
  Tensor d_x = need_d_x ? new_like(x) : new_contiguous({0}, x.scalar_type());
  Tensor d_h0 = new_like(h0), d_c0 = new_like(c0);
  std::vector<Tensor> d_weights;
  if (need_d_weights)
    for (const Tensor& w : weights) d_weights.push_back(new_like(w));
  DISPATCH_FLOATING(x.scalar_type(), "lstm", [&] {
    run_backward<scalar_t>(p, d_output, d_h_n, d_c_n, output, gates, states, hidden, x, h0, c0, weights, dropout_mask, need_d_x, d_x, d_h0,
                           d_c0, d_weights);
  });
  return {d_x, d_h0, d_c0, d_weights};
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "lstm_fwd(Tensor x, Tensor h0, Tensor c0, Tensor[] weights, Tensor? batch_sizes, Tensor? dropout_mask, int num_layers, "
      "bool bidirectional, bool save) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells, Tensor hidden)");
  m.def(
      "lstm_bwd(Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, Tensor output, Tensor gates, Tensor cells, Tensor hidden, "
      "bool need_d_x, bool need_d_weights, Tensor x, Tensor h0, Tensor c0, Tensor[] weights, Tensor? batch_sizes, Tensor? dropout_mask, "
      "int num_layers, "
      "bool bidirectional) -> (Tensor d_x, Tensor d_h0, Tensor d_c0, Tensor[] d_weights)");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CPU, m) {
  m.impl("lstm_fwd", TORCH_BOX(&bmk::lstm_fwd));
  m.impl("lstm_bwd", TORCH_BOX(&bmk::lstm_bwd));
}
