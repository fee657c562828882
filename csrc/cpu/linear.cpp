// A linear layer with bias, activation and residual in one pass. Formula and floor: linear_kernel.h.
#define KERNEL_SOURCE "linear_kernel.h"
#include "linear.h"

#include "for_each_isa.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../check.h"
#include "../text.h"
#include "new_tensor.h"

namespace bmk {

using torch::stable::Tensor;

namespace {

LinearCall make_call(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                     const Text& activation, double slope, const Tensor& y, const Tensor& known) {
  CHECK_CPU(x);
  CHECK_CPU(weight);
  CHECK_DIM(x, 2);
  CHECK_DIM(weight, 2);
  CHECK_SAME_DTYPE(weight, x);
  const int64_t rows = x.size(0), in = x.size(1), out = weight.size(0);
  CHECK_SHAPE(weight, out, in);
  if (bias) {
    CHECK_SHAPE(*bias, out);
    CHECK_SAME_DTYPE(*bias, x);
    CHECK_CONTIGUOUS(*bias);
  }
  if (residual) {
    CHECK_SHAPE(*residual, rows, out);
    CHECK_SAME_DTYPE(*residual, x);
    STD_TORCH_CHECK(out < 2 || residual->stride(1) == 1, "residual must have adjacent columns");
  }
  const Activation kind = parse_activation(activation);
  STD_TORCH_CHECK(kind != Activation::tanh_sigmoid, "activation: tanh_sigmoid is for convolutions");
  return {rows,
          in,
          out,
          kind,
          slope,
          x.const_data_ptr(),
          x.stride(0),
          x.stride(1),
          weight.const_data_ptr(),
          weight.stride(0),
          weight.stride(1),
          bias ? bias->const_data_ptr() : nullptr,
          residual ? residual->const_data_ptr() : nullptr,
          residual ? residual->stride(0) : 0,
          y.mutable_data_ptr(),
          known.numel() ? known.mutable_data_ptr() : nullptr};
}

}  // namespace

void run_linear(const LinearCall& call, torch::headeronly::ScalarType dtype) {
  DISPATCH_FLOATING(dtype, "linear", [&] { ISA_CALL(linear_forward<scalar_t>, call); });
}

// Returns (y, known): what the derivative of the activation is known from, empty unless `save_known`.
std::tuple<Tensor, Tensor> linear_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                      const std::optional<Tensor>& residual, const Text& activation, double slope, bool save_known) {
  CHECK_DIM(x, 2);
  CHECK_DIM(weight, 2);
  Tensor y = new_contiguous({x.size(0), weight.size(0)}, x.scalar_type());
  Tensor known = save_known ? new_contiguous({x.size(0), weight.size(0)}, x.scalar_type()) : new_contiguous({0}, x.scalar_type());
  run_linear(make_call(x, weight, bias, residual, activation, slope, y, known), x.scalar_type());
  return {y, known};
}

// Returns (dx, dweight, dbias); those that are not wanted are empty. `known` is what linear_fwd kept, or y.
std::tuple<Tensor, Tensor, Tensor> linear_bwd(const Tensor& dy, const Tensor& known, const Tensor& x, const Tensor& weight,
                                              const Text& activation, double slope, bool need_dx, bool need_dweight,
                                              bool need_dbias) {
  const LinearCall call = make_call(x, weight, std::nullopt, std::nullopt, activation, slope, known, known);
  CHECK_SHAPE(dy, call.rows, call.out);
  CHECK_SAME_DTYPE(dy, x);
  STD_TORCH_CHECK(call.out < 2 || dy.stride(1) == 1, "dy must have adjacent columns");
  if (call.activation != Activation::none) {
    CHECK_SHAPE(known, call.rows, call.out);
    CHECK_SAME_DTYPE(known, x);
    CHECK_CONTIGUOUS(known);
  }
  Tensor dx = need_dx ? new_contiguous({call.rows, call.in}, x.scalar_type()) : new_contiguous({0}, x.scalar_type());
  Tensor dweight = need_dweight ? new_contiguous({call.out, call.in}, x.scalar_type()) : new_contiguous({0}, x.scalar_type());
  Tensor dbias = need_dbias ? new_contiguous({call.out}, x.scalar_type()) : new_contiguous({0}, x.scalar_type());
  const auto target = [](const Tensor& t, bool need) { return need ? t.mutable_data_ptr() : nullptr; };
  DISPATCH_FLOATING(x.scalar_type(), "linear", [&] {
    ISA_CALL(linear_backward<scalar_t>, call, dy.const_data_ptr(), dy.stride(0), target(dx, need_dx), target(dweight, need_dweight),
             target(dbias, need_dbias));
  });
  return {dx, dweight, dbias};
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, float slope, bool save_known) -> (Tensor y, "
      "Tensor "
      "known)");
  m.def(
      "linear_bwd(Tensor dy, Tensor known, Tensor x, Tensor weight, str activation, float slope, bool need_dx, bool need_dweight, bool "
      "need_dbias) -> "
      "(Tensor dx, Tensor dweight, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&bmk::linear_fwd));
  m.impl("linear_bwd", TORCH_BOX(&bmk::linear_bwd));
}
