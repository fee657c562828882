// Layer and RMS normalisation with the addition before it. Formula and floor: norm_kernel.h.
#define KERNEL_SOURCE "norm_kernel.h"
#include "norm.h"

#include "for_each_isa.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../check.h"

namespace bmk {

using torch::stable::Tensor;

namespace {

torch::headeronly::ScalarType statistics_dtype(const Tensor& x) {
  using torch::headeronly::ScalarType;
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_rows(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == like.size(0) && t.size(1) == like.size(1), name, " must have shape ", shape_string(like),
                  ", got ", shape_string(t));
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of x");
  STD_TORCH_CHECK(t.size(1) < 2 || t.stride(1) == 1, name, " must have adjacent columns");
}

void check_column_vector(const std::optional<Tensor>& t, const Tensor& x, const char* name) {
  if (!t) return;
  STD_TORCH_CHECK(has_shape(*t, {x.size(1)}) && t->scalar_type() == x.scalar_type() && t->is_contiguous(), name,
                  " must be contiguous, of the dtype of x and of shape [", x.size(1), "], got ", shape_string(*t));
}

const void* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }
int64_t row_stride(const std::optional<Tensor>& t) { return t ? t->stride(0) : 0; }

}  // namespace

void run_norm(const NormCall& call, torch::headeronly::ScalarType dtype) {
  DISPATCH_FLOATING(dtype, "norm", [&] { ISA_CALL(norm_forward<scalar_t>, call); });
}

// Returns (y, h, mean, rstd); h is empty without a residual.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_fwd(const Tensor& x, const std::optional<Tensor>& residual,
                                                    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                                                    bool center) {
  CHECK_CPU(x);
  CHECK_DIM(x, 2);
  check_rows(x, x, "x");
  if (residual) check_rows(*residual, x, "residual");
  check_column_vector(weight, x, "weight");
  check_column_vector(bias, x, "bias");
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor y = torch::stable::new_empty(x, {rows, columns});
  Tensor h = residual ? torch::stable::new_empty(x, {rows, columns}) : torch::stable::new_empty(x, {0});
  Tensor mean = torch::stable::new_empty(x, {rows}, statistics_dtype(x)), rstd = torch::stable::new_empty(x, {rows}, statistics_dtype(x));
  const NormCall call{rows,
                      columns,
                      eps,
                      center,
                      x.const_data_ptr(),
                      x.stride(0),
                      data(residual),
                      row_stride(residual),
                      data(weight),
                      data(bias),
                      y.mutable_data_ptr(),
                      residual ? h.mutable_data_ptr() : nullptr,
                      mean.mutable_data_ptr(),
                      rstd.mutable_data_ptr()};
  run_norm(call, x.scalar_type());
  return {y, h, mean, rstd};
}

// Returns (d_h, d_weight, d_bias); those that are not wanted are empty.
std::tuple<Tensor, Tensor, Tensor> norm_bwd(const Tensor& dy, const std::optional<Tensor>& dh, const Tensor& h, const Tensor& mean,
                                            const Tensor& rstd, const std::optional<Tensor>& weight, bool center, bool need_weight,
                                            bool need_bias) {
  CHECK_CPU(h);
  CHECK_DIM(h, 2);
  check_rows(h, h, "h");
  check_rows(dy, h, "dy");
  if (dh) check_rows(*dh, h, "dh");
  check_column_vector(weight, h, "weight");
  const int64_t rows = h.size(0), columns = h.size(1);
  for (const Tensor* t : {&mean, &rstd}) {
    CHECK_SHAPE(*t, rows);
    CHECK_DTYPE_IS(*t, statistics_dtype(h));
    CHECK_CONTIGUOUS(*t);
  }
  Tensor d_h = torch::stable::new_empty(h, {rows, columns});
  Tensor d_weight = torch::stable::new_empty(h, {need_weight ? columns : 0});
  Tensor d_bias = torch::stable::new_empty(h, {need_bias ? columns : 0});
  const NormGradientCall call{rows,
                              columns,
                              center,
                              dy.const_data_ptr(),
                              dy.stride(0),
                              data(dh),
                              row_stride(dh),
                              h.const_data_ptr(),
                              h.stride(0),
                              mean.const_data_ptr(),
                              rstd.const_data_ptr(),
                              data(weight),
                              d_h.mutable_data_ptr(),
                              need_weight ? d_weight.mutable_data_ptr() : nullptr,
                              need_bias ? d_bias.mutable_data_ptr() : nullptr};
  DISPATCH_FLOATING(h.scalar_type(), "norm", [&] { ISA_CALL(norm_backward<scalar_t>, call); });
  return {d_h, d_weight, d_bias};
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool center) -> "
      "(Tensor y, Tensor h, Tensor mean, Tensor rstd)");
  m.def(
      "norm_bwd(Tensor dy, Tensor? dh, Tensor h, Tensor mean, Tensor rstd, Tensor? weight, bool center, bool need_weight, bool need_bias) "
      "-> (Tensor d_h, Tensor d_weight, Tensor d_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CPU, m) {
  m.impl("norm_fwd", TORCH_BOX(&bmk::norm_fwd));
  m.impl("norm_bwd", TORCH_BOX(&bmk::norm_bwd));
}
