// The steps of an LSTM with layer norm, the input's part of the gates given: see norm_lstm_kernel.h.
#define KERNEL_SOURCE "norm_lstm_kernel.h"
#include "norm_lstm.h"

#include <array>

#include "for_each_isa.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../check.h"
#include "new_tensor.h"
#include "pooled_tensor.h"

namespace bmk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

template <class S>
NormLstmInputs<S> inputs(const Tensor& a, const Tensor& h0, const Tensor& c0, const Tensor& w, const Tensor& gain, const Tensor& gain_c,
                         const Tensor& bias_c) {
  const auto data = [](const Tensor& t) { return static_cast<const S*>(t.const_data_ptr()); };
  return {data(a), data(h0), data(c0), data(w), data(gain), data(gain_c), data(bias_c)};
}

NormLstmShape describe(const Tensor& a, const Tensor& h0, const Tensor& c0, const Tensor& w, const Tensor& gain, const Tensor& gain_c,
                       const Tensor& bias_c, double eps, double eps_c) {
  CHECK_DIM(a, 3);
  CHECK_DIM(h0, 2);
  const NormLstmShape shape{a.size(0), a.size(1), h0.size(1), eps, eps_c};
  STD_TORCH_CHECK(shape.steps > 0, "a must have at least one step, got shape ", shape_string(a));
  CHECK_SHAPE(a, shape.steps, shape.batch, shape.gates());
  CHECK_SHAPE(h0, shape.batch, shape.hidden);
  CHECK_SHAPE(c0, shape.batch, shape.hidden);
  CHECK_SHAPE(w, shape.gates(), shape.hidden);
  CHECK_SHAPE(gain, shape.gates());
  CHECK_SHAPE(gain_c, shape.hidden);
  CHECK_SHAPE(bias_c, shape.hidden);
  for (const Tensor* t : {&a, &h0, &c0, &w, &gain, &gain_c, &bias_c}) {
    CHECK_CPU(*t);
    CHECK_SAME_DTYPE(*t, a);
    CHECK_CONTIGUOUS(*t);
  }
  return shape;
}

ScalarType saved_dtype(const Tensor& a) { return a.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

}  // namespace

// output, h_n, c_n, and for the backward z, gates, cells, empty unless `save`.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_lstm_fwd(const Tensor& a, const Tensor& h0, const Tensor& c0,
                                                                         const Tensor& w, const Tensor& gain, const Tensor& gain_c,
                                                                         const Tensor& bias_c, double eps, double eps_c, bool save) {
  const NormLstmShape s = describe(a, h0, c0, w, gain, gain_c, bias_c, eps, eps_c);
  Tensor output = new_contiguous({s.steps, s.batch, s.hidden}, a.scalar_type());
  Tensor h_n = new_contiguous({s.batch, s.hidden}, a.scalar_type()), c_n = new_contiguous({s.batch, s.hidden}, a.scalar_type());
  const ScalarType dtype = saved_dtype(a);
  const size_t size = dtype == ScalarType::Double ? sizeof(double) : sizeof(float);
  const int64_t steps = save ? s.steps : 0;
  Tensor z = pooled_empty({steps, s.batch, s.gates()}, dtype, size), gates = pooled_empty({steps, s.batch, s.gates()}, dtype, size);
  Tensor cells = pooled_empty({steps, s.batch, s.hidden}, dtype, size);
  DISPATCH_FLOATING(a.scalar_type(), "norm_lstm", [&] {
    using S = scalar_t;
    using T = any_isa::compute_t<S>;
    const auto kept = [&](Tensor& t) { return save ? static_cast<T*>(t.mutable_data_ptr()) : nullptr; };
    const auto out = [](Tensor& t) { return static_cast<S*>(t.mutable_data_ptr()); };
    const NormLstmForward<S, T> call{
        inputs<S>(a, h0, c0, w, gain, gain_c, bias_c), out(output), out(h_n), out(c_n), kept(z), kept(gates), kept(cells)};
    ISA_CALL(norm_lstm_forward<S>, s, call);
  });
  return {output, h_n, c_n, z, gates, cells};
}

