// WaveNet's layer: causal dilated convolution, gate, residual and skip in one pass over time. The formula is in
// gated_conv_kernel.h.
#define KERNEL_SOURCE "gated_conv_kernel.h"
#include "gated_conv.h"

#include "for_each_isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../check.h"
#include "new_tensor.h"
#include "pooled_tensor.h"

namespace bmk {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;
using Optional = std::optional<Tensor>;

namespace {

GatedConvShape describe(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& out_weight, const Optional& out_bias,
                        const Optional& skip_weight, const Optional& skip_bias, int64_t dilation) {
  CHECK_CPU(x);
  CHECK_DIM(x, 3);
  CHECK_DIM(weight, 3);
  GatedConvShape s{};
  s.batch = x.size(0), s.channels = x.size(1), s.length = x.size(2);
  s.gates = weight.size(0) / 2, s.kernel = weight.size(2), s.dilation = dilation;
  STD_TORCH_CHECK(weight.size(0) % 2 == 0 && s.gates > 0 && s.kernel > 0 && s.channels > 0,
                  "weight must have an even number of rows and no empty dimension, got shape ", shape_string(weight));
  STD_TORCH_CHECK(dilation > 0, "dilation must be positive, got ", dilation);
  CHECK_SHAPE(weight, 2 * s.gates, s.channels, s.kernel);
  if (out_weight) {
    s.out = s.channels;
    CHECK_SHAPE(*out_weight, s.out, s.gates, 1);
  }
  if (skip_weight) {
    CHECK_DIM(*skip_weight, 3);
    s.skips = skip_weight->size(0);
    CHECK_SHAPE(*skip_weight, s.skips, s.gates, 1);
  }
  auto check_bias = [&](const Optional& t, int64_t rows, const char* name) {
    STD_TORCH_CHECK(!t || has_shape(*t, {rows}), name, " must have shape [", rows, "], got ", t ? shape_string(*t) : "");
  };
  check_bias(bias, 2 * s.gates, "bias");
  check_bias(out_bias, s.out, "out_bias");
  check_bias(skip_bias, s.skips, "skip_bias");
  for (const Optional& t : {Optional(weight), bias, out_weight, out_bias, skip_weight, skip_bias})
    if (t) {
      CHECK_CPU(*t);
      CHECK_SAME_DTYPE(*t, x);
      CHECK_CONTIGUOUS(*t);
    }
  return s;
}

template <class S>
Signal<S> signal(const Optional& t, const Tensor& like, int64_t batch, int64_t channels, int64_t length) {
  if (!t) return {};
  CHECK_CPU(*t);
  CHECK_SAME_DTYPE(*t, like);
  CHECK_SHAPE(*t, batch, channels, length);
  return {static_cast<S*>(const_cast<void*>(t->const_data_ptr())), t->stride(0), t->stride(1), t->stride(2)};
}

template <class S>
S* data(const Optional& t) {
  return t ? static_cast<S*>(const_cast<void*>(t->const_data_ptr())) : nullptr;
}

// [N, C, T]; innermost: stored as [N, T, C].
Tensor new_signal(const Tensor& like, int64_t batch, int64_t channels, int64_t length, bool innermost) {
  return (innermost ? new_channels_last : new_contiguous)({batch, channels, length}, like.scalar_type());
}

}  // namespace

// Returns (out, skip), empty where their weight is left out, and gates, empty unless `save` and in bfloat16.
std::tuple<Tensor, Tensor, Tensor> gated_conv_fwd(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& out_weight,
                                          const Optional& out_bias, const Optional& skip_weight, const Optional& skip_bias,
                                          const Optional& skip_sum, int64_t dilation, bool innermost, bool save) {
  const GatedConvShape s = describe(x, weight, bias, out_weight, out_bias, skip_weight, skip_bias, dilation);
  Tensor out = out_weight ? new_signal(x, s.batch, s.out, s.length, innermost) : new_contiguous({0}, x.scalar_type());
  Tensor skip = skip_weight ? new_signal(x, s.batch, s.skips, s.length, innermost) : new_contiguous({0}, x.scalar_type());
  const bool keep = save && x.scalar_type() == ScalarType::BFloat16;
  Tensor gates = pooled_empty({keep ? s.batch : 0, s.length, kept_row(s.gates)}, ScalarType::Half, sizeof(uint16_t));
  DISPATCH_FLOATING(x.scalar_type(), "gated_conv", [&] {
    using S = scalar_t;
    GatedConvForward<S> call{s,
                             {data<const S>(weight), data<const S>(bias), data<const S>(out_weight), data<const S>(out_bias),
                              data<const S>(skip_weight), data<const S>(skip_bias)},
                             signal<const S>(x, x, s.batch, s.channels, s.length),
                             signal<const S>(skip_sum, x, s.batch, s.skips, s.length),
                             {},
                             {},
                             keep ? static_cast<uint16_t*>(gates.mutable_data_ptr()) : nullptr};
    if (out_weight) call.out = signal<S>(out, x, s.batch, s.out, s.length);
    if (skip_weight) call.skip = signal<S>(skip, x, s.batch, s.skips, s.length);
    ISA_CALL(gated_conv_forward<S>, call);
  });
  return {out, skip, gates};
}

// Returns (d_x, d_weight, d_bias, d_out_weight, d_out_bias, d_skip_weight, d_skip_bias); empty where not wanted or left out.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_conv_bwd(
    const Optional& d_out, const Optional& d_skip, const Tensor& gates, bool need_x, bool need_weights, const Tensor& x,
    const Tensor& weight, const Optional& bias, const Optional& out_weight, const Optional& out_bias, const Optional& skip_weight,
    const Optional& skip_bias, int64_t dilation, bool innermost) {
  const GatedConvShape s = describe(x, weight, bias, out_weight, out_bias, skip_weight, skip_bias, dilation);
  if (x.scalar_type() == ScalarType::BFloat16) {
    CHECK_CPU(gates);
    CHECK_SHAPE(gates, s.batch, s.length, kept_row(s.gates));
    CHECK_CONTIGUOUS(gates);
    STD_TORCH_CHECK(gates.scalar_type() == ScalarType::Half, "gates must be float16");
  }
  const Tensor none = new_contiguous({0}, x.scalar_type());
  Tensor d_x = need_x ? new_signal(x, s.batch, s.channels, s.length, innermost) : none;
  std::vector<Tensor> gradients;
  for (const Optional& t : {Optional(weight), bias, out_weight, out_bias, skip_weight, skip_bias})
    gradients.push_back(need_weights && t ? torch::stable::empty_like(*t) : new_contiguous({0}, x.scalar_type()));
  DISPATCH_FLOATING(x.scalar_type(), "gated_conv", [&] {
    using S = scalar_t;
    auto gradient = [&](int i, const Optional& t) { return need_weights && t ? data<S>(gradients[i]) : nullptr; };
    GatedConvBackward<S> call{s,
                              {data<const S>(weight), data<const S>(bias), data<const S>(out_weight), data<const S>(out_bias),
                               data<const S>(skip_weight), data<const S>(skip_bias)},
                              signal<const S>(x, x, s.batch, s.channels, s.length),
                              signal<const S>(d_out, x, s.batch, s.out, s.length),
                              signal<const S>(d_skip, x, s.batch, s.skips, s.length),
                              static_cast<const uint16_t*>(gates.const_data_ptr()),
                              {},
                              {gradient(0, weight), gradient(1, bias), gradient(2, out_weight), gradient(3, out_bias),
                               gradient(4, skip_weight), gradient(5, skip_bias)},
                              need_weights};
    if (need_x) call.d_x = signal<S>(d_x, x, s.batch, s.channels, s.length);
    ISA_CALL(gated_conv_backward<S>, call);
  });
  return {d_x, gradients[0], gradients[1], gradients[2], gradients[3], gradients[4], gradients[5]};
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "gated_conv_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? out_weight, Tensor? out_bias, Tensor? skip_weight, "
      "Tensor? skip_bias, Tensor? skip_sum, int dilation, bool innermost, bool save) -> (Tensor out, Tensor skip, Tensor gates)");
  m.def(
      "gated_conv_bwd(Tensor? d_out, Tensor? d_skip, Tensor gates, bool need_x, bool need_weights, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? out_weight, Tensor? out_bias, Tensor? skip_weight, Tensor? skip_bias, int dilation, bool innermost) -> (Tensor d_x, "
      "Tensor d_weight, Tensor d_bias, Tensor d_out_weight, Tensor d_out_bias, Tensor d_skip_weight, Tensor d_skip_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CPU, m) {
  m.impl("gated_conv_fwd", TORCH_BOX(&bmk::gated_conv_fwd));
  m.impl("gated_conv_bwd", TORCH_BOX(&bmk::gated_conv_bwd));
}
