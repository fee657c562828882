// One time step of a causal convolution that streams, in one call. The formula is in conv_step_kernel.h.
#define KERNEL_SOURCE "conv_step_kernel.h"
#include "conv_step.h"

#include "conv_arguments.h"
#include "for_each_isa.h"

#include <torch/csrc/stable/library.h>

#include "new_tensor.h"

namespace bmk {

using Optional = std::optional<Tensor>;

// Writes x_t into the ring and advances the position; returns (y, skip), skip empty without skip_weight.
std::tuple<Tensor, Tensor> conv_step_fwd(const Tensor& x, Tensor ring, Tensor position, const Tensor& weight, const Optional& bias,
                                         const Optional& out_weight, const Optional& out_bias, const Optional& skip_weight,
                                         const Optional& skip_bias, const Optional& skip_sum, int64_t dilation, int64_t groups,
                                         const Text& activation, double slope) {
  CHECK_DIM(x, 2);
  CHECK_DIM(weight, 3);
  const int64_t batch = x.size(0), channels = x.size(1), rows = weight.size(0), kernel = weight.size(2);
  STD_TORCH_CHECK(groups > 0 && dilation > 0 && kernel > 0 && channels % groups == 0 && rows % groups == 0,
                  "groups, dilation and the kernel must be positive and groups divide the channels, got ", groups, ", ", dilation, ", ",
                  kernel);
  CHECK_SHAPE(weight, rows, channels / groups, kernel);
  const int64_t delay = dilation * (kernel - 1);
  CHECK_SHAPE(ring, batch, delay, channels);
  CHECK_SHAPE(position, 1);
  CHECK_DTYPE_IS(position, torch::headeronly::ScalarType::Long);
  const Activation kind = parse_activation(activation);
  STD_TORCH_CHECK(kind != Activation::tanh_sigmoid || rows % 2 == 0, "weight must have an even number of rows for a gate, got ", rows);
  const int64_t values = kind == Activation::tanh_sigmoid ? rows / 2 : rows;
  int64_t out = 0, skips = 0;
  if (out_weight) {
    out = channels;
    CHECK_SHAPE(*out_weight, out, values, 1);
  }
  if (skip_weight) {
    CHECK_DIM(*skip_weight, 3);
    skips = skip_weight->size(0);
    CHECK_SHAPE(*skip_weight, skips, values, 1);
  }
  auto check = [&](const Optional& t, std::initializer_list<int64_t> shape, const char* name) {
    STD_TORCH_CHECK(!t || has_shape(*t, shape), name, " must have shape ", shape_string(shape), ", got ", t ? shape_string(*t) : "");
  };
  check(bias, {rows}, "bias");
  check(out_bias, {out}, "out_bias");
  check(skip_bias, {skips}, "skip_bias");
  check(skip_sum, {batch, skips}, "skip");
  CHECK_CPU(position);
  CHECK_CPU(x);
  for (const Tensor* t : {static_cast<const Tensor*>(&ring), &weight}) {
    CHECK_CPU(*t);
    CHECK_SAME_DTYPE(*t, x);
    CHECK_CONTIGUOUS(*t);
  }
  for (const Optional* t : {&bias, &out_weight, &out_bias, &skip_weight, &skip_bias, &skip_sum})
    if (*t) {
      CHECK_CPU(**t);
      CHECK_SAME_DTYPE(**t, x);
      CHECK_CONTIGUOUS(**t);
    }
  int64_t* step = static_cast<int64_t*>(position.mutable_data_ptr());
  STD_TORCH_CHECK(*step >= 0, "position must not be negative, got ", *step);
  Tensor y = new_contiguous({batch, out_weight ? out : values}, x.scalar_type());
  Tensor skip = skip_weight ? new_contiguous({batch, skips}, x.scalar_type()) : new_contiguous({0}, x.scalar_type());
  DISPATCH_FLOATING(x.scalar_type(), "conv_step", [&] {
    using S = scalar_t;
    auto pointer = [](const Optional& t) { return static_cast<const S*>(data(t)); };
    const ConvStep<S> call{batch,
                           channels,
                           rows,
                           kernel,
                           dilation,
                           groups,
                           out,
                           skips,
                           kind,
                           slope,
                           static_cast<const S*>(x.const_data_ptr()),
                           x.stride(0),
                           x.stride(1),
                           static_cast<S*>(ring.mutable_data_ptr()),
                           *step,
                           static_cast<const S*>(weight.const_data_ptr()),
                           pointer(bias),
                           pointer(out_weight),
                           pointer(out_bias),
                           pointer(skip_weight),
                           pointer(skip_bias),
                           pointer(skip_sum),
                           static_cast<S*>(y.mutable_data_ptr()),
                           static_cast<S*>(skip.mutable_data_ptr())};
    ISA_CALL(conv_step<S>, call);
  });
  *step += 1;
  return {y, skip};
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "conv_step_fwd(Tensor x_t, Tensor(a!) ring, Tensor(b!) position, Tensor weight, Tensor? bias, Tensor? out_weight, Tensor? out_bias, "
      "Tensor? skip_weight, Tensor? skip_bias, Tensor? skip, int dilation, int groups, str activation, float slope) -> (Tensor y, Tensor "
      "skip_out)");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CPU, m) { m.impl("conv_step_fwd", TORCH_BOX(&bmk::conv_step_fwd)); }