// The gradients of a, h0, c0, w, gain, gain_c, bias_c.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_lstm_bwd(
    const std::optional<Tensor>& d_output, const std::optional<Tensor>& d_h_n, const std::optional<Tensor>& d_c_n, const Tensor& output,
    const Tensor& z, const Tensor& gates, const Tensor& cells, const Tensor& a, const Tensor& h0, const Tensor& c0, const Tensor& w,
    const Tensor& gain, const Tensor& gain_c, const Tensor& bias_c, double eps, double eps_c) {
  const NormLstmShape s = describe(a, h0, c0, w, gain, gain_c, bias_c, eps, eps_c);
  CHECK_SHAPE(output, s.steps, s.batch, s.hidden);
  CHECK_SAME_DTYPE(output, a);
  CHECK_CONTIGUOUS(output);
  CHECK_SHAPE(z, s.steps, s.batch, s.gates());
  CHECK_SHAPE(gates, s.steps, s.batch, s.gates());
  CHECK_SHAPE(cells, s.steps, s.batch, s.hidden);
  for (const Tensor* t : {&z, &gates, &cells}) {
    CHECK_DTYPE_IS(*t, saved_dtype(a));
    CHECK_CONTIGUOUS(*t);
  }
  const auto check_gradient = [&](const std::optional<Tensor>& gradient, const char* name, int64_t numel) {
    STD_TORCH_CHECK(!gradient || (gradient->is_cpu() && gradient->scalar_type() == a.scalar_type() && gradient->is_contiguous() &&
                                  gradient->numel() == numel),
                    name, " must be a contiguous CPU tensor of the dtype of a with ", numel, " elements");
  };
  check_gradient(d_output, "d_output", output.numel());
  check_gradient(d_h_n, "d_h_n", h0.numel());
  check_gradient(d_c_n, "d_c_n", c0.numel());
  Tensor d_a = new_like(a), d_h0 = new_like(h0), d_c0 = new_like(c0), d_w = new_like(w);
  Tensor d_gain = new_like(gain), d_gain_c = new_like(gain_c), d_bias_c = new_like(bias_c);
  DISPATCH_FLOATING(a.scalar_type(), "norm_lstm", [&] {
    using S = scalar_t;
    using T = any_isa::compute_t<S>;
    const auto kept = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
    const auto given = [](const std::optional<Tensor>& t) { return t ? static_cast<const S*>(t->const_data_ptr()) : nullptr; };
    const auto out = [](Tensor& t) { return static_cast<S*>(t.mutable_data_ptr()); };
    const NormLstmBackward<S, T> call{inputs<S>(a, h0, c0, w, gain, gain_c, bias_c),
                                      static_cast<const S*>(output.const_data_ptr()),
                                      kept(z),
                                      kept(gates),
                                      kept(cells),
                                      given(d_output),
                                      given(d_h_n),
                                      given(d_c_n),
                                      out(d_a),
                                      out(d_h0),
                                      out(d_c0),
                                      out(d_w),
                                      out(d_gain),
                                      out(d_gain_c),
                                      out(d_bias_c)};
    ISA_CALL(norm_lstm_backward<S>, s, call);
  });
  return {d_a, d_h0, d_c0, d_w, d_gain, d_gain_c, d_bias_c};
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "norm_lstm_fwd(Tensor a, Tensor h0, Tensor c0, Tensor w, Tensor gain, Tensor gain_c, Tensor bias_c, float eps, float eps_c, bool "
      "save) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor z, Tensor gates, Tensor cells)");
  m.def(
      "norm_lstm_bwd(Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, Tensor output, Tensor z, Tensor gates, Tensor cells, Tensor a, "
      "Tensor h0, Tensor c0, Tensor w, Tensor gain, Tensor gain_c, Tensor bias_c, float eps, float eps_c) -> "
      "(Tensor d_a, Tensor d_h0, Tensor d_c0, Tensor d_w, Tensor d_gain, Tensor d_gain_c, Tensor d_bias_c)");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CPU, m) {
  m.impl("norm_lstm_fwd", TORCH_BOX(&bmk::norm_lstm_fwd));
  m.impl("norm_lstm_bwd", TORCH_BOX(&bmk::norm_lstm_bwd));
}
