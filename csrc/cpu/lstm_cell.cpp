// One step of an LSTM: a sequence of length one to the kernels of lstm.cpp.
#include "lstm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../check.h"
#include "new_tensor.h"

namespace bmk {

using torch::stable::select;
using torch::stable::Tensor;
using torch::stable::unsqueeze;

namespace {

std::vector<Tensor> weight_list(const Tensor& w_ih, const Tensor& w_hh, const std::optional<Tensor>& b_ih,
                                const std::optional<Tensor>& b_hh) {
  STD_TORCH_CHECK(b_ih.has_value() == b_hh.has_value(), "b_ih and b_hh must be given both or neither");
  if (b_ih) return {w_ih, w_hh, *b_ih, *b_hh};
  return {w_ih, w_hh};
}

// [B, ..] as the one step, or the one layer, of the kernels' [1, B, ..].
Tensor one(const Tensor& t) { return unsqueeze(t, 0); }
std::optional<Tensor> one(const std::optional<Tensor>& t) { return t ? std::optional(unsqueeze(*t, 0)) : std::nullopt; }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_cell_fwd(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& w_ih,
                                                         const Tensor& w_hh, const std::optional<Tensor>& b_ih,
                                                         const std::optional<Tensor>& b_hh, bool save) {
  CHECK_DIM(x, 2);
  const auto [output, h_n, c_n, gates, cells, hidden] =
      lstm_fwd(one(x), one(h), one(c), weight_list(w_ih, w_hh, b_ih, b_hh), std::nullopt, std::nullopt, 1, false, save);
  return {select(h_n, 0, 0), select(c_n, 0, 0), gates, cells};
}

// The forward where nothing is kept for a backward, without the tensors that a whole sequence would need. (h, c) after the step.
std::tuple<Tensor, Tensor> lstm_cell_infer(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& w_ih, const Tensor& w_hh,
                                           const std::optional<Tensor>& b_ih, const std::optional<Tensor>& b_hh) {
  CHECK_DIM(x, 2);
  CHECK_DIM(h, 2);
  const int64_t batch = x.size(0), input = x.size(1), hidden = h.size(1);
  CHECK_SHAPE(h, batch, hidden);
  CHECK_SHAPE(c, batch, hidden);
  CHECK_SHAPE(w_ih, 4 * hidden, input);
  CHECK_SHAPE(w_hh, 4 * hidden, hidden);
  STD_TORCH_CHECK(b_ih.has_value() == b_hh.has_value(), "b_ih and b_hh must be given both or neither");
  const auto check = [&](const Tensor& t) {
    CHECK_CPU(t);
    CHECK_SAME_DTYPE(t, x);
    CHECK_CONTIGUOUS(t);
  };
  for (const Tensor* t : {&x, &h, &c, &w_ih, &w_hh}) check(*t);
  for (const std::optional<Tensor>* b : {&b_ih, &b_hh})
    if (*b) {
      check(**b);
      CHECK_SHAPE(**b, 4 * hidden);
    }
  Tensor h_new = new_like(h), c_new = new_like(c);
  const auto pointer = [](const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; };
  lstm_cell_step(x.scalar_type(), {batch, input, hidden, x.const_data_ptr(), h.const_data_ptr(), c.const_data_ptr(), w_ih.const_data_ptr(),
                                   w_hh.const_data_ptr(), pointer(b_ih), pointer(b_hh), h_new.mutable_data_ptr(), c_new.mutable_data_ptr()});
  return {h_new, c_new};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> lstm_cell_bwd(
    const std::optional<Tensor>& d_h_new, const std::optional<Tensor>& d_c_new, const Tensor& h_new, const Tensor& gates,
    const Tensor& cells, bool need_d_x, bool need_d_weights, const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& w_ih,
    const Tensor& w_hh, const std::optional<Tensor>& b_ih, const std::optional<Tensor>& b_hh) {
  CHECK_DIM(x, 2);
  const Tensor no_hidden = new_contiguous({0, x.size(0), h.size(1)}, x.scalar_type());
  auto [d_x, d_h, d_c, d_weights] =
      lstm_bwd(one(d_h_new), std::nullopt, one(d_c_new), one(h_new), gates, cells, no_hidden, need_d_x, need_d_weights, one(x), one(h),
               one(c), weight_list(w_ih, w_hh, b_ih, b_hh), std::nullopt, std::nullopt, 1, false);
  return {need_d_x ? select(d_x, 0, 0) : d_x, select(d_h, 0, 0), select(d_c, 0, 0), d_weights};
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "lstm_cell_fwd(Tensor x, Tensor h, Tensor c, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, bool save) -> "
      "(Tensor h_new, Tensor c_new, Tensor gates, Tensor cells)");
  m.def(
      "lstm_cell_infer(Tensor x, Tensor h, Tensor c, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh) -> (Tensor h_new, Tensor c_new)");
  m.def(
      "lstm_cell_bwd(Tensor? d_h_new, Tensor? d_c_new, Tensor h_new, Tensor gates, Tensor cells, bool need_d_x, bool need_d_weights, "
      "Tensor x, Tensor h, Tensor c, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh) -> "
      "(Tensor d_x, Tensor d_h, Tensor d_c, Tensor[] d_weights)");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CPU, m) {
  m.impl("lstm_cell_fwd", TORCH_BOX(&bmk::lstm_cell_fwd));
  m.impl("lstm_cell_infer", TORCH_BOX(&bmk::lstm_cell_infer));
  m.impl("lstm_cell_bwd", TORCH_BOX(&bmk::lstm_cell_bwd));
}
