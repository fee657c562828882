// Softmax cross-entropy from logits. Formula and floor: cross_entropy_kernel.h.
#define KERNEL_SOURCE "cross_entropy_kernel.h"
#include "cross_entropy.h"

#include "for_each_isa.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "../check.h"
#include "../text.h"
#include "new_tensor.h"

namespace bmk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

ScalarType parts_dtype(const Tensor& logits) { return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

CrossEntropyCall make_call(const Tensor& logits, const Tensor& target, int64_t ignore_index, double smoothing, const Tensor& parts) {
  CHECK_CPU(logits);
  CHECK_CPU(target);
  CHECK_DIM(logits, 2);
  const int64_t rows = logits.size(0), columns = logits.size(1);
  STD_TORCH_CHECK(columns > 0, "logits must have classes, got shape ", shape_string(logits));
  STD_TORCH_CHECK(columns < 2 || logits.stride(1) == 1, "logits must have adjacent columns");
  CHECK_SHAPE(target, rows);
  CHECK_DTYPE_IS(target, ScalarType::Long);
  CHECK_CONTIGUOUS(target);
  CHECK_SHAPE(parts, 2, rows);
  CHECK_DTYPE_IS(parts, parts_dtype(logits));
  CHECK_CONTIGUOUS(parts);
  const int64_t* targets = static_cast<const int64_t*>(target.const_data_ptr());
  for (int64_t r = 0; r < rows; ++r)
    STD_TORCH_CHECK(targets[r] == ignore_index || (targets[r] >= 0 && targets[r] < columns), "Target ", targets[r], " is out of bounds.");
  char* first = static_cast<char*>(parts.mutable_data_ptr());
  return {rows,      columns, logits.const_data_ptr(), logits.stride(0), targets, ignore_index,
          smoothing, first,   first + rows * (parts.scalar_type() == ScalarType::Double ? 8 : 4)};
}

// What the sum over rows is divided by.
double share_of(const CrossEntropyCall& call, const std::string& reduction) {
  if (reduction != "mean") return 1;
  const auto counts = [&](int64_t target) { return target != call.ignore_index; };
  return static_cast<double>(std::count_if(call.target, call.target + call.rows, counts));
}

}  // namespace

// Returns (loss, parts): the loss of every row, or one, in the dtype of the logits.
std::tuple<Tensor, Tensor> cross_entropy_fwd(const Tensor& logits, const Tensor& target, int64_t ignore_index, double smoothing,
                                             const Text& reduction) {
  CHECK_DIM(logits, 2);
  const int64_t rows = logits.size(0);
  Tensor parts = new_contiguous({2, rows}, parts_dtype(logits));
  const CrossEntropyCall call = make_call(logits, target, ignore_index, smoothing, parts);
  const bool by_row = reduction == "none";
  Tensor loss = new_contiguous({by_row ? rows : 1}, logits.scalar_type());
  DISPATCH_FLOATING(logits.scalar_type(), "cross_entropy", [&] {
    ISA_CALL(cross_entropy_forward<scalar_t>, call, by_row, share_of(call, reduction), loss.mutable_data_ptr());
  });
  return {loss, parts};
}

Tensor cross_entropy_bwd(const Tensor& d_loss, const Tensor& parts, const Tensor& logits, const Tensor& target, int64_t ignore_index,
                         double smoothing, const Text& reduction) {
  const CrossEntropyCall call = make_call(logits, target, ignore_index, smoothing, parts);
  const bool by_row = reduction == "none";
  CHECK_SHAPE(d_loss, by_row ? call.rows : 1);
  CHECK_SAME_DTYPE(d_loss, logits);
  CHECK_CONTIGUOUS(d_loss);
  Tensor d_logits = new_contiguous({call.rows, call.columns}, logits.scalar_type());
  const CrossEntropyGradientCall gradient{call, d_loss.const_data_ptr(), by_row, share_of(call, reduction), d_logits.mutable_data_ptr()};
  DISPATCH_FLOATING(logits.scalar_type(), "cross_entropy", [&] { ISA_CALL(cross_entropy_backward<scalar_t>, gradient); });
  return d_logits;
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "cross_entropy_fwd(Tensor logits, Tensor target, int ignore_index, float label_smoothing, str reduction) -> "
      "(Tensor loss, Tensor parts)");
  m.def(
      "cross_entropy_bwd(Tensor d_loss, Tensor parts, Tensor logits, Tensor target, int ignore_index, float label_smoothing, "
      "str reduction) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CPU, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&bmk::cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&bmk::cross_entropy_bwd));
}
