// Convolution and transposed convolution of one or two axes, with bias, folded norm, residual, activation and pool in one
// pass over each band of the output. The formula and the floor of each kernel are in conv_direct.h and conv_winograd.h.
#define COMPILE_CONV_PRODUCTS
#define KERNEL_SOURCE "conv_kernel.h"
#include "conv_arguments.h"

#include "for_each_isa.h"

#include <torch/csrc/stable/library.h>

namespace bmk {

namespace {

using torch::headeronly::ScalarType;
using Parameter = std::optional<Tensor>;

// What a forward keeps for conv_bwd, where that needs it: index [as out] uint8, the chosen element of each max-pool window, and pre, the
// values before the activation. Both have their channels innermost.
struct Saved {
  Tensor index, pre;
};

Tensor run(const ConvCall& call, const Tensor& x, const Tensor& weight, const Parameter& bias, const Parameter& scale,
           const Parameter& shift, const Parameter& residual, double slope, Saved* saved) {
  call.check_channels(bias, x, "bias");
  call.check_channels(scale, x, "scale");
  call.check_channels(shift, x, "shift");
  if (residual) {
    ConvCall::check_shape(*residual, call.full, "residual");
    CHECK_SAME_DTYPE(*residual, x);
  }
  Tensor out = call.channels_last ? new_channels_last(call.out_shape, x.scalar_type()) : new_contiguous(call.out_shape, x.scalar_type());
  const bool save_index = saved && call.window.kind == Pooling::max, save_pre = saved && call.saves_pre();
  if (saved) {
    saved->index = save_index ? new_channels_last(call.out_shape, ScalarType::Byte) : new_contiguous({0}, ScalarType::Byte);
    saved->pre = save_pre ? new_channels_last(call.pre_shape(), x.scalar_type()) : new_contiguous({0}, x.scalar_type());
    // Pixels that no window of the pool covers are not computed, and their gradient, which is 0, must not meet a NaN.
    if (save_pre && call.window.kind == Pooling::avg) torch::stable::zero_(saved->pre);
  }
  const ConvForward arguments{call.conv,
                              call.transposed,
                              call.window,
                              call.activation,
                              slope,
                              image(x),
                              image(weight),
                              image(residual),
                              image(out),
                              save_pre ? image(saved->pre) : AnyImage{},
                              save_index ? image(saved->index) : AnyImage{},
                              data(bias),
                              data(scale),
                              data(shift)};
  DISPATCH_FLOATING(x.scalar_type(), "conv", [&] { ISA_CALL(conv_forward<scalar_t>, arguments); });
  return out;
}

}  // namespace

Tensor conv_infer(const Tensor& x, const Tensor& weight, const Parameter& bias, const Parameter& scale, const Parameter& shift,
                  const Parameter& residual, const std::vector<int64_t>& geometry, const Text& activation, double slope) {
  return run(ConvCall(x, weight, geometry, activation), x, weight, bias, scale, shift, residual, slope, nullptr);
}

// Returns (out, index, pre), see Saved; index and pre are empty where conv_bwd does not need them.
std::tuple<Tensor, Tensor, Tensor> conv_fwd(const Tensor& x, const Tensor& weight, const Parameter& bias, const Parameter& scale,
                                            const Parameter& shift, const Parameter& residual, const std::vector<int64_t>& geometry,
                                            const Text& activation, double slope) {
  Saved saved;
  Tensor out = run(ConvCall(x, weight, geometry, activation), x, weight, bias, scale, shift, residual, slope, &saved);
  return {out, saved.index, saved.pre};
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "conv_infer(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, int[] geometry, str activation, "
      "float slope) -> Tensor");
  m.def(
      "conv_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, int[] geometry, str activation, "
      "float slope) -> (Tensor out, Tensor index, Tensor pre)");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CPU, m) {
  m.impl("conv_infer", TORCH_BOX(&bmk::conv_infer));
  m.impl("conv_fwd", TORCH_BOX(&bmk::conv_fwd));
}
