// Layer and RMS normalisation with the addition before it. Formula and floor: norm_kernel.h.
#define KERNEL_SOURCE "norm_kernel.h"
#include "norm.h"

#include "for_each_isa.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../check.h"
#include "new_tensor.h"

namespace bmk {

using torch::stable::Tensor;

namespace {

torch::headeronly::ScalarType statistics_dtype(const Tensor& x) {
  using torch::headeronly::ScalarType;
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

int64_t columns_of(const Tensor& t) { return t.size(t.dim() - 1); }

int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

// From one row to the next: of a matrix any; more dimensions are contiguous.
int64_t row_stride(const Tensor& t) { return t.dim() == 2 ? t.stride(0) : columns_of(t); }
int64_t row_stride(const std::optional<Tensor>& t) { return t ? row_stride(*t) : 0; }

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

void check_rows(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() > 0 && t.dim() <= kMostDims && same_shape(t, like), name, " must be on the CPU, with 1 to ",
                  kMostDims, " dimensions, and have shape ", shape_string(like), ", got ", shape_string(t));
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of x");
  STD_TORCH_CHECK(t.dim() == 2 ? t.size(1) < 2 || t.stride(1) == 1 : t.is_contiguous(), name,
                  " must have adjacent columns, and be contiguous unless it is a matrix");
}

void check_column_vector(const std::optional<Tensor>& t, const Tensor& x, const char* name) {
  if (!t) return;
  STD_TORCH_CHECK(t->is_cpu() && has_shape(*t, {columns_of(x)}) && t->scalar_type() == x.scalar_type() && t->is_contiguous(), name,
                  " must be on the CPU, contiguous, of the dtype of x and of shape [", columns_of(x), "], got ", shape_string(*t));
}

const void* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

}  // namespace

void run_norm(const NormCall& call, torch::headeronly::ScalarType dtype) {
  DISPATCH_FLOATING(dtype, "norm", [&] { ISA_CALL(norm_forward<scalar_t>, call); });
}

// Returns (y, h, mean, rstd); h is empty without a residual.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_fwd(const Tensor& x, const std::optional<Tensor>& residual,
                                                    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                                                    bool center) {
  check_rows(x, x, "x");
  if (residual) check_rows(*residual, x, "residual");
  check_column_vector(weight, x, "weight");
  check_column_vector(bias, x, "bias");
  const int64_t rows = rows_of(x), columns = columns_of(x);
  Tensor y = new_like(x), h = residual ? new_like(x) : new_contiguous({0}, x.scalar_type());
  Tensor mean = new_contiguous({rows}, statistics_dtype(x)), rstd = new_contiguous({rows}, statistics_dtype(x));
  const NormCall call{rows,
                      columns,
                      eps,
                      center,
                      x.const_data_ptr(),
                      row_stride(x),
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
  check_rows(h, h, "h");
  check_rows(dy, h, "dy");
  if (dh) check_rows(*dh, h, "dh");
  check_column_vector(weight, h, "weight");
  const int64_t rows = rows_of(h), columns = columns_of(h);
  for (const Tensor* t : {&mean, &rstd}) {
    CHECK_SHAPE(*t, rows);
    CHECK_DTYPE_IS(*t, statistics_dtype(h));
    CHECK_CONTIGUOUS(*t);
  }
  Tensor d_h = new_like(h);
  Tensor d_weight = new_contiguous({need_weight ? columns : 0}, h.scalar_type());
  Tensor d_bias = new_contiguous({need_bias ? columns : 0}, h.scalar_type());
  const NormGradientCall call{rows,
                              columns,
                              center,
                              dy.const_data_ptr(),
                              row_stride(dy),
                              data(dh),
                              row_stride(dh),
                              h.const_data_ptr(),
                              row_stride(h),
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
